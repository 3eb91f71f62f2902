//! The block allocation table, through windows: never in memory as a whole.
//!
//! ```text
//!   entries   |payload block| x chunk ratio |sector bitmap| |payload block| x chunk ratio |sector bitmap| ...
//! ```
//!
//! Changed parts stay in memory until their owner has written them, by way of the log, in units of 4 KiB.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, Result, errno};

use super::header::MIB;

/// What an entry says of a payload block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// It reads as zero, whatever the state is called.
    Zero,
    /// It is at this offset of the file.
    At(u64),
}

/// States of payload blocks, the lowest three bits of an entry.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULLY_PRESENT: u64 = 6;

impl Payload {
    /// Parses an entry. The highest 44 bits are mebibytes, those between are reserved.
    ///
    /// # Errors
    /// States that blocks of a disk on its own do not have.
    pub(super) fn of(entry: u64) -> Result<Self> {
        match entry & 7 {
            NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED => Ok(Self::Zero),
            FULLY_PRESENT => Ok(Self::At(entry / MIB * MIB)),
            _ => Err(Error::from_errno(errno::EIO)),
        }
    }
}

/// The entry of a block at `offset`.
pub(super) fn present(offset: u64) -> u64 {
    offset | FULLY_PRESENT
}

/// The entry of a block without storage; `zero` if it is to say that it reads as zero, rather than that nothing was
/// ever there.
pub(super) fn absent(zero: bool) -> u64 {
    if zero { ZERO } else { NOT_PRESENT }
}

/// How many payload blocks have one sector bitmap.
///
/// Blocks have 1 MiB at least and 256 MiB at most, so there is one.
fn chunk_ratio(block_size: u64) -> u64 {
    (512 << 23) / block_size
}

/// How many sector bitmaps so many payload blocks have.
pub(super) fn chunks(blocks: u64, block_size: u64) -> u64 {
    blocks.div_ceil(chunk_ratio(block_size))
}

/// Which entry is that of a payload block.
pub(super) fn entry_of(block: u64, block_size: u64) -> u64 {
    block + block / chunk_ratio(block_size)
}

/// How many payload blocks from `block` on have entries that follow one another.
pub(super) fn left_in_chunk(block: u64, block_size: u64) -> u64 {
    chunk_ratio(block_size) - block % chunk_ratio(block_size)
}

/// How many entries the table of a disk has: those of sector bitmaps between payload blocks count.
pub(super) fn entries(disk_size: u64, block_size: u64) -> u64 {
    match disk_size.div_ceil(block_size) {
        0 => 0,
        blocks => entry_of(blocks - 1, block_size) + 1,
    }
}

/// Bytes of an entry.
pub(super) const ENTRY: u64 = 8;

/// What the log has in one data sector.
pub(super) const UNIT: usize = 4096;
/// Bytes of a window.
const WINDOW: usize = 64 << 10;
/// How many windows are kept.
const KEPT: usize = 16;

/// The windows of a table.
#[derive(Debug)]
pub(super) struct Bat {
    device: Arc<dyn Device>,
    region: ByteRange,
    /// By their offset in the region.
    windows: BTreeMap<u64, Window>,
    /// Their offsets, the one that has been in memory longest first.
    order: VecDeque<u64>,
}

#[derive(Debug)]
struct Window {
    bytes: Box<[u8]>,
    /// A bit for each unit that has changed.
    changed: u16,
}

impl Bat {
    /// The table in `region`, a multiple of mebibytes.
    pub(super) fn new(device: Arc<dyn Device>, region: ByteRange) -> Self {
        Self {
            device,
            region,
            windows: BTreeMap::new(),
            order: VecDeque::new(),
        }
    }

    /// The entries from entry `index` on that are in the same window; at least one.
    ///
    /// # Errors
    /// An entry outside the region, and as reading the file.
    pub(super) fn entries(&mut self, index: u64) -> Result<impl Iterator<Item = u64>> {
        let (window, skip) = self.window(index)?;
        let (entries, _) = window.bytes[skip..].as_chunks();
        Ok(entries.iter().map(|entry| u64::from_le_bytes(*entry)))
    }

    /// Entry `index`.
    ///
    /// # Errors
    /// As [`Bat::entries`].
    pub(super) fn entry(&mut self, index: u64) -> Result<u64> {
        Ok(self.entries(index)?.next().unwrap_or(0))
    }

    /// Changes entry `index`.
    ///
    /// # Errors
    /// As [`Bat::entries`].
    pub(super) fn set(&mut self, index: u64, entry: u64) -> Result<()> {
        let (window, skip) = self.window(index)?;
        window.bytes[skip..skip + 8].copy_from_slice(&entry.to_le_bytes());
        window.changed |= 1 << (skip / UNIT);
        Ok(())
    }

    /// Whether no further change fits into memory before those that are there are written.
    pub(super) fn is_crowded(&self) -> bool {
        let changed = self.windows.values().filter(|window| window.changed != 0);
        changed.count() >= KEPT / 2
    }

    /// The units that have changed, by their offset in the file.
    pub(super) fn changed(&self) -> Vec<(u64, Box<[u8; UNIT]>)> {
        let mut units = Vec::new();
        for (at, window) in &self.windows {
            let (parts, _) = window.bytes.as_chunks::<UNIT>();
            for (part, nth) in parts.iter().zip(0_u64..) {
                if window.changed & (1 << nth) != 0 {
                    let offset = self.region.start() + at + nth * UNIT as u64;
                    units.push((offset, Box::new(*part)));
                }
            }
        }
        units
    }

    /// What has changed is written.
    pub(super) fn settle(&mut self) {
        for window in self.windows.values_mut() {
            window.changed = 0;
        }
    }

    /// The window of entry `index`, and where in it the entry is.
    fn window(&mut self, index: u64) -> Result<(&mut Window, usize)> {
        let lost = || Error::corrupt(format!("Entry {index} lies outside the block allocation table"));
        let at = index
            .checked_mul(ENTRY)
            .filter(|at| *at < self.region.len())
            .ok_or_else(lost)?;
        let skip = usize::try_from(at % WINDOW as u64).unwrap_or(0);
        let at = at - skip as u64;
        if !self.windows.contains_key(&at) {
            self.make_room();
            // A part of the table behind the end of the file has no blocks to lead to.
            let mut bytes = vec![0; WINDOW].into_boxed_slice();
            self.device
                .read_padded(&mut bytes, self.region.start().saturating_add(at))?;
            self.windows.insert(at, Window { bytes, changed: 0 });
            self.order.push_back(at);
        }
        let window = self.windows.get_mut(&at).ok_or_else(lost)?;
        Ok((window, skip))
    }

    /// Gives up the window that has been in memory longest. Changed ones stay: they have to go through the log, and their
    /// owner keeps them few.
    fn make_room(&mut self) {
        if self.order.len() < KEPT {
            return;
        }
        let unchanged = |at: &u64| self.windows.get(at).is_none_or(|window| window.changed == 0);
        if let Some(leaves) = self.order.iter().position(unchanged)
            && let Some(at) = self.order.remove(leaves)
        {
            self.windows.remove(&at);
        }
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    #[test]
    fn bitmaps_have_an_entry_behind_each_chunk() {
        // Blocks of 32 MiB: 128 of them have one bitmap.
        let block = 32 * MIB;
        assert_eq!((entry_of(127, block), entry_of(128, block)), (127, 129));
        for (disk, count) in [(0, 0), (1, 1), (128, 128), (129, 130), (256, 257), (257, 259)] {
            assert_eq!(entries(disk * block, block), count, "{disk}");
        }
    }

    #[test]
    fn changes_are_told_in_units_until_they_are_written() {
        let device = Arc::new(MemoryDevice::new(vec![0; 3 << 20]));
        let mut bat = Bat::new(device, ByteRange::new(MIB, 2 * MIB));
        bat.set(3, 7).expect("inside");
        bat.set(513, 9).expect("inside");
        for window in 0..20 {
            bat.entry(window * 5000).expect("inside");
        }
        let changed = bat.changed();
        assert_eq!(
            changed.iter().map(|(at, _)| *at).collect::<Vec<_>>(),
            [MIB, MIB + 4096]
        );
        assert_eq!((changed[0].1[24], changed[1].1[8]), (7, 9));
        bat.settle();
        assert!(bat.changed().is_empty());
        assert!(bat.entry(MIB / 8).is_err() && bat.set(u64::MAX, 0).is_err());
    }
}
