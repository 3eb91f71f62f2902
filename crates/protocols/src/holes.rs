//! A cache of the extents of a file, data or holes, that were found last.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use diskimage_core::ByteRange;

/// The extents found last, so that a scan asks the kernel once for each extent instead of once for each request. There are
/// several, since the threads of a conversion scan several parts of a file at once.
#[derive(Debug, Default)]
pub(crate) struct HoleCache {
    /// The number of changes. An extent found before the last change is invalid. Writers only increment it, so that
    /// they do not contend for the lock.
    changes: AtomicU64,
    /// The one found last comes first.
    found: Mutex<[Option<CachedExtent>; KEPT]>,
}

/// The number of extents that are kept: a few more than threads that scan one file.
const KEPT: usize = 8;

/// An extent of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedExtent {
    /// The number of changes before it was found.
    pub(crate) changes: u64,
    pub(crate) range: ByteRange,
    pub(crate) hole: bool,
    /// It is a hole with data directly behind it.
    pub(crate) before_data: bool,
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
    pub(crate) fn keep(&self, extent: CachedExtent) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.rotate_right(1);
        found[0] = Some(extent);
    }

    /// The extent that `offset` is in, if it is one of those found last.
    pub(crate) fn cached(&self, offset: u64) -> Option<CachedExtent> {
        self.find(|extent| extent.range.start() <= offset && offset < extent.range.end())
    }

    /// Whether data begins at `offset`, behind a hole that is one of the extents found last.
    pub(crate) fn begins_data(&self, offset: u64) -> bool {
        self.find(|extent| extent.before_data && extent.range.end() == offset)
            .is_some()
    }

    /// The extent found last among those that are valid and for which `matches` is true.
    fn find(&self, matches: impl Fn(&CachedExtent) -> bool) -> Option<CachedExtent> {
        let changes = self.changes();
        let found = *self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found
            .into_iter()
            .flatten()
            .find(|extent| extent.changes == changes && matches(extent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(cache: &HoleCache, start: u64, end: u64, hole: bool) -> CachedExtent {
        CachedExtent {
            changes: cache.changes(),
            range: ByteRange::new(start, end),
            hole,
            before_data: hole,
        }
    }

    #[test]
    fn extents_of_several_scans_are_kept_until_a_change() {
        let cache = HoleCache::default();
        for scan in 0..KEPT as u64 {
            let start = scan * 1000;
            cache.keep(extent(&cache, start, start + 100, scan % 2 == 0));
        }
        assert!((0..KEPT as u64).all(|scan| cache.cached(scan * 1000 + 99).is_some()));
        assert!(cache.cached(100).is_none());
        assert!(cache.begins_data(100), "behind the first hole");
        assert!(!cache.begins_data(1100), "the second is data");
        cache.keep(extent(&cache, 90_000, 90_001, true));
        assert!(cache.cached(0).is_none(), "the oldest makes room");
        cache.invalidate();
        assert!(cache.cached(90_000).is_none());
        assert!(!cache.begins_data(90_001));
    }
}
