//! The details that `info` prints.

use diskimage_core::Info;

use super::VhdxLayer;

impl VhdxLayer {
    /// The details of the image.
    pub(super) fn collect_info(&self) -> Info {
        Info {
            cluster_size: Some(self.block_size),
            ..Info::default()
        }
    }
}
