//! How operations tell how far they are.

use std::fmt;

/// A callback that takes how much of how much is done; the unit is the operation's own.
#[derive(Clone, Copy)]
pub struct Progress<'a> {
    report: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

impl<'a> Progress<'a> {
    /// Reports to `report`, which may be called from any thread.
    pub fn new(report: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        Self { report: Some(report) }
    }

    /// Reports to nobody.
    pub const fn none() -> Self {
        Self { report: None }
    }

    /// Tells that `done` of `total` is done.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(report) = self.report {
            report(done, total);
        }
    }
}

impl fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress")
            .field("reports", &self.report.is_some())
            .finish()
    }
}
