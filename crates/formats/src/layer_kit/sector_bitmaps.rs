//! Bitmaps with a bit for each sector of a block, cached in pages: those in front of the blocks of VHD, and the sector
//! bitmap blocks of VHDX.
//!
//! ```text
//!   sectors    |written|stale|written|written| ...       bitmap   1 0 1 1 ...
//! ```
//!
//! A set bit means that the sector was written to this image. A sector whose bit is clear reads from the parent of a
//! differencing disk, else as zero, whatever the block has in its place. Bits are set after the sectors are written, in
//! memory, and reach the file after a flush: a crash loses unflushed sectors, and never exposes what they replaced.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Result};

use crate::layer_kit::metadata_cache::{MetadataCache, Table, WriteOrder};

/// Which bit of a byte belongs to its first sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitOrder {
    /// The highest one, as in VHD.
    HighestFirst,
    /// The lowest one, as in VHDX.
    LowestFirst,
}

/// The cached pages of all bitmaps.
#[derive(Debug)]
pub(crate) struct SectorBitmaps {
    cache: MetadataCache,
    order: BitOrder,
}

/// The bitmap at `range` of the file.
fn table(range: ByteRange) -> Table {
    Table {
        // What an L2 table is to its L1 table, a bitmap is to the block allocation table: written first.
        class: WriteOrder::L2,
        offset: range.start(),
        len: range.len(),
    }
}

impl SectorBitmaps {
    pub(crate) fn new(file: &Arc<dyn Device>, order: BitOrder) -> Self {
        Self {
            cache: MetadataCache::new(Arc::clone(file), Arc::clone(file)),
            order,
        }
    }

    /// Whether sector `sector` of the block with the bitmap at `bitmap` was written, and how many sectors from there
    /// on have the same state, up to `most`.
    ///
    /// # Errors
    /// Those of reading the file.
    pub(crate) fn run(&mut self, bitmap: ByteRange, sector: u64, most: u64) -> Result<(bool, u64)> {
        let order = self.order;
        let mut state = None;
        let mut len = 0;
        while len < most {
            let at = sector + len;
            let bytes = self.cache.bytes(table(bitmap), at / 8)?;
            let first = *state.get_or_insert(bytes.first().is_some_and(|byte| order.is_set(*byte, at)));
            let whole = if first { u8::MAX } else { 0 };
            if at.is_multiple_of(8) {
                // Whole bytes of the same state, as far as the page has them.
                let same = bytes.iter().take_while(|byte| **byte == whole).count() as u64;
                len += same * 8;
                if same > 0 {
                    continue;
                }
            }
            if bytes.first().is_none_or(|byte| order.is_set(*byte, at) != first) {
                break;
            }
            len += 1;
        }
        Ok((state == Some(true), len.clamp(1, most.max(1))))
    }

    /// Whether all of `sectors` were written.
    ///
    /// # Errors
    /// Those of reading the file.
    pub(crate) fn all_set(&mut self, bitmap: ByteRange, sectors: ByteRange) -> Result<bool> {
        let (is_set, len) = self.run(bitmap, sectors.start(), sectors.len())?;
        Ok(is_set && len == sectors.len())
    }

    /// Sets the bits of `sectors`, which were written.
    ///
    /// # Errors
    /// Those of reading the file, and of writing back other bitmaps.
    pub(crate) fn set(&mut self, bitmap: ByteRange, sectors: ByteRange) -> Result<()> {
        let order = self.order;
        let mut at = sectors.start();
        while at < sectors.end() {
            let bytes = self.cache.bytes_mut(table(bitmap), at / 8)?;
            for byte in bytes {
                let in_byte = ByteRange::new(at, at - at % 8 + 8).intersect(sectors);
                *byte |= order.mask(in_byte);
                at += in_byte.len();
                if at >= sectors.end() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Inserts the bitmap of a new block, with all bits clear.
    ///
    /// # Errors
    /// Those of writing back other bitmaps.
    pub(crate) fn insert_clear(&mut self, bitmap: ByteRange) -> Result<()> {
        self.cache.insert_zeroed(table(bitmap))
    }

    /// Flushes guest data, and writes the bitmaps that have changed.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        self.cache.write_back()
    }
}

impl BitOrder {
    /// Whether the bit of sector `sector` is set in its byte.
    fn is_set(self, byte: u8, sector: u64) -> bool {
        byte & self.mask(ByteRange::at(sector, 1)) != 0
    }

    /// The bits of `sectors`, which share a byte.
    fn mask(self, sectors: ByteRange) -> u8 {
        let from = u8::MAX >> (sectors.start() % 8);
        let mask = match sectors.end() % 8 {
            0 => from,
            end => from & !(u8::MAX >> end),
        };
        match self {
            Self::HighestFirst => mask,
            Self::LowestFirst => mask.reverse_bits(),
        }
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;
    use crate::testing::index;

    #[test]
    fn bits_are_set_and_found_again_whatever_their_bounds() {
        for (order, with_24_30_31) in [
            (BitOrder::HighestFirst, 0b1000_0011),
            (BitOrder::LowestFirst, 0b1100_0001),
        ] {
            let memory = Arc::new(MemoryDevice::new(vec![0; 4096]));
            let file: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
            let bitmap = ByteRange::at(512, 512);
            let mut model = [false; 4096];
            let mut bitmaps = SectorBitmaps::new(&file, order);
            for (start, end) in [
                (3, 5),
                (8, 16),
                (24, 25),
                (30, 57),
                (4095, 4096),
                (100, 101),
                (60, 64),
                (1000, 3000),
            ] {
                let sectors = ByteRange::new(start, end);
                bitmaps.set(bitmap, sectors).expect("memory");
                model[index(sectors)].fill(true);
            }
            bitmaps.write_back().expect("memory");
            let mut bitmaps = SectorBitmaps::new(&file, order);
            let mut sector = 0;
            for same in model.chunk_by(|one, other| one == other) {
                for skip in 0..same.len().min(20) {
                    let (from, most) = ((sector + skip) as u64, (4096 - sector - skip) as u64);
                    let run = bitmaps.run(bitmap, from, most).expect("memory");
                    assert_eq!(run, (same[0], (same.len() - skip) as u64), "from {from}");
                }
                sector += same.len();
            }
            let bytes = memory.contents();
            assert_eq!((bytes[512], bytes[513], bytes[1024]), (0b0001_1000, 0xff, 0));
            assert_eq!(bytes[515], with_24_30_31);
            assert_eq!(bitmaps.run(bitmap, 8, 5).expect("memory"), (true, 5));
            assert!(
                bitmaps
                    .all_set(bitmap, ByteRange::new(1000, 3000))
                    .expect("memory")
            );
            assert!(
                !bitmaps
                    .all_set(bitmap, ByteRange::new(1000, 3001))
                    .expect("memory")
            );
        }
    }
}
