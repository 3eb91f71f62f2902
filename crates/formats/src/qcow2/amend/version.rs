//! Rewrites the first cluster for another version, or with another name of the data file.

use diskimage_core::{Result, name};

use crate::qcow2::Qcow2;
use crate::qcow2::create::MIN_CLUSTER_FOR_NAMES;
use crate::qcow2::header::extension::kind;
use crate::qcow2::header::rewrite::FirstCluster;

impl Qcow2 {
    /// Converts the header to `version`, without optional features.
    pub(super) fn rewrite_header(&self, version: u32) -> Result<()> {
        let geometry = self.header.geometry;
        let names = version >= 3 && geometry.cluster_size() >= MIN_CLUSTER_FOR_NAMES;
        self.replace_first_cluster(|cluster| cluster.set_version(version, geometry.refcount_order, names))
    }

    /// Stores another name of the data file, without opening that file. An empty name removes the extension.
    pub(super) fn rename_data_file(&self, name: &str) -> Result<()> {
        let name = Some(name::to_bytes(name)).filter(|name| !name.is_empty());
        self.replace_first_cluster(|cluster| cluster.set_extension(kind::DATA_FILE, name.as_deref()))
    }

    fn replace_first_cluster(&self, change: impl FnOnce(&mut FirstCluster)) -> Result<()> {
        let old = self.first_cluster()?;
        let mut cluster = FirstCluster::read(&old)?;
        change(&mut cluster);
        self.write_first_cluster(&old, &cluster.to_bytes()?)?;
        self.file.flush()
    }
}
