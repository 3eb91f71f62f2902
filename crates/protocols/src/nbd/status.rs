//! A cache of an export's block status: the last reply of the server, for calls about the following ranges.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use diskimage_core::{ByteRange, ExtentKind, Result};

use super::reply::StatusExtent;

/// The last block status that was received. It is valid until a write to the export here, and only for [`MAX_AGE`],
/// since other clients may write as well.
#[derive(Debug, Default)]
pub(super) struct StatusCache {
    /// Held while the server is asked: other threads need the same reply.
    answer: Mutex<Option<CachedStatus>>,
    /// The number of changes.
    changes: AtomicU64,
}

#[derive(Debug)]
struct CachedStatus {
    changes: u64,
    when: Instant,
    /// The flags of consecutive ranges.
    runs: Vec<(ByteRange, u64)>,
}

/// For how long a status is valid.
const MAX_AGE: Duration = Duration::from_secs(2);

impl StatusCache {
    /// Invalidates the status; called before and after each write.
    pub(super) fn invalidate(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of bytes at the start of `range` that have the same flags, and the flags. `ask` asks the server.
    pub(super) fn find(
        &self,
        range: ByteRange,
        ask: impl FnOnce() -> Result<Vec<StatusExtent>>,
    ) -> Result<(u64, u64)> {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = self.changes.load(Ordering::Acquire);
        let good = |answer: &CachedStatus| answer.changes == changes && answer.when.elapsed() < MAX_AGE;
        if let Some(found) = answer
            .as_ref()
            .filter(|answer| good(answer))
            .and_then(|answer| answer.at(range))
        {
            return Ok(found);
        }
        let when = Instant::now();
        let mut runs: Vec<(ByteRange, u64)> = Vec::new();
        let mut at = range.start();
        for StatusExtent { len, flags } in ask()? {
            let run = ByteRange::at(at, len);
            at = run.end();
            match runs.last_mut() {
                Some((last, same)) if *same == flags => *last = ByteRange::new(last.start(), run.end()),
                _ => runs.push((run, flags)),
            }
        }
        let fresh = CachedStatus { changes, when, runs };
        let found = fresh.at(range);
        *answer = Some(fresh);
        // The status of the server begins at the start of `range`.
        Ok(found.unwrap_or((range.len(), 0)))
    }
}

impl CachedStatus {
    fn at(&self, range: ByteRange) -> Option<(u64, u64)> {
        let index = self.runs.partition_point(|(run, _)| run.end() <= range.start());
        let (run, flags) = self.runs.get(index)?;
        let common = run.intersect(range);
        (common.start() == range.start() && !common.is_empty()).then_some((common.len(), *flags))
    }
}

/// The kind of bytes with these flags. As in qemu-img, the flags are read as those of `base:allocation` for any
/// context.
pub(super) fn kind_of(flags: u64) -> ExtentKind {
    const HOLE: u64 = 1 << 0;
    const ZERO: u64 = 1 << 1;
    match (flags & HOLE != 0, flags & ZERO != 0) {
        (false, false) => ExtentKind::Data,
        (false, true) => ExtentKind::PreallocatedZero,
        (true, false) => ExtentKind::UnknownHole,
        (true, true) => ExtentKind::Zero,
    }
}
