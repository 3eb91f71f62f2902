//! Raw files, and files that begin like images.

use super::{Image, Open};

const KIB: u64 = 1 << 10;
const TIB: u64 = 1 << 40;

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "raw",
        "raw-hole",
        "A file of 4 TiB without a byte of data.",
        |files| {
            files.image().len(4 * TIB);
        },
    ),
    Image::new(
        "raw",
        "raw-many-holes",
        "Data in every other block: as many extents as blocks.",
        |files| {
            for nth in 0..2048 {
                files.image().put(nth * 8 * KIB, [7; 100]);
            }
            files.image().len(TIB);
        },
    ),
    Image::new("raw", "raw-empty", "A file of no bytes.", |files| {
        files.image().len(0);
    }),
    Image::new(
        "raw",
        "raw-one-byte",
        "A file of one byte, less than a sector.",
        |files| {
            files.image().put(0, [1]);
        },
    ),
    Image::new(
        "",
        "raw-polyglot-qcow2-vhd",
        "Begins as qcow2 and ends as VHD: no format is sure.",
        |files| {
            let image = files.image();
            image.put(0, b"QFI\xfb\0\0\0\x03").len(TIB);
            image.put(TIB - 512, b"conectix\0\0\0\x02\0\x01\0\0");
        },
    )
    .open(Open::Probe),
    Image::new(
        "",
        "raw-polyglot-vmdk-text",
        "A text of 64 KiB that begins as a descriptor and has no line.",
        |files| {
            files
                .image()
                .put(0, b"# Disk DescriptorFile\n")
                .put(22, vec![b'#'; 64 << 10]);
        },
    )
    .open(Open::Probe),
    Image::new(
        "",
        "raw-magic-of-all",
        "Has the magic of several formats at their offsets.",
        |files| {
            let image = files.image();
            image.put(0, b"QED\0").put(64, 0xbeda_107f_u32.to_le_bytes());
            image.put(32 << 10, b"vhdxfile").len(TIB);
        },
    )
    .open(Open::Probe),
    Image::new(
        "raw",
        "raw-offset-beyond",
        "A window of the disk that begins in a hole of 2 TiB.",
        |files| {
            files.image().len(4 * TIB);
        },
    )
    .open(Open::Options {
        objects: "",
        node: "driver=raw,offset=1099511627776,size=2199023255552",
    }),
];
