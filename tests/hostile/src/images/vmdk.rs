//! VMDK.

use super::Image;
use crate::files::{Files, Sparse};
use crate::streams;

const SECTOR: u64 = 512;
const AT_END: u64 = u64::MAX;
const COMPRESSED: u32 = 3 << 16;

/// The header of a sparse extent.
struct Extent {
    version: u32,
    flags: u32,
    capacity: u64,
    grain: u64,
    entries: u32,
    redundant: u64,
    directory: u64,
    descriptor: (u64, u64),
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            version: 1,
            flags: 1,
            capacity: 1 << 21,
            grain: 128,
            entries: 512,
            redundant: 0,
            directory: 64,
            descriptor: (1, 20),
        }
    }
}

impl Extent {
    fn write<'a>(&self, file: &'a mut Sparse) -> &'a mut Sparse {
        file.put(0, b"KDMV").le32(4, &[self.version, self.flags]);
        file.le64(
            12,
            &[self.capacity, self.grain, self.descriptor.0, self.descriptor.1],
        );
        file.le32(44, &[self.entries])
            .le64(48, &[self.redundant, self.directory, 128])
            .put(72, b"\0\n \r\n");
        let compressed = u16::from(self.flags & COMPRESSED != 0);
        file.put(77, compressed.to_le_bytes()).len(1 << 16);
        if self.descriptor.0 > 0 {
            file.put(
                self.descriptor.0 * SECTOR,
                descriptor("monolithicSparse", &["RW 1 SPARSE \"image\""]),
            );
        }
        file
    }
}

fn descriptor(kind: &str, lines: &[&str]) -> Vec<u8> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{}\n",
        lines.join("\n")
    )
    .into_bytes()
}

/// A descriptor with `line` many times.
fn lines(kind: &str, line: &str, count: usize, files: &mut Files) {
    files.image().put(0, descriptor(kind, &vec![line; count]));
}

/// A stream with a grain of `bytes`, to which all entries of `tables` tables refer.
fn stream(extent: &Extent, sectors: u64, bytes: &[u8], files: &mut Files) {
    let compressed = streams::zlib(bytes);
    let file = extent.write(files.image());
    let tables = extent.capacity.div_ceil(extent.grain * u64::from(extent.entries));
    file.le32(
        extent.directory * SECTOR,
        &vec![256; usize::try_from(tables).expect("few")],
    );
    file.le32(
        256 * SECTOR,
        &vec![512; usize::try_from(extent.entries).expect("few")],
    );
    file.le64(512 * SECTOR, &[sectors]).le32(
        512 * SECTOR + 8,
        &[u32::try_from(compressed.len()).expect("small")],
    );
    file.put(512 * SECTOR + 12, &compressed);
    file.len((512 * SECTOR + 12 + compressed.len() as u64).next_multiple_of(SECTOR) + SECTOR);
}

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "vmdk",
        "vmdk-directory-in-a-hole",
        "A directory for 32 Mi tables, all of it a hole.",
        |files| {
            let extent = Extent {
                capacity: (32 << 20) * 128 * 512,
                ..Extent::default()
            };
            extent.write(files.image()).len(256 << 20);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-directory-cut-off",
        "A directory for 32 Mi tables in a file of 64 KiB.",
        |files| {
            Extent {
                capacity: (32 << 20) * 128 * 512,
                ..Extent::default()
            }
            .write(files.image());
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-one-table",
        "A directory of 128 Ki entries refers to one empty table.",
        |files| {
            let extent = Extent {
                capacity: (128 << 10) * 128 * 512,
                ..Extent::default()
            };
            let file = extent.write(files.image());
            file.le32(64 * SECTOR, &vec![2048; 128 << 10]).len(2 << 20);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-tables-in-holes",
        "A directory of 128 Ki entries refers to tables in holes.",
        |files| {
            let extent = Extent {
                capacity: (128 << 10) * 128 * 512,
                ..Extent::default()
            };
            let entries: Vec<u32> = (0..128 << 10).map(|nth| 2048 + 4 * nth).collect();
            extent
                .write(files.image())
                .le32(64 * SECTOR, &entries)
                .len((2048 + (512 << 10)) * SECTOR);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-tables-beyond-the-end",
        "A directory of 128 Ki entries refers beyond the end.",
        |files| {
            let extent = Extent {
                capacity: (128 << 10) * 128 * 512,
                ..Extent::default()
            };
            extent
                .write(files.image())
                .le32(64 * SECTOR, &vec![u32::MAX; 128 << 10]);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-one-grain",
        "8192 entries refer to one grain.",
        |files| {
            let file = Extent {
                capacity: 1 << 20,
                ..Extent::default()
            }
            .write(files.image());
            file.le32(64 * SECTOR, &[256; 16]).le32(256 * SECTOR, &[512; 512]);
            file.put(512 * SECTOR, vec![7; 64 << 10]);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-grains-of-1-gib",
        "Grains of 1 GiB in holes.",
        |files| {
            let extent = Extent {
                capacity: 1 << 30,
                grain: 1 << 21,
                ..Extent::default()
            };
            extent
                .write(files.image())
                .le32(64 * SECTOR, &[256])
                .le32(256 * SECTOR, &[512; 512])
                .len(2 << 30);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-grains-too-large",
        "Grains of 2^63 sectors.",
        |files| {
            Extent {
                grain: 1 << 63,
                ..Extent::default()
            }
            .write(files.image());
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-stream-of-16-mib-grains",
        "A stream with grains of 16 MiB, 64 times the same.",
        |files| {
            let extent = Extent {
                version: 3,
                flags: 1 | COMPRESSED,
                capacity: 64 << 15,
                grain: 1 << 15,
                ..Extent::default()
            };
            stream(&extent, 0, &vec![7; 16 << 20], files);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-stream-of-different-grains",
        "A stream with 32 grains of 16 MiB.",
        |files| {
            let extent = Extent {
                version: 3,
                flags: 1 | COMPRESSED,
                capacity: 32 << 15,
                grain: 1 << 15,
                ..Extent::default()
            };
            let compressed = streams::zlib(&vec![7; 16 << 20]);
            let each = (12 + compressed.len() as u64).next_multiple_of(SECTOR);
            let file = extent.write(files.image());
            file.le32(64 * SECTOR, &[256]);
            for nth in 0..32 {
                let at = 512 * SECTOR + nth * each;
                file.le32(
                    256 * SECTOR + 4 * nth,
                    &[u32::try_from(at / SECTOR).expect("small")],
                );
                file.le64(at, &[nth << 15])
                    .le32(at + 8, &[u32::try_from(compressed.len()).expect("small")]);
                file.put(at + 12, &compressed);
            }
            file.len(512 * SECTOR + 33 * each);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-stream-of-one-grain",
        "All entries of 16 tables refer to one compressed grain.",
        |files| {
            let extent = Extent {
                version: 3,
                flags: 1 | COMPRESSED,
                capacity: 1 << 20,
                ..Extent::default()
            };
            stream(&extent, 0, &[7; 64 << 10], files);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-stream-of-4-gib",
        "A compressed grain that is said to have 4 GiB.",
        |files| {
            let extent = Extent {
                version: 3,
                flags: 1 | COMPRESSED,
                ..Extent::default()
            };
            stream(&extent, 0, &[7; 64 << 10], files);
            files.image().le32(512 * SECTOR + 8, &[u32::MAX]);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-stream-without-footer",
        "A stream whose footer is looked for in 4 TiB of a hole.",
        |files| {
            let extent = Extent {
                version: 3,
                flags: 1 | COMPRESSED,
                directory: AT_END,
                ..Extent::default()
            };
            extent.write(files.image()).len(4 << 40);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-stream-of-markers",
        "A stream of half a million grains of a sector, without a footer.",
        |files| {
            let extent = Extent {
                version: 3,
                flags: 1 | COMPRESSED,
                directory: AT_END,
                ..Extent::default()
            };
            let file = extent.write(files.image());
            let mut sector = [0; 512];
            sector[8] = 1;
            file.put(128 * SECTOR, sector.repeat(16 << 10));
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-descriptor-of-4-tib",
        "An embedded descriptor of 2^54 sectors.",
        |files| {
            Extent {
                descriptor: (1, 1 << 54),
                ..Extent::default()
            }
            .write(files.image());
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-many-extents-on-one-file",
        "30000 extents on one file.",
        |files| {
            lines("twoGbMaxExtentFlat", "RW 1 FLAT \"data\" 0", 30_000, files);
            files.file("data").put(0, [7; 512]);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-many-sparse-extents-on-one-file",
        "2000 sparse extents on one file.",
        |files| {
            lines("twoGbMaxExtentSparse", "RW 2097152 SPARSE \"data\"", 2000, files);
            let extent = Extent {
                descriptor: (0, 0),
                ..Extent::default()
            };
            extent.write(files.file("data"));
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-many-missing-extents",
        "30000 extents on files that do not exist.",
        |files| {
            lines("twoGbMaxExtentFlat", "RW 1 FLAT \"missing\" 0", 30_000, files);
        },
    ),
    Image::new("vmdk", "vmdk-too-many-extents", "40000 extents.", |files| {
        lines("twoGbMaxExtentFlat", "RW 1 ZERO", 40_000, files);
    }),
    Image::new(
        "vmdk",
        "vmdk-zero-extents",
        "30000 extents of zeroes, together 30 PiB.",
        |files| {
            lines("twoGbMaxExtentFlat", "RW 2147483648 ZERO", 30_000, files);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-extent-is-the-descriptor",
        "The descriptor is its own extent.",
        |files| {
            lines("monolithicFlat", "RW 1 FLAT \"image\" 0", 1, files);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-long-line",
        "A descriptor of one line of 4 MiB.",
        |files| {
            let line = format!("RW 1 FLAT \"{}\" 0", "x".repeat((4 << 20) - 300));
            lines("monolithicFlat", &line, 1, files);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-descriptor-in-a-hole",
        "A descriptor that goes on in a hole of 4 TiB.",
        |files| {
            lines("monolithicFlat", "RW 1 ZERO", 1, files);
            files.image().len(4 << 40);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-extent-of-2-63",
        "An extent of 2^63 sectors.",
        |files| {
            lines("monolithicFlat", "RW 9223372036854775807 ZERO", 1, files);
        },
    ),
    Image::new(
        "vmdk",
        "vmdk-parent-itself",
        "The image is its own parent.",
        |files| {
            let lines = ["parentFileNameHint=\"image\"", "RW 2048 ZERO"];
            let text = String::from_utf8(descriptor("monolithicFlat", &lines)).expect("text");
            files.image().put(0, text.replace("ffffffff", "12345678"));
        },
    ),
];
