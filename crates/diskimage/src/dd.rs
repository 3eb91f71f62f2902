//! Copies a part of a disk that is counted in blocks, as `dd` does.
//!
//! ```text
//!   source   [skip][skip][    ][    ][    ]│ count          the part is what `count` leaves after `skip`
//!   target   [    ][    ][    ]
//! ```

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use diskimage_core::{AlignedBuf, ByteRange, Device, Image, Result, ResultExt, saturating_index, to_index};
use diskimage_formats::window_layer;

use crate::convert::{Conversion, LONGEST_SEGMENT};
use crate::files::flush;

/// A part of a disk, counted in blocks as by `dd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The length of a block in bytes.
    pub size: u64,
    /// The number of blocks from the start of the disk, those skipped included; all blocks if not given.
    pub count: Option<u64>,
    /// The number of blocks to skip at the start of the disk.
    pub skip: u64,
}

impl Blocks {
    /// The guest offset and the length of the part in a disk of `len` bytes; `None` if the part would start beyond the
    /// end of the disk or of the last block.
    pub fn of(self, len: u64) -> Option<(u64, u64)> {
        let end = self
            .count
            .map_or(len, |count| count.saturating_mul(self.size).min(len));
        let start = self.skip.saturating_mul(self.size);
        if start > end {
            return None;
        }
        Some((start, end - start))
    }
}

/// Copies `len` bytes at `start` of `source` to the start of `target`, zeroes as data. The size of requests does not
/// depend on the size of blocks, but after an error all blocks before the one that failed are in the target.
///
/// # Errors
/// The target is too small, or a request fails: the first failure in guest order.
pub fn dd(source: &Arc<Image>, (start, len): (u64, u64), block: u64, target: &Image) -> Result<()> {
    let device: Arc<dyn Device> = Arc::<Image>::clone(source);
    let part = Image::new(window_layer(device, start, len), None, source.name(), false);
    let sources = [Arc::new(part)];
    let failed_at = AtomicU64::new(u64::MAX);
    let conversion = Conversion {
        sparse: 0,
        in_order: true,
        failed_at: Some(&failed_at),
        ..Conversion::new(&sources, target)
    };
    if let Err(error) = conversion.run() {
        // A stream has whole clusters only, which are written once.
        if target.layer().needs_encoding() {
            return Err(error);
        }
        let at = failed_at.into_inner();
        copy_blocks((&sources[0], start), at - at % block, block, target)?;
        return Err(error);
    }
    flush(target)
}

/// Copies blocks from `at` on, each as a whole or not at all, until one fails or the segment that has failed is done.
/// `part` starts at byte `start` of the source.
fn copy_blocks((part, start): (&Image, u64), at: u64, block: u64, target: &Image) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let mut buf = AlignedBuf::new(to_index(block.min(PIECE))?)?;
    let end = at.saturating_add(LONGEST_SEGMENT + block).min(part.len());
    let mut rest = ByteRange::new(at.min(end), end);
    let mut copy = |range: ByteRange, write: bool| -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.first(PIECE);
            rest = rest.skip(piece.len());
            let buf = &mut buf[..to_index(piece.len())?];
            part.read_at(buf, piece.start()).context(|| {
                let place = first_unreadable(part, start, piece);
                format!("error while reading from input image file at byte {place}")
            })?;
            if write {
                target
                    .write_at(buf, piece.start())
                    .context(|| "error while writing to output image file")?;
            }
        }
        Ok(())
    };
    while !rest.is_empty() {
        let one = rest.first(block);
        rest = rest.skip(one.len());
        if block > PIECE {
            copy(one, false)?;
        }
        copy(one, true)?;
    }
    Ok(())
}

/// The offset in the source of the first byte of `range` whose sector cannot be read; the start of `range` if all can be
/// read now. `part` starts at byte `start` of the source.
fn first_unreadable(part: &Image, start: u64, range: ByteRange) -> u64 {
    const SECTOR: u64 = 512;
    let mut buf = [0; 512];
    let mut rest = range;
    while !rest.is_empty() {
        let sector = rest.first(SECTOR - (start + rest.start()) % SECTOR);
        rest = rest.skip(sector.len());
        let len = saturating_index(sector.len());
        if part.read_at(&mut buf[..len], sector.start()).is_err() {
            return start + sector.start();
        }
    }
    start + range.start()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{contents, image_on, raw};

    #[test]
    fn blocks_are_counted_from_the_start_of_the_disk() {
        let part = |size, count, skip| Blocks { size, count, skip }.of(1000);
        assert_eq!(part(512, None, 0), Some((0, 1000)));
        assert_eq!(part(100, Some(3), 1), Some((100, 200)));
        assert_eq!(part(100, Some(5), 5), Some((500, 0)));
        assert_eq!(part(100, Some(1), 5), None);
        assert_eq!(part(100, None, 10), Some((1000, 0)));
        assert_eq!(part(100, None, 11), None);
        assert_eq!(part(u64::MAX, Some(u64::MAX), 0), Some((0, 1000)));
    }

    #[test]
    fn a_part_that_is_not_aligned_is_copied() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let source = raw(bytes.clone());
        for (start, len) in [(0, 100_000), (7, 5000), (99_999, 1), (500, 0)] {
            let target = image_on("qcow2", "", 100 << 10, None);
            dd(&source, (start, len), 512, &target).expect("copies");
            let from = usize::try_from(start).expect("small");
            let expected = &bytes[from..from + usize::try_from(len).expect("small")];
            assert!(contents(&target).starts_with(expected), "{start} {len}");
        }
    }
}
