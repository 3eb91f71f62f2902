//! The facts about an image.

use diskimage_core::{Detail, FileRole, Info, NamedFile, Result};

use super::Qcow2;
use super::encrypt::Encrypted;
use super::header::CryptMethod;
use super::header::feature::{Autoclear, Incompatible};

impl Qcow2 {
    /// The facts that `info` prints, in its order.
    pub(super) fn info_impl(&self) -> Result<Info> {
        let header = &self.header;
        let v3 = header.version >= 3;
        let mut facts = vec![
            Detail::text("compat", if v3 { "1.1" } else { "0.10" }),
            Detail::text("compression-type", header.compression.name()),
        ];
        if v3 {
            facts.push(Detail::flag("lazy-refcounts", self.is_lazy()));
        }
        if let Some(value) = self.bitmap_details()? {
            facts.push(Detail {
                name: "bitmaps",
                value,
            });
        }
        facts.push(Detail::number(
            "refcount-bits",
            1 << header.geometry.refcount_order,
        ));
        let data_file = header
            .extensions
            .data_file
            .as_ref()
            .filter(|_| self.has_data_file());
        facts.extend(data_file.map(|name| Detail::text("data-file", name.text())));
        facts.extend(self.encrypted.as_ref().map(Encrypted::details));
        if v3 {
            if self.has_data_file() {
                facts.push(Detail::flag(
                    "data-file-raw",
                    header.features.autoclear.has(Autoclear::DATA_FILE_RAW),
                ));
            }
            facts.push(Detail::flag(
                "corrupt",
                header.features.incompatible.has(Incompatible::CORRUPT),
            ));
            facts.push(Detail::flag("extended-l2", header.geometry.extended_l2));
        }
        Ok(Info {
            cluster_size: Some(header.geometry.cluster_size()),
            encrypted: header.crypt != CryptMethod::None,
            dirty: header.features.incompatible.has(Incompatible::DIRTY),
            snapshots: self
                .readable_snapshots()
                .0
                .into_iter()
                .map(|snapshot| snapshot.info)
                .collect(),
            specific: Some(facts),
            other_files: data_file
                .map(|name| NamedFile::new(FileRole::DataFile, name.text()))
                .into_iter()
                .collect(),
            ..Info::default()
        })
    }
}
