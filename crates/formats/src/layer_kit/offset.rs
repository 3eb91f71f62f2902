//! Offsets of the two spaces that a layer maps between, as types that cannot be taken for each other.
//!
//! ```text
//!   GuestOffset ──► tables ──► HostOffset        a byte of the virtual disk; a byte of the file that holds it
//! ```
//!
//! Code that knows one of the spaces only, like the cache of tables and the reserved ranges, has plain numbers and
//! [`ByteRange`]s.

use std::fmt;
use std::marker::PhantomData;

use diskimage_core::{ByteRange, align_down, align_up};

/// A byte of the virtual disk.
pub(crate) type GuestOffset = Offset<Guest>;

/// A byte of the file that holds the disk.
pub(crate) type HostOffset = Offset<Host>;

/// The virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Guest {}

/// The file that holds the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Host {}

/// A byte offset in `Space`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Offset<Space>(u64, PhantomData<Space>);

impl<Space: Copy> Offset<Space> {
    /// The offset `value`.
    pub(crate) const fn new(value: u64) -> Self {
        Self(value, PhantomData)
    }

    /// The number, for code that knows one space only.
    pub(crate) const fn get(self) -> u64 {
        self.0
    }

    /// The offset `len` bytes further on; saturates.
    #[must_use]
    pub(crate) const fn plus(self, len: u64) -> Self {
        Self::new(self.0.saturating_add(len))
    }

    /// The offset `len` bytes further on, unless that is too large a number.
    pub(crate) fn checked_plus(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(Self::new)
    }

    /// The bytes from `start` to this offset, which is not before it.
    pub(crate) const fn since(self, start: Self) -> u64 {
        self.0.saturating_sub(start.0)
    }

    /// The bytes from the start of the unit of `unit` bytes that the offset is in.
    pub(crate) const fn within(self, unit: u64) -> u64 {
        self.0 % unit
    }

    /// The number of the unit of `unit` bytes that the offset is in.
    pub(crate) const fn unit(self, unit: u64) -> u64 {
        self.0 / unit
    }

    /// The end of the unit of `unit` bytes that the offset is in; saturates.
    #[must_use]
    pub(crate) const fn unit_end(self, unit: u64) -> Self {
        Self::new((self.0 / unit + 1).saturating_mul(unit))
    }

    /// Whether the offset is that of a unit of `unit` bytes.
    pub(crate) const fn is_multiple_of(self, unit: u64) -> bool {
        self.0.is_multiple_of(unit)
    }

    /// The offset rounded down to a multiple of `unit`.
    #[must_use]
    pub(crate) const fn align_down(self, unit: u64) -> Self {
        Self::new(align_down(self.0, unit))
    }

    /// The offset rounded up to a multiple of `unit`; saturates at the largest one.
    #[must_use]
    pub(crate) const fn align_up(self, unit: u64) -> Self {
        Self::new(align_up(self.0, unit))
    }

    /// The `len` bytes from the offset on.
    pub(crate) const fn range(self, len: u64) -> ByteRange {
        ByteRange::at(self.0, len)
    }
}

impl<Space> fmt::Debug for Offset<Space> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arithmetic_saturates() {
        let last = GuestOffset::new(u64::MAX - 1);
        assert_eq!(last.plus(5), GuestOffset::new(u64::MAX));
        assert_eq!(last.unit_end(4096), GuestOffset::new(u64::MAX));
        assert_eq!(last.checked_plus(5), None);
        assert_eq!(GuestOffset::new(5).since(GuestOffset::new(7)), 0);
    }

    #[test]
    fn an_offset_is_in_a_unit() {
        let offset = HostOffset::new(4100);
        assert_eq!(offset.unit(512), 8);
        assert_eq!(offset.within(512), 4);
        assert_eq!(offset.unit_end(512), HostOffset::new(4608));
        assert_eq!(offset.range(10), ByteRange::new(4100, 4110));
    }
}
