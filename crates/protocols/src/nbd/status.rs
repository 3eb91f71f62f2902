//! What is known of an export's allocation: the last answer of the server, for the questions about what follows.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use diskimage_core::{ByteRange, ExtentKind, Result};

use super::reply::StatusExtent;

/// The last answer to a question about allocation. It is good until somebody writes here, and only for a moment, since
/// others may write as well.
#[derive(Debug, Default)]
pub(super) struct StatusCache {
    /// Held while the server is asked: the others want the same answer.
    answer: Mutex<Option<CachedStatus>>,
    /// How many changes there were.
    changes: AtomicU64,
}

#[derive(Debug)]
struct CachedStatus {
    changes: u64,
    when: Instant,
    /// What the bytes are, from `start` on and in order.
    runs: Vec<(ByteRange, u64)>,
}

/// For how long an answer is good.
const MAX_AGE: Duration = Duration::from_secs(2);

impl StatusCache {
    /// The bytes of the export change, or have changed.
    pub(super) fn invalidate(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The flags of the bytes at the start of `range`, and how far they hold; `ask` asks the server.
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
        // The server's answer begins where the question does.
        Ok(found.unwrap_or((range.len(), 0)))
    }
}

impl CachedStatus {
    fn at(&self, range: ByteRange) -> Option<(u64, u64)> {
        let index = self.runs.partition_point(|(run, _)| run.end() <= range.start());
        let (run, flags) = self.runs.get(index)?;
        let there = run.intersect(range);
        (there.start() == range.start() && !there.is_empty()).then_some((there.len(), *flags))
    }
}

/// What bytes with these flags are, as the original understands them, whatever the context means by them.
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
