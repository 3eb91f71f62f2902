//! qcow, version 1.

use super::{Image, Open};
use crate::files::{Files, Sparse};
use crate::streams;

const COMPRESSED: u64 = 1 << 63;

/// A header with an L1 table at 4096.
fn qcow(size: u64, cluster_bits: u8, l2_bits: u8, files: &mut Files) -> &mut Sparse {
    let file = files.image().be32(0, &[0x5146_49fb, 1]).be64(24, &[size]);
    file.put(32, [cluster_bits, l2_bits, 0, 0])
        .be32(36, &[0])
        .be64(40, &[4096])
}

/// An image with one L2 table of 8192 entries for clusters of 64 KiB.
fn one_table(entry: u64, cluster: &[u8], files: &mut Files) {
    let file = qcow(512 << 20, 16, 13, files).be64(4096, &[1 << 16]);
    file.be64(1 << 16, &[entry; 8192])
        .put(2 << 16, cluster)
        .len(4 << 16);
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "qcow",
        "qcow-l1-in-a-hole",
        "An L1 table of 2 GiB, all of it a hole.",
        |files| {
            qcow(((1 << 28) - 1) << 29, 16, 13, files).len(4096 + (2 << 30));
        },
    ),
    Image::new(
        "qcow",
        "qcow-l1-cut-off",
        "An L1 table of 2 GiB in a file of 8 KiB.",
        |files| {
            qcow(((1 << 28) - 1) << 29, 16, 13, files).len(8192);
        },
    ),
    Image::new(
        "qcow",
        "qcow-size-of-all-bits",
        "A disk of 2^64-1 bytes.",
        |files| {
            qcow(u64::MAX, 16, 13, files).len(8192);
        },
    ),
    Image::new(
        "qcow",
        "qcow-one-empty-table",
        "128 Ki entries refer to one empty L2 table.",
        |files| {
            let file = qcow((128 << 10) << 29, 16, 13, files);
            file.be64(4096, &vec![2 << 20; 128 << 10]).len(4 << 20);
        },
    ),
    Image::new(
        "qcow",
        "qcow-tables-in-holes",
        "64 Ki entries refer to L2 tables in holes.",
        |files| {
            let entries: Vec<u64> = (0..64 << 10).map(|nth| (16 + nth) << 16).collect();
            qcow((64 << 10) << 29, 16, 13, files)
                .be64(4096, &entries)
                .len((16 + (64 << 10)) << 16);
        },
    ),
    Image::new(
        "qcow",
        "qcow-one-stream",
        "8192 entries refer to one compressed cluster.",
        |files| {
            let stream = streams::deflate(&[7; 1 << 16]);
            one_table(COMPRESSED | (stream.len() as u64) << 47 | 2 << 16, &stream, files);
        },
    ),
    Image::new(
        "qcow",
        "qcow-one-cluster",
        "8192 entries refer to one cluster.",
        |files| {
            one_table(2 << 16, &[7; 1 << 16], files);
        },
    ),
    Image::new(
        "qcow",
        "qcow-table-refers-to-itself",
        "All clusters are the L2 table.",
        |files| {
            one_table(1 << 16, &[], files);
        },
    ),
    Image::new(
        "qcow",
        "qcow-clusters-beyond-the-end",
        "8192 entries refer beyond the end.",
        |files| {
            one_table(1 << 50, &[], files);
        },
    ),
    Image::new(
        "qcow",
        "qcow-small-clusters",
        "Clusters of 512 bytes, in a table for 512 GiB in a hole.",
        |files| {
            qcow(512 << 30, 9, 6, files).len(4096 + (128 << 20));
        },
    ),
    Image::new(
        "qcow",
        "qcow-backing-itself",
        "The image is its own backing image.",
        |files| {
            qcow(1 << 30, 16, 13, files)
                .be64(8, &[48])
                .be32(16, &[5])
                .put(48, b"image")
                .len(8192);
        },
    ),
    Image::new(
        "qcow",
        "qcow-backing-name-too-long",
        "A name of the backing image of 4 GiB.",
        |files| {
            qcow(1 << 30, 16, 13, files)
                .be64(8, &[48])
                .be32(16, &[u32::MAX])
                .len(8192);
        },
    ),
    Image::new(
        "qcow",
        "qcow-encrypted-cluster",
        "AES encryption, with one cluster 8192 times.",
        |files| {
            one_table(2 << 16, &[7; 1 << 16], files);
            files.image().be32(36, &[1]);
        },
    )
    .open(Open::Options {
        objects: "secret,id=s,data=abc",
        node: "driver=qcow,encrypt.format=aes,encrypt.key-secret=s",
    }),
    Image::new(
        "qcow",
        "qcow-tables-of-2-61-entries",
        "L2 tables of 2^61 entries.",
        |files| {
            qcow(512 << 20, 16, 61, files).len(1 << 20);
        },
    ),
    Image::new(
        "qcow",
        "qcow-tables-of-2-255-entries",
        "L2 tables of 2^255 entries.",
        |files| {
            qcow(512 << 20, 16, 255, files).len(1 << 20);
        },
    ),
    Image::new(
        "qcow",
        "qcow-clusters-of-2-255-bytes",
        "Clusters of 2^255 bytes.",
        |files| {
            qcow(512 << 20, 255, 13, files).len(1 << 20);
        },
    ),
];
