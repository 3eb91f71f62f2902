//! LZMA2 in an xz container.

use diskimage_core::Result;
use lzma_rust2::XzReader;

/// The largest dictionary in bytes: that of the strongest preset of `xz`. The limit is ours; the stream names any size it
/// likes.
const MAX_DICTIONARY: u32 = 64 << 20;
/// The memory limit of a decoder in KiB: the dictionary, and 1 MiB for the rest.
const MEMORY: u32 = (MAX_DICTIONARY >> 10) + 1024;

/// The bytes of a stream that [`dictionary`] looks at.
pub(crate) const HEAD: usize = 24;

/// The bytes of the dictionary that the stream beginning with `head` needs, or more.
pub(crate) fn dictionary(head: &[u8; HEAD]) -> u64 {
    // Behind the header of the stream: the length of the block's header, flags, the filter (LZMA2) and its one property.
    let &[_, flags, filter, len, bits, ..] = head[12..].first_chunk::<5>().unwrap_or(&[0; 5]);
    let is_plain = flags == 0 && filter == 0x21 && len == 1;
    let size = match u32::from(bits) {
        bits if is_plain && bits < 40 => u64::from(2 | bits & 1) << (bits / 2 + 11),
        _ => u64::MAX,
    };
    size.min(MAX_DICTIONARY.into())
}

/// Fills `block` from the stream at the start of `bytes`. The stream must end where the block ends.
pub(crate) fn decode(bytes: &[u8], block: &mut [u8]) -> Result<()> {
    super::fill(XzReader::new_mem_limit(bytes, false, MEMORY), block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dictionary_that_would_take_gibibytes_is_refused() {
        let mut stream = Vec::new();
        let mut options = lzma_rust2::XzOptions::with_preset(1);
        options.lzma_options.dict_size = 1 << 16;
        let mut writer = lzma_rust2::XzWriter::new(&mut stream, options).unwrap();
        std::io::Write::write_all(&mut writer, &[7; 1000]).unwrap();
        writer.finish().unwrap();
        let mut block = [0; 1000];
        decode(&stream, &mut block).unwrap();
        assert_eq!(block, [7; 1000]);
        // Block header: length, flags, the filter's number and the length of its properties, the dictionary's size.
        let header = 12..12 + (usize::from(stream[12]) + 1) * 4;
        assert_eq!(stream[14..16], [0x21, 1]);
        let head = stream.first_chunk().unwrap();
        assert_eq!(dictionary(head), 1 << 16);
        stream[16] = 38;
        let sum = crc32(&stream[header.start..header.end - 4]);
        stream[header.end - 4..header.end].copy_from_slice(&sum.to_le_bytes());
        assert!(decode(&stream, &mut block).is_err());
    }

    /// CRC-32, the checksum of an xz block header.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
                (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg())
            })
        })
    }
}
