//! A cache of the extent of a file, data or hole, that was found last.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use diskimage_core::ByteRange;

/// The extent found last, so that a scan asks the kernel once for each extent instead of once for each request.
#[derive(Debug, Default)]
pub(crate) struct HoleCache {
    /// The number of changes. An extent found before the last change is invalid. Writers only increment it, so that
    /// they do not contend for the lock.
    changes: AtomicU64,
    last: Mutex<Option<CachedExtent>>,
}

/// An extent of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedExtent {
    /// The number of changes before it was found.
    pub(crate) changes: u64,
    pub(crate) range: ByteRange,
    pub(crate) hole: bool,
}

impl HoleCache {
    /// Invalidates the extent; called after every change.
    pub(crate) fn invalidate(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// The number of changes so far.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Keeps an extent until the next change.
    pub(crate) fn keep(&self, found: CachedExtent) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }

    /// The extent that `offset` is in, if that is the one found last.
    pub(crate) fn cached(&self, offset: u64) -> Option<CachedExtent> {
        let last = (*self.last.lock().unwrap_or_else(PoisonError::into_inner))?;
        let fresh = last.changes == self.changes();
        (fresh && last.range.start() <= offset && offset < last.range.end()).then_some(last)
    }
}
