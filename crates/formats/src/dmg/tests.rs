//! Reads UDIF images that the tests assemble from chunks.

use std::io::Write as _;
use std::sync::Arc;

use diskimage_core::{
    Device, Image, MemoryDevice, NodeOptions, Note, Object, Objects, OpenContext, OpenRequest, Result,
    Secret, errno,
};
use hmac::{Hmac, KeyInit, Mac};

use super::Dmg;
use crate::codec::deflate;
use crate::encryption::{BlockCipher, CipherAlg, HashAlg, derive, keyed, triple_des};
use crate::testing::{contents, open};
use diskimage_core::{ErrorKind, Format as _};

/// Type, first sector, sectors, offset, bytes.
type Entry = (u32, u64, u64, u64, u64);

const ADC: u32 = 0x8000_0004;
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

/// A stream of literals, then a repetition of the last byte if there are several.
fn adc(bytes: &[u8]) -> Vec<u8> {
    let literals = bytes.chunks(128);
    literals
        .flat_map(|part| [&[0x7f + u8::try_from(part.len()).unwrap()][..], part].concat())
        .collect()
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
        (ADC, adc(&content[7168..7680])),
        (1, content[7680..].to_vec()),
    ];
    let (mut data, mut entries) = (Vec::new(), Vec::new());
    let sector_ranges = [(0, 4), (4, 4), (8, 4), (12, 2), (14, 1), (15, 1)];
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
    for encode in [deflate::encode_zlib, bzip2, lzfse, lzma, adc] {
        let data = encode(&content()[..2048]);
        let code = match encode(b"x").first() {
            Some(b'B') => BZIP2,
            Some(b'b') => LZFSE,
            Some(0xfd) => LZMA,
            Some(0x80) => ADC,
            _ => ZLIB,
        };
        for sectors in [3, 5] {
            // A stream of ADC has no end: it is cut where the chunk is full.
            if code == ADC && sectors == 3 {
                continue;
            }
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
    assert!(with(1024).unwrap_err().to_string().contains("UDIF trailer"));
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

/// An encrypted container of version 2 with `plain`, for the passphrase `abc`.
fn container(plain: &[u8], alg: CipherAlg) -> Vec<u8> {
    let (key, iv_key) = (vec![0x11; alg.key_len()], [0x22; 20]);
    let mut file = b"encrcdsa".to_vec();
    let key_bits = u32::try_from(alg.key_len() * 8).unwrap();
    for number in [2, 16, 5, 0x8000_0001, key_bits, 91, 160] {
        file.extend(number.to_be_bytes());
    }
    file.extend([0; 16]);
    file.extend(512_u32.to_be_bytes());
    file.extend((plain.len() as u64).to_be_bytes());
    file.extend(4096_u64.to_be_bytes());
    // Two keys: one for a certificate, one for the passphrase.
    file.extend(2_u32.to_be_bytes());
    for (kind, offset) in [(2_u32, 0_u64), (1, 256)] {
        file.extend(kind.to_be_bytes());
        file.extend(offset.to_be_bytes());
        file.extend(168_u64.to_be_bytes());
    }
    file.resize(256, 0);
    let salt = [0x33; 20];
    let mut keys = [&key[..], &iv_key, b"CKIE\0"].concat();
    let padding = 8 - keys.len() % 8;
    keys.extend(std::iter::repeat_n(u8::try_from(padding).unwrap(), padding));
    let wrapping = derive(HashAlg::Sha1, b"abc", &salt, 10, 24);
    encrypt(&*triple_des(&wrapping).unwrap(), &[0x44; 8], &mut keys);
    for number in [103_u32, 0, 10, 20] {
        file.extend(number.to_be_bytes());
    }
    file.extend(salt);
    file.resize(256 + 48, 0);
    file.extend(8_u32.to_be_bytes());
    file.extend([0x44; 8]);
    file.resize(256 + 84, 0);
    for number in [192, 17, 7, 6, u32::try_from(keys.len()).unwrap()] {
        file.extend(number.to_be_bytes());
    }
    file.extend(keys);
    file.resize(4096, 0);
    let cipher = keyed(alg, &key).unwrap();
    for (number, block) in (0_u32..).zip(plain.chunks(512)) {
        let mut hmac = Hmac::<sha1::Sha1>::new_from_slice(&iv_key).unwrap();
        hmac.update(&number.to_be_bytes());
        let mut block = block.to_vec();
        block.resize(512, 0);
        encrypt(&*cipher, &hmac.finalize().into_bytes()[..16], &mut block);
        file.extend(block);
    }
    file
}

fn encrypt(cipher: &dyn BlockCipher, iv: &[u8], bytes: &mut [u8]) {
    let mut before = iv.to_vec();
    for block in bytes.chunks_mut(iv.len()) {
        block
            .iter_mut()
            .zip(&before)
            .for_each(|(byte, before)| *byte ^= before);
        cipher.encrypt(block);
        before.copy_from_slice(block);
    }
}

fn opened_with(bytes: Vec<u8>, passphrase: Option<&str>) -> Result<Image> {
    let mut objects = Objects::new();
    let mut options = NodeOptions::new();
    if let Some(passphrase) = passphrase {
        objects.add("s", Object::Secret(Secret::new(passphrase.into())))?;
        options.set("key-secret", "s");
    }
    let context = OpenContext::default().with_objects(Arc::new(objects));
    let file = Arc::new(MemoryDevice::new(bytes));
    let layer = Dmg.open(OpenRequest::new(file, "test", &mut options, &context))?;
    Ok(Image::new(layer, None, "test", false))
}

#[test]
fn encrypted_images_of_both_kinds_are_read() {
    let compressed = deflate::encode_zlib(&content());
    let entry = (ZLIB, 0, 16, 0, compressed.len() as u64);
    let udif = with_list(&compressed, &[mish(0, &[entry, TERMINATOR])], 16);
    for alg in [CipherAlg::Aes128, CipherAlg::Aes256] {
        for plain in [udif.clone(), content()] {
            let image = opened_with(container(&plain, alg), Some("abc")).unwrap();
            assert_eq!(contents(&image), content());
            assert!(image.layer().info().unwrap().encrypted);
            let mut part = [0; 700];
            image.read_at(&mut part, 1000).unwrap();
            assert_eq!(part[..], content()[1000..1700]);
        }
    }
}

#[test]
fn encrypted_images_that_cannot_be_read_say_why() {
    let intact = container(&content(), CipherAlg::Aes256);
    let message = |at: usize, bytes: &[u8], passphrase| {
        let mut image = intact.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        let error = opened_with(image, passphrase).unwrap_err();
        (error.kind(), error.chain())
    };
    let abc = Some("abc");
    assert_eq!(message(0, b"e", Some("abd")).0, ErrorKind::Permission);
    assert_eq!(
        message(0, b"e", None).1,
        "Parameter 'key-secret' is required for cipher"
    );
    for (at, value, expected) in [
        (8, 3_u32, "Unsupported encrypted disk image (version 0x3)"),
        (16, 1, "Unsupported encrypted disk image (cipher mode 0x1)"),
        (20, 1, "Unsupported encrypted disk image (cipher 0x1)"),
        (24, 192, "Unsupported encrypted disk image (key bits 0xc0)"),
        (52, 0, "Unsupported encrypted disk image (block size 0x0)"),
        (52, 513, "Unsupported encrypted disk image (block size 0x201)"),
        (72, 33, "Unsupported encrypted disk image (number of keys 0x21)"),
        (
            264,
            (1 << 24) + 1,
            "More than 16777216 PBKDF iterations are not supported",
        ),
        (264, 0, "A key of the encrypted disk image is damaged"),
        (268, 33, "A key of the encrypted disk image is damaged"),
        (356, 65, "A key of the encrypted disk image is damaged"),
        (356, 63, "A key of the encrypted disk image is damaged"),
        (
            96,
            2,
            "The encrypted disk image has no passphrase, only keys for certificates, which are not supported",
        ),
    ] {
        assert_eq!(message(at, &value.to_be_bytes(), abc).1, expected, "{at}");
    }
    let mut cut_off = intact.clone();
    cut_off.truncate(intact.len() - 1);
    let error = opened_with(cut_off, abc).unwrap_err();
    assert!(error.chain().contains("looks truncated"), "{error:?}");
    let error = opened_with([&[0; 1000], &b"cdsaencr"[..]].concat(), abc).unwrap_err();
    assert!(error.chain().contains("version 1"), "{error:?}");
    assert!(
        opened_with(content(), abc).is_err(),
        "a secret for what is not encrypted"
    );
}

#[test]
fn encrypted_images_with_any_byte_changed_never_panic() {
    let intact = container(&content()[..1024], CipherAlg::Aes128);
    for at in (0..600).chain(4096..intact.len()) {
        for value in [0, 0x7f, 0xff] {
            // The upper bytes of the count of iterations would only take time.
            if (264..266).contains(&at) {
                continue;
            }
            let mut bytes = intact.clone();
            bytes[at] = value;
            let Ok(image) = opened_with(bytes, Some("abc")) else {
                continue;
            };
            drop(image.read_at(&mut [0; 512], image.len().saturating_sub(512)));
        }
    }
}

#[test]
fn a_disk_without_a_trailer_is_read_unless_it_was_cut_off() {
    let disk = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = vec![0; 8192];
        edit(&mut bytes);
        opened(bytes)
    };
    let put = |at: usize, field: &'static [u8]| {
        move |bytes: &mut Vec<u8>| bytes[at..at + field.len()].copy_from_slice(field)
    };
    assert_eq!(contents(&opened(content()).unwrap()), content());
    for (name, edit) in [
        ("zeroes", put(0, b"")),
        ("driver map", put(0, b"ER\x02\0\0\0\0\x10")),
        ("GPT", put(512, b"EFI PART")),
        ("HFS+", put(1024, b"H+")),
        ("APFS", put(32, b"NXSB")),
    ] {
        assert_eq!(disk(&edit).map(|image| image.len()).unwrap(), 8192, "{name}");
    }
    let refused = |edit: &dyn Fn(&mut Vec<u8>)| disk(edit).map(drop).unwrap_err().chain();
    for edit in [put(0, b"ER\x02\0\0\0\0\x11"), put(0, b"ER\xff\0\xff\xff\xff\xff")] {
        assert!(refused(&edit).contains("looks truncated"));
    }
    for (at, fields) in [
        (512, &b"EFI PART"[..]),
        (1024, b"HX"),
        (1024, b"BD"),
        (32, b"NXSB"),
    ] {
        let edit = |bytes: &mut Vec<u8>| {
            bytes[at..at + 64].fill(0x7f);
            bytes[at..at + fields.len()].copy_from_slice(fields);
        };
        // Sizes whose product overflows are not those of a disk.
        let outcome = disk(&edit);
        assert!(outcome.is_ok() || outcome.unwrap_err().chain().contains("looks truncated"));
    }
    let missing = "Could not locate UDIF trailer in dmg file";
    for start in [b"koly", b"BZh9", b"bvx2", b"\x78\xda\0\0"] {
        assert_eq!(refused(&put(0, start)), missing);
    }
    assert_eq!(refused(&|bytes| bytes.truncate(8191)), missing);
    assert!(refused(&put(0, b"sprs")).contains("sparseimage"));
}

#[test]
fn images_in_segments_are_refused_by_name() {
    let mut image = with_list(&[0; 100], &[mish(0, &[(0, 0, 8, 0, 0)])], 8);
    let trailer = image.len() - 512;
    image[trailer + 0x3f] = 2;
    let error = opened(image).unwrap_err();
    assert!(error.to_string().contains("2 segments (.dmgpart)"), "{error:?}");
}
