//! VHD.

use diskimage_testing::{SparseBlock, VhdImage, VhdParent};

use super::Image;
use crate::fields::{index, put};
use crate::files::{Files, Sparse};

const GIB: u64 = 1 << 30;
const ENTRIES: u32 = (1 << 29) - 1;

/// The sum of a structure, whose field for it is at `at`.
fn seal(bytes: &mut [u8], at: usize) {
    put(bytes, at, &[0; 4]);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    put(bytes, at, &(!sum).to_be_bytes());
}

/// An image whose table has `entries` entries, all of them a hole. The footer is at the start only.
fn vhd(size: u64, block: u32, entries: u32, files: &mut Files) -> &mut Sparse {
    let mut bytes = VhdImage {
        size: 8 << 20,
        ..VhdImage::default()
    }
    .build();
    let (footer, header) = bytes[..1536].split_at_mut(512);
    put(footer, 40, &size.to_be_bytes());
    put(footer, 48, &size.to_be_bytes());
    // A geometry of 0 has the size from the field.
    put(footer, 56, &[0xff, 0xff, 16, 255]);
    seal(footer, 64);
    put(header, 28, &entries.to_be_bytes());
    put(header, 32, &block.to_be_bytes());
    seal(header, 36);
    let end = (1536 + u64::from(entries) * 4).next_multiple_of(512);
    files.image().put(0, &bytes[..1536]).put(end, &bytes[..512])
}

fn block(nth: u64, written: std::ops::Range<u64>) -> SparseBlock {
    SparseBlock {
        index: nth,
        written: vec![(written, 7)],
        stale: 0xee,
    }
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "vpc",
        "vpc-table-in-a-hole",
        "A table of 2^29 entries in a hole: all refer to sector 0.",
        |files| {
            vhd(u64::from(ENTRIES) * (2 << 20), 2 << 20, ENTRIES, files);
        },
    ),
    Image::new(
        "vpc",
        "vpc-table-cut-off",
        "A table of 2^29 entries in a file of 4 KiB.",
        |files| {
            vhd(u64::from(ENTRIES) * (2 << 20), 2 << 20, ENTRIES, files).len(4096);
        },
    ),
    Image::new(
        "vpc",
        "vpc-small-blocks",
        "Blocks of a sector, and half a million of them.",
        |files| {
            vhd(256 << 20, 512, 1 << 19, files).put(1536, vec![0xff; 4 << 19]);
        },
    ),
    Image::new(
        "vpc",
        "vpc-blocks-of-2-gib",
        "Blocks of 2 GiB, with bitmaps of 512 KiB in a hole.",
        |files| {
            vhd(1 << 41, 1 << 31, 1024, files)
                .be32(1536, &[4096; 1024])
                .len(8 * GIB);
        },
    ),
    Image::new("vpc", "vpc-empty", "A disk of 2 TiB without a block.", |files| {
        vhd(2040 * GIB, 2 << 20, 1 << 20, files).put(1536, vec![0xff; 4 << 20]);
    }),
    Image::new(
        "vpc",
        "vpc-blocks-beyond-the-end",
        "A million blocks beyond the end.",
        |files| {
            vhd(2040 * GIB, 2 << 20, 1 << 20, files).put(1536, vec![0xf0; 4 << 20]);
        },
    ),
    Image::new(
        "vpc",
        "vpc-one-block",
        "500 entries refer to one block.",
        |files| {
            let file = vhd(1000 << 20, 2 << 20, 500, files).be32(1536, &[8; 500]);
            file.put(4096, [0xff; 512])
                .put(4608, vec![7; 2 << 20])
                .len(4608 + (2 << 20));
        },
    ),
    Image::new(
        "vpc",
        "vpc-checkerboard",
        "A block with every other sector, 64 times.",
        |files| {
            let file = vhd(128 << 20, 2 << 20, 64, files).be32(1536, &[8; 64]);
            file.put(4096, [0x55; 512]).put(4608, vec![7; 2 << 20]);
        },
    ),
    Image::new(
        "vpc",
        "vpc-differencing-loop",
        "A differencing disk that is its own parent.",
        |files| {
            let parent = VhdParent {
                unique_id: [1; 16],
                name: "image".to_owned(),
                locators: vec![(*b"W2ru", ".\\image".to_owned())],
                ..VhdParent::default()
            };
            let image = VhdImage {
                parent: Some(parent),
                blocks: vec![block(0, 0..1)],
                ..VhdImage::default()
            };
            files.image().put(0, image.build());
        },
    ),
    Image::new(
        "vpc",
        "vpc-locator-too-long",
        "A locator of the parent of 4 GiB.",
        |files| {
            let parent = VhdParent {
                unique_id: [2; 16],
                name: "a".repeat(255),
                locators: vec![(*b"W2ru", ".\\a".to_owned()); 8],
                ..VhdParent::default()
            };
            let mut bytes = VhdImage {
                parent: Some(parent),
                ..VhdImage::default()
            }
            .build();
            let header = &mut bytes[512..1536];
            for nth in 0..8 {
                put(header, 576 + nth * 24 + 8, &u32::MAX.to_be_bytes());
            }
            seal(header, 36);
            files.image().put(0, bytes);
        },
    ),
    Image::new(
        "vpc",
        "vpc-header-is-the-footer",
        "The header is at the footer.",
        |files| {
            let mut bytes = VhdImage::default().build();
            put(&mut bytes[..512], 16, &0_u64.to_be_bytes());
            seal(&mut bytes[..512], 64);
            files.image().put(0, bytes);
        },
    ),
    Image::new("vpc", "vpc-table-at-2-63", "A table at 2^63.", |files| {
        let mut bytes = VhdImage::default().build();
        put(&mut bytes[512..1536], 16, &(1_u64 << 63).to_be_bytes());
        seal(&mut bytes[512..1536], 36);
        files.image().put(0, bytes);
    }),
    Image::new(
        "vpc",
        "vpc-fixed-in-a-hole",
        "A fixed disk of 2 TiB in a hole.",
        |files| {
            let mut footer = VhdImage::default().build()[..512].to_vec();
            let size = 2040 * GIB;
            put(&mut footer, 16, &u64::MAX.to_be_bytes());
            put(&mut footer, 40, &size.to_be_bytes());
            put(&mut footer, 48, &size.to_be_bytes());
            put(&mut footer, 60, &2_u32.to_be_bytes());
            seal(&mut footer, 64);
            assert_eq!(index(512), footer.len());
            files.image().put(size, footer);
        },
    ),
    Image::new("vpc", "vpc-blocks-of-nothing", "Blocks of 0 bytes.", |files| {
        vhd(8 << 20, 0, 16, files);
    }),
    Image::new("vpc", "vpc-blocks-of-no-power", "Blocks of 3 bytes.", |files| {
        vhd(8 << 20, 3, 16, files);
    }),
];
