//! Images of other programs, built by hand from the specification: descriptors with extents of all kinds, streams, and
//! names of other machines.

use std::collections::BTreeMap;

use super::*;
use crate::vmdk::header::{DEFLATE, HOSTED_MAGIC, HostedHeader, LINE_ENDS, flag};
use diskimage_core::{Backing, Encoder, LOOSE, Probe};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// A descriptor; an empty field is left out.
struct Text<'a> {
    version: &'a str,
    cid: &'a str,
    parent_cid: &'a str,
    create_type: &'a str,
    encoding: &'a str,
    parent: &'a [u8],
    extents: &'a [&'a [u8]],
    line_end: &'a str,
}

const TEXT: Text<'static> = Text {
    version: "version=1",
    cid: "CID=12345678",
    parent_cid: "parentCID=ffffffff",
    create_type: "createType=\"custom\"",
    encoding: "",
    parent: b"",
    extents: &[],
    line_end: "\n",
};

impl Text<'_> {
    fn bytes(&self) -> Vec<u8> {
        let lines = [
            b"# Disk DescriptorFile",
            self.version.as_bytes(),
            self.encoding.as_bytes(),
            self.cid.as_bytes(),
            self.parent_cid.as_bytes(),
            self.create_type.as_bytes(),
            self.parent,
            b"# Extent description",
        ];
        let lines = lines.into_iter().chain(self.extents.iter().copied());
        let lines = lines.filter(|line| !line.is_empty());
        lines
            .flat_map(|line| [line, self.line_end.as_bytes()].concat())
            .collect()
    }
}

/// The files of a machine. Only these exist.
#[derive(Clone, Debug, Default)]
struct Machine(BTreeMap<String, Arc<MemoryDevice>>, Arc<Mutex<Vec<String>>>);

impl Machine {
    fn with(files: &[(&str, &[u8])]) -> Self {
        let mut machine = Self::default();
        for (name, bytes) in files {
            machine.put(name, bytes.to_vec());
        }
        machine
    }

    fn put(&mut self, name: &str, bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), Arc::new(MemoryDevice::new(bytes)));
    }

    /// Opens the descriptor as `dir/disk.vmdk`.
    fn open(&self, descriptor: &[u8], write: bool) -> Result<Image> {
        let file = Arc::new(MemoryDevice::new(descriptor.to_vec()));
        self.open_file(file, write)
    }

    fn open_file(&self, file: Arc<MemoryDevice>, write: bool) -> Result<Image> {
        let context = OpenContext::new(Arc::new(self.clone()));
        let layer = Vmdk.open(OpenRequest {
            write,
            ..OpenRequest::new(file, "dir/disk.vmdk", &mut NodeOptions::new(), &context)
        })?;
        Ok(Image::new(layer, None, "dir/disk.vmdk", write))
    }

    fn opened(&self) -> Vec<String> {
        self.1.lock().expect("no panic").clone()
    }
}

impl Gate for Machine {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        match self.0.get(name) {
            Some(file) => {
                self.1.lock().expect("no panic").push(name.to_owned());
                Ok(Arc::clone(file) as Arc<dyn Device>)
            }
            None => Err(Error::new(ErrorKind::NotFound, format!("no file {name}"))),
        }
    }

    fn locate(&self, image: &str, name: &str) -> Option<String> {
        let directory = image.rfind('/').map_or("", |slash| &image[..=slash]);
        let mut names = self.0.keys().filter_map(|path| path.strip_prefix(directory));
        names
            .find(|found| found.to_lowercase() == name.to_lowercase())
            .map(str::to_owned)
    }
}

fn sectors(byte: u8, count: usize) -> Vec<u8> {
    vec![byte; count * SECTOR]
}

/// A sparse extent with one grain table, whose grains are in the order of the file.
struct SparseFile<'a> {
    grains: &'a [(u32, u8)],
    capacity: u64,
    descriptor: &'a [u8],
    /// The directory is behind the grains, and a footer says where.
    footer: bool,
    compressed: bool,
    end_marker: bool,
    padding: usize,
}

const SPARSE: SparseFile<'static> = SparseFile {
    grains: &[(0, 5), (2, 6)],
    capacity: 384,
    descriptor: b"",
    footer: false,
    compressed: false,
    end_marker: true,
    padding: 0,
};

const STREAM: SparseFile<'static> = SparseFile {
    compressed: true,
    footer: true,
    ..SPARSE
};

impl SparseFile<'_> {
    /// Sectors in front of the grains: the header, the descriptor, and the directory with its table at sector 3.
    const OVERHEAD: u64 = 128;

    fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0; usize::try_from(Self::OVERHEAD).expect("small") * SECTOR];
        file[SECTOR..][..self.descriptor.len()].copy_from_slice(self.descriptor);
        let mut table = vec![0; 512 * 4];
        for (nth, byte) in self.grains {
            let at = file.len() / SECTOR;
            let entry = usize::try_from(*nth).expect("small") * 4;
            table[entry..entry + 4].copy_from_slice(&u32::try_from(at).expect("small").to_le_bytes());
            file.extend(self.grain(*nth, *byte));
        }
        let marker = |kind: u32, sectors: u64| {
            let mut marker = sectors.to_le_bytes().to_vec();
            marker.extend(0_u32.to_le_bytes());
            marker.extend(kind.to_le_bytes());
            marker.resize(SECTOR, 0);
            marker
        };
        let directory_at = if self.footer {
            file.extend(marker(1, 4));
            let table_at = file.len() / SECTOR;
            file.extend(&table);
            file.extend(marker(2, 1));
            let directory_at = file.len() / SECTOR;
            file.extend(u32::try_from(table_at).expect("small").to_le_bytes());
            file.resize(file.len().next_multiple_of(SECTOR), 0);
            directory_at
        } else {
            file[22 * SECTOR..][..4].copy_from_slice(&23_u32.to_le_bytes());
            file[23 * SECTOR..][..table.len()].copy_from_slice(&table);
            22
        };
        let mut header = self.header(directory_at as u64);
        if self.footer {
            file.extend(marker(3, 1));
            file.extend(header.as_bytes());
            header.gd_offset = U64::new(u64::MAX);
        }
        file[..SECTOR].copy_from_slice(header.as_bytes());
        if self.compressed && self.end_marker {
            file.resize(file.len() + SECTOR, 0);
        }
        file.resize(file.len() + self.padding, 0);
        file
    }

    fn grain(&self, nth: u32, byte: u8) -> Vec<u8> {
        let data = vec![byte; GRAIN];
        if !self.compressed {
            return data;
        }
        let mut stream = Vec::new();
        crate::codec::deflate::StreamEncoder::new(None)
            .encode(&data, &mut stream)
            .expect("encodes");
        let mut grain = (u64::from(nth) * 128).to_le_bytes().to_vec();
        grain.extend(u32::try_from(stream.len()).expect("small").to_le_bytes());
        grain.extend(stream);
        grain.resize(grain.len().next_multiple_of(SECTOR), 0);
        grain
    }

    fn header(&self, directory_at: u64) -> HostedHeader {
        let compressed = if self.compressed {
            flag::COMPRESSED | flag::MARKERS
        } else {
            0
        };
        let has_descriptor = !self.descriptor.is_empty();
        HostedHeader {
            magic: HOSTED_MAGIC,
            version: U32::new(if self.compressed { 3 } else { 1 }),
            flags: U32::new(flag::LINE_ENDS | compressed),
            capacity: U64::new(self.capacity),
            grain_size: U64::new(128),
            descriptor_offset: U64::new(has_descriptor.into()),
            descriptor_size: U64::new(if has_descriptor { 20 } else { 0 }),
            num_gtes_per_gt: U32::new(512),
            rgd_offset: U64::new(0),
            gd_offset: U64::new(directory_at),
            over_head: U64::new(Self::OVERHEAD),
            unclean_shutdown: 0,
            line_ends: LINE_ENDS,
            compress_algorithm: U16::new(if self.compressed { DEFLATE } else { 0 }),
            pad: [0; 433],
        }
    }

    fn disk(&self) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(self.capacity).expect("small") * SECTOR];
        for (nth, byte) in self.grains {
            let at = usize::try_from(*nth).expect("small") * GRAIN;
            disk[at..at + GRAIN].fill(*byte);
        }
        disk
    }
}

#[test]
fn extents_without_write_access_keep_their_place() {
    let machine = Machine::with(&[("dir/a", &sectors(1, 8)), ("dir/b", &sectors(2, 8))]);
    let text = Text {
        extents: &[
            b"RDONLY 2 ZERO",
            b"RDONLY 4 FLAT \"a\" 1",
            b"RW 3 ZERO",
            b"RW 2 FLAT \"b\" 0",
            b"RDONLY 5 ZERO",
        ],
        ..TEXT
    };
    let expected = [
        sectors(0, 2),
        sectors(1, 4),
        sectors(0, 3),
        sectors(2, 2),
        sectors(0, 5),
    ]
    .concat();
    let image = machine.open(&text.bytes(), false).expect("opens");
    assert!(contents(&image) == expected);
    image
        .layer()
        .check(Repair::No, &Progress::none())
        .expect("is sound");

    let image = machine.open(&text.bytes(), true).expect("opens");
    for (sector, why) in [
        (1, "The extent at 0x0 is RDONLY, and cannot be written"),
        (3, "The extent at 0x400 is RDONLY, and cannot be written"),
        (6, "The extent at 0xc00 is ZERO, and cannot be written"),
        (10, "The extent at 0x1600 is RDONLY, and cannot be written"),
    ] {
        let error = image.write_at(&[9; 1024], sector * 512).expect_err("is refused");
        assert_eq!(error.chain(), why);
    }
    let zeroed = image.write_zeroes(ByteRange::new(1024, 1536), ZeroMode::KeepAllocated);
    assert!(zeroed.is_err(), "zeroes change a read-only extent as well");
    image.write_at(&[9; 512], 9 * 512).expect("is writable");
    assert!(machine.0["dir/a"].contents() == sectors(1, 8));
    let error = image.resize(1 << 20, Preallocation::Off).expect_err("is refused");
    assert_eq!(
        error.chain(),
        "The extent at 0x1600 is RDONLY, and cannot be written"
    );
}

#[test]
fn a_read_only_stream_is_not_written() {
    let machine = Machine::with(&[("dir/s", &STREAM.bytes())]);
    let text = Text {
        create_type: "createType=\"streamOptimized\"",
        extents: &[b"RDONLY 384 SPARSE \"s\""],
        ..TEXT
    };
    let image = machine.open(&text.bytes(), true).expect("opens");
    assert!(contents(&image) == STREAM.disk());
    let error = image
        .write_at(&vec![1; GRAIN], GRAIN as u64)
        .expect_err("is refused");
    assert_eq!(
        error.chain(),
        "The extent at 0x0 is RDONLY, and cannot be written"
    );
    assert!(image.write_encoded(GRAIN as u64, &[1; 20]).is_err());
    image.flush().expect("flushes");
    assert!(machine.0["dir/s"].contents() == STREAM.bytes());
}

#[test]
fn an_extent_without_access_can_be_shown_but_not_read() {
    let machine = Machine::with(&[("dir/a", &sectors(1, 8))]);
    let text = Text {
        create_type: "createType=\"partitionedDevice\"",
        extents: &[
            b"RW 2 FLAT \"a\" 0",
            b"NOACCESS 4 FLAT \"\\\\.\\PhysicalDrive0\" 2",
            b"NOACCESS 1 ZERO",
            b"RW 1 FLAT \"a\" 7",
        ],
        ..TEXT
    };
    let image = machine.open(&text.bytes(), false).expect("opens");
    assert_eq!(image.len(), 8 * 512);
    image.layer().info().expect("has details");
    image
        .layer()
        .check(Repair::No, &Progress::none())
        .expect("is sound");
    let mut sector = [0; 512];
    for nth in [0, 1, 7] {
        image.read_at(&mut sector, nth * 512).expect("reads");
        assert_eq!(sector, [1; 512]);
    }
    for nth in [2, 5] {
        let error = image.read_at(&mut sector, nth * 512).expect_err("is refused");
        let why = "The extent from 0x400 to 0xc00 is NOACCESS: its data is not part of the image";
        assert_eq!(error.chain(), "Permission denied");
        assert_eq!(error.preceding_note(), Some(&Note::Error(why.to_owned())));
    }
    assert!(image.read_at(&mut sector, 6 * 512).is_err());
}

#[test]
fn flat_images_of_all_create_types_are_read() {
    for create_type in [
        "monolithicFlat",
        "MONOLITHICFLAT",
        "2GbMaxExtentFlat",
        "twoGbMaxExtentFlat",
        "vmfs",
        "vmfsThin",
        "vmfsPreallocated",
        "vmfsEagerZeroedThick",
        "vmfsRaw",
        "vmfsRDM",
        "vmfsRDMP",
        "vmfsRawDeviceMap",
        "vmfsPassthroughRawDeviceMap",
        "custom",
        "fullDevice",
        "partitionedDevice",
    ] {
        let lines: [&[u8]; 8] = [
            b"RW 4 FLAT \"a.vmdk\" 1",
            b"RW 5 VMFS \"a.vmdk\"",
            b"RW 4 VMFSRDM \"a.vmdk\"",
            b"RW 4 VMFSRAW \"a.vmdk\"",
            b"  RW\t4   FLAT \t \"a.vmdk\"   1  ",
            b"RW 4 FLAT \"a.vmdk\" 0 partitionUUID \\\\?\\Volume{1}",
            b"rw 4 flat \"a.vmdk\" 0",
            b"RW 4 VMFS \"a.vmdk\" partitionUUID 1",
        ];
        for line in lines {
            let machine = Machine::with(&[("dir/a.vmdk", &sectors(1, 5))]);
            let line_text = String::from_utf8_lossy(line).into_owned();
            let text = Text {
                create_type: &format!("createType=\"{create_type}\""),
                extents: &[line, b"RW 1 ZERO"],
                ..TEXT
            };
            let image = machine.open(&text.bytes(), false).expect("opens");
            let first = if line_text.starts_with("RW 5") { 5 } else { 4 };
            let expected = [sectors(1, first), sectors(0, 1)].concat();
            assert!(contents(&image) == expected, "{create_type} {line_text}");
        }
    }
}

#[test]
fn sparse_images_of_all_create_types_are_read() {
    let cowd = |grain: u8| {
        let mut file = vec![0; 100 * SECTOR];
        file[..4].copy_from_slice(b"COWD");
        for (at, number) in [(4, 1_u32), (8, 3), (12, 16), (16, 8), (20, 4), (24, 1)] {
            file[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        file[4 * SECTOR..][..4].copy_from_slice(&8_u32.to_le_bytes());
        file[8 * SECTOR..][..4].copy_from_slice(&50_u32.to_le_bytes());
        file[50 * SECTOR..58 * SECTOR].fill(grain);
        file
    };
    let hosted = |bytes: Vec<u8>, disk: Vec<u8>| (bytes, "SPARSE", disk);
    let compressed = SparseFile {
        descriptor: b"",
        ..STREAM
    };
    for (create_type, (bytes, kind, disk)) in [
        ("twoGbMaxExtentSparse", hosted(SPARSE.bytes(), SPARSE.disk())),
        ("2GbMaxExtentSparse", hosted(SPARSE.bytes(), SPARSE.disk())),
        ("custom", hosted(SPARSE.bytes(), SPARSE.disk())),
        ("streamOptimized", hosted(compressed.bytes(), compressed.disk())),
        (
            "vmfsSparse",
            (cowd(9), "VMFSSPARSE", [sectors(9, 8), sectors(0, 8)].concat()),
        ),
        (
            "vmfsThin",
            (cowd(9), "VMFSSPARSE", [sectors(9, 8), sectors(0, 8)].concat()),
        ),
    ] {
        let mut machine = Machine::default();
        machine.put("dir/part", bytes);
        let line = format!("RW {} {kind} \"part\"", disk.len() / SECTOR);
        let text = Text {
            create_type: &format!("createType=\"{create_type}\""),
            extents: &[line.as_bytes()],
            ..TEXT
        };
        let image = machine.open(&text.bytes(), false).expect("opens");
        assert!(contents(&image) == disk, "{create_type}");
        image
            .layer()
            .check(Repair::No, &Progress::none())
            .expect("is sound");
    }
}

#[test]
fn the_mapping_file_of_a_device_is_not_taken_for_the_disk() {
    let machine = Machine::with(&[("dir/disk-rdm.vmdk", &sectors(1, 4))]);
    let text = Text {
        create_type: "createType=\"vmfsRawDeviceMap\"",
        extents: &[b"RW 100 VMFSRDM \"disk-rdm.vmdk\""],
        ..TEXT
    };
    let error = machine.open(&text.bytes(), false).expect_err("has no data");
    assert_eq!(
        error.chain(),
        "'dir/disk-rdm.vmdk' is the mapping file of a raw device (VMFSRDM), and does not hold the data of the disk"
    );
    assert!(
        error
            .hint_lines()
            .first()
            .map(String::as_str)
            .is_some_and(|hint| hint.contains("device of the machine"))
    );
    let text = Text {
        create_type: "createType=\"fullDevice\"",
        extents: &[b"RW 100 FLAT \"\\\\.\\PhysicalDrive0\" 0"],
        ..TEXT
    };
    let error = machine.open(&text.bytes(), false).expect_err("has no device");
    assert!(
        error
            .hint_lines()
            .first()
            .map(String::as_str)
            .is_some_and(|hint| hint.contains("device of the machine"))
    );
}

#[test]
fn descriptors_of_other_editors_are_recognised_and_read() {
    let machine = Machine::with(&[("dir/a", &sectors(1, 8))]);
    let plain = Text {
        extents: &[b"RW 8 FLAT \"a\" 0"],
        ..TEXT
    };
    let with_mark = |mark: &[u8], bytes: Vec<u8>| [mark, &bytes].concat();
    let utf16 = |big: bool, bytes: Vec<u8>| -> Vec<u8> {
        let text = format!("\u{feff}{}", String::from_utf8(bytes).expect("text"));
        let units = text.encode_utf16();
        units
            .flat_map(|unit| {
                if big {
                    unit.to_be_bytes()
                } else {
                    unit.to_le_bytes()
                }
            })
            .collect()
    };
    let known = |bytes: &[u8]| {
        Vmdk.probe(&Probe {
            head: bytes,
            tail: &[],
            len: bytes.len() as u64,
            name: "x",
        })
    };
    for (what, bytes, score) in [
        ("plain", plain.bytes(), 100),
        (
            "CRLF",
            Text {
                line_end: "\r\n",
                ..plain
            }
            .bytes(),
            100,
        ),
        (
            "lines of blanks",
            with_mark(b" \n  \r\n# a comment\n", plain.bytes()),
            100,
        ),
        (
            "empty lines",
            with_mark(b"\n  \n# a comment\n\n", plain.bytes()),
            LOOSE,
        ),
        ("a mark", with_mark(b"\xef\xbb\xbf", plain.bytes()), LOOSE),
        (
            "a mark and CRLF",
            with_mark(
                b"\xef\xbb\xbf",
                Text {
                    line_end: "\r\n",
                    ..plain
                }
                .bytes(),
            ),
            LOOSE,
        ),
        (
            "blanks",
            Text {
                version: "version = 1",
                ..plain
            }
            .bytes(),
            LOOSE,
        ),
        (
            "blanks at the end",
            Text {
                version: "version=1 ",
                ..plain
            }
            .bytes(),
            LOOSE,
        ),
        (
            "quotes",
            Text {
                version: "version=\"1\"",
                ..plain
            }
            .bytes(),
            LOOSE,
        ),
        (
            "upper case",
            Text {
                version: "VERSION=1",
                ..plain
            }
            .bytes(),
            LOOSE,
        ),
        ("a tab", with_mark(b"\t\r\n", plain.bytes()), LOOSE),
        (
            "an indent",
            Text {
                version: "  version=1",
                ..plain
            }
            .bytes(),
            LOOSE,
        ),
        ("no version", Text { version: "", ..plain }.bytes(), LOOSE),
        ("UTF-16LE", utf16(false, plain.bytes()), LOOSE),
        ("UTF-16BE", utf16(true, plain.bytes()), LOOSE),
        (
            "other case",
            Text {
                version: "Version=1",
                cid: "cid = 12345678",
                parent_cid: "PARENTCID\t=\tFFFFFFFF",
                create_type: "createtype=custom",
                ..plain
            }
            .bytes(),
            LOOSE,
        ),
        (
            "no parentCID",
            Text {
                parent_cid: "",
                ..plain
            }
            .bytes(),
            100,
        ),
    ] {
        assert_eq!(known(&bytes), score, "{what}");
        let image = machine.open(&bytes, false).expect("opens");
        assert!(contents(&image) == sectors(1, 8), "{what}");
        assert_eq!(image.layer().cid(), Some(0x1234_5678), "{what}");
    }
    for (what, bytes) in [
        ("another text", &b"version = 1\nname = x\n"[..]),
        ("a comment", b"# Disk DescriptorFile\n"),
        ("another version", b"version = 4\ncreateType=\"vmfs\"\n"),
        ("another beginning", b"x\nversion=1\ncreateType=\"vmfs\"\n"),
        ("nothing", b""),
        ("a mark", b"\xef\xbb\xbf"),
        ("a mark of UTF-16", b"\xff\xfe"),
    ] {
        assert_eq!(known(bytes), 0, "{what}");
    }
}

#[test]
fn a_descriptor_with_other_keys_is_changed_in_place() {
    let machine = Machine::with(&[("dir/a", &sectors(1, 8))]);
    let text = Text {
        cid: "cid = 12345678",
        extents: &[b"RW 8 FLAT \"a\" 0"],
        ..TEXT
    };
    let before = [b"\xef\xbb\xbf", &text.bytes()[..]].concat();
    let file = Arc::new(MemoryDevice::new(before.clone()));
    let image = machine.open_file(Arc::clone(&file), true).expect("opens");
    image.write_at(&[2; 512], 0).expect("writes");
    image.flush().expect("flushes");
    let cid = image.layer().cid().expect("has one");
    assert_ne!(cid, 0x1234_5678);
    let after = file.contents();
    let text = String::from_utf8(before).expect("text");
    assert_eq!(
        String::from_utf8(after).expect("text"),
        text.replace(" 12345678", &format!("{cid:08x}")) + "\0"
    );

    let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let file = Arc::new(MemoryDevice::new(units.clone()));
    let image = machine.open_file(Arc::clone(&file), true).expect("opens");
    let error = image.write_at(&[3; 512], 0).expect_err("is refused");
    assert_eq!(
        error.chain(),
        "The descriptor is in UTF-16LE, which can only be read"
    );
    assert!(file.contents() == units);
}

#[test]
fn lines_that_begin_like_extents_are_not_dropped() {
    let machine = Machine::with(&[("dir/a", &sectors(1, 8))]);
    for line in [
        "RW 5 FLAT a 0",
        "RW 5 FLAT \"\" 0",
        "RW five FLAT \"a\" 0",
        "RW -5 FLAT \"a\" 0",
        "RW",
        "RDONLY 5 FLAT \"a\"",
        "RDONLY 5",
        "NOACCESS 5 FOO",
        "RW 5 FLAT \"a\" -1",
    ] {
        let text = Text {
            extents: &[line.as_bytes(), b"RW 1 FLAT \"a\" 0"],
            ..TEXT
        };
        let error = machine.open(&text.bytes(), false).expect_err("makes no sense");
        assert_eq!(error.chain(), format!("Invalid extent line: {line}"));
    }
}

#[test]
fn a_descriptor_of_many_extents_is_read_whole_or_not_at_all() {
    let machine = Machine::with(&[("dir/a", &sectors(1, 1))]);
    let line: &[u8] = b"RW 1 FLAT \"a\" 0";
    for (count, is_read) in [(5000, true), (32768, true), (32769, false)] {
        let text = Text {
            extents: &vec![line; count],
            ..TEXT
        };
        let image = machine.open(&text.bytes(), false);
        assert_eq!(
            image.map(|image| image.len()).ok(),
            is_read.then_some(count as u64 * 512)
        );
    }
    let comment = vec![b'#'; 5 << 20];
    let text = Text {
        extents: &[line, &comment, line],
        ..TEXT
    };
    let error = machine.open(&text.bytes(), false).expect_err("is too long");
    assert_eq!(error.chain(), "The descriptor has more than 4194304 bytes");
}

#[test]
fn extents_are_found_beside_the_image() {
    let latin: &[u8] = b"RW 8 FLAT \"C:\\t\xe9st\\\xe9.vmdk\" 0";
    for (line, files, found) in [
        (
            &b"RW 8 FLAT \"C:\\vm\\x.vmdk\" 0"[..],
            &["dir/x.vmdk"][..],
            "dir/x.vmdk",
        ),
        (
            b"RW 8 FLAT \"C:\\vm\\x.vmdk\" 0",
            &["dir/C:\\vm\\x.vmdk", "dir/x.vmdk"],
            "dir/C:\\vm\\x.vmdk",
        ),
        (
            b"RW 8 FLAT \"..\\x.vmdk\" 0",
            &["dir/../x.vmdk", "dir/x.vmdk"],
            "dir/../x.vmdk",
        ),
        (b"RW 8 FLAT \"..\\x.vmdk\" 0", &["dir/x.vmdk"], "dir/x.vmdk"),
        (
            b"RW 8 FLAT \"/vmfs/volumes/s/x.vmdk\" 0",
            &["dir/x.vmdk"],
            "dir/x.vmdk",
        ),
        (
            b"RW 8 FLAT \"/vmfs/volumes/s/x.vmdk\" 0",
            &["/vmfs/volumes/s/x.vmdk", "dir/x.vmdk"],
            "/vmfs/volumes/s/x.vmdk",
        ),
        (b"RW 8 FLAT \"sub/x.vmdk\" 0", &["dir/x.vmdk"], "dir/x.vmdk"),
        (b"RW 8 FLAT \"X.vmdk\" 0", &["dir/x.VMDK"], "dir/x.VMDK"),
        (
            b"RW 8 FLAT \"X.vmdk\" 0",
            &["dir/X.vmdk", "dir/x.VMDK"],
            "dir/X.vmdk",
        ),
        (b"RW 8 FLAT \"C:\\VM\\X.VMDK\" 0", &["dir/x.vmdk"], "dir/x.vmdk"),
        (latin, &["dir/é.vmdk"], "dir/é.vmdk"),
        (latin, &["dir/É.VMDK"], "dir/É.VMDK"),
    ] {
        let mut machine = Machine::default();
        for (nth, name) in (1..).zip(files) {
            machine.put(name, sectors(nth, 8));
        }
        let text = Text {
            encoding: "encoding=\"windows-1252\"",
            extents: &[line],
            ..TEXT
        };
        let image = machine.open(&text.bytes(), false).expect("opens");
        assert!(contents(&image) == sectors(1, 8), "{found}");
        assert_eq!(machine.opened(), [found]);
    }
    let machine = Machine::default();
    let text = Text {
        extents: &[b"RW 8 FLAT \"C:\\vm\\x.vmdk\" 0"],
        ..TEXT
    };
    let error = machine.open(&text.bytes(), false).expect_err("is missing");
    assert_eq!(error.chain(), "no file dir/C:\\vm\\x.vmdk");
    assert_eq!(
        error.hint_lines().first().map(String::as_str),
        Some("No file 'x.vmdk' is beside the image either.")
    );
}

#[test]
fn a_file_with_several_extents_is_opened_once() {
    let file: Vec<u8> = (0..8).flat_map(|nth| sectors(nth, 1)).collect();
    let machine = Machine::with(&[("dir/a", &file)]);
    let text = Text {
        extents: &[
            b"RW 2 FLAT \"a\" 6",
            b"RDONLY 1 FLAT \"a\" 3",
            b"RW 2 FLAT \"a\" 0",
        ],
        ..TEXT
    };
    let image = machine.open(&text.bytes(), true).expect("opens");
    assert_eq!(machine.opened(), ["dir/a"]);
    let expected: Vec<u8> = [6, 7, 3, 0, 1]
        .into_iter()
        .flat_map(|nth| sectors(nth, 1))
        .collect();
    assert!(contents(&image) == expected);
    image.write_at(&[9; 512], 3 * 512).expect("writes");
    assert_eq!(machine.0["dir/a"].contents()[..512], [9; 512]);
    let error = image.resize(1 << 20, Preallocation::Off).expect_err("is refused");
    assert_eq!(
        error.chain(),
        "Several extents are in 'dir/a', so the last one cannot grow"
    );

    let machine = Machine::with(&[("dir/s", &SPARSE.bytes())]);
    let text = Text {
        extents: &[b"RW 384 SPARSE \"s\"", b"RW 2 FLAT \"s\" 0"],
        ..TEXT
    };
    machine.open(&text.bytes(), false).expect("opens");
    let error = machine.open(&text.bytes(), true).expect_err("is refused");
    assert_eq!(
        error.chain(),
        "Several extents are in 'dir/s', one of them sparse: they can only be read"
    );
}

#[test]
fn streams_are_read_with_what_is_behind_them() {
    let embedded = Text {
        create_type: "createType=\"streamOptimized\"",
        extents: &[b"RW 384 SPARSE \"disk.vmdk\""],
        ..TEXT
    }
    .bytes();
    for footer in [false, true] {
        for descriptor in [&b""[..], &embedded] {
            for padding in [0, 1, 511, 512, 1536, 100_000] {
                let file = SparseFile {
                    footer,
                    descriptor,
                    padding,
                    ..STREAM
                };
                let image = Machine::default().open(&file.bytes(), false).expect("opens");
                assert!(contents(&image) == file.disk(), "{footer} {padding}");
                assert!(image.layer().notes().is_empty(), "{footer} {padding}");
                assert_eq!(
                    image.layer().cid().is_some_and(|cid| cid > 0),
                    !descriptor.is_empty()
                );
            }
        }
    }
    // Something else behind the stream.
    let mut bytes = STREAM.bytes();
    bytes.extend([0x55; 2000]);
    let image = Machine::default().open(&bytes, false).expect("opens");
    assert!(contents(&image) == STREAM.disk());
}

#[test]
fn a_padded_stream_is_continued_where_it_ended() {
    let embedded = Text {
        create_type: "createType=\"streamOptimized\"",
        ..TEXT
    }
    .bytes();
    for footer in [false, true] {
        for padding in [0, 1536, 100_352] {
            let stream = SparseFile {
                footer,
                descriptor: &embedded,
                padding,
                ..STREAM
            };
            let file = Arc::new(MemoryDevice::new(stream.bytes()));
            let image = Machine::default()
                .open_file(Arc::clone(&file), true)
                .expect("opens");
            image.write_at(&vec![7; GRAIN], GRAIN as u64).expect("writes");
            image.flush().expect("flushes");
            let expected = SparseFile {
                grains: &[(0, 5), (1, 7), (2, 6)],
                ..stream
            };
            let image = Machine::default().open(&file.contents(), false).expect("opens");
            assert!(contents(&image) == expected.disk(), "{footer} {padding}");
            let bytes = file.contents();
            let used = bytes.iter().rposition(|byte| *byte != 0).expect("has data");
            let whole = (used + 1).next_multiple_of(SECTOR) + SECTOR;
            let streamed = read_as_stream(&bytes[..whole], expected.disk().len());
            assert!(streamed == Some(expected.disk()), "{footer} {padding}");
        }
    }
}

#[test]
fn a_stream_that_was_cut_off_says_so() {
    let whole = STREAM.bytes();
    // Only the end-of-stream marker is missing.
    let image = Machine::default()
        .open(&whole[..whole.len() - SECTOR], false)
        .expect("opens");
    assert!(contents(&image) == STREAM.disk());
    let note =
        Note::Warning("'dir/disk.vmdk' has no end-of-stream marker, it may have been cut off".to_owned());
    assert_eq!(image.layer().notes(), [note]);
    for cut in (128 * SECTOR + 1..whole.len() - SECTOR).step_by(100) {
        match Machine::default().open(&whole[..cut], false) {
            Err(error) => {
                let text = error.chain();
                let is_told = text.ends_with("the file was cut off") || text == "Invalid footer";
                assert!(is_told, "{cut}: {text}");
            }
            // Only padding of the footer is missing.
            Ok(image) => {
                assert!(contents(&image) == STREAM.disk(), "{cut}");
                assert!(!image.layer().notes().is_empty(), "{cut}");
            }
        }
    }
    // With the directory in front all grains that are there can be read.
    let whole = SparseFile {
        footer: false,
        ..STREAM
    }
    .bytes();
    for cut in (128 * SECTOR + 1..whole.len() - SECTOR).step_by(100) {
        let image = Machine::default().open(&whole[..cut], false).expect("opens");
        let mut grain = vec![0; GRAIN];
        let read = image.read_at(&mut grain, 2 * GRAIN as u64);
        assert!(read.is_err() || grain == [6; GRAIN], "{cut}");
        assert!(!image.layer().notes().is_empty() || read.is_err(), "{cut}");
    }
}

#[test]
fn parents_have_further_names_and_identities() {
    let text = Text {
        encoding: "encoding=\"windows-1252\"",
        parent_cid: "parentCID=0000abcd",
        parent: b"parentFileNameHint=\"C:\\vm\\\xe9.vmdk\"",
        extents: &[b"RW 384 SPARSE \"s\""],
        create_type: "createType=\"twoGbMaxExtentSparse\"",
        ..TEXT
    };
    let machine = Machine::with(&[("dir/s", &SPARSE.bytes())]);
    let image = machine.open(&text.bytes(), false).expect("opens");
    let layer = image.layer();
    let Some(Backing { name, .. }) = layer.backing() else {
        panic!("has a parent");
    };
    assert_eq!(*name.to_bytes(), *b"C:\\vm\\\xe9.vmdk");
    let others: Vec<String> = layer
        .backing_search()
        .names
        .iter()
        .map(|name| name.text().to_owned())
        .collect();
    assert_eq!(others, ["C:\\vm\\é.vmdk", "é.vmdk", "é.vmdk"]);
    let below = Text {
        cid: "CID=00001234",
        ..text
    };
    let below = machine.open(&below.bytes(), false).expect("opens");
    let top = Image::new(Arc::clone(layer), Some(Arc::new(below)), "top", false);
    let error = top.read_at(&mut [0; 512], GRAIN as u64).expect_err("has changed");
    assert_eq!(error.chain(), "Invalid argument");
    let Some(Note::Error(note)) = error.preceding_note() else {
        panic!("says why");
    };
    assert!(
        note.contains("0x00001234") && note.contains("0x0000abcd"),
        "{note}"
    );
}

/// A block device, which has a fixed length and old contents.
#[derive(Debug)]
struct BlockDevice {
    bytes: MemoryDevice,
    len: u64,
}

impl BlockDevice {
    fn new(len: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: MemoryDevice::new(vec![0x5a; len]),
            len: len as u64,
        })
    }

    fn require_room(&self, end: u64) -> Result<()> {
        match end > self.len {
            true => Err(Error::from_errno(diskimage_core::errno::ENOSPC)),
            false => Ok(()),
        }
    }
}

impl Device for BlockDevice {
    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> &diskimage_core::Limits {
        self.bytes.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.bytes.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.require_room(offset + buf.len() as u64)?;
        self.bytes.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_room(range.end())?;
        self.bytes.write_zeroes(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.bytes.discard(range)
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<diskimage_core::Extent> {
        self.bytes.status(range, detail)
    }

    fn flush(&self) -> Result<()> {
        self.bytes.flush()
    }

    fn resize(&self, len: u64, _preallocation: Preallocation) -> Result<()> {
        match len == self.len {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Unsupported, "Cannot resize device files")),
        }
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }
}

#[test]
fn an_image_on_a_block_device_is_written_behind_its_contents() {
    for (options, is_stream) in [
        ("", false),
        ("zeroed_grain=on", false),
        ("subformat=streamOptimized", true),
    ] {
        let file = BlockDevice::new(4 << 20);
        let device: Arc<dyn Device> = Arc::<BlockDevice>::clone(&file);
        diskimage_testing::create_image(&Vmdk, &device, options, SIZE as u64).expect("creates");
        let open =
            |write| diskimage_testing::open_image(&Vmdk, Arc::clone(&device), write, None).expect("opens");
        assert!(contents(&open(false)) == vec![0; SIZE], "{options}");
        let mut model = vec![0; SIZE];
        for (nth, byte) in [(2, 7), (0, 8), (1, 9)] {
            let image = open(true);
            let range = nth * GRAIN..(nth + 1) * GRAIN;
            model[range.clone()].fill(byte);
            image
                .write_at(&model[range.clone()], range.start as u64)
                .expect("writes");
            image.flush().expect("flushes");
            assert!(contents(&open(false)) == model, "{options} {nth}");
        }
        let image = open(false);
        assert!(image.layer().notes().is_empty(), "{options}");
        image
            .layer()
            .check(Repair::No, &Progress::none())
            .expect("is sound");
        let image = open(true);
        model.resize(40 << 20, 0);
        image.resize(40 << 20, Preallocation::Off).expect("grows");
        image.flush().expect("flushes");
        let image = open(false);
        assert!(contents(&image) == model, "{options}");
        if is_stream {
            let bytes = file.bytes.contents();
            let used = bytes.iter().rposition(|byte| *byte != 0x5a).expect("has data");
            let streamed = read_as_stream(&bytes[..used + 1], model.len());
            assert!(streamed == Some(model), "{options}");
        }
    }
    let device: Arc<dyn Device> = BlockDevice::new(60_000);
    let error = diskimage_testing::create_image(&Vmdk, &device, "", SIZE as u64).expect_err("is too short");
    assert_eq!(error.chain(), "Cannot grow device files");
    let device: Arc<dyn Device> = BlockDevice::new(100_000);
    diskimage_testing::create_image(&Vmdk, &device, "", SIZE as u64).expect("creates");
    let image = diskimage_testing::open_image(&Vmdk, device, true, None).expect("opens");
    let error = image.write_at(&[1; GRAIN], 0).expect_err("has no room");
    assert_eq!(error.errno(), Some(diskimage_core::errno::ENOSPC));
}
