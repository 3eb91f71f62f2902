//! qcow2, versions 2 and 3.

use super::{Image, Open};
use crate::files::{Files, Sparse};
use crate::streams;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const EXTENDED_L2: u64 = 1 << 4;
const DATA_FILE: u64 = 1 << 2;

/// The fields of a header, and the extensions behind it.
struct Qcow2 {
    version: u32,
    bits: u32,
    size: u64,
    l1: (u64, u32),
    refcounts: (u64, u32),
    snapshots: (u64, u32),
    crypt: u32,
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    order: u32,
    compression: u8,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Vec<u8>,
}

impl Default for Qcow2 {
    /// Refcount table, refcount block and L1 table in the clusters 1 to 3 of 64 KiB.
    fn default() -> Self {
        Self {
            version: 3,
            bits: 16,
            size: 512 * MIB,
            l1: (3 << 16, 1),
            refcounts: (1 << 16, 1),
            snapshots: (0, 0),
            crypt: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            order: 4,
            compression: 0,
            extensions: Vec::new(),
            backing: Vec::new(),
        }
    }
}

impl Qcow2 {
    /// The same structures in larger or smaller clusters.
    fn bits(bits: u32) -> Self {
        Self {
            bits,
            l1: (3 << bits, 1),
            refcounts: (1 << bits, 1),
            size: 1 << (2 * bits - 3),
            ..Self::default()
        }
    }

    /// Writes the header, an entry of the refcount table, and refcounts of 1 for the first clusters.
    fn write<'a>(&self, files: &'a mut Files) -> &'a mut Sparse {
        let file = files.image();
        self.header(file);
        let cluster = 1 << self.bits;
        file.be64(self.refcounts.0, &[2 * cluster]);
        if self.order == 4 {
            file.put(2 * cluster, [0, 1].repeat(32));
        }
        file.len(file_end(self.l1.0 + u64::from(self.l1.1) * 8, cluster));
        file
    }

    fn header(&self, file: &mut Sparse) {
        let mut behind = Vec::new();
        for (kind, bytes) in &self.extensions {
            behind.extend_from_slice(&kind.to_be_bytes());
            behind.extend_from_slice(&u32::try_from(bytes.len()).expect("small").to_be_bytes());
            behind.extend_from_slice(bytes);
            behind.resize(behind.len().next_multiple_of(8), 0);
        }
        behind.extend_from_slice(&[0; 8]);
        let name_at = if self.backing.is_empty() {
            0
        } else {
            112 + behind.len() as u64
        };
        file.be32(0, &[0x5146_49fb, self.version]).be64(8, &[name_at]);
        file.be32(
            16,
            &[u32::try_from(self.backing.len()).expect("short"), self.bits],
        );
        file.be64(24, &[self.size]).be32(32, &[self.crypt, self.l1.1]);
        file.be64(40, &[self.l1.0, self.refcounts.0])
            .be32(56, &[self.refcounts.1, self.snapshots.1]);
        file.be64(64, &[self.snapshots.0]);
        if self.version > 2 {
            file.be64(72, &[self.incompatible, self.compatible, self.autoclear]);
            file.be32(96, &[self.order, 112])
                .put(104, [self.compression, 0, 0, 0, 0, 0, 0, 0]);
            file.put(112, &behind);
        }
        if name_at > 0 {
            file.put(name_at, &self.backing);
        }
    }
}

fn file_end(at: u64, cluster: u64) -> u64 {
    at.next_multiple_of(cluster)
}

/// An entry for `stored` bytes of a compressed cluster at `at`.
fn encoded(at: u64, stored: usize, bits: u32) -> u64 {
    let sectors = (at % 512 + stored as u64).div_ceil(512) - 1;
    COMPRESSED | sectors << (62 - (bits - 8)) | at
}

/// An image with one L2 table in cluster 4, all of whose entries are `entry`.
fn one_table(bits: u32, compression: u8, entry: u64, cluster: &[u8], files: &mut Files) {
    let at = 1_u64 << bits;
    let image = Qcow2 {
        compression,
        incompatible: u64::from(compression) << 3,
        ..Qcow2::bits(bits)
    };
    let file = image.write(files);
    file.be64(3 * at, &[(4 * at) | COPIED]);
    file.be64(4 * at, &vec![entry; usize::try_from(at / 8).expect("fits")]);
    file.put(5 * at, cluster).len(7 * at);
}

/// A snapshot of the table: fields, then `id` and `name`.
fn snapshot(l1: (u64, u32), vm_state: u64, id: &[u8], name: &[u8]) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend_from_slice(&l1.0.to_be_bytes());
    entry.extend_from_slice(&l1.1.to_be_bytes());
    entry.extend_from_slice(&u16::try_from(id.len()).expect("short").to_be_bytes());
    entry.extend_from_slice(&u16::try_from(name.len()).expect("short").to_be_bytes());
    entry.extend_from_slice(&[0; 16]);
    entry.extend_from_slice(&u32::try_from(vm_state & 0xffff_ffff).expect("fits").to_be_bytes());
    entry.extend_from_slice(&24_u32.to_be_bytes());
    entry.extend_from_slice(&vm_state.to_be_bytes());
    entry.extend_from_slice(&(512 * MIB).to_be_bytes());
    entry.extend_from_slice(&u64::MAX.to_be_bytes());
    entry.extend_from_slice(id);
    entry.extend_from_slice(name);
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// An image with `count` snapshots that are all the same.
fn snapshots(count: u32, entry: &[u8], files: &mut Files) {
    let image = Qcow2 {
        snapshots: (8 << 16, count),
        ..Qcow2::default()
    };
    let file = image.write(files);
    let count = usize::try_from(count).expect("fits");
    file.put(8 << 16, entry.repeat(count));
    file.len(file_end((8 << 16) + (entry.len() * count) as u64, 1 << 16));
}

/// An entry of the directory of bitmaps.
fn bitmap(table: (u64, u32), granularity: u8, name: &[u8]) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend_from_slice(&table.0.to_be_bytes());
    entry.extend_from_slice(&table.1.to_be_bytes());
    entry.extend_from_slice(&2_u32.to_be_bytes());
    entry.extend_from_slice(&[1, granularity]);
    entry.extend_from_slice(&u16::try_from(name.len()).expect("short").to_be_bytes());
    entry.extend_from_slice(&0_u32.to_be_bytes());
    entry.extend_from_slice(name);
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// An image of `size` bytes whose directory of bitmaps has these entries and is `len` bytes long.
fn bitmaps<'a>(size: u64, count: u32, entries: &[u8], len: u64, files: &'a mut Files) -> &'a mut Sparse {
    let mut extension = count.to_be_bytes().to_vec();
    extension.extend_from_slice(&[0; 4]);
    extension.extend_from_slice(&len.to_be_bytes());
    extension.extend_from_slice(&(8_u64 << 16).to_be_bytes());
    let image = Qcow2 {
        size,
        l1: (3 << 16, u32::try_from(size.div_ceil(512 * MIB)).expect("fits")),
        autoclear: 1,
        extensions: vec![(0x2385_2875, extension)],
        ..Qcow2::default()
    };
    let file = image.write(files);
    file.put(8 << 16, entries);
    file.len(file_end((8 << 16) + len, 1 << 16));
    file
}

/// An image with an L1 table of `entries` entries, the same for all.
fn many_tables(entries: u32, entry: u64, files: &mut Files) -> &mut Sparse {
    let image = Qcow2 {
        size: u64::from(entries) * 512 * MIB,
        l1: (16 << 16, entries),
        ..Qcow2::default()
    };
    let file = image.write(files);
    file.be64(16 << 16, &vec![entry; usize::try_from(entries).expect("fits")]);
    file.len(file_end((16 << 16) + u64::from(entries) * 8, 1 << 16));
    file
}

/// The header of a LUKS volume as `encrypt.format=luks` stores it.
fn encrypted(at: u64, len: u64, header: &[u8], files: &mut Files) {
    let image = Qcow2 {
        crypt: 2,
        extensions: vec![(0x0537_be77, [at.to_be_bytes(), len.to_be_bytes()].concat())],
        ..Qcow2::default()
    };
    let file = image.write(files);
    file.put(8 << 16, header).len(64 << 16);
}

const SECRET: Open = Open::Options {
    objects: "secret,id=s,data=abc",
    node: "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s",
};

pub(super) const IMAGES: &[Image] = &[
    Image::new(
        "qcow2",
        "qcow2-l1-in-a-hole",
        "An L1 table of 32 MiB for 2 PiB, all of it a hole.",
        |files| {
            let image = Qcow2 {
                size: 1 << 51,
                l1: (3 << 16, 4 << 20),
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-v2-l1-in-a-hole",
        "The same in version 2, with clusters of 512 bytes.",
        |files| {
            let image = Qcow2 {
                version: 2,
                bits: 9,
                size: 128 * GIB,
                l1: (3 << 9, 4 << 20),
                refcounts: (512, 1),
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-l1-too-long",
        "An L1 table of 2^32-1 entries, more than is allowed.",
        |files| {
            let image = Qcow2 {
                size: 1 << 62,
                l1: (3 << 16, u32::MAX),
                ..Qcow2::default()
            };
            image.header(files.image());
            files.image().len(MIB);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-size-of-all-bits",
        "A disk of 2^64-1 bytes.",
        |files| {
            let image = Qcow2 {
                size: u64::MAX,
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-empty-table",
        "128 Ki entries of the L1 table refer to one empty L2 table.",
        |files| {
            many_tables(128 << 10, 8 << 16, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-zero-table",
        "32 Ki entries of the L1 table refer to one L2 table of zero clusters.",
        |files| {
            many_tables(32 << 10, 8 << 16, files).be64(8 << 16, &[1; 8192]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-tables-beyond-the-end",
        "A million entries of the L1 table refer beyond the end.",
        |files| {
            many_tables(1 << 20, 1 << 50, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-tables-not-aligned",
        "128 Ki entries of the L1 table are not aligned.",
        |files| {
            many_tables(128 << 10, (8 << 16) + 512, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-tables-in-holes",
        "64 Ki entries of the L1 table refer to L2 tables of 2 MiB in holes.",
        |files| {
            let at = 2 * MIB;
            let image = Qcow2 {
                size: (64 << 10) << 39,
                l1: (3 * at, 64 << 10),
                ..Qcow2::bits(21)
            };
            let file = image.write(files);
            let entries: Vec<u64> = (0..64 << 10).map(|nth| (8 + nth) * at).collect();
            file.be64(3 * at, &entries).len((8 + (64 << 10)) * at);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-l1-refers-to-itself",
        "The L2 table is the L1 table.",
        |files| {
            Qcow2::default().write(files).be64(3 << 16, &[3 << 16 | COPIED]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-l2-refers-to-itself",
        "All clusters are the L2 table.",
        |files| {
            one_table(16, 0, 4 << 16 | COPIED, &[], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-clusters-are-the-header",
        "All clusters are the header.",
        |files| {
            one_table(16, 0, COPIED, &[], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-cluster",
        "8192 entries refer to one cluster.",
        |files| {
            one_table(16, 0, 5 << 16 | COPIED, &[7; 1 << 16], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-hole",
        "8192 entries refer to one cluster that is a hole.",
        |files| {
            one_table(16, 0, 5 << 16, &[], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-clusters-beyond-the-end",
        "8192 entries refer beyond the end of the file.",
        |files| {
            one_table(16, 0, 1 << 50, &[], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-clusters-not-aligned",
        "8192 entries are not aligned.",
        |files| {
            one_table(16, 0, (5 << 16) + 512, &[], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-stream",
        "8192 entries refer to one compressed cluster.",
        |files| {
            let stream = streams::deflate(&[7; 1 << 16]);
            one_table(16, 0, encoded(5 << 16, stream.len(), 16), &stream, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-bomb-of-2-mib",
        "512 entries refer to one compressed cluster of 2 MiB.",
        |files| {
            let stream = streams::deflate(&vec![7; 2 << 20]);
            let at = 2 * MIB;
            let file = Qcow2 {
                size: GIB,
                ..Qcow2::bits(21)
            }
            .write(files);
            file.be64(3 * at, &[(4 * at) | COPIED]);
            file.be64(4 * at, &[encoded(5 * at, stream.len(), 21); 512]);
            file.put(5 * at, &stream).len(7 * at);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-broken-stream",
        "8192 entries refer to a compressed cluster that is noise.",
        |files| {
            one_table(16, 0, encoded(5 << 16, 60_000, 16), &[0xa5; 1 << 16], files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-zstd-window-of-2-gib",
        "Compressed clusters claim a window of 2 GiB.",
        |files| {
            let stream = streams::zstd(7, 1 << 16, 31);
            one_table(16, 1, encoded(5 << 16, stream.len(), 16), &stream, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-zstd-window-of-128-mib",
        "Compressed clusters claim the largest window that is decoded.",
        |files| {
            let stream = streams::zstd(7, 1 << 16, 27);
            one_table(16, 1, encoded(5 << 16, stream.len(), 16), &stream, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcount-table-in-a-hole",
        "A refcount table of 8 MiB, all of it a hole.",
        |files| {
            let image = Qcow2 {
                refcounts: (16 << 16, 128),
                ..Qcow2::default()
            };
            image.write(files).len((16 + 128) << 16);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcount-table-too-long",
        "A refcount table of 2^32-1 clusters.",
        |files| {
            let image = Qcow2 {
                refcounts: (16 << 16, u32::MAX),
                ..Qcow2::default()
            };
            image.header(files.image());
            files.image().len(MIB);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-refcount-block",
        "A million entries of the refcount table refer to one block.",
        |files| {
            let image = Qcow2 {
                refcounts: (16 << 16, 128),
                ..Qcow2::default()
            };
            let file = image.write(files);
            file.be64(16 << 16, &vec![2 << 16; 1 << 20])
                .put(2 << 16, [0, 1].repeat(1 << 15));
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-one-bit-refcounts",
        "One block of 2^19 refcounts of one bit, a million times.",
        |files| {
            let image = Qcow2 {
                refcounts: (16 << 16, 128),
                order: 0,
                ..Qcow2::default()
            };
            let file = image.write(files);
            file.be64(16 << 16, &vec![2 << 16; 1 << 20])
                .put(2 << 16, [0xff; 1 << 16]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcount-blocks-beyond-the-end",
        "A million refcount blocks lie beyond the end.",
        |files| {
            let image = Qcow2 {
                refcounts: (16 << 16, 128),
                ..Qcow2::default()
            };
            image.write(files).be64(16 << 16, &vec![1 << 50; 1 << 20]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcount-table-is-its-block",
        "The refcount table refers to itself.",
        |files| {
            Qcow2::default().write(files).be64(1 << 16, &[1 << 16; 8192]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcounts-of-64-bits",
        "Refcounts of 64 bits that are all 2^64-1.",
        |files| {
            let image = Qcow2 {
                order: 6,
                ..Qcow2::default()
            };
            image.write(files).put(2 << 16, [0xff; 1 << 16]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcounts-leak",
        "Refcounts of a whole block that nothing uses.",
        |files| {
            Qcow2::default()
                .write(files)
                .put(2 << 16, [0, 9].repeat(1 << 15))
                .len(32768 << 16);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-65536",
        "65536 snapshots without names.",
        |files| {
            snapshots(65536, &snapshot((3 << 16, 1), 0, b"1", b""), files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-too-many",
        "2^32-1 snapshots.",
        |files| {
            let image = Qcow2 {
                snapshots: (8 << 16, u32::MAX),
                ..Qcow2::default()
            };
            image.write(files).len(MIB);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-with-long-names",
        "511 snapshots with names of 65535 zero bytes in holes.",
        |files| {
            let entry = snapshot((3 << 16, 1), 0, &[], &[]);
            let image = Qcow2 {
                snapshots: (8 << 16, 511),
                ..Qcow2::default()
            };
            let file = image.write(files);
            for nth in 0..511 {
                let at = (8 << 16) + nth * (2 * 65536 + 64);
                file.put(at, &entry).put(at + 12, [0xff; 4]);
            }
            file.len((8 << 16) + 511 * (2 * 65536 + 64) + (1 << 16));
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-with-escaped-names",
        "30 snapshots with names of 65535 bytes that are escaped.",
        |files| {
            snapshots(30, &snapshot((3 << 16, 1), 0, &[0x80; 65535], &[1; 65535]), files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-with-extra-data",
        "Snapshots with extra data of 4 GiB.",
        |files| {
            let mut entry = snapshot((3 << 16, 1), 0, b"1", b"a");
            entry[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
            snapshots(100, &entry, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-share-an-l1-table",
        "1000 snapshots share an L1 table of 32 MiB in a hole.",
        |files| {
            snapshots(1000, &snapshot((256 << 16, 4 << 20), 1 << 62, b"1", b"a"), files);
            files.image().len((256 << 16) + 32 * MIB);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-share-a-tree",
        "10000 snapshots share an L1 table with a full L2 table.",
        |files| {
            snapshots(10_000, &snapshot((4 << 16, 1), 0, b"1", b"a"), files);
            let file = files.image();
            file.be64(4 << 16, &[5 << 16]);
            file.be64(5 << 16, &vec![6 << 16; 8192]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-snapshots-with-l1-tables-too-long",
        "Snapshots with L1 tables of 2^32-1 entries.",
        |files| {
            snapshots(1000, &snapshot((1 << 50, u32::MAX), 0, b"1", b"a"), files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-bitmaps-with-long-names",
        "60000 bitmaps with names of 1023 zero bytes in holes.",
        |files| {
            let (entry, each) = (bitmap((0, 0), 16, &[]), 1048);
            let file = bitmaps(512 * MIB, 60_000, &[], 60_000 * each, files);
            for nth in 0..60_000 {
                file.put((8 << 16) + nth * each, &entry)
                    .put((8 << 16) + nth * each + 18, [3, 0xff]);
            }
            file.len((8 << 16) + (60_000 * each).next_multiple_of(1 << 16));
        },
    ),
    Image::new("qcow2", "qcow2-bitmaps-65535", "65535 bitmaps.", |files| {
        let entries = bitmap((9 << 16, 1), 16, b"a").repeat(65535);
        bitmaps(512 * MIB, 65535, &entries, entries.len() as u64, files);
    }),
    Image::new(
        "qcow2",
        "qcow2-bitmaps-too-many",
        "2^32-1 bitmaps in a directory of 2^63 bytes.",
        |files| {
            bitmaps(512 * MIB, u32::MAX, &[], 4096, files).be64(112 + 16, &[1 << 63]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-bitmap-table-in-a-hole",
        "A bitmap table of 2^32-1 entries, all of it a hole.",
        |files| {
            let entry = bitmap((16 << 16, u32::MAX), 9, b"b");
            bitmaps(512 * MIB, 1, &entry, entry.len() as u64, files).len(40 * GIB);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-bitmaps-share-a-table",
        "1000 bitmaps share a table of 8192 entries.",
        |files| {
            let entries = bitmap((16 << 16, 8192), 9, b"b").repeat(1000);
            let file = bitmaps(1 << 41, 1000, &entries, entries.len() as u64, files);
            file.be64(16 << 16, &vec![20 << 16; 8192]).len(32 << 16);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-bitmap-of-512-mib",
        "A bitmap of 512 MiB, all of whose bits are set by its table.",
        |files| {
            let entry = bitmap((1024 << 16, 8192), 9, b"b");
            let file = bitmaps(1 << 41, 1, &entry, entry.len() as u64, files);
            file.be64(1024 << 16, &vec![1; 8192]).len(1026 << 16);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-bitmap-with-extra-data",
        "A bitmap with extra data of 4 GiB.",
        |files| {
            let mut entry = bitmap((0, 0), 16, b"b");
            entry[20..24].copy_from_slice(&u32::MAX.to_be_bytes());
            bitmaps(512 * MIB, 1, &entry, entry.len() as u64, files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-backing-itself",
        "The image is its own backing image.",
        |files| {
            Qcow2 {
                backing: b"image".to_vec(),
                ..Qcow2::default()
            }
            .write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-backing-loop",
        "Three images are backing images of each other.",
        |files| {
            for (name, next) in [("image", "b"), ("b", "c"), ("c", "image")] {
                let mut one = Files::default();
                Qcow2 {
                    backing: next.as_bytes().to_vec(),
                    ..Qcow2::default()
                }
                .write(&mut one);
                files.add(name, one);
            }
        },
    ),
    Image::new("qcow2", "qcow2-chain-of-300", "A chain of 300 images.", |files| {
        for nth in 0..300 {
            let name = if nth == 0 {
                "image".to_owned()
            } else {
                format!("image{nth}")
            };
            let mut one = Files::default();
            let backing = format!("image{}", nth + 1).into_bytes();
            Qcow2 {
                backing: if nth == 299 { Vec::new() } else { backing },
                ..Qcow2::default()
            }
            .write(&mut one);
            files.add(&name, one);
        }
    }),
    Image::new(
        "qcow2",
        "qcow2-chain-of-150-with-tables",
        "A chain of 150 images of 2 MiB clusters, all with tables.",
        |files| {
            for nth in 0..150 {
                let name = if nth == 0 {
                    "image".to_owned()
                } else {
                    format!("image{nth}")
                };
                let (mut one, at) = (Files::default(), 2 * MIB);
                let backing = format!("image{}", nth + 1).into_bytes();
                let backing = if nth == 149 { Vec::new() } else { backing };
                let file = Qcow2 {
                    backing,
                    size: 1 << 39,
                    ..Qcow2::bits(21)
                }
                .write(&mut one);
                file.be64(3 * at, &[4 * at]).be64(4 * at, &[5 * at]).len(6 * at);
                files.add(&name, one);
            }
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-backing-name-of-control-characters",
        "A name of the backing image of 1023 control characters.",
        |files| {
            Qcow2 {
                backing: vec![0x1b; 1023],
                ..Qcow2::default()
            }
            .write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-backing-name-too-long",
        "A name of the backing image of 4 GiB.",
        |files| {
            Qcow2 {
                backing: b"x".to_vec(),
                ..Qcow2::default()
            }
            .write(files)
            .be32(16, &[u32::MAX]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-backing-is-a-bomb",
        "The backing image is one compressed cluster, 8192 times.",
        |files| {
            let stream = streams::deflate(&[7; 1 << 16]);
            let mut below = Files::default();
            one_table(16, 0, encoded(5 << 16, stream.len(), 16), &stream, &mut below);
            files.add("below", below);
            let backing =
                b"json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"below\"}}".to_vec();
            Qcow2 {
                backing,
                ..Qcow2::default()
            }
            .write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-backing-json-deep",
        "The backing image is JSON with a thousand brackets.",
        |files| {
            let backing = [b"json:".to_vec(), vec![b'['; 1000]].concat();
            Qcow2 {
                backing,
                ..Qcow2::default()
            }
            .write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-data-file-is-the-image",
        "The data file is the image.",
        |files| {
            let image = Qcow2 {
                incompatible: DATA_FILE,
                extensions: vec![(0x4441_5441, b"image".to_vec())],
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-data-file-in-a-hole",
        "A raw data file of 4 TiB without data.",
        |files| {
            let image = Qcow2 {
                incompatible: DATA_FILE,
                autoclear: 2,
                size: 1 << 42,
                l1: (3 << 16, 8192),
                extensions: vec![(0x4441_5441, b"data".to_vec())],
                ..Qcow2::default()
            };
            image.write(files);
            files.file("data").len(1 << 42);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-data-file-name-too-long",
        "A name of the data file of 60000 bytes.",
        |files| {
            let image = Qcow2 {
                incompatible: DATA_FILE,
                extensions: vec![(0x4441_5441, vec![b'a'; 60_000])],
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-extension-too-long",
        "A header extension of 4 GiB.",
        |files| {
            let image = Qcow2 {
                extensions: vec![(0x1234_5678, vec![0; 8])],
                ..Qcow2::default()
            };
            image.write(files).be32(116, &[u32::MAX]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-many-extensions",
        "A quarter of a million unknown header extensions.",
        |files| {
            let image = Qcow2 {
                extensions: vec![(0x1234_5678, Vec::new()); 250_000],
                ..Qcow2::bits(21)
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-feature-names",
        "A table of 40000 names of unknown features, which the image needs.",
        |files| {
            let mut names = Vec::new();
            for nth in 0..40_000_u32 {
                let mut name = vec![1; 48];
                name[0] = 0;
                name[1] = nth.to_le_bytes()[0] & 63;
                names.extend_from_slice(&name);
            }
            let image = Qcow2 {
                incompatible: !31,
                extensions: vec![(0x6803_f857, names)],
                ..Qcow2::bits(21)
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-extended-checkerboard",
        "Subclusters alternate between data and nothing.",
        |files| {
            let image = Qcow2 {
                incompatible: EXTENDED_L2,
                size: 256 * MIB,
                ..Qcow2::default()
            };
            let file = image.write(files);
            file.be64(3 << 16, &[4 << 16 | COPIED]);
            file.be64(4 << 16, &[5 << 16 | COPIED, 0x5555_5555].repeat(4096))
                .len(6 << 16);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-extended-contradiction",
        "Subclusters are data and zero at once.",
        |files| {
            let image = Qcow2 {
                incompatible: EXTENDED_L2,
                size: 256 * MIB,
                ..Qcow2::default()
            };
            let file = image.write(files);
            file.be64(3 << 16, &[4 << 16 | COPIED]);
            file.be64(4 << 16, &[5 << 16 | COPIED, u64::MAX].repeat(4096))
                .len(6 << 16);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-dirty-and-corrupt",
        "An image that is dirty and marked as corrupt, with an L1 table in a hole.",
        |files| {
            let image = Qcow2 {
                incompatible: 3,
                compatible: 1,
                size: 1 << 51,
                l1: (3 << 16, 4 << 20),
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-legacy-encryption",
        "AES encryption, with one cluster 8192 times.",
        |files| {
            let image = Qcow2 {
                crypt: 1,
                ..Qcow2::default()
            };
            let file = image.write(files);
            file.be64(3 << 16, &[4 << 16 | COPIED])
                .be64(4 << 16, &[5 << 16 | COPIED; 8192])
                .len(6 << 16);
        },
    )
    .open(Open::Options {
        objects: "secret,id=s,data=abc",
        node: "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s",
    }),
    Image::new(
        "qcow2",
        "qcow2-luks-header-too-long",
        "A LUKS header of 2^63 bytes.",
        |files| {
            encrypted(8 << 16, 1 << 63, &super::luks::header(1000, 1000), files);
        },
    )
    .open(SECRET),
    Image::new(
        "qcow2",
        "qcow2-luks-header-beyond-the-end",
        "A LUKS header beyond the end of the file.",
        |files| {
            encrypted(1 << 50, 2 * MIB, &[], files);
        },
    )
    .open(SECRET),
    Image::new(
        "qcow2",
        "qcow2-luks-iterations",
        "A LUKS header with 2^32-1 iterations.",
        |files| {
            encrypted(8 << 16, 2 * MIB, &super::luks::header(u32::MAX, u32::MAX), files);
        },
    )
    .open(SECRET),
    Image::new(
        "qcow2",
        "qcow2-luks-iterations-2-30",
        "A LUKS header with 2^30 iterations in each slot.",
        |files| {
            encrypted(8 << 16, 2 * MIB, &super::luks::header(1 << 30, 1 << 30), files);
        },
    )
    .open(SECRET),
    Image::new(
        "qcow2",
        "qcow2-clusters-of-2-63-bytes",
        "Clusters of 2^63 bytes.",
        |files| {
            Qcow2::default().write(files).be32(20, &[63]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-refcounts-of-2-32-bits",
        "Refcounts of 2^(2^32-1) bits.",
        |files| {
            Qcow2::default().write(files).be32(96, &[u32::MAX]);
        },
    ),
    Image::new(
        "qcow2",
        "qcow2-data-file-is-a-json-name",
        "A data file whose name has options, which name a file of the machine.",
        |files| {
            let name = br#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}"#;
            let image = Qcow2 {
                incompatible: DATA_FILE,
                extensions: vec![(0x4441_5441, name.to_vec())],
                ..Qcow2::default()
            };
            image.write(files);
        },
    ),
];
