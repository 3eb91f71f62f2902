//! The block allocation table (BAT), cached in pages.
//!
//! ```text
//!   entries   |payload block| x chunk ratio |sector bitmap| |payload block| x chunk ratio |sector bitmap| ...
//! ```
//!
//! Dirty pages stay in memory until the layer has written them through the log, in units of 4 KiB.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, ErrorKind, Result, errno};

use super::header::MIB;
use crate::layer_kit::paged_table::PagedTable;

/// The state of a payload block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// It has no storage and reads as zero: the states not present, undefined, zero and unmapped.
    Zero,
    /// It is stored at this offset of the file.
    At(u64),
    /// It has no storage and reads from the parent of a differencing disk: the state not present.
    Parent,
    /// It is stored at this offset of the file as far as the sector bitmap says, the rest reads from the parent.
    Partly(u64),
}

/// States of payload blocks, the lowest three bits of an entry.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;
/// The state of a sector bitmap block that is stored.
const BITMAP_PRESENT: u64 = 6;

impl Payload {
    /// Parses an entry: bits 0 to 2 are the state, bits 20 to 63 the offset in mebibytes, those between are reserved.
    ///
    /// # Errors
    /// States that are undefined, or that only blocks of differencing disks have.
    pub(super) fn of(entry: u64, is_differencing: bool) -> Result<Self> {
        match (entry & 7, is_differencing) {
            (NOT_PRESENT, true) => Ok(Self::Parent),
            (NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED, _) => Ok(Self::Zero),
            (FULLY_PRESENT, _) => Ok(Self::At(entry / MIB * MIB)),
            (PARTIALLY_PRESENT, true) => Ok(Self::Partly(entry / MIB * MIB)),
            _ => Err(Error::damage(ErrorKind::Invalid, errno::EIO)),
        }
    }

    /// The offset of the storage of the block.
    pub(super) fn offset(self) -> Option<u64> {
        match self {
            Self::At(offset) | Self::Partly(offset) => Some(offset),
            Self::Zero | Self::Parent => None,
        }
    }
}

/// The offset of a sector bitmap block; `None` if it has no storage.
pub(super) fn bitmap_offset(entry: u64) -> Option<u64> {
    (entry & 7 == BITMAP_PRESENT).then_some(entry / MIB * MIB)
}

/// The entry of a block stored at `offset`.
pub(super) fn present(offset: u64) -> u64 {
    offset | FULLY_PRESENT
}

/// The entry of a block without storage: in state zero if `zero`, else not present.
pub(super) fn absent(zero: bool) -> u64 {
    if zero { ZERO } else { NOT_PRESENT }
}

/// The order of the entries: the specification's chunk ratio tells how many payload blocks share a sector bitmap block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunks {
    ratio: u64,
}

/// Sectors that a sector bitmap block has bits for.
pub(super) const SECTORS_OF_CHUNK: u64 = 1 << 23;

impl Chunks {
    /// For payload blocks of `block_size` bytes, 1 MiB to 256 MiB, and logical sectors of 512 or 4096: the ratio is 16 to
    /// 32768.
    pub(super) fn new(block_size: u64, sector: u64) -> Self {
        Self {
            ratio: (SECTORS_OF_CHUNK * sector / block_size).max(1),
        }
    }

    /// How many sector bitmap blocks `blocks` payload blocks have.
    pub(super) fn count(self, blocks: u64) -> u64 {
        blocks.div_ceil(self.ratio)
    }

    /// The index of the entry of a payload block.
    pub(super) fn entry_of(self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// The index of the entry of the sector bitmap block of a payload block.
    pub(super) fn bitmap_entry_of(self, block: u64) -> u64 {
        let chunk = block / self.ratio;
        (chunk + 1).saturating_mul(self.ratio).saturating_add(chunk)
    }

    /// How many payload blocks from `block` on have contiguous entries, with no sector bitmap's in between.
    pub(super) fn left_in_chunk(self, block: u64) -> u64 {
        self.ratio - block % self.ratio
    }

    /// How many entries the table of a disk of `blocks` payload blocks has, up to that of the last one: those of sector
    /// bitmaps count, too.
    pub(super) fn entries(self, blocks: u64) -> u64 {
        match blocks {
            0 => 0,
            blocks => self.entry_of(blocks - 1) + 1,
        }
    }
}

/// Bytes of an entry.
pub(super) const ENTRY: u64 = 8;

/// Bytes that one data sector of the log describes.
pub(super) const UNIT: usize = 4096;
/// The cached pages of a table.
#[derive(Debug)]
pub(super) struct Bat(PagedTable<8>);

impl Bat {
    /// The table in `region`, a multiple of mebibytes.
    pub(super) fn new(device: Arc<dyn Device>, region: ByteRange) -> Self {
        // Dirty units are written through the log.
        Self(PagedTable::new(device, region.start(), region.len() / ENTRY).owner_writes_back())
    }

    /// The entries from entry `index` on that are in the same page; at least one.
    ///
    /// # Errors
    /// An index outside the region, and those of reading the file.
    pub(super) fn entries(&mut self, index: u64) -> Result<impl Iterator<Item = u64>> {
        let entries = self.0.entries(index)?.iter();
        Ok(entries.map(|entry| u64::from_le_bytes(*entry)))
    }

    /// Entry `index`.
    ///
    /// # Errors
    /// Those of [`Bat::entries`].
    pub(super) fn entry(&mut self, index: u64) -> Result<u64> {
        self.0.entry(index).map(u64::from_le_bytes)
    }

    /// Changes entry `index`.
    ///
    /// # Errors
    /// Those of [`Bat::entries`].
    pub(super) fn set(&mut self, index: u64, entry: u64) -> Result<()> {
        self.0.set(index, entry.to_le_bytes())
    }

    /// Whether so many pages are dirty that they should be written back.
    pub(super) fn too_many_dirty(&self) -> bool {
        self.0.too_many_dirty()
    }

    /// The dirty units with their offsets in the file.
    pub(super) fn dirty_units(&self) -> Vec<(u64, Box<[u8; UNIT]>)> {
        let units = self.0.dirty_units(UNIT);
        units
            .filter_map(|(offset, bytes)| Some((offset, Box::new(*bytes.first_chunk()?))))
            .collect()
    }

    /// Marks all pages clean, once they have been written through the log.
    pub(super) fn mark_clean(&mut self) {
        self.0.mark_clean();
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    #[test]
    fn bitmaps_have_an_entry_behind_each_chunk() {
        // With blocks of 32 MiB, the chunk ratio is 128.
        let chunks = Chunks::new(32 * MIB, 512);
        assert_eq!(chunks.entry_of(127), 127);
        assert_eq!(chunks.entry_of(128), 129);
        assert_eq!(chunks.bitmap_entry_of(0), 128);
        assert_eq!(chunks.bitmap_entry_of(128), 257);
        for (blocks, count) in [(0, 0), (1, 1), (128, 128), (129, 130), (256, 257), (257, 259)] {
            assert_eq!(chunks.entries(blocks), count, "{blocks}");
        }
        // Larger sectors make larger chunks.
        let chunks = Chunks::new(32 * MIB, 4096);
        assert_eq!(chunks.entry_of(1023), 1023);
        assert_eq!(chunks.bitmap_entry_of(0), 1024);
        assert_eq!(chunks.entry_of(1024), 1025);
        assert_eq!(chunks.bitmap_entry_of(1024), 2049);
    }

    #[test]
    fn dirty_units_are_listed_until_they_are_clean() {
        let device = Arc::new(MemoryDevice::new(vec![0; 3 << 20]));
        let mut bat = Bat::new(device, ByteRange::new(MIB, 2 * MIB));
        bat.set(3, 7).expect("inside");
        bat.set(513, 9).expect("inside");
        for page in 0..20 {
            bat.entry(page * 5000).expect("inside");
        }
        let dirty = bat.dirty_units();
        assert_eq!(
            dirty.iter().map(|(at, _)| *at).collect::<Vec<_>>(),
            [MIB, MIB + 4096]
        );
        assert_eq!(dirty[0].1[24], 7);
        assert_eq!(dirty[1].1[8], 9);
        bat.mark_clean();
        assert!(bat.dirty_units().is_empty());
        assert!(bat.entry(MIB / 8).is_err() && bat.set(u64::MAX, 0).is_err());
    }
}
