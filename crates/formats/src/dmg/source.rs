//! Reads the `mish` blocks from the property list or, in old images, from the resource fork.

use diskimage_core::{ByteRange, Device, Result, to_index};

use super::chunk::Chunks;
use super::invalid;
use super::trailer::Trailer;

/// qemu-img's limit for the length of the property list, which also bounds a resource.
const MAX_LEN: u64 = 16 << 20;

/// Adds the chunks of all `mish` blocks to `chunks`.
pub(super) fn read(file: &dyn Device, trailer: &Trailer, name: &str, chunks: &mut Chunks) -> Result<()> {
    if !trailer.resources.is_empty() {
        read_fork(file, trailer.resources, name, chunks)
    } else if !trailer.list.is_empty() {
        read_list(file, trailer.list, name, chunks)
    } else {
        Err(invalid(name))
    }
}

/// Reads the resources of the fork.
///
/// ```text
///   fork       offset of the data|offset of the map|length of the data|length of the map|...
///   data       length|resource|length|resource|...
/// ```
fn read_fork(file: &dyn Device, fork: ByteRange, name: &str, chunks: &mut Chunks) -> Result<()> {
    let number = |offset: u64| -> Result<u64> {
        let mut bytes = [0; 4];
        file.read_padded(&mut bytes, offset)?;
        Ok(u64::from(u32::from_be_bytes(bytes)))
    };
    let data = fork.start().saturating_add(number(fork.start())?);
    let len = number(fork.start().saturating_add(8))?;
    let mut rest = ByteRange::new(data, data.saturating_add(len)).intersect(fork);
    if len == 0 || rest.len() != len {
        return Err(invalid(name));
    }
    while !rest.is_empty() {
        if rest.len() < 4 {
            return Err(invalid(name));
        }
        let len = number(rest.start())?;
        rest = rest.skip(4);
        if len == 0 || len > rest.len() || len > MAX_LEN {
            return Err(invalid(name));
        }
        chunks.add(&bytes(file, rest.first(len))?)?;
        rest = rest.skip(len);
    }
    Ok(())
}

/// Reads all `data` elements of the property list, at any depth: [`Chunks::add`] skips those that are no `mish` block.
fn read_list(file: &dyn Device, list: ByteRange, name: &str, chunks: &mut Chunks) -> Result<()> {
    const BEGIN: &[u8] = b"<data>";
    const END: &[u8] = b"</data>";
    if list.len() > MAX_LEN {
        return Err(invalid(name));
    }
    let text = bytes(file, list)?;
    let mut rest = &text[..];
    while let Some(begin) = position(rest, BEGIN) {
        rest = &rest[begin + BEGIN.len()..];
        let end = position(rest, END).ok_or_else(|| invalid(name))?;
        chunks.add(&base64(&rest[..end]))?;
        rest = &rest[end + END.len()..];
    }
    Ok(())
}

/// Reads `range`. The caller checked that it is not longer than [`MAX_LEN`].
fn bytes(file: &dyn Device, range: ByteRange) -> Result<Vec<u8>> {
    file.require(range.start(), range.len())?;
    let mut bytes = vec![0; to_index(range.len().min(MAX_LEN))?];
    file.read_at(&mut bytes, range.start())?;
    Ok(bytes)
}

fn position(text: &[u8], needle: &[u8]) -> Option<usize> {
    text.windows(needle.len()).position(|bytes| bytes == needle)
}

/// Decodes base64. Characters outside of the alphabet are skipped, as in qemu-img.
fn base64(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for character in text {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => break,
            _ => continue,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count).to_le_bytes()[0]);
            bits &= (1 << count) - 1;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_skips_characters_outside_of_the_alphabet() {
        assert_eq!(base64(b"\n\tbWlz\n aAA!B/w=="), b"mish\x00\x01\xff");
        assert_eq!(base64(b"+/8"), [0xfb, 0xff]);
        assert_eq!(base64(b""), b"");
    }
}
