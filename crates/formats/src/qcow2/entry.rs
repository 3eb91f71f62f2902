//! Entries of the L1 and L2 tables.
//!
//! ```text
//!   standard    63 COPIED   62 0   61..56 0   55..9 host offset                0 reads as zero (version 3)
//!   compressed  63 0        62 1   61..x sectors - 1      x-1..0 host offset   x = 62 - (cluster_bits - 8)
//! ```
//!
//! An extended entry is followed by 64 bits: which subclusters are allocated (low half) and which read as zero.

use diskimage_core::{ByteRange, Encoded, Error, Result, saturating_u32};

use super::header::{Geometry, limit};
use crate::layer_kit::offset::{GuestOffset, HostOffset};

/// The cluster has a refcount of exactly one: it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
/// The bits of L1 and L2 entries that hold a host offset.
pub(super) const OFFSET_MASK: u64 = (limit::HOST_OFFSET - 1) & !0x1ff;

/// A decoded L2 entry. The host offset of an uncompressed cluster is aligned to clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L2Entry {
    pub(super) kind: Cluster,
    /// Whether the cluster may be written in place.
    pub(super) copied: bool,
    /// The subclusters of an extended entry; in a standard entry all subclusters are alike.
    pub(super) sub: Subclusters,
}

/// The storage of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// None; subclusters of an extended entry may still read as zeroes.
    None,
    /// A cluster at this offset; in an extended entry only allocated subclusters hold data.
    Host(HostOffset),
    /// Compressed data: its offset, and an upper bound of its length in bytes.
    Compressed { offset: HostOffset, stored: u64 },
}

/// The subclusters that are allocated and those that read as zeroes, one bit each; no subcluster is both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Subclusters {
    pub(super) allocated: u32,
    pub(super) zero: u32,
}

impl Subclusters {
    pub(super) const NONE: Self = Self {
        allocated: 0,
        zero: 0,
    };
    pub(super) const ALLOCATED: Self = Self {
        allocated: u32::MAX,
        zero: 0,
    };
    pub(super) const ZERO: Self = Self {
        allocated: 0,
        zero: u32::MAX,
    };

    /// Marks the subclusters in `mask` as allocated and not zero.
    #[must_use]
    pub(super) fn with_data(self, mask: u32) -> Self {
        Self {
            allocated: self.allocated | mask,
            zero: self.zero & !mask,
        }
    }
}

impl L2Entry {
    pub(super) const UNALLOCATED: Self = Self {
        kind: Cluster::None,
        copied: false,
        sub: Subclusters::NONE,
    };

    /// An entry for a cluster at `offset` with a refcount of one.
    pub(super) fn data(offset: HostOffset, sub: Subclusters) -> Self {
        Self {
            kind: Cluster::Host(offset),
            copied: true,
            sub,
        }
    }

    /// Decodes an entry. `has_data_file` says that clusters are in an external data file, where offset 0 is valid.
    ///
    /// # Errors
    /// Unaligned offsets, subclusters that are both allocated and zero, zero clusters in version 2.
    pub(super) fn parse(
        numbers: [u64; 2],
        geometry: Geometry,
        version: u32,
        has_data_file: bool,
    ) -> Result<Self> {
        let [standard, bitmap] = numbers;
        let copied = standard & COPIED != 0;
        if standard & COMPRESSED != 0 {
            let shift = 62 - (geometry.cluster_bits - 8);
            let offset = standard & ((1 << shift) - 1) & (limit::HOST_OFFSET - 1);
            let sectors = ((standard & (COMPRESSED - 1)) >> shift) + 1;
            if offset < geometry.cluster_size() {
                return Err(Error::corrupt(format!(
                    "Compressed cluster offset {offset:#x} lies in the header"
                )));
            }
            let kind = Cluster::Compressed {
                offset: HostOffset::new(offset),
                stored: sectors * 512 - offset % 512,
            };
            return Ok(Self {
                kind,
                copied: false,
                sub: Subclusters::ALLOCATED,
            });
        }
        let offset = standard & OFFSET_MASK;
        if !offset.is_multiple_of(geometry.cluster_size()) {
            return Err(Error::corrupt(format!(
                "Cluster allocation offset {offset:#x} unaligned"
            )));
        }
        let is_host = offset != 0 || (has_data_file && copied);
        if copied && !is_host {
            return Err(Error::corrupt(
                "Cluster allocation offset 0 with the flag of a cluster in use",
            ));
        }
        let kind = if is_host {
            Cluster::Host(HostOffset::new(offset))
        } else {
            Cluster::None
        };
        let sub = if geometry.extended_l2 {
            let (allocated, zero) = (low_half(bitmap), low_half(bitmap >> 32));
            if allocated & zero != 0 || (allocated != 0 && !is_host) {
                return Err(Error::corrupt(format!("Invalid subcluster bitmap {bitmap:#x}")));
            }
            Subclusters { allocated, zero }
        } else if standard & ZERO != 0 {
            if version < 3 {
                return Err(Error::corrupt("Zero cluster entry found in pre-v3 image"));
            }
            Subclusters::ZERO
        } else if is_host {
            Subclusters::ALLOCATED
        } else {
            Subclusters::NONE
        };
        Ok(Self { kind, copied, sub })
    }

    /// Encodes the entry: the standard entry and the subcluster bitmap.
    pub(super) fn to_numbers(self, geometry: Geometry) -> [u64; 2] {
        let copied = if self.copied { COPIED } else { 0 };
        let standard = match self.kind {
            Cluster::None => copied,
            Cluster::Host(offset) => offset.get() | copied,
            Cluster::Compressed { offset, stored } => {
                let shift = 62 - (geometry.cluster_bits - 8);
                let sectors = offset.range(stored).units(512);
                COMPRESSED | ((sectors.end - sectors.start - 1) << shift) | offset.get()
            }
        };
        if geometry.extended_l2 {
            let whole = matches!(self.kind, Cluster::Compressed { .. });
            let bitmap = u64::from(self.sub.allocated) | u64::from(self.sub.zero) << 32;
            [standard, if whole { 0 } else { bitmap }]
        } else {
            [standard | if self.sub.zero != 0 { ZERO } else { 0 }, 0]
        }
    }

    /// The host range of the entry's clusters, aligned to clusters.
    pub(super) fn host_clusters(self, geometry: Geometry) -> Option<ByteRange> {
        let size = geometry.cluster_size();
        match self.kind {
            Cluster::None => None,
            Cluster::Host(offset) => Some(offset.range(size)),
            Cluster::Compressed { offset, stored } => Some(offset.range(stored).align_out(size)),
        }
    }
}

/// The number of standard entries at the start of `numbers`, at least one, that continue the first: each refers to the
/// cluster of `size` bytes behind that of the entry before, with the same flags.
pub(super) fn ascending(numbers: &[[u8; 8]], size: u64) -> usize {
    let first = numbers.first().map_or(0, |number| u64::from_be_bytes(*number));
    let mut next = first;
    let run = numbers.iter().take_while(|number| {
        let continues = u64::from_be_bytes(**number) == next;
        next = next.wrapping_add(size);
        continues
    });
    run.count().max(1)
}

/// The encoded cluster at `offset` for the guest cluster that starts at `guest`.
pub(super) fn encoded(offset: HostOffset, stored: u64, guest: GuestOffset, geometry: Geometry) -> Encoded {
    Encoded {
        offset: offset.get(),
        stored,
        cluster: guest.range(geometry.cluster_size()),
    }
}

/// The low 32 bits of `value`.
fn low_half(value: u64) -> u32 {
    saturating_u32(value & u64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
    };
    const EXTENDED: Geometry = Geometry {
        extended_l2: true,
        ..PLAIN
    };

    fn round_trip(entry: L2Entry, geometry: Geometry) {
        assert_eq!(
            L2Entry::parse(entry.to_numbers(geometry), geometry, 3, false).expect("valid"),
            entry
        );
    }

    #[test]
    fn entries_round_trip() {
        round_trip(L2Entry::UNALLOCATED, PLAIN);
        round_trip(
            L2Entry::data(HostOffset::new(0x50000), Subclusters::ALLOCATED),
            PLAIN,
        );
        round_trip(
            L2Entry {
                kind: Cluster::None,
                copied: false,
                sub: Subclusters::ZERO,
            },
            PLAIN,
        );
        round_trip(
            L2Entry::data(
                HostOffset::new(0x50000),
                Subclusters {
                    allocated: 6,
                    zero: 1,
                },
            ),
            EXTENDED,
        );
        let kind = Cluster::Compressed {
            offset: HostOffset::new(0x50123),
            stored: 512 * 3 - 0x123,
        };
        round_trip(
            L2Entry {
                kind,
                copied: false,
                sub: Subclusters::ALLOCATED,
            },
            PLAIN,
        );
    }

    #[test]
    fn entries_of_contiguous_clusters_are_a_run() {
        let numbers = |entries: &[u64]| {
            entries
                .iter()
                .map(|entry| entry.to_be_bytes())
                .collect::<Vec<_>>()
        };
        let size = PLAIN.cluster_size();
        let first = COPIED | 0x50000;
        assert_eq!(
            ascending(&numbers(&[first, first + size, first + 2 * size]), size),
            3
        );
        assert_eq!(ascending(&numbers(&[first, first + size, first + size]), size), 2);
        assert_eq!(ascending(&numbers(&[first, 0x60000]), size), 1, "another flag");
        assert_eq!(ascending(&numbers(&[first, first + 2 * size]), size), 1);
        assert_eq!(ascending(&numbers(&[u64::MAX, 0]), size), 1);
        assert_eq!(ascending(&[], size), 1);
    }

    #[test]
    fn invalid_entries_are_refused() {
        assert!(L2Entry::parse([0x50200, 0], PLAIN, 3, false).is_err());
        assert!(L2Entry::parse([1, 0], PLAIN, 2, false).is_err());
        assert!(L2Entry::parse([0x50000, 0x1_0000_0001], EXTENDED, 3, false).is_err());
        assert!(L2Entry::parse([0, 1], EXTENDED, 3, false).is_err());
        assert!(L2Entry::parse([COPIED, 0], PLAIN, 3, false).is_err());
        assert!(L2Entry::parse([COPIED, 0], PLAIN, 3, true).is_ok());
        assert!(L2Entry::parse([COMPRESSED | 0xffff, 0], PLAIN, 3, false).is_err());
    }
}
