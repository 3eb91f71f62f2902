//! LUKS, version 1.

use super::{Image, Open};

/// Sectors of the material of a slot, and where the payload begins.
const MATERIAL: u32 = 504;
const PAYLOAD: u32 = 8 + 8 * MATERIAL;

/// A header with eight active slots.
pub(super) fn header(iterations: u32, digest_iterations: u32) -> Vec<u8> {
    let mut bytes = vec![0; 592];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"LUKS\xba\xbe\0\x01");
    put(8, b"aes");
    put(40, b"xts-plain64");
    put(72, b"sha256");
    put(104, &PAYLOAD.to_be_bytes());
    put(108, &64_u32.to_be_bytes());
    put(164, &digest_iterations.to_be_bytes());
    put(168, b"01234567-89ab-cdef-0123-456789abcdef");
    for slot in 0..8_u32 {
        let at = 208 + 48 * usize::try_from(slot).expect("small");
        put(at, &0x00ac_71f3_u32.to_be_bytes());
        put(at + 4, &iterations.to_be_bytes());
        put(at + 40, &(8 + slot * MATERIAL).to_be_bytes());
        put(at + 44, &4000_u32.to_be_bytes());
    }
    bytes
}

const SECRET: Open = Open::Options {
    objects: "secret,id=s,data=abc",
    node: "driver=luks,key-secret=s",
};

/// The length of the file: the payload is a hole.
const LEN: u64 = 1 << 32;

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "luks",
        "luks-iterations",
        "2^32-1 iterations in all slots.",
        |files| {
            files.image().put(0, header(u32::MAX, u32::MAX)).len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-iterations-2-30",
        "2^30 iterations in all slots.",
        |files| {
            files.image().put(0, header(1 << 30, 1000)).len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-iterations-of-the-digest",
        "2^30 iterations of the digest, eight times.",
        |files| {
            files.image().put(0, header(1000, 1 << 30)).len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-iterations-of-the-last-slot",
        "The last slot has 2^30 iterations, and the passphrase fits none.",
        |files| {
            files
                .image()
                .put(0, header(1000, 1000))
                .be32(208 + 7 * 48 + 4, &[1 << 30])
                .len(LEN);
        },
    )
    .open(SECRET),
    Image::new("luks", "luks-stripes", "2^32-1 stripes.", |files| {
        files
            .image()
            .put(0, header(1000, 1000))
            .be32(208 + 44, &[u32::MAX])
            .len(LEN);
    })
    .open(SECRET),
    Image::new("luks", "luks-key-of-4-gib", "A master key of 4 GiB.", |files| {
        files
            .image()
            .put(0, header(1000, 1000))
            .be32(108, &[u32::MAX])
            .len(LEN);
    })
    .open(SECRET),
    Image::new(
        "luks",
        "luks-payload-beyond-the-end",
        "A payload at 2 TiB.",
        |files| {
            files
                .image()
                .put(0, header(1000, 1000))
                .be32(104, &[u32::MAX])
                .len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-payload-in-the-header",
        "A payload that begins in the header.",
        |files| {
            files.image().put(0, header(1000, 1000)).be32(104, &[1]).len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-materials-overlap",
        "All slots have the same material.",
        |files| {
            let file = files.image().put(0, header(1000, 1000));
            for slot in 0..8 {
                file.be32(208 + 48 * slot + 40, &[8]);
            }
            file.len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-materials-beyond-the-end",
        "Materials behind the end of the file.",
        |files| {
            files.image().put(0, header(1000, 1000)).len(4096);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-no-passphrase-fits",
        "Eight slots, none of which the passphrase unlocks.",
        |files| {
            files.image().put(0, header(1000, 1000)).len(LEN);
        },
    )
    .open(SECRET),
    Image::new(
        "luks",
        "luks-names-without-end",
        "Names of cipher, mode and hash without a zero.",
        |files| {
            files
                .image()
                .put(0, header(1000, 1000))
                .put(8, [0x1b; 96])
                .len(LEN);
        },
    )
    .open(SECRET),
];
