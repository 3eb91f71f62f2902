//! Checks of images, and what they find and mend.

use std::fmt::Debug;

use crate::{Progress, Result};

/// A layer whose tables can be checked.
pub trait Check: Debug + Send + Sync {
    /// Looks for inconsistencies and mends what `repair` allows.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format cannot repair; errors that end the check.
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport>;
}

/// What a check may mend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    No,
    /// Space that nothing refers to.
    Leaks,
    /// All that can be.
    All,
}

/// The outcome of a check. Counters follow the original's report; what was found and done is told line by line on the
/// way, see [`Progress::note`](crate::Progress::note).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Inconsistencies that can lose data.
    pub corruptions: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
    /// Errors that kept the check from looking everywhere.
    pub check_errors: u64,
    /// Inconsistencies mended.
    pub corruptions_fixed: u64,
    /// Leaks mended.
    pub leaks_fixed: u64,
    /// Where the image ends in the file.
    pub image_end_offset: u64,
    /// How many clusters the guest's disk has.
    pub total_clusters: u64,
    /// How many of them are allocated.
    pub allocated_clusters: u64,
    /// How many of those are compressed.
    pub compressed_clusters: u64,
    /// How many of those do not follow the one before.
    pub fragmented_clusters: u64,
}
