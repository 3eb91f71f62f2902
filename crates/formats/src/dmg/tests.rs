//! Reads UDIF images that the tests assemble from chunks.

use std::io::Write as _;
use std::sync::Arc;

use diskimage_core::{Device, Image, MemoryDevice, Note, Result, errno};

use super::Dmg;
use crate::codec::deflate;
use crate::testing::open;

/// Type, first sector, sectors, offset, bytes.
type Entry = (u32, u64, u64, u64, u64);

const ZLIB: u32 = 0x8000_0005;
const BZIP2: u32 = 0x8000_0006;
const LZFSE: u32 = 0x8000_0007;
const LZMA: u32 = 0x8000_0008;
const TERMINATOR: Entry = (0xffff_ffff, 0, 0, 0, 0);

fn mish(first: u64, entries: &[Entry]) -> Vec<u8> {
    let mut block = b"mish\0\0\0\x01".to_vec();
    block.extend(first.to_be_bytes());
    block.resize(204, 0);
    for (code, sector, sectors, offset, stored) in entries {
        block.extend(code.to_be_bytes());
        block.extend([0; 4]);
        for number in [sector, sectors, offset, stored] {
            block.extend(number.to_be_bytes());
        }
    }
    block
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bit = |at: usize| {
        bytes
            .get(at / 8)
            .is_some_and(|byte| byte >> (7 - at % 8) & 1 != 0)
    };
    (0..bytes.len() * 8)
        .step_by(6)
        .map(|at| {
            let digit = (0..6).fold(0, |digit, next| digit << 1 | usize::from(bit(at + next)));
            char::from(DIGITS[digit])
        })
        .collect()
}

/// Concatenates the parts of an image. `list_at` is the field of the trailer that holds the range of `list`: 0xd8 for a
/// property list, 0x28 for a resource fork.
fn finish(data: &[u8], list: &[u8], list_at: usize, sectors: u64) -> Vec<u8> {
    let mut trailer = [0; 512];
    trailer[..4].copy_from_slice(b"koly");
    for (at, value) in [
        (0x20, data.len() as u64),
        (list_at, data.len() as u64),
        (list_at + 8, list.len() as u64),
        (0x1ec, sectors),
    ] {
        trailer[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    [data, list, &trailer].concat()
}

fn with_list(data: &[u8], blocks: &[Vec<u8>], sectors: u64) -> Vec<u8> {
    let elements: String = blocks
        .iter()
        .map(|block| format!("<data>\n{}\n</data>", base64(block)))
        .collect();
    finish(
        data,
        format!("<plist>{elements}</plist>").as_bytes(),
        0xd8,
        sectors,
    )
}

fn with_fork(data: &[u8], blocks: &[Vec<u8>], sectors: u64) -> Vec<u8> {
    let resources: Vec<u8> = blocks
        .iter()
        .flat_map(|block| [&u32::try_from(block.len()).unwrap().to_be_bytes()[..], block].concat())
        .collect();
    let mut fork = vec![0; 256];
    fork[2] = 1;
    fork[8..12].copy_from_slice(&u32::try_from(resources.len()).unwrap().to_be_bytes());
    fork.extend(resources);
    finish(data, &fork, 0x28, sectors)
}

fn opened(bytes: Vec<u8>) -> Result<Image> {
    open(&Dmg, Arc::new(MemoryDevice::new(bytes)), false)
}

fn content() -> Vec<u8> {
    (0..8192_usize)
        .map(|at| (at * at / 97).to_le_bytes()[0])
        .collect()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lzfse(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    lzfse_rust::encode_bytes(bytes, &mut out).unwrap();
    out
}

fn lzma(bytes: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(6);
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn chunks_of_every_kind_are_read() {
    let content = content();
    let parts = [
        (ZLIB, deflate::encode_zlib(&content[..2048])),
        (BZIP2, bzip2(&content[2048..4096])),
        (LZFSE, lzfse(&content[4096..6144])),
        (LZMA, lzma(&content[6144..7168])),
        (1, content[7168..].to_vec()),
    ];
    let (mut data, mut entries) = (Vec::new(), Vec::new());
    let sector_ranges = [(0, 4), (4, 4), (8, 4), (12, 2), (14, 2)];
    for ((first, sectors), (code, bytes)) in sector_ranges.into_iter().zip(&parts) {
        entries.push((*code, first, sectors, data.len() as u64, bytes.len() as u64));
        data.extend(bytes);
    }
    entries.extend([(0, 16, 1, 0, 0), (2, 17, 1, 0, 0), TERMINATOR]);
    let mut expected = content;
    expected.resize(9216, 0);
    for image in [
        with_list(&data, &[mish(0, &entries)], 18),
        with_fork(&data, &[b"other".to_vec(), mish(0, &entries)], 18),
    ] {
        let image = opened(image).unwrap();
        let mut disk = vec![0xff; 9216];
        image.read_at(&mut disk, 0).unwrap();
        assert_eq!(disk, expected);
        for (offset, len) in [(2000, 100), (4095, 2), (6000, 3000), (9215, 1)] {
            let mut part = vec![0xff; len];
            image.read_at(&mut part, offset as u64).unwrap();
            assert_eq!(part, expected[offset..offset + len]);
        }
    }
}

#[test]
fn chunks_of_several_partitions_are_sorted() {
    let blocks = [
        mish(4, &[(1, 0, 4, 2048, 2048), TERMINATOR]),
        mish(0, &[(1, 0, 4, 0, 2048)]),
    ];
    let image = opened(with_list(&content()[..4096], &blocks, 8)).unwrap();
    let mut disk = vec![0; 4096];
    image.read_at(&mut disk, 0).unwrap();
    assert_eq!(disk, content()[..4096]);
}

#[test]
fn streams_of_another_length_and_gaps_are_errors() {
    for encode in [deflate::encode_zlib, bzip2, lzfse, lzma] {
        let data = encode(&content()[..2048]);
        let code = match encode(b"x").first() {
            Some(b'B') => BZIP2,
            Some(b'b') => LZFSE,
            Some(0xfd) => LZMA,
            _ => ZLIB,
        };
        for sectors in [3, 5] {
            let entry = (code, 0, sectors, 0, data.len() as u64);
            let image = opened(with_list(&data, &[mish(0, &[entry])], 8)).unwrap();
            let error = image.read_at(&mut [0; 512], 0).unwrap_err();
            assert_eq!(error.errno(), Some(errno::EIO), "{code:x} {sectors}");
            assert!(image.read_at(&mut [0; 512], 3584).is_err());
        }
    }
}

#[test]
fn chunks_that_are_too_large_are_refused() {
    let message = |entry| {
        let error = opened(with_list(&[], &[mish(0, &[entry])], 8)).unwrap_err();
        assert_eq!(error.to_string(), "Invalid argument");
        error.preceding_note().cloned()
    };
    assert_eq!(
        message((ZLIB, 0, 131_073, 0, 1)),
        Some(Note::Error(
            "sector count 131073 for chunk 0 is larger than max (131072)".to_owned()
        ))
    );
    assert_eq!(
        message((1, 0, 1, 0, (64 << 20) + 1)),
        Some(Note::Error(
            "length 67108865 for chunk 0 is larger than max (67108864)".to_owned()
        ))
    );
}

#[test]
fn the_trailer_is_found_in_the_last_sectors_only() {
    let image = with_list(&[0; 100], &[mish(0, &[(0, 0, 8, 0, 0)])], 8);
    let with = |more: usize| {
        let mut longer = image.clone();
        longer.resize(image.len() + more, 0);
        opened(longer)
    };
    assert!(with(0).is_ok());
    assert!(with(512 - image.len() % 512).is_ok());
    let error = with(1024).unwrap_err();
    assert_eq!(error.to_string(), "Could not locate UDIF trailer in dmg file");
    assert!(opened(b"koly".to_vec()).is_err());
    assert!(opened(Vec::new()).is_err());
}

#[test]
fn images_with_any_byte_changed_never_panic() {
    let data = deflate::encode_zlib(&content()[..2048]);
    let entries = [(ZLIB, 0, 4, 0, data.len() as u64), (1, 4, 4, 3, 2048), TERMINATOR];
    for intact in [
        with_list(&data, &[mish(0, &entries)], 8),
        with_fork(&data, &[mish(0, &entries)], 8),
    ] {
        for at in 0..intact.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bytes = intact.clone();
                bytes[at] = value;
                let Ok(image) = opened(bytes) else { continue };
                for offset in [0, image.len() / 2, image.len().saturating_sub(512)] {
                    // An error is fine, a panic is not.
                    drop(image.read_at(&mut [0; 512], offset));
                }
            }
        }
    }
}
