//! The zero test, at memory speed in safe code.

/// Whether every byte of `buf` is zero.
///
/// Blocks of 256 bytes are folded with OR, which the compiler turns into wide vector instructions; a loop that stops at
/// the first byte would run at a fifth of the speed.
pub fn is_zero(buf: &[u8]) -> bool {
    let (blocks, rest) = buf.as_chunks::<256>();
    // Most data differs from zero early; do not fold a whole request to learn it.
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Splits off the longest head of `buf` whose `unit`-sized blocks are all zero or all not: whether the head is zero, and
/// its length. A last block may be shorter than `unit`. `buf` is not empty and `unit` not zero.
pub fn leading(buf: &[u8], unit: usize) -> (bool, usize) {
    let mut blocks = buf.chunks(unit);
    let first = blocks.next().map_or(&[][..], |block| block);
    let zero = is_zero(first);
    let more: usize = blocks
        .take_while(|block| is_zero(block) == zero)
        .map(<[u8]>::len)
        .sum();
    (zero, first.len() + more)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(leading(&buf, 100), (true, 300));
        assert_eq!(leading(&buf[300..], 100), (false, 100));
        assert_eq!(leading(&buf[400..], 256), (true, 600));
    }
}
