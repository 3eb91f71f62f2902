//! Redologs of Bochs.

use super::Image;
use crate::files::{Files, Sparse};

const TIB: u64 = 1 << 40;

/// A header: entries of the catalog, bytes of a bitmap and of an extent, and of the disk.
fn bochs(entries: u32, bitmap: u32, extent: u32, disk: u64, files: &mut Files) -> &mut Sparse {
    let file = files
        .image()
        .put(0, b"Bochs Virtual HD Image\0")
        .put(32, b"Redolog\0")
        .put(48, b"Growing\0");
    file.le32(64, &[0x2_0000, 512, entries, bitmap, extent])
        .le64(88, &[disk])
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "bochs",
        "bochs-empty",
        "A disk of 2 TiB without an extent.",
        |files| {
            bochs(1 << 18, 2048, 1 << 23, 2 * TIB, files).put(512, vec![0xff; 4 << 18]);
        },
    ),
    Image::new(
        "bochs",
        "bochs-catalog-in-a-hole",
        "A catalog of a million entries in a hole: all refer to the first extent.",
        |files| {
            bochs(1 << 20, 2048, 1 << 23, 8 * TIB, files).len(512 + (4 << 20) + 2048 + (8 << 20));
        },
    ),
    Image::new(
        "bochs",
        "bochs-one-extent",
        "256 entries refer to one full extent of 1 MiB.",
        |files| {
            let file = bochs(256, 512, 1 << 20, 256 << 20, files).put(512, [0; 1024]);
            file.put(1536, [0xff; 512]).put(2048, vec![7; 1 << 20]);
        },
    ),
    Image::new(
        "bochs",
        "bochs-checkerboard",
        "An extent with every other sector, 64 times.",
        |files| {
            let file = bochs(64, 2048, 1 << 23, 64 << 23, files).put(512, [0; 256]);
            file.put(768, [0x55; 2048]).len(768 + 2048 + (8 << 20));
        },
    ),
    Image::new(
        "bochs",
        "bochs-extents-beyond-the-end",
        "A catalog of a million extents beyond the end.",
        |files| {
            bochs(1 << 20, 2048, 1 << 23, 8 * TIB, files).put(512, vec![0x7f; 4 << 20]);
        },
    ),
    Image::new(
        "bochs",
        "bochs-catalog-too-long",
        "A catalog of 2^32-1 entries.",
        |files| {
            bochs(u32::MAX, 512, 512, TIB, files).len(4096);
        },
    ),
    Image::new("bochs", "bochs-extent-too-large", "Extents of 2 GiB.", |files| {
        bochs(1024, 1 << 19, 1 << 31, TIB, files).len(4096);
    }),
    Image::new("bochs", "bochs-bitmap-too-large", "Bitmaps of 4 GiB.", |files| {
        bochs(1024, u32::MAX, 1 << 20, 1 << 30, files)
            .put(512, [0; 4096])
            .len(1 << 33);
    }),
    Image::new(
        "bochs",
        "bochs-catalog-beyond-the-end",
        "A file that ends before its catalog.",
        |files| {
            bochs(1 << 20, 2048, 1 << 23, 8 * TIB, files).len(512);
        },
    ),
    Image::new(
        "bochs",
        "bochs-small-extents",
        "A disk of 512 MiB in extents of a sector.",
        |files| {
            bochs(1 << 20, 512, 512, 512 << 20, files).put(512, vec![0xff; 4 << 20]);
        },
    ),
    Image::new(
        "bochs",
        "bochs-extents-of-nothing",
        "Extents of 0 bytes.",
        |files| {
            bochs(16, 512, 0, 8 << 20, files).len(1 << 20);
        },
    ),
    Image::new(
        "bochs",
        "bochs-bitmaps-of-nothing",
        "Bitmaps of 0 bytes.",
        |files| {
            bochs(16, 0, 1 << 20, 8 << 20, files).len(1 << 20);
        },
    ),
];
