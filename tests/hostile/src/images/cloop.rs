//! Compressed loop images.

use super::Image;
use crate::files::{Files, Sparse};
use crate::streams;

const MAGIC: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

fn cloop(block: u32, blocks: u32, files: &mut Files) -> &mut Sparse {
    files.image().put(0, MAGIC).be32(128, &[block, blocks])
}

/// `count` blocks of the same stream, one behind the other.
fn streams_of(block: u32, count: u32, stream: &[u8], files: &mut Files) {
    let at = 136 + 8 * (u64::from(count) + 1);
    let offsets: Vec<u64> = (0..=u64::from(count))
        .map(|nth| at + nth * stream.len() as u64)
        .collect();
    let all = stream.repeat(usize::try_from(count).expect("fits"));
    cloop(block, count, files).be64(136, &offsets).put(at, all);
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "cloop",
        "cloop-no-offsets",
        "64 Mi blocks in a file that ends before their offsets.",
        |files| {
            cloop(65536, (64 << 20) - 1, files);
        },
    ),
    Image::new(
        "cloop",
        "cloop-offsets-in-a-hole",
        "64 Mi offsets, all of them a hole.",
        |files| {
            cloop(65536, (64 << 20) - 1, files).len(512 << 20);
        },
    ),
    Image::new(
        "cloop",
        "cloop-offsets-in-a-hole-then-one",
        "64 Mi offsets in a hole, and one behind it.",
        |files| {
            cloop(65536, (64 << 20) - 1, files).be64(136 + 8 * ((64 << 20) - 2), &[1 << 20, 1 << 20]);
        },
    ),
    Image::new("cloop", "cloop-too-many-blocks", "2^32-1 blocks.", |files| {
        cloop(512, u32::MAX, files).len(4096);
    }),
    Image::new(
        "cloop",
        "cloop-blocks-of-64-mib",
        "Sixteen blocks of 64 MiB that compress to almost nothing.",
        |files| {
            streams_of(64 << 20, 16, &streams::zlib(&vec![7; 64 << 20]), files);
        },
    ),
    Image::new("cloop", "cloop-block-of-4-gib", "A block of 4 GiB.", |files| {
        cloop(!511, 1, files).be64(136, &[152, 4096]).len(4096);
    }),
    Image::new(
        "cloop",
        "cloop-stored-128-mib",
        "Blocks of 512 bytes whose streams have 128 MiB, in a hole.",
        |files| {
            let offsets: Vec<u64> = (0..=64).map(|nth| 4096 + (nth << 27)).collect();
            cloop(512, 64, files).be64(136, &offsets).len(4096 + (64 << 27));
        },
    ),
    Image::new(
        "cloop",
        "cloop-empty-blocks",
        "128 Ki blocks of 64 KiB without a stream.",
        |files| {
            cloop(65536, 128 << 10, files).be64(136, &vec![4096; (128 << 10) + 1]);
        },
    ),
    Image::new(
        "cloop",
        "cloop-offsets-backwards",
        "Offsets that go backwards.",
        |files| {
            let offsets: Vec<u64> = (0..100_000_u64).map(|nth| 1_000_000_000 - nth).collect();
            cloop(65536, 99_999, files).be64(136, &offsets);
        },
    ),
    Image::new(
        "cloop",
        "cloop-small-blocks",
        "64 Ki blocks of a sector.",
        |files| {
            streams_of(512, 64 << 10, &streams::zlib(&[7; 512]), files);
        },
    ),
    Image::new(
        "cloop",
        "cloop-blocks-of-nothing",
        "Blocks of 0 bytes.",
        |files| {
            cloop(0, 16, files).len(1 << 16);
        },
    ),
];
