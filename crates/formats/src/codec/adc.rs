//! Apple Data Compression, the LZ77 variant of early disk images of macOS.
//!
//! A stream is a sequence of codes, told apart by their first byte:
//!
//! ```text
//!   1lllllll  bytes...            l + 1 literal bytes
//!   00lllldd  dddddddd            a copy of l + 3 bytes from d + 1 bytes back
//!   01llllll  dddddddd dddddddd   a copy of l + 4 bytes from d + 1 bytes back
//! ```
//!
//! Distances are big-endian. The stream has no end mark: it ends where the block is full.

use diskimage_core::Result;

use super::damaged;

/// Fills `block` from the stream at the start of `bytes`. The last code must end where the block ends.
pub(crate) fn decode(bytes: &[u8], block: &mut [u8]) -> Result<()> {
    let (mut rest, mut at) = (bytes, 0);
    while at < block.len() {
        let (code, after) = rest.split_first().ok_or_else(damaged)?;
        let low = usize::from(code & 0x3f);
        let end = if code & 0x80 != 0 {
            let len = usize::from(code & 0x7f) + 1;
            let (literal, after) = after.split_at_checked(len).ok_or_else(damaged)?;
            let place = block.get_mut(at..at + len).ok_or_else(damaged)?;
            place.copy_from_slice(literal);
            rest = after;
            at + len
        } else if code & 0x40 != 0 {
            let (distance, after) = after.split_first_chunk().ok_or_else(damaged)?;
            rest = after;
            copy(block, at, low + 4, usize::from(u16::from_be_bytes(*distance)) + 1)?
        } else {
            let (distance, after) = after.split_first().ok_or_else(damaged)?;
            rest = after;
            copy(
                block,
                at,
                (low >> 2) + 3,
                ((low & 3) << 8 | usize::from(*distance)) + 1,
            )?
        };
        at = end;
    }
    Ok(())
}

/// Copies `len` bytes to `at` from `distance` bytes before, and returns the end. The ranges may overlap: then the copy
/// repeats the bytes between them.
fn copy(block: &mut [u8], at: usize, len: usize, distance: usize) -> Result<usize> {
    let from = at.checked_sub(distance).ok_or_else(damaged)?;
    let end = at + len;
    if end > block.len() {
        return Err(damaged());
    }
    for index in 0..len {
        block[at + index] = block[from + index];
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8], len: usize) -> Option<Vec<u8>> {
        let mut block = vec![0; len];
        decode(bytes, &mut block).ok().map(|()| block)
    }

    #[test]
    fn each_kind_of_code_is_decoded() {
        let literal = [0x83, b'a', b'b', b'c', b'd'];
        assert_eq!(decoded(&literal, 4).unwrap(), b"abcd");
        let short = [&literal[..], &[0x04, 0x03]].concat();
        assert_eq!(decoded(&short, 8).unwrap(), b"abcdabcd", "4 bytes from 4 back");
        let long = [&literal[..], &[0x41, 0x00, 0x00]].concat();
        assert_eq!(decoded(&long, 9).unwrap(), b"abcdddddd", "5 bytes from 1 back");
        let trailing = [&literal[..], &[0x99; 9]].concat();
        assert_eq!(decoded(&trailing, 4).unwrap(), b"abcd");
    }

    #[test]
    fn distances_reach_as_far_as_their_bits() {
        let mut stream = Vec::new();
        let start: Vec<u8> = (0..1024_u32).map(|n| (n * 7 % 251) as u8).collect();
        for part in start.chunks(128) {
            stream.push(0xff);
            stream.extend_from_slice(part);
        }
        stream.extend([0x3f, 0xff]);
        let block = decoded(&stream, 1024 + 18).unwrap();
        assert_eq!(block[1024..], start[..18]);
    }

    #[test]
    fn streams_that_do_not_fit_their_block_are_damage() {
        for (stream, len) in [
            (&[][..], 1),
            (&[0x83, 1, 2][..], 4),
            (&[0x83, 1, 2, 3, 4][..], 3),
            (&[0x80, 1, 0x00, 0x01][..], 4),
            (&[0x80, 1, 0x00][..], 4),
            (&[0x80, 1, 0x40, 0x00][..], 5),
            (&[0x80, 1, 0x40, 0x00, 0x00][..], 4),
            (&[0x00, 0x00][..], 3),
        ] {
            assert_eq!(decoded(stream, len), None, "{stream:?}");
        }
    }

    #[test]
    fn random_streams_never_panic_and_match_a_plain_decoder() {
        let mut state = 88_172_645_463_325_252_u64;
        for _ in 0..20_000 {
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            };
            let bytes: Vec<u8> = std::iter::once(next() | 0x80)
                .chain((0..usize::from(next())).map(|_| next() & 0xbf))
                .collect();
            let len = usize::from(next()) + 1;
            assert_eq!(decoded(&bytes, len), plainly(&bytes, len));
        }
    }

    /// The same, byte by byte into a vector.
    fn plainly(bytes: &[u8], len: usize) -> Option<Vec<u8>> {
        let (mut out, mut input) = (Vec::new(), bytes.iter().copied().map(usize::from));
        while out.len() < len {
            let code = input.next()?;
            if code >= 0x80 {
                for _ in 0..code - 0x7f {
                    out.push(u8::try_from(input.next()?).ok()?);
                }
                continue;
            }
            let (count, distance) = if code >= 0x40 {
                (code - 0x3c, input.next()? << 8 | input.next()?)
            } else {
                ((code >> 2) + 3, (code & 3) << 8 | input.next()?)
            };
            for _ in 0..count {
                out.push(*out.get(out.len().checked_sub(distance + 1)?)?);
            }
        }
        (out.len() == len).then_some(out)
    }
}
