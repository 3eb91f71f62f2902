//! Disk images of macOS.

use super::Image;
use crate::files::{Files, Sparse};
use crate::streams;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Types of chunks.
const ZERO: u32 = 0;
const RAW: u32 = 1;
const ADC: u32 = 0x8000_0004;
const ZLIB: u32 = 0x8000_0005;
const BZIP2: u32 = 0x8000_0006;
const LZFSE: u32 = 0x8000_0007;
const XZ: u32 = 0x8000_0008;

/// A chunk: its type, sectors of the disk, and bytes of the file.
type Chunk = (u32, u64, u64, u64, u64);

/// An image whose data fork begins with `data`, with these chunks, of `sectors` sectors.
fn dmg<'a>(data: &[u8], chunks: &[Chunk], sectors: u64, files: &'a mut Files) -> &'a mut Sparse {
    let mut mish = vec![0; 204];
    mish[..4].copy_from_slice(b"mish");
    mish[16..24].copy_from_slice(&sectors.to_be_bytes());
    for (kind, sector, count, offset, len) in chunks {
        mish.extend_from_slice(&kind.to_be_bytes());
        mish.extend_from_slice(&[0; 4]);
        for number in [sector, count, offset, len] {
            mish.extend_from_slice(&number.to_be_bytes());
        }
    }
    let list = [b"<plist><data>", &streams::base64(&mish)[..], b"</data></plist>"].concat();
    let at = (data.len() as u64).next_multiple_of(SECTOR);
    let file = files.image();
    file.put(0, data).put(at, &list);
    trailer(file, at, list.len() as u64, sectors);
    file
}

/// The trailer behind a property list.
fn trailer(file: &mut Sparse, list: u64, len: u64, sectors: u64) {
    let at = (list + len).next_multiple_of(SECTOR);
    file.put(at, b"koly\0\0\0\x04\0\0\x02\0").be32(at + 0x3c, &[1]);
    file.be64(at + 0xd8, &[list, len])
        .be64(at + 0x1ec, &[sectors])
        .len(at + 512);
}

/// `count` chunks of `each` bytes that share one stream.
fn shared(kind: u32, stream: &[u8], each: u64, count: u64, files: &mut Files) {
    let sectors = each / SECTOR;
    let chunks: Vec<Chunk> = (0..count)
        .map(|nth| (kind, nth * sectors, sectors, 0, stream.len() as u64))
        .collect();
    dmg(stream, &chunks, count * sectors, files);
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "dmg",
        "dmg-one-zlib-stream",
        "2000 chunks of 1 MiB share one zlib stream.",
        |files| {
            shared(ZLIB, &streams::zlib(&vec![7; 1 << 20]), MIB, 2000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-one-bzip2-stream",
        "2000 chunks of 1 MiB share one bzip2 stream.",
        |files| {
            shared(BZIP2, &streams::bzip2(&vec![7; 1 << 20]), MIB, 2000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-one-lzfse-stream",
        "2000 chunks of 64 KiB share one LZFSE stream.",
        |files| {
            shared(LZFSE, &streams::lzfse(&[7; 1 << 16]), 1 << 16, 2000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-one-xz-stream",
        "2000 chunks of 1 MiB share one xz stream.",
        |files| {
            shared(XZ, &streams::xz(&vec![7; 1 << 20], 1 << 16), MIB, 2000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-zlib-bomb",
        "Chunks of 64 MiB of zeroes in a zlib stream.",
        |files| {
            shared(ZLIB, &streams::zlib(&vec![0; 64 << 20]), 64 * MIB, 16, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-bzip2-bomb",
        "Chunks of 64 MiB in a bzip2 stream of 100 bytes.",
        |files| {
            shared(BZIP2, &streams::bzip2(&vec![7; 64 << 20]), 64 * MIB, 4, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-xz-dictionary-of-64-mib",
        "Chunks whose xz streams have dictionaries of 64 MiB.",
        |files| {
            shared(XZ, &streams::xz(&vec![7; 1 << 20], 64 << 20), MIB, 64, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-xz-dictionary-of-128-mib",
        "Chunks whose xz streams have dictionaries of 128 MiB.",
        |files| {
            shared(XZ, &streams::xz(&vec![7; 1 << 20], 128 << 20), MIB, 64, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-different-xz-streams",
        "Thirty chunks of 64 MiB with xz streams of their own.",
        |files| {
            let stream = streams::xz(&vec![7; 64 << 20], 32 << 20);
            let sectors = 64 * MIB / SECTOR;
            let each = (stream.len() as u64).next_multiple_of(SECTOR);
            let mut data = Vec::new();
            for _ in 0..8 {
                data.extend_from_slice(&stream);
                data.resize(data.len().next_multiple_of(512), 0);
            }
            let chunks: Vec<Chunk> = (0..8)
                .map(|nth| (XZ, nth * sectors, sectors, nth * each, each))
                .collect();
            dmg(&data, &chunks, 8 * sectors, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-stored-64-mib",
        "Chunks whose streams are said to have 64 MiB, in a hole.",
        |files| {
            let sectors = 64 * MIB / SECTOR;
            let chunks: Vec<Chunk> = (0..32)
                .map(|nth| (ZLIB, nth * sectors, sectors, nth, 64 * MIB))
                .collect();
            let file = files.image();
            file.len(0);
            let mut inner = Files::default();
            dmg(&[], &chunks, 32 * sectors, &mut inner);
            files.add("image", inner);
        },
    ),
    Image::new(
        "dmg",
        "dmg-too-many-sectors",
        "A chunk of 2^32 sectors.",
        |files| {
            dmg(&[0; 512], &[(ZLIB, 0, 1 << 32, 0, 512)], 1 << 32, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-empty-disk",
        "A disk of 2 TiB that is one chunk of zeroes.",
        |files| {
            dmg(&[0; 512], &[(ZERO, 0, 1 << 32, 0, 0)], 1 << 32, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-many-zero-chunks",
        "A quarter of a million chunks of zeroes, a sector each.",
        |files| {
            let chunks: Vec<Chunk> = (0..200_000).map(|nth| (ZERO, nth, 1, 0, 0)).collect();
            dmg(&[0; 512], &chunks, 200_000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-many-raw-chunks",
        "200000 raw chunks of the same sector.",
        |files| {
            let chunks: Vec<Chunk> = (0..200_000).map(|nth| (RAW, nth, 1, 0, 512)).collect();
            dmg(&[7; 512], &chunks, 200_000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-no-chunks",
        "A disk of 2 TiB without chunks.",
        |files| {
            dmg(&[0; 512], &[], 1 << 32, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-chunks-overlap",
        "200000 chunks that all begin at the first sector.",
        |files| {
            dmg(
                &[7; 512],
                &vec![(RAW, 0, 1 << 16, 0, 512); 200_000],
                1 << 16,
                files,
            );
        },
    ),
    Image::new(
        "dmg",
        "dmg-unknown-chunks",
        "200000 chunks of types that nobody knows.",
        |files| {
            let chunks: Vec<Chunk> = (0..200_000)
                .map(|nth| (nth | 0x7000_0000, 0, 1, 0, 512))
                .collect();
            dmg(&[7; 512], &chunks, 1, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-adc-of-noise",
        "2000 chunks of 1 MiB that are no ADC streams.",
        |files| {
            shared(ADC, &[0xff; 4096], MIB, 2000, files);
        },
    ),
    Image::new(
        "dmg",
        "dmg-list-of-16-mib",
        "A property list of 16 MiB, all of it a hole.",
        |files| {
            trailer(files.image(), 0, 16 * MIB, 1 << 32);
        },
    ),
    Image::new(
        "dmg",
        "dmg-list-of-2-63",
        "A property list of 2^63 bytes.",
        |files| {
            let file = files.image();
            trailer(file, 0, MIB, 1 << 32);
            file.be64(MIB + 0xe0, &[1 << 63]);
        },
    ),
    Image::new(
        "dmg",
        "dmg-list-of-tags",
        "A property list of 16 MiB of opened elements.",
        |files| {
            let tags = b"<data>".repeat((16 << 20) / 6);
            files.image().put(0, &tags);
            trailer(files.image(), 0, tags.len() as u64, 1 << 32);
        },
    ),
    Image::new(
        "dmg",
        "dmg-many-empty-blocks",
        "A property list of a million empty elements.",
        |files| {
            let tags = b"<data></data>".repeat(1 << 20);
            files.image().put(0, &tags);
            trailer(files.image(), 0, tags.len() as u64, 1 << 32);
        },
    ),
    Image::new(
        "dmg",
        "dmg-container-of-iterations",
        "An encrypted container with keys of 2^24 iterations.",
        |files| {
            let file = files.image().put(0, b"encrcdsa");
            file.be32(8, &[2, 16, 5, 0x8000_0001, 128, 91, 160])
                .be32(52, &[512]);
            file.be64(56, &[MIB, 4096]).be32(72, &[32]).len(4 * MIB);
            for key in 0..32 {
                file.be32(76 + key * 20, &[1]).be64(80 + key * 20, &[1024, 168]);
            }
            file.be32(1024, &[103, 0, u32::MAX, 20])
                .be32(1024 + 48, &[8])
                .be32(1024 + 84, &[192, 17, 0, 6, 48]);
        },
    )
    .open(super::Open::Options {
        objects: "secret,id=s,data=abc",
        node: "driver=dmg,key-secret=s",
    }),
];
