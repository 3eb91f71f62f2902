//! The details that `info` prints.

use diskimage_core::Info;

use super::VpcLayer;

impl VpcLayer {
    /// The details of the image.
    pub(super) fn collect_info(&self) -> Info {
        Info {
            cluster_size: self.granularity,
            ..Info::default()
        }
    }
}
