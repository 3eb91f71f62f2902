//! The geometry: cylinders, heads and sectors, with the disk size that they stand for.

use zerocopy::byteorder::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Cylinders, heads and sectors per track.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Geometry {
    cylinders: U16,
    heads: u8,
    sectors: u8,
}

impl Geometry {
    /// The largest geometry.
    pub(super) const LARGEST: Self = Self {
        cylinders: U16::MAX_VALUE,
        heads: 16,
        sectors: 255,
    };

    /// The sectors of a disk with this geometry.
    pub(super) fn len(self) -> u64 {
        u64::from(self.cylinders.get()) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry that the specification's appendix "CHS Calculation" gives for `sectors` sectors; it may hold a few
    /// less.
    pub(super) fn near(sectors: u64) -> Self {
        let sectors = sectors.min(Self::LARGEST.len());
        let (track, heads) = if sectors >= 65535 * 16 * 63 {
            (255, 16)
        } else {
            let heads = (sectors / 17).div_ceil(1024).max(4);
            if sectors / 17 < heads * 1024 && heads <= 16 {
                (17, heads)
            } else if sectors / 31 < 16 * 1024 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        // The fallbacks are not reached: `sectors` is clamped to 65535 cylinders, 16 heads and tracks of 255 sectors.
        Self {
            cylinders: U16::new(u16::try_from(sectors / track / heads).unwrap_or(u16::MAX)),
            heads: u8::try_from(heads).unwrap_or(16),
            sectors: u8::try_from(track).unwrap_or(255),
        }
    }

    /// The smallest geometry of [`Geometry::near`] that holds `sectors` sectors; `None` if none does.
    pub(super) fn holding(sectors: u64) -> Option<Self> {
        if sectors == 0 {
            return Some(Self::default());
        }
        let candidates = (sectors..=Self::LARGEST.len()).map(Self::near);
        candidates.into_iter().find(|geometry| geometry.len() >= sectors)
    }
}
