//! VHDX.

use diskimage_testing::{FULLY_PRESENT, SparseBlock, VhdxImage, guid, seal_vhdx};

use super::Image;
use crate::fields::{index, put};
use crate::files::{Files, Sparse};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const UNIT: usize = 4096;
const LOG_GUID: [u8; 16] = [5; 16];
/// Where logs of these images are: behind everything else.
const LOG: u64 = 16 * MIB;

/// Headers that refer to a log of `len` bytes with entries.
fn with_log(len: u32, bytes: &mut [u8]) {
    for at in [64 * KIB, 128 * KIB].map(index) {
        put(bytes, at + 48, &LOG_GUID);
        put(bytes, at + 68, &len.to_le_bytes());
        put(bytes, at + 72, &LOG.to_le_bytes());
        seal_vhdx(&mut bytes[at..at + UNIT]);
    }
}

/// An image with a log of `len` bytes that begins with `log`.
fn logged<'a>(len: u32, log: &[u8], files: &'a mut Files) -> &'a mut Sparse {
    let mut bytes = VhdxImage::default().build();
    with_log(len, &mut bytes);
    files
        .image()
        .put(0, bytes)
        .put(LOG, log)
        .len(LOG + u64::from(len))
}

/// The header of an entry of the log.
struct Entry {
    len: u32,
    tail: u32,
    sequence: u64,
    descriptors: u32,
    flushed: u64,
    last: u64,
}

impl Entry {
    /// The entry with these descriptors, and its checksum.
    fn bytes(&self, descriptors: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).expect("fits")];
        put(&mut bytes, 0, b"loge");
        put(&mut bytes, 8, &self.len.to_le_bytes());
        put(&mut bytes, 12, &self.tail.to_le_bytes());
        put(&mut bytes, 16, &self.sequence.to_le_bytes());
        put(&mut bytes, 24, &self.descriptors.to_le_bytes());
        put(&mut bytes, 32, &LOG_GUID);
        put(&mut bytes, 48, &self.flushed.to_le_bytes());
        put(&mut bytes, 56, &self.last.to_le_bytes());
        put(&mut bytes, 64, descriptors);
        seal_vhdx(&mut bytes);
        bytes
    }
}

fn zero(offset: u64, len: u64) -> Vec<u8> {
    [
        b"zero\0\0\0\0",
        &len.to_le_bytes()[..],
        &offset.to_le_bytes(),
        &1_u64.to_le_bytes(),
    ]
    .concat()
}

/// An entry of zero descriptors.
fn zeroes(descriptors: &[Vec<u8>], last: u64) -> Vec<u8> {
    let len = (64 + descriptors.len() * 32).next_multiple_of(UNIT);
    let entry = Entry {
        len: u32::try_from(len).expect("fits"),
        tail: 0,
        sequence: 1,
        descriptors: u32::try_from(descriptors.len()).expect("fits"),
        flushed: 5 * MIB,
        last,
    };
    entry.bytes(&descriptors.concat())
}

/// An image of `size` bytes whose table of `len` bytes at 16 MiB is a hole.
fn large_table(size: u64, block: u64, len: u32, files: &mut Files) -> &mut Sparse {
    let mut bytes = VhdxImage {
        size,
        block_size: block,
        ..VhdxImage::default()
    }
    .build();
    for at in [192 * KIB, 256 * KIB].map(index) {
        put(&mut bytes, at + 32, &(16 * MIB).to_le_bytes());
        put(&mut bytes, at + 40, &len.to_le_bytes());
        seal_vhdx(&mut bytes[at..at + index(64 * KIB)]);
    }
    files.image().put(0, bytes).len(16 * MIB + u64::from(len))
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "vhdx",
        "vhdx-log-of-4-gib",
        "A log of almost 4 GiB in a hole.",
        |files| {
            logged(u32::MAX - 0x000f_ffff, &[], files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-entry-of-4-gib",
        "An entry of the log that says it has almost 4 GiB.",
        |files| {
            let mut entry = Entry {
                len: 4096,
                tail: 0,
                sequence: 1,
                descriptors: 1,
                flushed: 0,
                last: 0,
            }
            .bytes(&[]);
            put(&mut entry, 8, &(u32::MAX - 0x000f_ffff).to_le_bytes());
            logged(u32::MAX - 0x000f_ffff, &entry, files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-of-entries-of-2-gib",
        "Every sector of the log begins an entry of 2 GiB.",
        |files| {
            let mut entry = Entry {
                len: 4096,
                tail: 0,
                sequence: 1,
                descriptors: 1,
                flushed: 0,
                last: 0,
            }
            .bytes(&[]);
            put(&mut entry, 8, &(1_u32 << 31).to_le_bytes());
            logged(3 << 30, &entry.repeat(512), files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-of-zero-descriptors",
        "500000 zero descriptors, which overlap.",
        |files| {
            let descriptors: Vec<_> = (0..500_000)
                .map(|nth| zero(5 * MIB + (nth % 1000) * 4096, 8 * MIB))
                .collect();
            let entry = zeroes(&descriptors, 16 * MIB);
            logged(64 << 20, &entry, files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-of-separate-zeroes",
        "500000 zero descriptors, each of 4 KiB, with gaps.",
        |files| {
            let descriptors: Vec<_> = (0..500_000)
                .rev()
                .map(|nth| zero(GIB + nth * 8192, 4096))
                .collect();
            let entry = zeroes(&descriptors, 16 * MIB);
            logged(64 << 20, &entry, files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-of-zeroes-of-2-62",
        "Zero descriptors of 2^62 bytes.",
        |files| {
            let descriptors = vec![zero(4 * GIB, 1 << 62); 1000];
            logged(1 << 20, &zeroes(&descriptors, 16 * MIB), files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-that-extends-the-file",
        "A log that makes the file 4 EiB long.",
        |files| {
            logged(1 << 20, &zeroes(&[zero(5 * MIB, 4096)], 1 << 62), files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-of-many-entries",
        "32768 entries of 4 KiB that make no sequence.",
        |files| {
            let log: Vec<u8> = (1..=8192)
                .flat_map(|nth| {
                    let tail = 4096;
                    Entry {
                        len: 4096,
                        tail,
                        sequence: nth,
                        descriptors: 0,
                        flushed: 0,
                        last: 0,
                    }
                    .bytes(&[])
                })
                .collect();
            logged(32 << 20, &log, files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-log-too-many-descriptors",
        "An entry with 2^32-1 descriptors.",
        |files| {
            let entry = Entry {
                len: 4096,
                tail: 0,
                sequence: 1,
                descriptors: u32::MAX,
                flushed: 0,
                last: 0,
            };
            logged(1 << 20, &entry.bytes(&[]), files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-table-in-a-hole",
        "A table of 512 MiB for 64 TiB, all of it a hole.",
        |files| {
            large_table(64 << 40, MIB, 513 << 20, files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-table-too-small",
        "A disk of 64 TiB with a table of 1 MiB.",
        |files| {
            large_table(64 << 40, MIB, 1 << 20, files);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-one-block",
        "1024 entries refer to one block.",
        |files| {
            let file = large_table(GIB, MIB, 1 << 20, files);
            file.le64(16 * MIB, &[(18 * MIB) | FULLY_PRESENT; 1024])
                .put(18 * MIB, vec![7; 1 << 20]);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-blocks-beyond-the-end",
        "A million entries refer beyond the end.",
        |files| {
            let file = large_table(1 << 40, MIB, 16 << 20, files);
            file.le64(16 * MIB, &vec![1 << 50 | FULLY_PRESENT; 1 << 20]);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-blocks-in-unknown-states",
        "A million entries have a state that there is not.",
        |files| {
            let file = large_table(1 << 40, MIB, 16 << 20, files);
            file.le64(16 * MIB, &vec![5; 1 << 20]);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-blocks-of-256-mib",
        "Blocks of 256 MiB in holes.",
        |files| {
            let file = large_table(1 << 40, 256 * MIB, 1 << 20, files);
            let entries: Vec<u64> = (0..1024)
                .map(|nth| ((17 + 256 * nth) * MIB) | FULLY_PRESENT)
                .collect();
            file.le64(16 * MIB, &entries).len(300 * GIB);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-parent-locator",
        "A parent locator with many long values.",
        |files| {
            let value = "x".repeat(15_000);
            let image = VhdxImage {
                parent: Some((0..16).map(|nth| (format!("key{nth}"), value.clone())).collect()),
                ..VhdxImage::default()
            };
            files.image().put(0, image.build());
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-parent-itself",
        "The image is its own parent.",
        |files| {
            let linkage = "{01010101-0101-0101-0101-010101010101}".to_owned();
            let image = VhdxImage {
                parent: Some(vec![
                    ("parent_linkage".to_owned(), linkage),
                    ("relative_path".to_owned(), ".\\image".to_owned()),
                ]),
                blocks: vec![(
                    7,
                    SparseBlock {
                        index: 0,
                        written: vec![(0..1, 7)],
                        stale: 0xee,
                    },
                )],
                ..VhdxImage::default()
            };
            files.image().put(0, image.build());
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-too-many-metadata-items",
        "2047 items of the same kind.",
        |files| {
            let mut bytes = VhdxImage::default().build();
            let at = index(4 * MIB);
            put(&mut bytes, at + 10, &2047_u16.to_le_bytes());
            for nth in 5..2047 {
                put(
                    &mut bytes,
                    at + 32 + nth * 32,
                    &guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8"),
                );
                put(&mut bytes, at + 48 + nth * 32, &65536_u32.to_le_bytes());
            }
            files.image().put(0, bytes);
        },
    ),
    Image::new(
        "vhdx",
        "vhdx-too-many-regions",
        "A region table of 2^32-1 regions.",
        |files| {
            let mut bytes = VhdxImage::default().build();
            for at in [192 * KIB, 256 * KIB].map(index) {
                put(&mut bytes, at + 8, &u32::MAX.to_le_bytes());
                seal_vhdx(&mut bytes[at..at + index(64 * KIB)]);
            }
            files.image().put(0, bytes);
        },
    ),
    Image::new("vhdx", "vhdx-blocks-of-nothing", "Blocks of 0 bytes.", |files| {
        let mut bytes = VhdxImage::default().build();
        let table = bytes.windows(8).position(|window| window == b"metadata");
        // The first item.
        let size = table.expect("is there") + index(64 * KIB);
        assert_eq!(bytes[size..size + 4], (1_u32 << 20).to_le_bytes());
        put(&mut bytes, size, &[0; 4]);
        files.image().put(0, bytes);
    }),
];
