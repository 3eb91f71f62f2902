//! Zeroes: the test for them, at memory speed in safe code, and writing them where nothing faster works.

use crate::{ByteRange, Device, Result, to_index};

/// Whether every byte of `buf` is zero.
///
/// Blocks of 256 bytes are folded with OR, which the compiler turns into wide vector instructions; a loop that stops at
/// the first byte would run at a fifth of the speed.
pub fn is_zero(buf: &[u8]) -> bool {
    let (blocks, rest) = buf.as_chunks::<256>();
    // Most data is nonzero in its first block: the loop stops after the first block that is.
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The longest run of `unit`-sized blocks at the start of `buf` that are either all zero or all nonzero: whether it is
/// zero, and its length in bytes. The last block may be shorter than `unit`. `buf` is not empty and `unit` not zero.
pub fn leading_run(buf: &[u8], unit: usize) -> (bool, usize) {
    let mut blocks = buf.chunks(unit);
    let first = blocks.next().map_or(&[][..], |block| block);
    let zero = is_zero(first);
    let more: usize = blocks
        .take_while(|block| is_zero(block) == zero)
        .map(<[u8]>::len)
        .sum();
    (zero, first.len() + more)
}

/// The longest chunk of zeroes that is written at once.
const CHUNK: u64 = 1 << 20;

/// Calls `write` with zero bytes and an offset for each part of `range`, in ascending order. A part has at most 1 MiB
/// and ends on a multiple of 1 MiB or at the end of `range`, so that all but the outer ones are aligned.
///
/// # Errors
/// The first error of `write`.
pub fn write_zero_chunks(range: ByteRange, mut write: impl FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
    let zeroes = vec![0; to_index(range.len().min(CHUNK))?];
    let mut rest = range;
    while !rest.is_empty() {
        let part = rest.first(CHUNK - rest.start() % CHUNK);
        write(&zeroes[..to_index(part.len())?], part.start())?;
        rest = rest.skip(part.len());
    }
    Ok(())
}

impl dyn Device + '_ {
    /// Writes zero bytes over `range` with [`Device::write_at`].
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        write_zero_chunks(range, |zeroes, offset| self.write_at(zeroes, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_written_in_aligned_chunks() {
        let mib = 1 << 20;
        for (range, parts) in [
            (ByteRange::new(5, 5), &[][..]),
            (ByteRange::new(100, 300), &[(100, 200)]),
            (
                ByteRange::new(mib - 1, 3 * mib),
                &[(mib - 1, 1), (mib, mib), (2 * mib, mib)],
            ),
            (ByteRange::new(mib, 2 * mib + 7), &[(mib, mib), (2 * mib, 7)]),
        ] {
            let mut written = Vec::new();
            let outcome = write_zero_chunks(range, |zeroes, offset| {
                assert!(is_zero(zeroes));
                written.push((offset, zeroes.len() as u64));
                Ok(())
            });
            outcome.expect("no write fails");
            assert_eq!(written, parts, "{range:?}");
        }
    }

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [1, 255, 256, 257, 1000] {
            let mut buf = vec![0; len];
            assert!(is_zero(&buf));
            for at in [0, len / 2, len - 1] {
                buf[at] = 1;
                assert!(!is_zero(&buf), "byte {at} of {len}");
                buf[at] = 0;
            }
        }
    }

    #[test]
    fn heads_end_where_the_kind_changes() {
        let mut buf = vec![0; 1000];
        buf[300] = 1;
        assert_eq!(leading_run(&buf, 100), (true, 300));
        assert_eq!(leading_run(&buf[300..], 100), (false, 100));
        assert_eq!(leading_run(&buf[400..], 256), (true, 600));
    }
}
