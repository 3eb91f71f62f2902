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
}

/// States of payload blocks, the lowest three bits of an entry.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULLY_PRESENT: u64 = 6;

impl Payload {
    /// Parses an entry: bits 0 to 2 are the state, bits 20 to 63 the offset in mebibytes, those between are reserved.
    ///
    /// # Errors
    /// States that are undefined, or that only blocks of differencing disks have.
    pub(super) fn of(entry: u64) -> Result<Self> {
        match entry & 7 {
            NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED => Ok(Self::Zero),
            FULLY_PRESENT => Ok(Self::At(entry / MIB * MIB)),
            _ => Err(Error::damage(ErrorKind::Invalid, errno::EIO)),
        }
    }
}

/// The entry of a block stored at `offset`.
pub(super) fn present(offset: u64) -> u64 {
    offset | FULLY_PRESENT
}

/// The entry of a block without storage: in state zero if `zero`, else not present.
pub(super) fn absent(zero: bool) -> u64 {
    if zero { ZERO } else { NOT_PRESENT }
}

/// The specification's chunk ratio: how many payload blocks share a sector bitmap block.
///
/// Blocks have 1 MiB to 256 MiB, so it is 16 to 4096.
fn chunk_ratio(block_size: u64) -> u64 {
    (512 << 23) / block_size
}

/// How many sector bitmap blocks `blocks` payload blocks have.
pub(super) fn chunks(blocks: u64, block_size: u64) -> u64 {
    blocks.div_ceil(chunk_ratio(block_size))
}

/// The index of the entry of a payload block.
pub(super) fn entry_of(block: u64, block_size: u64) -> u64 {
    block + block / chunk_ratio(block_size)
}

/// How many payload blocks from `block` on have contiguous entries, with no sector bitmap's in between.
pub(super) fn left_in_chunk(block: u64, block_size: u64) -> u64 {
    chunk_ratio(block_size) - block % chunk_ratio(block_size)
}

/// How many entries the table of a disk has, up to that of the last payload block: those of sector bitmaps count, too.
pub(super) fn entries(disk_size: u64, block_size: u64) -> u64 {
    match disk_size.div_ceil(block_size) {
        0 => 0,
        blocks => entry_of(blocks - 1, block_size) + 1,
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
        let block = 32 * MIB;
        assert_eq!((entry_of(127, block), entry_of(128, block)), (127, 129));
        for (disk, count) in [(0, 0), (1, 1), (128, 128), (129, 130), (256, 257), (257, 259)] {
            assert_eq!(entries(disk * block, block), count, "{disk}");
        }
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
        assert_eq!((dirty[0].1[24], dirty[1].1[8]), (7, 9));
        bat.mark_clean();
        assert!(bat.dirty_units().is_empty());
        assert!(bat.entry(MIB / 8).is_err() && bat.set(u64::MAX, 0).is_err());
    }
}
