//! Ranges of bytes and the arithmetic of alignment.

use std::fmt;

use crate::{Error, ErrorKind, Result};

/// A half-open range of byte offsets, never inverted.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The bytes from `start` up to but not including `end`; empty if `end` is not larger.
    pub const fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            end: if end > start { end } else { start },
        }
    }

    /// `len` bytes from `start` on; the end saturates at `u64::MAX`.
    pub const fn at(start: u64, len: u64) -> Self {
        Self {
            start,
            end: start.saturating_add(len),
        }
    }

    /// The offset of the first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The offset after the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the length is 0.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The intersection of both ranges.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Whether both ranges have a byte in common.
    pub fn overlaps(self, other: Self) -> bool {
        !self.intersect(other).is_empty()
    }

    /// The smallest range with both ends on multiples of `unit` that contains this one. `unit` is not zero.
    #[must_use]
    pub fn align_out(self, unit: u64) -> Self {
        Self::new(align_down(self.start, unit), align_up(self.end, unit))
    }

    /// The largest range with both ends on multiples of `unit` inside this one; empty if there is none.
    #[must_use]
    pub fn align_in(self, unit: u64) -> Self {
        Self::new(align_up(self.start, unit), align_down(self.end, unit))
    }

    /// The indices of the units of `unit` bytes that overlap the range. `unit` is not zero.
    pub fn units(self, unit: u64) -> std::ops::Range<u64> {
        self.start / unit..self.end.div_ceil(unit)
    }

    /// The first `len` bytes, or all if there are fewer.
    #[must_use]
    pub fn first(self, len: u64) -> Self {
        Self::new(self.start, self.start.saturating_add(len).min(self.end))
    }

    /// The rest after the first `len` bytes.
    #[must_use]
    pub fn skip(self, len: u64) -> Self {
        Self::new(self.start.saturating_add(len).min(self.end), self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// `value` rounded down to a multiple of `unit`, which is not zero.
pub const fn align_down(value: u64, unit: u64) -> u64 {
    value - value % unit
}

/// `value` rounded up to a multiple of `unit`, which is not zero; saturates at the largest multiple.
pub const fn align_up(value: u64, unit: u64) -> u64 {
    match value % unit {
        0 => value,
        rest => match value.checked_add(unit - rest) {
            Some(up) => up,
            None => align_down(u64::MAX, unit),
        },
    }
}

/// `value`, a length in memory or an index into a slice, as `usize`.
///
/// # Errors
/// [`ErrorKind::Limit`] if the address space is too small for it.
pub fn to_index(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::new(ErrorKind::Limit, "Cannot allocate memory"))
}

/// `value` as a number of bytes or things in memory, or the largest such number: for a value that is limited by a length
/// in memory afterwards.
pub fn saturating_index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// `value` as a number of 32 bits, or the largest such number: for a value whose limit is below that, or for which the
/// largest number means at least as much.
pub fn saturating_u32(value: impl TryInto<u32>) -> u32 {
    value.try_into().unwrap_or(u32::MAX)
}

/// `value / unit`, rounded up. `unit` is not zero.
pub const fn div_ceil(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_invert() {
        assert!(ByteRange::new(5, 3).is_empty());
        assert_eq!(ByteRange::new(0, 10).intersect(ByteRange::new(20, 30)).len(), 0);
        assert!(ByteRange::new(1, 511).align_in(512).is_empty());
    }

    #[test]
    fn an_empty_range_overlaps_nothing() {
        let outer = ByteRange::new(0, 10);
        assert!(outer.overlaps(ByteRange::new(9, 20)));
        for empty in [0, 5, 10].map(|at| ByteRange::at(at, 0)) {
            assert!(!outer.overlaps(empty), "{empty:?}");
            assert!(!empty.overlaps(outer), "{empty:?}");
            assert!(!empty.overlaps(empty), "{empty:?}");
        }
    }

    #[test]
    fn conversions_saturate() {
        assert_eq!(saturating_index(7), 7);
        assert_eq!(saturating_u32(7_usize), 7);
        assert_eq!(saturating_u32(u64::MAX), u32::MAX);
    }

    #[test]
    fn alignment_saturates() {
        assert_eq!(align_up(u64::MAX, 512), u64::MAX - 511);
        assert_eq!(align_up(513, 512), 1024);
        assert_eq!(
            ByteRange::new(513, 1000).align_out(512),
            ByteRange::new(512, 1024)
        );
    }
}
