//! Compressed streams.

use std::io::Write;

use bzip2::Compression;
use bzip2::write::BzEncoder;
use lzma_rust2::{XzOptions, XzWriter};
use zlib_rs::{DeflateConfig, ReturnCode};

const NO_ERROR: &str = "memory has no errors";

/// A zlib stream.
pub(crate) fn zlib(bytes: &[u8]) -> Vec<u8> {
    compressed(bytes, DeflateConfig::new(9))
}

/// A deflate stream without a header, as in qcow and qcow2.
pub(crate) fn deflate(bytes: &[u8]) -> Vec<u8> {
    compressed(
        bytes,
        DeflateConfig {
            window_bits: -12,
            ..DeflateConfig::new(9)
        },
    )
}

fn compressed(bytes: &[u8], config: DeflateConfig) -> Vec<u8> {
    let mut out = vec![0; zlib_rs::compress_bound(bytes.len()) + 64];
    let (stream, code) = zlib_rs::compress_slice(&mut out, bytes, config);
    assert_eq!(code, ReturnCode::Ok);
    stream.to_vec()
}

/// A bzip2 stream.
pub(crate) fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = BzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect(NO_ERROR);
    encoder.finish().expect(NO_ERROR)
}

/// An xz stream with a dictionary of `dictionary` bytes.
pub(crate) fn xz(bytes: &[u8], dictionary: u32) -> Vec<u8> {
    let mut options = XzOptions::with_preset(1);
    options.lzma_options.dict_size = dictionary;
    let mut writer = XzWriter::new(Vec::new(), options).expect(NO_ERROR);
    writer.write_all(bytes).expect(NO_ERROR);
    writer.finish().expect(NO_ERROR)
}

/// A Zstandard frame of one byte repeated `len` times, up to 128 KiB, which claims a window of 2 to the power of `window`.
pub(crate) fn zstd(byte: u8, len: u32, window: u8) -> Vec<u8> {
    let block = len << 3 | 1 << 1 | 1;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window - 10) << 3];
    frame.extend_from_slice(&block.to_le_bytes()[..3]);
    frame.push(byte);
    frame
}

/// An LZFSE stream of one block that is not compressed.
pub(crate) fn lzfse(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).expect("small");
    [b"bvx-", &len.to_le_bytes()[..], bytes, b"bvx$"].concat()
}

/// Bytes in the alphabet of base64.
pub(crate) fn base64(bytes: &[u8]) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = Vec::with_capacity(bytes.len() / 3 * 4 + 4);
    for three in bytes.chunks(3) {
        let bits = three
            .iter()
            .fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte))
            << (8 * (3 - three.len()));
        for nth in 0..4 {
            let digit = ALPHABET[bits >> (18 - 6 * nth) & 63];
            text.push(if nth > three.len() { b'=' } else { digit });
        }
    }
    text
}
