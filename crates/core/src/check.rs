//! Checks of images, and what they find and repair.

use std::fmt::Debug;

use crate::{Progress, Result};

/// A layer whose tables can be checked.
pub trait Check: Debug + Send + Sync {
    /// Looks for inconsistencies and repairs what `repair` allows.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format cannot repair; errors that end the
    /// check.
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport>;
}

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    No,
    /// Leaked clusters, which no table refers to.
    Leaks,
    /// Leaks and corruptions.
    All,
}

/// The outcome of a check. The counters are those of `qemu-img check`; findings and repairs are reported one by one
/// while the check runs, see [`Progress::note`](crate::Progress::note).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Inconsistencies that can lose data.
    pub corruptions: u64,
    /// Allocated clusters that no table refers to.
    pub leaks: u64,
    /// Errors that prevented a part of the check.
    pub check_errors: u64,
    /// Inconsistencies that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// The host offset at which the image ends.
    pub image_end_offset: u64,
    /// Clusters of the guest disk.
    pub total_clusters: u64,
    /// How many of these are allocated.
    pub allocated_clusters: u64,
    /// How many of the allocated ones are compressed.
    pub compressed_clusters: u64,
    /// How many of the allocated ones do not follow the one before in the file.
    pub fragmented_clusters: u64,
}
