//! VDI.

use super::Image;
use crate::files::{Files, Sparse};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const BLOCKS: u32 = (1 << 29) - 128;

/// A header of a disk of `size` bytes with a map of `blocks` entries.
fn vdi(size: u64, blocks: u32, allocated: u32, files: &mut Files) -> &mut Sparse {
    let data = 512 + (u64::from(blocks) * 4).next_multiple_of(512);
    let file = files.image().put(0, b"<<< hostile >>>\n");
    file.le32(64, &[0xbeda_107f, 0x1_0001, 0x190, 1]);
    file.le32(340, &[512, u32::try_from(data).expect("fits"), 0, 0, 0, 512, 0])
        .le64(368, &[size]);
    file.le32(376, &[1 << 20, 0, blocks, allocated])
        .put(392, [1; 32])
        .len(data)
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "vdi",
        "vdi-map-in-a-hole",
        "A map of 2^29 entries in a hole: all refer to block 0.",
        |files| {
            vdi(u64::from(BLOCKS) * MIB, BLOCKS, 1, files);
        },
    ),
    Image::new(
        "vdi",
        "vdi-map-cut-off",
        "A map of 2^29 entries in a file of 4 KiB.",
        |files| {
            vdi(u64::from(BLOCKS) * MIB, BLOCKS, 0, files).len(4096);
        },
    ),
    Image::new(
        "vdi",
        "vdi-small-disk-large-map",
        "A disk of a sector with a map of 2^29 entries.",
        |files| {
            vdi(512, BLOCKS, 0, files);
        },
    ),
    Image::new("vdi", "vdi-too-many-blocks", "2^32-1 blocks.", |files| {
        let file = vdi(GIB, 1024, 0, files);
        file.le32(384, &[u32::MAX]);
    }),
    Image::new(
        "vdi",
        "vdi-empty-map",
        "A map of a million entries, all unallocated.",
        |files| {
            vdi(1 << 40, 1 << 20, 0, files).put(512, vec![0xff; 4 << 20]);
        },
    ),
    Image::new(
        "vdi",
        "vdi-zero-map",
        "A map of a million entries, all zero blocks.",
        |files| {
            vdi(1 << 40, 1 << 20, 0, files).le32(512, &vec![u32::MAX - 1; 1 << 20]);
        },
    ),
    Image::new(
        "vdi",
        "vdi-one-block",
        "1024 entries refer to one block.",
        |files| {
            let file = vdi(GIB, 1024, 1, files);
            file.put(512, [0; 4096]).put(4608, vec![7; 1 << 20]);
        },
    ),
    Image::new(
        "vdi",
        "vdi-one-hole",
        "A million entries refer to one block, which is a hole.",
        |files| {
            let file = vdi(1 << 40, 1 << 20, 1, files);
            file.put(512, vec![0; 4 << 20]).le32(344, &[8 << 20]).len(9 << 20);
        },
    ),
    Image::new(
        "vdi",
        "vdi-blocks-beyond-the-end",
        "A million entries refer beyond the end.",
        |files| {
            vdi(1 << 40, 1 << 20, u32::MAX, files).put(512, vec![0x7f; 4 << 20]);
        },
    ),
    Image::new(
        "vdi",
        "vdi-map-is-the-header",
        "The map begins at the header.",
        |files| {
            vdi(GIB, 1024, 0, files).le32(340, &[0, 0]);
        },
    ),
    Image::new(
        "vdi",
        "vdi-data-at-4-gib",
        "Data at 4 GiB, behind the end.",
        |files| {
            vdi(GIB, 1024, 1024, files).le32(344, &[!511]);
        },
    ),
    Image::new(
        "vdi",
        "vdi-size-of-all-bits",
        "A disk of 2^64-1 bytes.",
        |files| {
            vdi(u64::MAX, 1024, 0, files);
        },
    ),
    Image::new("vdi", "vdi-blocks-of-nothing", "Blocks of 0 bytes.", |files| {
        vdi(8 * MIB, 8, 0, files).le32(376, &[0]);
    }),
];
