//! qed.

use super::Image;
use crate::files::{Files, Sparse};

/// A header with an L1 table in the first cluster behind it.
fn qed(size: u64, cluster: u32, table: u32, features: u64, files: &mut Files) -> &mut Sparse {
    let file = files.image().le32(0, &[0x0044_4551, cluster, table, 1]);
    file.le64(16, &[features, 0, 0, u64::from(cluster), size]);
    file.len(u64::from(cluster) * u64::from(table + 1))
}

/// Clusters of 64 KiB and tables of four; all entries of the L1 table are `entry`.
fn tables(entry: u64, files: &mut Files) -> &mut Sparse {
    qed(32768 << 31, 1 << 16, 4, 0, files).le64(1 << 16, &vec![entry; 32768])
}

/// One L2 table with the same entry 32768 times.
fn one_table(entry: u64, cluster: &[u8], files: &mut Files) {
    let file = qed(512 << 20, 1 << 16, 4, 0, files).le64(1 << 16, &[5 << 16]);
    file.le64(5 << 16, &vec![entry; 32768])
        .put(9 << 16, cluster)
        .len(10 << 16);
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "qed",
        "qed-tables-of-1-gib",
        "Tables of 1 GiB, all of them holes.",
        |files| {
            qed(1 << 50, 64 << 20, 16, 0, files);
        },
    ),
    Image::new(
        "qed",
        "qed-one-table-of-1-gib",
        "The L1 table of 1 GiB refers to an L2 table of 1 GiB in a hole.",
        |files| {
            qed(1 << 50, 64 << 20, 16, 0, files)
                .le64(64 << 20, &[17 << 26; 64])
                .len(33 << 26);
        },
    ),
    Image::new(
        "qed",
        "qed-one-empty-table",
        "32768 entries refer to one empty L2 table.",
        |files| {
            tables(5 << 16, files).len(9 << 16);
        },
    ),
    Image::new(
        "qed",
        "qed-tables-in-holes",
        "32768 entries refer to L2 tables in holes.",
        |files| {
            let entries: Vec<u64> = (0..32768).map(|nth| (5 + 4 * nth) << 16).collect();
            tables(0, files)
                .le64(1 << 16, &entries)
                .len((5 + 4 * 32768) << 16);
        },
    ),
    Image::new(
        "qed",
        "qed-tables-beyond-the-end",
        "32768 entries refer beyond the end.",
        |files| {
            tables(1 << 50, files);
        },
    ),
    Image::new(
        "qed",
        "qed-tables-are-the-l1-table",
        "32768 entries refer to the L1 table.",
        |files| {
            tables(1 << 16, files);
        },
    ),
    Image::new(
        "qed",
        "qed-one-cluster",
        "All entries of a table refer to one cluster.",
        |files| {
            one_table(9 << 16, &[7; 1 << 16], files);
        },
    ),
    Image::new(
        "qed",
        "qed-clusters-beyond-the-end",
        "All entries of a table refer beyond the end.",
        |files| {
            one_table(1 << 50, &[], files);
        },
    ),
    Image::new(
        "qed",
        "qed-zero-clusters",
        "All entries of a table are zero clusters.",
        |files| {
            one_table(1, &[], files);
        },
    ),
    Image::new(
        "qed",
        "qed-need-check",
        "An image that needs a check, with tables of 1 GiB in holes.",
        |files| {
            qed(1 << 50, 64 << 20, 16, 2, files);
        },
    ),
    Image::new(
        "qed",
        "qed-header-of-2-32-clusters",
        "A header of 2^32-1 clusters.",
        |files| {
            qed(1 << 30, 1 << 16, 4, 0, files).le32(12, &[u32::MAX]);
        },
    ),
    Image::new(
        "qed",
        "qed-size-of-all-bits",
        "A disk of 2^64-512 bytes.",
        |files| {
            qed(!511, 64 << 20, 16, 0, files);
        },
    ),
    Image::new(
        "qed",
        "qed-backing-itself",
        "The image is its own backing image.",
        |files| {
            qed(1 << 30, 1 << 16, 4, 1, files)
                .le32(56, &[64, 5])
                .put(64, b"image");
        },
    ),
    Image::new(
        "qed",
        "qed-backing-name-of-4-gib",
        "A name of the backing image of 4 GiB.",
        |files| {
            let file = qed(1 << 30, 1 << 16, 4, 1, files)
                .le32(12, &[1 << 16])
                .le64(40, &[1 << 32]);
            file.le32(56, &[64, u32::MAX - 64]).len((1 << 32) + (4 << 16));
        },
    ),
];
