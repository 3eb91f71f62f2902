//! Images in memory.

mod foreign;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use diskimage_core::options::Options;
use diskimage_core::{
    ByteRange, CreateRequest, Device, Error, ErrorKind, Format, Gate, Image, MemoryDevice, NewFiles,
    NodeOptions, Note, OpenContext, OpenRequest, Preallocation, Progress, Reference, Repair, ResizeRequest,
    Result, StatusDetail, ZeroMode, name,
};
use diskimage_testing::{Journal, RecordingDevice};
use proptest::prelude::*;

use super::Vmdk;
use crate::testing::{contents, use_damaged};

/// Files by name; a missing file is created when it is opened.
#[derive(Clone, Debug, Default)]
struct Files(Arc<Mutex<HashMap<String, Arc<MemoryDevice>>>>);

impl Files {
    fn file(&self, name: &str) -> Arc<MemoryDevice> {
        let mut files = self.0.lock().expect("no panic");
        Arc::clone(files.entry(name.to_owned()).or_default())
    }

    fn create(&self, options: &str, size: u64) -> Result<()> {
        let mut values = Options::new(<dyn Format>::create_options(&Vmdk));
        values.parse(options)?;
        let file: Arc<dyn Device> = self.file("disk.vmdk");
        let objects = Arc::default();
        let plan = Vmdk.plan_create(CreateRequest {
            name: "disk.vmdk",
            size,
            options: &values,
            objects: &objects,
        })?;
        plan.write(NewFiles {
            file,
            make_part: &mut |part| Ok(self.file(part)),
            backing: None,
        })
    }

    fn open(&self, write: bool) -> Result<Image> {
        open_on(self.file("disk.vmdk"), self, write)
    }

    /// Grows the disk, in further files if they are needed.
    fn grow(&self, image: &Image, len: u64) -> Result<()> {
        let mut request = ResizeRequest::new(len, Preallocation::Off);
        for part in image.layer().new_parts(&request)? {
            request.parts.push(self.file(&part));
        }
        image.resize_with(&request)
    }
}

impl Gate for Files {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        let files = self.0.lock().expect("no panic");
        match files.get(name) {
            Some(file) => Ok(Arc::clone(file) as Arc<dyn Device>),
            None => Err(Error::new(ErrorKind::Denied, format!("{name} is not allowed"))),
        }
    }
}

/// The same files; opening a missing one is an error.
#[derive(Clone)]
struct Existing(Files);

impl Gate for Existing {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Gate::open(&self.0, reference).map_err(|error| Error::new(ErrorKind::NotFound, error.chain()))
    }
}

fn open_on<G: Gate + Clone + 'static>(file: Arc<dyn Device>, gate: &G, write: bool) -> Result<Image> {
    let context = OpenContext::new(Arc::new(gate.clone()));
    let layer = Vmdk.open(OpenRequest {
        write,
        ..OpenRequest::new(file, "disk.vmdk", &mut NodeOptions::new(), &context)
    })?;
    Ok(Image::new(layer, None, "disk.vmdk", write))
}

const SIZE: usize = 3 * 65536 + 512 * 7;

const WRITABLE: &[&str] = &[
    "",
    "zeroed_grain=on",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
    "subformat=twoGbMaxExtentFlat",
];

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    /// By so many sectors.
    Grow(usize),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SIZE, 1..100_000_usize);
    prop_oneof![
        (range.clone(), 1..255_u8).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        range.prop_map(|(at, len)| Step::Zero(at, len)),
        // Some sizes need another grain table.
        prop_oneof![0..300_usize, 65_000..70_000_usize].prop_map(Step::Grow),
        Just(Step::Reopen),
    ]
}

#[derive(Clone, Debug)]
enum StreamStep {
    /// So many grains from this one on.
    Write(usize, usize, u8),
    /// By so many sectors.
    Grow(usize),
    Reopen,
}

fn stream_step() -> impl Strategy<Value = StreamStep> {
    prop_oneof![
        3 => (0..12_usize, 1..4_usize, 1..255_u8)
            .prop_map(|(first, count, byte)| StreamStep::Write(first, count, byte)),
        1 => prop_oneof![0..300_usize, 65_000..70_000_usize].prop_map(StreamStep::Grow),
        1 => Just(StreamStep::Reopen),
    ]
}

/// Bytes of a grain.
const GRAIN: usize = 65536;

/// Puts a footer at the end of a stream that has none, by which its directory is found then.
fn give_footer(file: &MemoryDevice) {
    let mut header = [0; 512];
    file.read_at(&mut header, 0).expect("has one");
    if header[56..64] == [0xff; 8] {
        return;
    }
    // Instead of the end-of-stream marker, if there is one yet.
    let over_head = u64::from(header[64]) * 512;
    let end = over_head.max(file.len() - 512);
    let mut tail = [0; 3 * 512];
    (tail[0], tail[12]) = (1, 3);
    tail[512..1024].copy_from_slice(&header);
    file.write_at(&tail, end).expect("has room");
    header[56..64].fill(0xff);
    file.write_at(&header, 0).expect("has one");
}

/// The disk as a sequential reader of the stream decodes it; empty if no grain was ever written.
fn read_as_stream(file: &[u8], len: usize) -> Option<Vec<u8>> {
    let number = |at: usize, len: usize| {
        let bytes = file[at..at + len].iter().rev();
        bytes.fold(0_usize, |number, byte| number << 8 | usize::from(*byte))
    };
    let mut disk = vec![0; len.next_multiple_of(GRAIN)];
    let mut at = number(64, 8) * 512;
    if at == file.len() {
        return None;
    }
    loop {
        let (sectors, size) = (number(at, 8), number(at + 8, 4));
        if size > 0 {
            let grain = &mut disk[sectors * 512..][..GRAIN];
            let done = crate::codec::deflate::decode_stream(&file[at + 12..at + 12 + size], grain);
            assert_eq!(done.expect("is whole"), GRAIN);
            at = (at + 12 + size).next_multiple_of(512);
        } else if sectors > 0 {
            assert!((1..=3).contains(&number(at + 12, 4)), "a kind of metadata");
            at += 512 + sectors * 512;
        } else {
            assert_eq!(at + 512, file.len(), "nothing follows the marker of the end");
            disk.truncate(len);
            return Some(disk);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_disk_holds_what_was_written(
        kind in 0..WRITABLE.len(),
        steps in proptest::collection::vec(step(), 1..12),
    ) {
        let files = Files::default();
        files.create(WRITABLE[kind], SIZE as u64).expect("creates");
        let mut image = files.open(true).expect("opens");
        let mut model = vec![0; SIZE];
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    let end = (at + len).min(model.len());
                    model[at..end].fill(byte);
                    image.write_at(&model[at..end], at as u64).expect("writes");
                }
                Step::Grow(sectors) => {
                    model.resize(model.len() + sectors * 512, 0);
                    image.resize(model.len() as u64, Preallocation::Off).expect("grows");
                }
                Step::Zero(at, len) => {
                    let end = (at + len).min(model.len());
                    model[at..end].fill(0);
                    image
                        .write_zeroes(ByteRange::new(at as u64, end as u64), ZeroMode::Unmap)
                        .expect("zeroes");
                }
                Step::Reopen => {
                    image.flush().expect("flushes");
                    image = files.open(true).expect("opens again");
                }
            }
            prop_assert!(contents(&image) == model);
        }
        image.flush().expect("flushes");
        let image = files.open(false).expect("opens");
        prop_assert!(contents(&image) == model);
        image.layer().check(Repair::No, &Progress::none()).expect("is sound");
    }

    #[test]
    fn a_stream_holds_whole_grains_and_can_be_read_from_its_start(
        steps in proptest::collection::vec(stream_step(), 1..10),
        footer in any::<bool>(),
    ) {
        let files = Files::default();
        files.create("subformat=streamOptimized", SIZE as u64).expect("creates");
        let mut image = files.open(true).expect("opens");
        let mut model = vec![0; SIZE];
        let mut there = std::collections::HashSet::new();
        for step in steps {
            match step {
                StreamStep::Write(first, count, byte) => {
                    let range = first * GRAIN..((first + count) * GRAIN).min(model.len());
                    if range.start >= range.end {
                        continue;
                    }
                    let bytes = vec![byte; range.len()];
                    let grains = first..range.end.div_ceil(GRAIN);
                    let fits = grains.clone().all(|grain| !there.contains(&grain));
                    prop_assert_eq!(image.write_at(&bytes, range.start as u64).is_ok(), fits);
                    if fits {
                        model[range].fill(byte);
                        there.extend(grains);
                    }
                }
                StreamStep::Grow(sectors) => {
                    model.resize(model.len() + sectors * 512, 0);
                    image.resize(model.len() as u64, Preallocation::Off).expect("grows");
                }
                StreamStep::Reopen => {
                    image.flush().expect("flushes");
                    drop(image);
                    if footer {
                        give_footer(&files.file("disk.vmdk"));
                    }
                    image = files.open(true).expect("opens again");
                }
            }
            prop_assert!(contents(&image) == model);
        }
        image.flush().expect("flushes");
        prop_assert!(contents(&files.open(false).expect("opens")) == model);
        let streamed = read_as_stream(&files.file("disk.vmdk").contents(), model.len());
        prop_assert!(streamed.is_none_or(|bytes| bytes == model));
    }

    #[test]
    fn damage_never_panics(
        kind in 0..WRITABLE.len() + 1,
        at in prop_oneof![0..96_usize, 512..900_usize, 10752..20000_usize],
        bytes in proptest::collection::vec(any::<u8>(), 1..9),
    ) {
        let files = Files::default();
        let options = WRITABLE.get(kind).copied().unwrap_or("subformat=streamOptimized");
        files.create(options, SIZE as u64).expect("creates");
        for name in ["disk.vmdk", "disk-s001.vmdk"] {
            let file = files.file(name);
            if file.len() > (at + bytes.len()) as u64 {
                file.write_at(&bytes, at as u64).expect("is long enough");
            }
        }
        for write in [false, true] {
            // Any error is right.
            let Ok(image) = files.open(write) else { continue };
            use_damaged(&image, write, &[]);
            drop(image.layer().check(Repair::No, &Progress::none()));
        }
    }
}

#[test]
fn what_was_flushed_survives_crashes() {
    for options in ["", "zeroed_grain=on"] {
        let files = Files::default();
        files.create(options, 1 << 20).expect("creates");
        let before = files.file("disk.vmdk").contents();
        let journal: Arc<Journal> = Arc::default();
        let device: Arc<dyn Device> = Arc::new(RecordingDevice::new(before.clone(), 0, &journal));
        let image = open_on(device, &files, true).expect("opens");
        // A position in the journal, and the data that is durable from then on.
        let mut flushed = vec![(0, Vec::new())];
        let mut written = Vec::new();
        for (nth, offset) in [0_u64, 70_000, 300_000, 1000].into_iter().enumerate() {
            let byte = u8::try_from(nth).expect("few") + 1;
            image.write_at(&vec![byte; 5000], offset).expect("writes");
            written.retain(|(other, _)| *other != 0 || offset != 1000);
            written.push((offset, byte));
            image.flush().expect("flushes");
            flushed.push((journal.len(), written.clone()));
        }
        let count = journal.crashes(&[before], 12, 0x5eed, |crash| {
            let left: Arc<dyn Device> = Arc::new(MemoryDevice::new(crash.files[0].clone()));
            let image = open_on(left, &files, false).expect("opens after a crash");
            image
                .layer()
                .check(Repair::No, &Progress::none())
                .expect("is sound after a crash");
            let known = flushed.partition_point(|(position, _)| *position <= crash.position);
            for (offset, byte) in &flushed[known - 1].1 {
                // The last write overwrites part of the first.
                let (mut buf, at) = (vec![0; 900], *offset);
                image.read_at(&mut buf, at).expect("reads");
                assert_eq!(buf, vec![*byte; 900], "{} {}", crash.position, crash.kept);
            }
        });
        assert!(count > 20, "{count} crashes");
    }
}

#[test]
fn a_disk_that_grows_survives_crashes() {
    for (options, name) in [
        ("", "disk.vmdk"),
        ("subformat=twoGbMaxExtentSparse", "disk-s001.vmdk"),
        ("subformat=monolithicFlat", "disk-flat.vmdk"),
    ] {
        let files = Files::default();
        let old_len = (31 << 20) - 512;
        files.create(options, old_len).expect("creates");
        let image = files.open(true).expect("opens");
        image.write_at(&[7; 70_000], 30_000).expect("writes");
        image.write_at(&[8; 1000], old_len - 1000).expect("writes");
        image.flush().expect("flushes");
        let mut names = vec!["disk.vmdk"];
        names.extend((name != "disk.vmdk").then_some(name));
        let before: Vec<Vec<u8>> = names.iter().map(|name| files.file(name).contents()).collect();
        let journal: Arc<Journal> = Arc::default();
        let recorded = Present::recorded(&names, &before, &journal);
        let image = recorded.open(true);
        image.resize(40 << 20, Preallocation::Off).expect("grows");
        image.flush().expect("flushes");
        let mut lens = std::collections::BTreeSet::new();
        journal.crashes(&before, 12, 0x5eed, |crash| {
            let image = Present::left(&names, crash.files).open(false);
            let mut buf = vec![0; 70_000];
            image.read_at(&mut buf, 30_000).expect("reads");
            assert!(buf == [7; 70_000], "{options}: {}", crash.position);
            image.read_at(&mut buf[..1000], old_len - 1000).expect("reads");
            assert!(buf[..1000] == [8; 1000], "{options}: {}", crash.position);
            let added = image.len() - old_len;
            let mut buf = vec![1; usize::try_from(added.min(1 << 20)).expect("small")];
            image.read_at(&mut buf, old_len).expect("reads");
            assert!(buf.iter().all(|byte| *byte == 0), "{options}: {}", crash.position);
            lens.insert(image.len());
        });
        assert_eq!(
            lens.into_iter().collect::<Vec<_>>(),
            [old_len, 40 << 20],
            "{options}"
        );
    }
}

#[test]
fn a_disk_in_several_files_goes_on_in_further_files() {
    let files = Files::default();
    files
        .create("subformat=twoGbMaxExtentSparse,zeroed_grain=on", 1 << 20)
        .expect("creates");
    let image = files.open(true).expect("opens");
    image.write_at(&[5; 1000], (1 << 20) - 1000).expect("writes");
    files.grow(&image, 5 << 30).expect("grows");
    image
        .write_at(&[6; 1000], (4 << 30) - 500)
        .expect("writes across two files");
    files.grow(&image, 6 << 30).expect("fills the last file");
    files.grow(&image, (6 << 30) + 512).expect("grows by a sector");
    image.write_at(&[7; 512], 6 << 30).expect("writes");
    image.flush().expect("flushes");
    let text = files.file("disk.vmdk").contents();
    let lines: Vec<String> = String::from_utf8_lossy(&text)
        .lines()
        .filter(|line| line.starts_with("RW"))
        .map(str::to_owned)
        .collect();
    assert_eq!(
        lines,
        [
            "RW 4194304 SPARSE \"disk-s001.vmdk\"",
            "RW 4194304 SPARSE \"disk-s002.vmdk\"",
            "RW 4194304 SPARSE \"disk-s003.vmdk\"",
            "RW 1 SPARSE \"disk-s004.vmdk\"",
        ]
    );
    let image = files.open(false).expect("opens");
    assert_eq!(image.len(), (6 << 30) + 512);
    for (offset, len, byte) in [
        ((1 << 20) - 1000, 1000, 5),
        (2 << 30, 1000, 0),
        ((4 << 30) - 500, 1000, 6),
        (6 << 30, 512, 7),
    ] {
        let mut buf = vec![1; len];
        image.read_at(&mut buf, offset).expect("reads");
        assert!(buf.iter().all(|found| *found == byte), "{offset:#x}");
    }
    image
        .layer()
        .check(Repair::No, &Progress::none())
        .expect("is sound");
}

#[test]
fn a_disk_in_several_files_that_grows_survives_crashes() {
    let files = Files::default();
    files
        .create("subformat=twoGbMaxExtentSparse", 1 << 20)
        .expect("creates");
    let image = files.open(true).expect("opens");
    image.write_at(&[7; 1000], 30_000).expect("writes");
    image.flush().expect("flushes");
    let names = ["disk.vmdk", "disk-s001.vmdk", "disk-s002.vmdk"];
    let before = names.map(|name| files.file(name).contents());
    let journal: Arc<Journal> = Arc::default();
    let recorded = Present::recorded(&names, &before, &journal);
    let image = recorded.open(true);
    let mut request = ResizeRequest::new(3 << 30, Preallocation::Off);
    request.parts.push(Arc::clone(&recorded.0["disk-s002.vmdk"]));
    image.resize_with(&request).expect("grows");
    image.flush().expect("flushes");
    let mut lens = std::collections::BTreeSet::new();
    journal.crashes(&before, 12, 0x5eed, |crash| {
        let image = Present::left(&names, crash.files).open(false);
        let mut buf = vec![0; 1000];
        image.read_at(&mut buf, 30_000).expect("reads");
        assert!(buf == [7; 1000], "{}", crash.position);
        let rest = ByteRange::new(1 << 20, image.len());
        if !rest.is_empty() {
            let extent = image.status(rest, StatusDetail::Zeroes).expect("a status");
            assert!(extent.kind.is_zero(), "{}", crash.position);
        }
        lens.insert(image.len());
    });
    // The old disk, the disk up to the end of the grown extent, the new disk.
    assert_eq!(lens.into_iter().collect::<Vec<_>>(), [1 << 20, 2 << 30, 3 << 30]);
}

/// Files that exist already.
#[derive(Clone)]
struct Present(HashMap<String, Arc<dyn Device>>);

impl Present {
    fn new(names: &[&str], files: impl Iterator<Item = Arc<dyn Device>>) -> Self {
        Self(names.iter().map(|name| (*name).to_owned()).zip(files).collect())
    }

    /// Files with these contents, whose writes `journal` records.
    fn recorded(names: &[&str], before: &[Vec<u8>], journal: &Arc<Journal>) -> Self {
        let files = before.iter().enumerate();
        let record = |(nth, bytes): (usize, &Vec<u8>)| {
            Arc::new(RecordingDevice::new(bytes.clone(), nth, journal)) as Arc<dyn Device>
        };
        Self::new(names, files.map(record))
    }

    /// Files as a crash left them.
    fn left(names: &[&str], files: &[Vec<u8>]) -> Self {
        let file = |bytes: &Vec<u8>| Arc::new(MemoryDevice::new(bytes.clone())) as Arc<dyn Device>;
        Self::new(names, files.iter().map(file))
    }

    fn open(&self, write: bool) -> Image {
        open_on(Arc::clone(&self.0["disk.vmdk"]), self, write).expect("opens")
    }
}

impl Gate for Present {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        Ok(Arc::clone(&self.0[name]))
    }
}

#[test]
fn what_cannot_grow_says_why() {
    for (options, len, why) in [
        (
            "subformat=twoGbMaxExtentSparse",
            3 << 30,
            "The disk would need further files, which are made only where its size is all that changes",
        ),
        ("", 65536, "Images of this format can only grow"),
        ("", (1 << 20) + 1, "The new size must be a multiple of 512"),
    ] {
        let files = Files::default();
        files.create(options, 1 << 20).expect("creates");
        let image = files.open(true).expect("opens");
        let before = files.file("disk.vmdk").contents();
        let error = image.resize(len, Preallocation::Off).expect_err("cannot grow");
        assert_eq!(error.chain(), why);
        assert!(files.file("disk.vmdk").contents() == before, "{options}");
    }
}

#[test]
fn what_a_flat_file_has_behind_the_disk_does_not_show() {
    let files = Files::default();
    files
        .create("subformat=monolithicFlat", 1 << 20)
        .expect("creates");
    files
        .file("disk-flat.vmdk")
        .write_at(&[9; 4096], 1 << 20)
        .expect("writes");
    let image = files.open(true).expect("opens");
    image.resize(2 << 20, Preallocation::Off).expect("grows");
    let image = files.open(false).expect("opens");
    assert_eq!(image.len(), 2 << 20);
    assert!(contents(&image).iter().all(|byte| *byte == 0));
}

#[test]
fn compressed_grains_are_written_once() {
    let files = Files::default();
    files
        .create("subformat=streamOptimized", SIZE as u64)
        .expect("creates");
    let image = files.open(true).expect("opens");
    let mut encoder = image.layer().encoder(None).expect("has one").expect("has one");
    let mut grain: Vec<u8> = (0..65536_u32)
        .map(|at| u8::try_from(at % 251).expect("small"))
        .collect();
    let mut bytes = Vec::new();
    for offset in [65536, 3 * 65536] {
        grain[0] = 77;
        assert!(encoder.encode(&grain, &mut bytes).expect("encodes"));
        image.write_encoded(offset, &bytes).expect("is new");
    }
    let again = image.write_encoded(65536, &bytes).expect_err("is there already");
    let reason = "Could not write to allocated cluster for streamOptimized".to_owned();
    assert_eq!(
        (again.chain(), again.preceding_note()),
        ("Input/output error".to_owned(), Some(&Note::Error(reason)))
    );
    assert!(image.write_at(&[1; 512], 0).is_err(), "no part of a grain");
    image.flush().expect("flushes");
    let file = files.file("disk.vmdk").contents();
    // A sequential reader finds the grains in disk order, and the end-of-stream marker.
    let mut at = 65536;
    for sector in [128_u64, 384] {
        assert_eq!(file[at..at + 8], sector.to_le_bytes());
        let len = u32::from_le_bytes(file[at + 8..at + 12].try_into().expect("four"));
        at = (at + 12 + usize::try_from(len).expect("short")).next_multiple_of(512);
    }
    assert_eq!(file[at..], [0; 512], "the marker of the end");
    let mut model = vec![0; SIZE];
    model[65536..131_072].copy_from_slice(&grain);
    model[3 * 65536..].copy_from_slice(&grain[..SIZE - 3 * 65536]);
    assert!(contents(&files.open(false).expect("opens")) == model);
}

#[test]
fn noise_is_compressed_although_it_grows() {
    let files = Files::default();
    files.create("subformat=streamOptimized", 65536).expect("creates");
    let image = files.open(true).expect("opens");
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    })
    .take(65536)
    .collect();
    let mut bytes = Vec::new();
    let mut encoder = image.layer().encoder(None).expect("has one").expect("has one");
    assert!(encoder.encode(&noise, &mut bytes).expect("encodes"));
    image.write_encoded(0, &bytes).expect("is new");
    image.flush().expect("flushes");
    assert!(contents(&files.open(false).expect("opens")) == noise);
}

#[test]
fn extents_are_opened_through_the_gate_only() {
    let files = Files::default();
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
                RW 8 FLAT \"/etc/passwd\" 0\n";
    files
        .file("disk.vmdk")
        .write_at(text.as_bytes(), 0)
        .expect("writes");
    let error = files.open(false).expect_err("the gate is closed");
    assert_eq!(
        (error.kind(), error.chain()),
        (ErrorKind::Denied, "/etc/passwd is not allowed".to_owned())
    );
}

#[test]
fn an_empty_disk_of_a_petabyte_is_looked_at_quickly() {
    let files = Files::default();
    files.create("", 1 << 30).expect("creates");
    let file = files.file("disk.vmdk");
    // A directory of zeroes at the end of the file.
    let sectors: u64 = 1 << 36;
    file.write_at(&sectors.to_le_bytes(), 12).expect("writes");
    file.write_at(&0_u32.to_le_bytes(), 8).expect("writes");
    file.write_at(&(file.len() / 512).to_le_bytes(), 56)
        .expect("writes");
    file.write_at(&vec![0; 8 << 20], file.len()).expect("writes");
    let image = files.open(false).expect("opens");
    let range = ByteRange::new(0, image.len());
    let extent = image.status(range, StatusDetail::Zeroes).expect("is empty");
    assert_eq!(extent.len, 1 << 45);
}

#[test]
fn an_image_whose_base_has_changed_is_not_read() {
    let files = Files::default();
    files.create("", 1 << 20).expect("creates");
    let base = files.open(true).expect("opens");
    let cid = base.layer().cid().expect("has one");
    let backing = Arc::new(files.open(false).expect("opens"));
    base.write_at(&[1; 512], 0).expect("writes");
    let changed = Arc::new(files.open(false).expect("opens"));
    let top = |parent: u32, backing: &Arc<Image>| {
        let others = Files::default();
        others.create("", 1 << 20).expect("creates");
        let text = String::from_utf8_lossy(&others.file("disk.vmdk").contents()[512..1100])
            .replace("parentCID=ffffffff", &format!("parentCID={parent:08x}"));
        others
            .file("disk.vmdk")
            .write_at(text.as_bytes(), 512)
            .expect("writes");
        let layer = Arc::clone(others.open(false).expect("opens").layer());
        Image::new(layer, Some(Arc::clone(backing)), "top", false)
    };
    let mut buf = [0; 512];
    top(cid, &backing).read_at(&mut buf, 0).expect("is the right one");
    let error = top(cid, &changed).read_at(&mut buf, 0).expect_err("has changed");
    assert_eq!(error.chain(), "Invalid argument");
}

#[test]
fn what_is_made_is_recognised() {
    for options in WRITABLE.iter().chain(&["subformat=streamOptimized"]) {
        let files = Files::default();
        files.create(options, 1 << 20).expect("creates");
        let head = files.file("disk.vmdk").contents();
        let head = &head[..head.len().min(2048)];
        let score = Vmdk.probe(&diskimage_core::Probe {
            head,
            tail: &[],
            len: 2048,
            name: "x",
        });
        assert_eq!(score, 100, "{options}");
    }
}

/// The number of four bytes at `at`.
fn number_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("inside"))
}

/// A disk with the first two grains and one grain of the second table, and the offsets of its directories.
fn three_grains(options: &str) -> (Files, [usize; 2]) {
    let files = Files::default();
    files.create(options, 40 << 20).expect("creates");
    let image = files.open(true).expect("opens");
    for at in [0, GRAIN, 33 << 20] {
        image.write_at(&vec![7; GRAIN], at as u64).expect("writes");
    }
    image.flush().expect("flushes");
    let bytes = files.file("disk.vmdk").contents();
    let directories = [48, 56].map(|at| usize::try_from(number_at(&bytes, at)).expect("small") * 512);
    (files, directories)
}

#[test]
fn nothing_is_written_where_tables_are_or_seem_to_be() {
    for options in ["", "zeroed_grain=on"] {
        let (files, [redundant, directory]) = three_grains(options);
        let good = files.file("disk.vmdk").contents();
        let table = |at: usize| usize::try_from(number_at(&good, at)).expect("small") * 512;
        let (first, second) = (table(directory), table(directory + 4));
        let grain = number_at(&good, first);
        let sector = |at: usize| u32::try_from(at / 512).expect("small");
        for (at, entry, guest) in [
            // The grain's entry refers to the descriptor, a directory, either table, its own table.
            (first, 1, 0),
            (first, 2, 0),
            (first, sector(directory), 0),
            (first, sector(redundant), 0),
            (first, sector(first), 0),
            (first, sector(second), 0),
            (first, sector(table(redundant)), 0),
            // The table's entry refers to the header, the directory, a grain, the other table.
            (directory, sector(directory), 3 * GRAIN),
            (directory, grain, 3 * GRAIN),
            (directory, sector(second), 3 * GRAIN),
            (redundant, sector(second), 3 * GRAIN),
            (redundant, 1, 3 * GRAIN),
            (directory, 0x00ff_ffff, 3 * GRAIN),
        ] {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&entry.to_le_bytes());
            if options == "zeroed_grain=on" && entry == 1 && at == first {
                continue;
            }
            let file = Arc::new(MemoryDevice::new(bad.clone()));
            let image = open_on(Arc::<MemoryDevice>::clone(&file), &files, true).expect("opens");
            let guest = guest as u64;
            assert!(image.write_at(&[1; 512], guest).is_err(), "{entry} at {at:#x}");
            assert!(
                image.flush().is_ok() && file.contents() == bad,
                "{entry} at {at:#x}"
            );
        }
    }
}

#[test]
fn a_descriptor_behind_the_header_is_found_without_its_offset() {
    let (files, _) = three_grains("");
    let bytes = files.file("disk.vmdk").contents();
    for (offset, sectors) in [(0, 20), (1, 0), (2, 20), (1 << 30, 20), (1 << 62, 20)] {
        let mut other = bytes.clone();
        other[28..36].copy_from_slice(&u64::to_le_bytes(offset));
        other[36..44].copy_from_slice(&u64::to_le_bytes(sectors));
        let file = Arc::new(MemoryDevice::new(other));
        let image = open_on(Arc::<MemoryDevice>::clone(&file), &files, true).expect("opens");
        image.write_at(&[1; 512], 0).expect("writes");
        image.flush().expect("flushes");
        let after = file.contents();
        assert!(
            after[512..1024] != bytes[512..1024],
            "the new CID is written there"
        );
        assert!(after[1024..21 * 512] == bytes[1024..21 * 512]);
    }
}

#[test]
fn a_descriptor_ends_where_its_text_does() {
    let (files, _) = three_grains("");
    let mut bytes = files.file("disk.vmdk").contents();
    let len = bytes.len();
    // In the header, the descriptor's range overlaps the directories; then it spans the first grain.
    for (offset, sectors) in [(1, 2000), (1, 21)] {
        let mut bad = bytes.clone();
        bad[28..36].copy_from_slice(&u64::to_le_bytes(offset));
        bad[36..44].copy_from_slice(&u64::to_le_bytes(sectors));
        let file = Arc::new(MemoryDevice::new(bad.clone()));
        let image = open_on(Arc::<MemoryDevice>::clone(&file), &files, true);
        let written = image.and_then(|image| image.write_at(&[1; 512], 0));
        assert!(written.is_err(), "{sectors} sectors at {offset}");
        assert!(file.contents() == bad, "{sectors} sectors at {offset}");
    }
    // The descriptor's range is behind all else, and spans a grain.
    let text = bytes[512..21 * 512].to_vec();
    bytes.extend_from_slice(&text);
    bytes.extend_from_slice(&[0x66; 65536]);
    bytes[28..36].copy_from_slice(&(len as u64 / 512).to_le_bytes());
    bytes[36..44].copy_from_slice(&100_u64.to_le_bytes());
    let file = Arc::new(MemoryDevice::new(bytes));
    let image = open_on(Arc::<MemoryDevice>::clone(&file), &files, true).expect("opens");
    image.write_at(&[1; 512], 0).expect("writes");
    image.flush().expect("flushes");
    let after = file.contents();
    let behind = len + text.len();
    assert!(after[behind..behind + 65536].iter().all(|byte| *byte == 0x66));
}

/// A descriptor in Shift_JIS, whose extent may have been renamed to UTF-8.
#[test]
fn an_extent_is_found_by_its_bytes_and_then_by_its_decoded_name() {
    let descriptor = b"# Disk DescriptorFile\nversion=1\nencoding=\"Shift_JIS\"\nCID=1\nparentCID=ffffffff\n\
                       createType=\"monolithicFlat\"\nRW 1 FLAT \"\x93\xfa\x96\x7b.raw\" 0\n";
    let own_name = name::from_bytes(b"\x93\xfa\x96\x7b.raw");
    let files = Files::default();
    let file = || Arc::new(MemoryDevice::new(descriptor.to_vec())) as Arc<dyn Device>;
    let first_byte = |image: Result<Image>| {
        let mut byte = [0];
        image?.read_at(&mut byte, 0)?;
        Ok::<_, Error>(byte[0])
    };
    let existing = || open_on(file(), &Existing(files.clone()), false);

    let error = first_byte(existing()).expect_err("neither is there");
    assert_eq!(error.chain(), format!("{own_name} is not allowed"));

    files.file("日本.raw").write_at(&[1; 512], 0).expect("writes");
    assert_eq!(first_byte(existing()).map_err(|error| error.chain()), Ok(1));
    let error =
        first_byte(open_on(file(), &files, false)).expect_err("the first one is forbidden, not missing");
    assert_eq!(error.kind(), ErrorKind::Denied);

    files.file(&own_name).write_at(&[2; 512], 0).expect("writes");
    assert_eq!(first_byte(existing()).map_err(|error| error.chain()), Ok(2));
}
