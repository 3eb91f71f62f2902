//! Offsets of the two spaces that a layer maps between, and the numbers of clusters of the file, as types that cannot
//! be taken for each other.
//!
//! ```text
//!   GuestOffset ──► tables ──► HostOffset        a byte of the virtual disk; a byte of the file that holds it
//!                                  ║
//!                             ClusterIndex       the cluster of the file that has the byte: what refcounts count
//! ```
//!
//! Code that knows one of the spaces only, like the cache of tables and the reserved ranges, has plain numbers and
//! [`ByteRange`]s.

use std::fmt;
use std::iter::Map;
use std::marker::PhantomData;
use std::ops::Range;

use diskimage_core::{ByteRange, align_down, align_up};

/// A byte of the virtual disk.
pub(crate) type GuestOffset = Position<Guest>;

/// A byte of the file that holds the disk.
pub(crate) type HostOffset = Position<Host>;

/// A cluster of the file that holds the disk, by its number. Distances between two of them are numbers of clusters.
pub(crate) type ClusterIndex = Position<HostClusters>;

/// The virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Guest {}

/// The file that holds the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Host {}

/// The clusters of that file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum HostClusters {}

/// A space whose positions are bytes.
pub(crate) trait Bytes {}

impl Bytes for Guest {}

impl Bytes for Host {}

/// The number of a byte or a cluster in `Space`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Position<Space>(u64, PhantomData<Space>);

impl<Space: Copy> Position<Space> {
    /// The position `value`.
    pub(crate) const fn new(value: u64) -> Self {
        Self(value, PhantomData)
    }

    /// The number, for code that knows one space only.
    pub(crate) const fn get(self) -> u64 {
        self.0
    }

    /// The position `len` further on; saturates.
    #[must_use]
    pub(crate) const fn plus(self, len: u64) -> Self {
        Self::new(self.0.saturating_add(len))
    }

    /// The position `len` further on, unless that is too large a number.
    pub(crate) fn checked_plus(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(Self::new)
    }

    /// The distance from `start` to this position, which is not before it.
    pub(crate) const fn since(self, start: Self) -> u64 {
        self.0.saturating_sub(start.0)
    }

    /// The distance from the start of the unit of length `unit` that the position is in.
    pub(crate) const fn within(self, unit: u64) -> u64 {
        self.0 % unit
    }

    /// The number of the unit of length `unit` that the position is in.
    pub(crate) const fn unit(self, unit: u64) -> u64 {
        self.0 / unit
    }

    /// The end of the unit of length `unit` that the position is in; saturates.
    #[must_use]
    pub(crate) const fn unit_end(self, unit: u64) -> Self {
        Self::new((self.0 / unit + 1).saturating_mul(unit))
    }

    /// Whether the position is the start of a unit of length `unit`.
    pub(crate) const fn is_multiple_of(self, unit: u64) -> bool {
        self.0.is_multiple_of(unit)
    }

    /// The position rounded down to a multiple of `unit`.
    #[must_use]
    pub(crate) const fn align_down(self, unit: u64) -> Self {
        Self::new(align_down(self.0, unit))
    }

    /// The position rounded up to a multiple of `unit`; saturates at the largest one.
    #[must_use]
    pub(crate) const fn align_up(self, unit: u64) -> Self {
        Self::new(align_up(self.0, unit))
    }
}

impl<Space: Copy + Bytes> Position<Space> {
    /// The `len` bytes from the offset on.
    pub(crate) const fn range(self, len: u64) -> ByteRange {
        ByteRange::at(self.0, len)
    }
}

impl HostOffset {
    /// The cluster of `1 << bits` bytes that the offset is in.
    pub(crate) const fn cluster(self, bits: u32) -> ClusterIndex {
        ClusterIndex::new(self.0 >> bits)
    }

    /// The first cluster of `1 << bits` bytes that has no byte before the offset.
    pub(crate) const fn cluster_end(self, bits: u32) -> ClusterIndex {
        ClusterIndex::new(self.0.div_ceil(1 << bits))
    }
}

impl ClusterIndex {
    /// The cluster before this one; `None` for the first.
    pub(crate) fn before(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self::new)
    }

    /// The offset of the cluster, which has `1 << bits` bytes.
    pub(crate) const fn offset(self, bits: u32) -> HostOffset {
        HostOffset::new(self.0 << bits)
    }
}

/// A run of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClusterRange {
    pub(crate) start: ClusterIndex,
    /// The cluster behind the last one; not before `start`.
    pub(crate) end: ClusterIndex,
}

impl ClusterRange {
    /// The clusters from `start` up to `end`; none if `end` is before `start`.
    pub(crate) fn new(start: ClusterIndex, end: ClusterIndex) -> Self {
        Self {
            start,
            end: end.max(start),
        }
    }

    /// The `count` clusters from `start` on.
    pub(crate) const fn at(start: ClusterIndex, count: u64) -> Self {
        Self {
            start,
            end: start.plus(count),
        }
    }

    /// The clusters of `1 << bits` bytes that `range`, of the file, touches.
    pub(crate) fn touched(range: ByteRange, bits: u32) -> Self {
        let (start, end) = (HostOffset::new(range.start()), HostOffset::new(range.end()));
        Self::new(start.cluster(bits), end.cluster_end(bits))
    }

    /// The number of clusters.
    pub(crate) const fn len(self) -> u64 {
        self.end.since(self.start)
    }

    /// Whether `cluster` is in the run.
    pub(crate) fn contains(self, cluster: ClusterIndex) -> bool {
        self.start <= cluster && cluster < self.end
    }

    /// The bytes of the clusters, which have `1 << bits` bytes each.
    pub(crate) const fn bytes(self, bits: u32) -> ByteRange {
        ByteRange::new(self.start.offset(bits).get(), self.end.offset(bits).get())
    }
}

impl IntoIterator for ClusterRange {
    type Item = ClusterIndex;
    type IntoIter = Map<Range<u64>, fn(u64) -> ClusterIndex>;

    fn into_iter(self) -> Self::IntoIter {
        (self.start.0..self.end.0).map(ClusterIndex::new)
    }
}

impl<Space> fmt::Debug for Position<Space> {
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

    #[test]
    fn the_clusters_that_bytes_touch_are_a_run() {
        let range = ClusterRange::touched(ByteRange::new(0x1_ffff, 0x3_0001), 16);
        assert_eq!(range.start, ClusterIndex::new(1));
        assert_eq!(range.end, ClusterIndex::new(4));
        assert_eq!(range.len(), 3);
        assert_eq!(range.bytes(16), ByteRange::new(0x1_0000, 0x4_0000));
        assert_eq!(range.into_iter().next_back(), Some(ClusterIndex::new(3)));
        assert!(range.contains(ClusterIndex::new(3)) && !range.contains(ClusterIndex::new(4)));
        assert_eq!(
            ClusterRange::touched(ByteRange::new(0x2_0000, 0x2_0000), 16).len(),
            0
        );
    }

    #[test]
    fn a_cluster_has_an_offset() {
        let offset = HostOffset::new(0x2_0001);
        assert_eq!(offset.cluster(16), ClusterIndex::new(2));
        assert_eq!(offset.cluster_end(16), ClusterIndex::new(3));
        assert_eq!(offset.cluster(16).offset(16), HostOffset::new(0x2_0000));
    }
}
