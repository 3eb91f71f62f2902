//! LZMA2 in an xz container.

use diskimage_core::Result;
use lzma_rust2::XzReader;

/// The memory limit of a decoder in KiB: a dictionary twice as large as that of the strongest preset of `xz`, and 1 MiB
/// for the rest. The limit is ours; the stream names any dictionary size it likes.
const MEMORY: u32 = (128 << 10) + 1024;

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
