//! Parallels.

use super::Image;
use crate::files::{Files, Sparse};

/// A header: sectors of a cluster, entries, sectors of the disk.
fn parallels(tracks: u32, entries: u32, sectors: u64, files: &mut Files) -> &mut Sparse {
    let file = files
        .image()
        .put(0, b"WithouFreSpacExt")
        .le32(16, &[2, 16, 0, tracks, entries]);
    let end = (64 + u64::from(entries) * 4).next_multiple_of(u64::from(tracks) * 512);
    file.le64(36, &[sectors])
        .le32(44, &[0, u32::try_from(end / 512).expect("fits"), 0]);
    file.le64(56, &[0]).len(end)
}

const ENTRIES: u32 = (1 << 29) - 1;

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "parallels",
        "parallels-table-in-a-hole",
        "A table of 2^29 entries, all of it a hole.",
        |files| {
            parallels(2048, ENTRIES, u64::from(ENTRIES) * 2048, files);
        },
    ),
    Image::new(
        "parallels",
        "parallels-table-cut-off",
        "A table of 2^29 entries in a file of 4 KiB.",
        |files| {
            parallels(2048, ENTRIES, u64::from(ENTRIES) * 2048, files).len(4096);
        },
    ),
    Image::new(
        "parallels",
        "parallels-small-disk-large-table",
        "A disk of a sector with a table of 2^29 entries.",
        |files| {
            parallels(2048, ENTRIES, 1, files);
        },
    ),
    Image::new(
        "parallels",
        "parallels-too-many-entries",
        "2^32-1 entries.",
        |files| {
            parallels(2048, 16, 16 * 2048, files).le32(32, &[u32::MAX]);
        },
    ),
    Image::new(
        "parallels",
        "parallels-one-cluster",
        "1024 entries refer to one cluster.",
        |files| {
            let file = parallels(1024, 1024, 1024 * 1024, files).le32(64, &[1; 1024]);
            file.put(512 << 10, vec![7; 512 << 10]);
        },
    ),
    Image::new(
        "parallels",
        "parallels-one-hole",
        "A million entries refer to one cluster that is a hole.",
        |files| {
            let file = parallels(2048, 1 << 20, 1 << 31, files).le32(64, &vec![6; 1 << 20]);
            file.len(8 << 20);
        },
    ),
    Image::new(
        "parallels",
        "parallels-clusters-beyond-the-end",
        "A million entries refer beyond the end.",
        |files| {
            parallels(2048, 1 << 20, 1 << 31, files).put(64, vec![0x7f; 4 << 20]);
        },
    ),
    Image::new(
        "parallels",
        "parallels-clusters-of-2-gib",
        "Clusters of 2 GiB in holes.",
        |files| {
            let file = parallels((1 << 22) - 1, 1024, ((1 << 22) - 1) * 1024, files);
            file.le32(64, &[1, 2, 3, 4, 5]).len(7 << 31);
        },
    ),
    Image::new(
        "parallels",
        "parallels-small-clusters",
        "Clusters of a sector, four million of them, in an old image.",
        |files| {
            let file = parallels(1, 4 << 20, 4 << 20, files).put(0, b"WithoutFreeSpace");
            file.len(64 + (16 << 20));
        },
    ),
    Image::new(
        "parallels",
        "parallels-extension-of-2-gib",
        "A Format Extension in a cluster of 2 GiB.",
        |files| {
            let file = parallels((1 << 22) - 1, 16, 1 << 25, files).le64(56, &[1 << 22]);
            file.le64(1 << 31, &[0xab23_4cef_23dc_ea87]).len(3 << 31);
        },
    ),
    Image::new(
        "parallels",
        "parallels-extension-of-128-mib",
        "A Format Extension in a cluster of 128 MiB.",
        |files| {
            let file = parallels(1 << 18, 16, 1 << 22, files).le64(56, &[1 << 18]);
            file.le64(1 << 27, &[0xab23_4cef_23dc_ea87]).len(1 << 28);
        },
    ),
    Image::new(
        "parallels",
        "parallels-extension-beyond-the-end",
        "A Format Extension at 2^62.",
        |files| {
            parallels(2048, 16, 16 * 2048, files).le64(56, &[1 << 53]);
        },
    ),
    Image::new(
        "parallels",
        "parallels-size-of-all-bits",
        "A disk of 2^64-1 sectors.",
        |files| {
            parallels(2048, 16, u64::MAX, files);
        },
    ),
    Image::new(
        "parallels",
        "parallels-in-use",
        "An image that was not closed, with a table in a hole.",
        |files| {
            parallels(2048, ENTRIES, u64::from(ENTRIES) * 2048, files).le32(44, &[0x746f_6e59]);
        },
    ),
    Image::new(
        "parallels",
        "parallels-clusters-of-nothing",
        "Clusters of 0 sectors.",
        |files| {
            parallels(2048, 16, 16 * 2048, files).le32(28, &[0]);
        },
    ),
];
