//! Images in memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use diskimage_core::options::Options;
use diskimage_core::{
    Budget, ByteRange, CreateRequest, Device, Error, ErrorKind, Format, Gate, Image, MemoryDevice,
    NodeOptions, Objects, OpenRequest, Preallocation, Progress, Reference, Repair, Result, Want, ZeroMode,
};
use diskimage_testing::{Journal, Recorder};
use proptest::prelude::*;

use super::Vmdk;
use crate::testing::contents;

/// Files by name; one that is asked for and not there is made.
#[derive(Debug, Default)]
struct Files(Mutex<HashMap<String, Arc<MemoryDevice>>>);

impl Files {
    fn file(&self, name: &str) -> Arc<MemoryDevice> {
        let mut files = self.0.lock().expect("no panic");
        Arc::clone(files.entry(name.to_owned()).or_default())
    }

    fn create(&self, options: &str, size: u64) -> Result<()> {
        let mut values = Options::new(Vmdk.create_options());
        values.parse(options)?;
        let file: Arc<dyn Device> = self.file("disk.vmdk");
        for part in Vmdk.new_parts("disk.vmdk", size, &values)? {
            self.file(&part);
        }
        Vmdk.create(CreateRequest {
            file,
            name: "disk.vmdk",
            size,
            options: &values,
            objects: &Arc::default(),
            gate: self,
            id_below: None,
        })
    }

    fn open(&self, write: bool) -> Result<Image> {
        open_on(self.file("disk.vmdk"), self, write)
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

fn open_on(file: Arc<dyn Device>, gate: &dyn Gate, write: bool) -> Result<Image> {
    let layer = Vmdk.open(OpenRequest {
        file,
        name: "disk.vmdk",
        write,
        for_check: false,
        no_data: false,
        force_share: false,
        children: Vec::new(),
        options: &mut NodeOptions::new(),
        objects: &Arc::<Objects>::default(),
        gate,
        budget: Budget::default(),
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
        // Some need another grain table.
        prop_oneof![0..300_usize, 65_000..70_000_usize].prop_map(Step::Grow),
        Just(Step::Reopen),
    ]
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
            // Any error will do.
            let Ok(image) = files.open(write) else { continue };
            let mut buf = vec![0; 4096];
            let end = image.len();
            for offset in [0, end / 2, end.saturating_sub(4096)] {
                drop(image.read_at(&mut buf, offset));
                if write {
                    drop(image.write_at(&buf, offset));
                }
            }
            if end > 0 {
                drop(image.status(ByteRange::new(0, end), Want::Zeroes));
            }
            drop(image.layer().check(Repair::No, &Progress::none()));
            drop(image.flush());
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
        let device: Arc<dyn Device> = Arc::new(Recorder::new(before.clone(), 0, &journal));
        let image = open_on(device, &files, true).expect("opens");
        // A position of the journal, and what is certain to be there from then on.
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
                // The last write is over part of the first.
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
        let devices = before
            .iter()
            .enumerate()
            .map(|(nth, bytes)| -> Arc<dyn Device> { Arc::new(Recorder::new(bytes.clone(), nth, &journal)) });
        let recorded = Present::new(&names, devices);
        let image = open_on(Arc::clone(&recorded.0["disk.vmdk"]), &recorded, true).expect("opens");
        image.resize(40 << 20, Preallocation::Off).expect("grows");
        image.flush().expect("flushes");
        let mut lens = std::collections::BTreeSet::new();
        journal.crashes(&before, 12, 0x5eed, |crash| {
            let devices = crash
                .files
                .iter()
                .map(|bytes| -> Arc<dyn Device> { Arc::new(MemoryDevice::new(bytes.clone())) });
            let left = Present::new(&names, devices);
            let image = open_on(Arc::clone(&left.0["disk.vmdk"]), &left, false).expect("opens");
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

/// Files that are there already.
struct Present(HashMap<String, Arc<dyn Device>>);

impl Present {
    fn new(names: &[&str], files: impl Iterator<Item = Arc<dyn Device>>) -> Self {
        Self(names.iter().map(|name| (*name).to_owned()).zip(files).collect())
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
            "subformat=streamOptimized",
            2 << 20,
            "The tables of a stream stand in front of it and have no room to grow",
        ),
        (
            "subformat=twoGbMaxExtentSparse",
            3 << 30,
            "The last extent can grow up to 2147483648 bytes of the disk, and no further one is added",
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
    let mut encoder = image.layer().encoder().expect("has one").expect("has one");
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
    assert_eq!(
        again.chain(),
        "Could not write to allocated cluster for streamOptimized: Input/output error"
    );
    assert!(image.write_at(&[1; 512], 0).is_err(), "no part of a grain");
    image.flush().expect("flushes");
    let file = files.file("disk.vmdk").contents();
    // What reads the file as a stream finds the grains in the disk's order, and the end.
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
    let mut encoder = image.layer().encoder().expect("has one").expect("has one");
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
    let extent = image.status(range, Want::Zeroes).expect("is empty");
    assert_eq!(extent.len, 1 << 45);
}

#[test]
fn an_image_whose_base_has_changed_is_not_read() {
    let files = Files::default();
    files.create("", 1 << 20).expect("creates");
    let base = files.open(true).expect("opens");
    let cid = base.layer().content_id().expect("has one");
    let below = Arc::new(files.open(false).expect("opens"));
    base.write_at(&[1; 512], 0).expect("writes");
    let changed = Arc::new(files.open(false).expect("opens"));
    let top = |parent: u32, below: &Arc<Image>| {
        let others = Files::default();
        others.create("", 1 << 20).expect("creates");
        let text = String::from_utf8_lossy(&others.file("disk.vmdk").contents()[512..1100])
            .replace("parentCID=ffffffff", &format!("parentCID={parent:08x}"));
        others
            .file("disk.vmdk")
            .write_at(text.as_bytes(), 512)
            .expect("writes");
        let layer = Arc::clone(others.open(false).expect("opens").layer());
        Image::new(layer, Some(Arc::clone(below)), "top", false)
    };
    let mut buf = [0; 512];
    top(cid, &below).read_at(&mut buf, 0).expect("is the right one");
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
        let score = Vmdk.probe(&diskimage_core::Probe { head, name: "x" });
        assert_eq!(score, 100, "{options}");
    }
}
