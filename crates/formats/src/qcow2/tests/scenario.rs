//! The scenarios of the crash and fault tests: steps that change an image, and a model of the contents allowed
//! afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskimage_core::options::Options;
use diskimage_core::{
    AmendRequest, Backing, ByteRange, CheckReport, Device, Error, Format, Image, Layer, MemoryDevice,
    NewBitmap, NewSnapshot, NodeOptions, Note, OpenContext, OpenRequest, Preallocation, Progress, Repair,
    ResizeRequest, Result, Snapshots, ZeroMode, errno,
};

use super::super::{Qcow2, Qcow2Format};
use super::create;
use crate::testing::{OneFile, contents};

/// One operation on an image. Clusters are filled with one value below 8.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, ZeroMode),
    Discard(u64, u64),
    /// Writes the cluster at this offset compressed.
    Compressed(u64, u8),
    Resize(u64, Preallocation),
    /// Creates a snapshot with this name, which is used once.
    Take(&'static str),
    /// Applies that snapshot.
    Apply(&'static str),
    /// Deletes that snapshot.
    Drop(&'static str),
    /// Amends the image, which must be opened again afterwards.
    Amend(&'static str),
    /// Frees all data.
    Empty,
    /// Sets another backing file and its format.
    Backing(&'static str, &'static str),
    Flush,
}

/// An image and the steps that change it.
#[derive(Debug)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// The creation options.
    pub(super) options: &'static str,
    pub(super) size: u64,
    /// The steps that run first and are flushed.
    pub(super) setup: Vec<Step>,
    /// Whether a snapshot is created after the first steps.
    pub(super) snapshot: bool,
    /// Whether a bitmap records the writes of the later steps.
    pub(super) bitmap: bool,
    /// The steps under test.
    pub(super) steps: Vec<Step>,
}

/// The facts about an image before the steps under test.
#[derive(Debug)]
pub(super) struct Before {
    /// The contents of the disk.
    disk: Vec<u8>,
    /// Whether a snapshot holds these contents.
    snapshot: bool,
    /// Whether a bitmap records writes.
    bitmap: bool,
    /// The backing files that the header may name.
    backings: Vec<Option<Backing>>,
}

const BITMAP: &str = "b";

/// The granularity of the bitmap.
const GRANULE: u64 = 4096;

/// The contents of the files of an image: the image itself, and its data file if it has one.
pub(super) type Files = Vec<Vec<u8>>;

impl Scenario {
    /// Whether all steps amend options: such scenarios have few requests.
    pub(super) fn only_amends(&self) -> bool {
        let amends = |step: &Step| matches!(step, Step::Amend(..) | Step::Flush);
        self.steps.iter().all(amends)
    }

    /// Runs the first steps. Returns the files, the facts about them, and the model of the disk.
    pub(super) fn prepare(&self) -> (Files, Before, Model) {
        let data = Arc::new(MemoryDevice::default());
        let file = create(
            self.options,
            self.size,
            &OneFile(Arc::<MemoryDevice>::clone(&data)),
        );
        let devices: Vec<Arc<dyn Device>> = vec![
            Arc::<MemoryDevice>::clone(&file),
            Arc::<MemoryDevice>::clone(&data),
        ];
        let mut model = Model::new(self.size);
        let image = open_on(&devices, true).expect("opens");
        for step in self.setup.iter().chain(&[Step::Flush]) {
            model.begin(step);
            step.apply(&image).expect("no fault yet");
            model.done(step);
        }
        if self.bitmap {
            let bitmaps = image.layer().bitmaps().expect("version 3 has bitmaps");
            let bitmap = NewBitmap {
                name: BITMAP,
                granularity: Some(GRANULE),
                enabled: true,
            };
            bitmaps.add(&bitmap).expect("no fault yet");
            image.flush().expect("no fault yet");
        }
        let before = Before {
            disk: contents(&image),
            snapshot: self.snapshot,
            bitmap: self.bitmap,
            backings: std::iter::once(image.layer().backing())
                .chain(self.steps.iter().filter_map(Step::backing))
                .collect(),
        };
        drop(image);
        let mut files = vec![file.contents(), data.contents()];
        if self.snapshot {
            take_snapshot(&mut files[0]);
            model.now.keep(KEPT, true);
            model.crashed.keep(KEPT, true);
        }
        (files, before, model)
    }
}

impl Step {
    pub(super) fn apply(&self, image: &Image) -> Result<()> {
        match *self {
            Self::Write(at, len, value) => image.write_at(&filled(len, value), at),
            Self::Zero(at, len, mode) => image.write_zeroes(ByteRange::at(at, len), mode),
            Self::Discard(at, len) => image.discard(ByteRange::at(at, len)),
            Self::Compressed(at, value) => {
                let mut encoder = image.layer().encoder(None)?.expect("qcow2 compresses");
                let mut encoded = Vec::new();
                assert!(encoder.encode(&filled(image.layer().granularity(), value), &mut encoded)?);
                image.write_encoded(at, &encoded)
            }
            Self::Resize(len, preallocation) => image.resize_with(&ResizeRequest::new(len, preallocation)),
            Self::Take(name) => snapshots(image).create(&NewSnapshot {
                name,
                date_sec: 0,
                date_nsec: 0,
            }),
            Self::Apply(name) => snapshots(image).apply(find_snapshot(image, name)?),
            Self::Drop(name) => snapshots(image).delete(find_snapshot(image, name)?),
            Self::Amend(list) => amend(image, list),
            Self::Empty => image.make_empty(),
            Self::Backing(..) => image.layer().set_backing(self.backing().flatten().as_ref()),
            Self::Flush => image.flush(),
        }
    }

    /// The backing file that the step sets; an empty name removes it.
    fn backing(&self) -> Option<Option<Backing>> {
        match *self {
            Self::Backing(name, format) => Some((!name.is_empty()).then(|| Backing {
                name: name.to_owned().into(),
                format: (!format.is_empty()).then(|| format.to_owned()),
            })),
            _ => None,
        }
    }
}

/// The name of the snapshot that the first steps created.
const KEPT: &str = "s";

fn amend(image: &Image, list: &str) -> Result<()> {
    let mut options = Options::new(Qcow2Format.properties().amend_options.expect("can be amended"));
    options.parse(list).expect("valid");
    image.amend(&AmendRequest::new(&options, &Arc::default(), &Progress::none()))
}

pub(super) fn snapshots(image: &Image) -> &dyn Snapshots {
    image.layer().snapshots().expect("qcow2 has snapshots")
}

fn find_snapshot(image: &Image, name: &str) -> Result<usize> {
    let list = snapshots(image).list()?;
    // After a fault the snapshot may be missing; then the step fails as well.
    let found = list.iter().position(|snapshot| snapshot.name == name);
    found.ok_or_else(|| Error::from_errno(errno::EIO))
}

fn filled(len: u64, value: u8) -> Vec<u8> {
    vec![value; usize::try_from(len).expect("small")]
}

/// Opens the image on the first device, with the second as its data file.
pub(super) fn open_on(devices: &[Arc<dyn Device>], write: bool) -> Result<Image> {
    open_layer(devices, write, false).map(|layer| Image::new(layer, None, "test", write))
}

/// Opens the image for writing with at most `memory` bytes of cached pages.
pub(super) fn open_with_memory(devices: &[Arc<dyn Device>], memory: usize) -> Result<Image> {
    let layer = open_layer(devices, true, false)?;
    layer.lock().metadata.cache.limit_memory(memory);
    // Snapshots change tables in copies even if they are few.
    layer.lock().copied_from = 0;
    Ok(Image::new(layer, None, "test", true))
}

pub(super) fn open_layer(devices: &[Arc<dyn Device>], write: bool, for_check: bool) -> Result<Arc<Qcow2>> {
    let context = match devices.get(1) {
        Some(data) => OpenContext::new(Arc::new(OneFile(Arc::clone(data)))),
        None => OpenContext::default(),
    };
    Qcow2::open(OpenRequest {
        write,
        for_check,
        ..OpenRequest::new(Arc::clone(&devices[0]), "test", &mut NodeOptions::new(), &context)
    })
}

/// Cache memory for all tables of a scenario.
pub(super) const PLENTY: usize = 1 << 20;

/// Cache memory for few pages: pages are evicted and read again during operations.
pub(super) const SCARCE: usize = 4096;

pub(super) fn in_memory(files: &[Vec<u8>]) -> Vec<Arc<dyn Device>> {
    let device = |bytes: &Vec<u8>| Arc::new(MemoryDevice::new(bytes.clone())) as Arc<dyn Device>;
    files.iter().map(device).collect()
}

/// The allowed contents of the disk: for each byte the allowed values, one bit each.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Allowed while the image stays open.
    pub(super) now: State,
    /// Allowed after a crash.
    pub(super) crashed: State,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    lens: Vec<u64>,
    bytes: Vec<u8>,
    /// The allowed contents of the snapshots that steps created, by name.
    kept: Vec<Kept>,
}

#[derive(Clone, Debug)]
struct Kept {
    name: &'static str,
    /// Whether the snapshot must exist.
    sure: bool,
    disk: State,
}

const ZERO: u8 = 1;

impl Model {
    fn new(len: u64) -> Self {
        let state = State {
            lens: vec![len],
            bytes: filled(len, ZERO),
            kept: Vec::new(),
        };
        Self {
            now: state.clone(),
            crashed: state,
        }
    }

    /// Allows that the step took effect wholly, in part or not at all.
    pub(super) fn begin(&mut self, step: &Step) {
        self.now.allow(step);
        self.crashed.allow(step);
    }

    /// Requires that the step took effect.
    pub(super) fn done(&mut self, step: &Step) {
        match *step {
            Step::Flush | Step::Amend(_) => self.crashed = self.now.clone(),
            Step::Take(name) => {
                self.now.keep(name, true);
                self.crashed = self.now.clone();
            }
            Step::Drop(name) => {
                self.now.kept.retain(|kept| kept.name != name);
                self.crashed = self.now.clone();
            }
            Step::Apply(name) => {
                if let Some(disk) = self.now.kept_disk(name) {
                    self.now.lens = disk.lens;
                    self.now.bytes = disk.bytes;
                }
                self.crashed = self.now.clone();
            }
            Step::Resize(len, _) => {
                self.now.bytes.resize(index(len), ZERO);
                self.now.lens = vec![len];
                // A resize is durable when it returns.
                self.crashed.lens = vec![len];
            }
            // A discard may leave the old bytes.
            Step::Discard(..) => {}
            // All data is gone only when the step returns.
            Step::Empty => {
                self.now.bytes.fill(ZERO);
                self.crashed.bytes.fill(ZERO);
            }
            _ => {
                if let Some((range, value)) = self.now.fill(step) {
                    self.now.bytes[range].fill(1 << value);
                }
            }
        }
    }
}

impl State {
    /// The range that a step fills, and the value.
    fn fill(&self, step: &Step) -> Option<(std::ops::Range<usize>, u8)> {
        let (at, len, value) = match *step {
            Step::Write(at, len, value) => (at, len, value),
            Step::Zero(at, len, _) | Step::Discard(at, len) => (at, len, 0),
            Step::Compressed(at, value) => (at, CLUSTER, value),
            Step::Empty => (0, self.bytes.len() as u64, 0),
            Step::Resize(..)
            | Step::Backing(..)
            | Step::Flush
            | Step::Amend(_)
            | Step::Take(_)
            | Step::Apply(_)
            | Step::Drop(_) => return None,
        };
        let end = index(at + len).min(self.bytes.len());
        Some((index(at).min(end)..end, value))
    }

    /// Allows that a snapshot holds the present disk.
    fn keep(&mut self, name: &'static str, sure: bool) {
        self.kept.retain(|kept| kept.name != name);
        let disk = Self {
            kept: Vec::new(),
            ..self.clone()
        };
        self.kept.push(Kept { name, sure, disk });
    }

    /// Allows that the snapshot became one of an empty disk.
    pub(super) fn may_be_empty(&mut self, name: &str) {
        let kept = self.kept.iter_mut().find(|kept| kept.name == name);
        if let Some(kept) = kept {
            kept.disk.lens.push(0);
        }
    }

    fn kept_disk(&self, name: &str) -> Option<Self> {
        let kept = self.kept.iter().find(|kept| kept.name == name)?;
        Some(kept.disk.clone())
    }

    /// Describes what is wrong with the snapshots of an image, if anything is.
    fn refuse_snapshots(&self, image: &Image) -> Option<String> {
        for Kept { name, sure, disk } in &self.kept {
            match snapshots(image).open(None, Some(name)) {
                Ok(layer) => {
                    let kept = Image::new(layer, None, "snapshot", false);
                    if let Some(wrong) = disk.refuse(&contents(&kept)) {
                        return Some(format!("snapshot {name}: {wrong}"));
                    }
                }
                _ if *sure => return Some(format!("snapshot {name} is lost")),
                _ => {}
            }
        }
        None
    }

    fn allow(&mut self, step: &Step) {
        match step {
            Step::Take(name) => self.keep(name, false),
            Step::Drop(name) => {
                self.kept
                    .iter_mut()
                    .for_each(|kept| kept.sure &= kept.name != *name);
            }
            Step::Apply(name) => {
                let Some(disk) = self.kept_disk(name) else { return };
                self.lens.extend(&disk.lens);
                let len = self.bytes.len().max(disk.bytes.len());
                self.bytes.resize(len, 0);
                for (byte, kept) in self.bytes.iter_mut().zip(&disk.bytes) {
                    *byte |= kept;
                }
            }
            _ => {}
        }
        if let Step::Resize(len, _) = *step {
            self.lens.push(len);
            if index(len) > self.bytes.len() {
                self.bytes.resize(index(len), ZERO);
            }
            for byte in &mut self.bytes[index(len)..] {
                *byte |= ZERO;
            }
        } else if let Some((range, value)) = self.fill(step) {
            for byte in &mut self.bytes[range] {
                *byte |= 1 << value;
            }
        }
    }

    /// Describes what is wrong with these contents of the disk, if anything is.
    pub(super) fn refuse(&self, disk: &[u8]) -> Option<String> {
        if !self.lens.contains(&(disk.len() as u64)) {
            return Some(format!("length {} is none of {:?}", disk.len(), self.lens));
        }
        // Fast path: most sectors hold one value everywhere.
        let even = |bytes: &[u8]| {
            bytes
                .split_first()
                .is_none_or(|(_, rest)| rest == &bytes[..rest.len()])
        };
        let wrong = |(byte, allowed): (&u8, &u8)| {
            1u8.checked_shl(u32::from(*byte))
                .is_none_or(|bit| bit & allowed == 0)
        };
        let sectors = disk.chunks(512).zip(self.bytes.chunks(512)).enumerate();
        let mut suspects = sectors.filter(|(_, (disk, allowed))| {
            !(even(disk) && even(allowed)) || disk.iter().zip(*allowed).take(1).any(wrong)
        });
        let at = suspects.find_map(|(sector, (disk, allowed))| {
            let at = disk.iter().zip(allowed).position(wrong)?;
            Some(sector * 512 + at)
        })?;
        Some(format!(
            "byte {at:#x} is {:#x}, allowed is {:#010b}",
            disk[at], self.bytes[at]
        ))
    }
}

/// The cluster size of scenarios that write compressed clusters.
pub(super) const CLUSTER: u64 = 4096;

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

pub(super) fn report(layer: &dyn Layer, repair: Repair) -> CheckReport {
    layer.check(repair, &Progress::none()).expect("can be checked")
}

/// The errors of a check, except COPIED flags that are off although the refcount is one: they cost needless copies
/// only.
fn report_ignoring_flags(layer: &dyn Layer) -> CheckReport {
    let harmless = AtomicU64::new(0);
    let notes = |note: &Note| {
        let text = note.text();
        let flag_off = text
            .split(['=', ' '])
            .filter_map(|word| u64::from_str_radix(word, 16).ok());
        let off = flag_off.max().is_some_and(|entry| entry >> 63 == 0);
        if text.contains("OFLAG_COPIED") && text.ends_with("refcount=1") && off {
            harmless.fetch_add(1, Ordering::Relaxed);
        }
    };
    let progress = Progress::none().with_notes(&notes);
    let mut found = layer.check(Repair::No, &progress).expect("can be checked");
    found.corruptions = found.corruptions.saturating_sub(harmless.into_inner());
    found
}

/// Describes what is wrong with an image, except for leaked clusters.
pub(super) fn find_fault(files: &[Vec<u8>], disk: &State, before: &Before) -> Option<String> {
    find_fault_with(files, disk, before, |layer| report(layer, Repair::No))
}

/// As [`find_fault`], for snapshots that change in place: a crash may leave COPIED flags off that could be on.
pub(super) fn find_fault_ignoring_flags(files: &[Vec<u8>], disk: &State, before: &Before) -> Option<String> {
    find_fault_with(files, disk, before, report_ignoring_flags)
}

fn find_fault_with(
    files: &[Vec<u8>],
    disk: &State,
    before: &Before,
    report_of: fn(&dyn Layer) -> CheckReport,
) -> Option<String> {
    let devices = in_memory(files);
    let image = match open_on(&devices, false) {
        Ok(image) => image,
        Err(error) => return Some(format!("does not open: {}", error.chain())),
    };
    let found = report_of(&**image.layer());
    if found.corruptions > 0 || found.check_errors > 0 {
        return Some(format!("{found:?}"));
    }
    let backing = image.layer().backing();
    if !before.backings.contains(&backing) {
        return Some(format!("is based on {backing:?}"));
    }
    let mut bytes = filled(image.len(), 0xee);
    if let Err(error) = image.read_at(&mut bytes, 0) {
        return Some(format!("does not read: {}", error.chain()));
    }
    if let Some(wrong) = disk.refuse(&bytes).or_else(|| disk.refuse_snapshots(&image)) {
        return Some(wrong);
    }
    if before.snapshot {
        let layer = snapshots(&image).open(None, Some("s")).expect("readable");
        let kept = Image::new(layer, None, "snapshot", false);
        if contents(&kept) != before.disk {
            return Some("the snapshot has changed".to_owned());
        }
    }
    if before.bitmap
        && let Some(fault) = find_unrecorded(&image, &bytes, before)
    {
        return Some(fault);
    }
    if found.leaks > 0 {
        let layer = open_layer(&devices, true, true).expect("opens for repair");
        let repaired = report(&*layer, Repair::Leaks);
        drop(layer);
        let again = report(&**open_on(&devices, false).expect("opens").layer(), Repair::No);
        if (repaired.leaks_fixed, again.leaks, again.corruptions) != (found.leaks, 0, 0) {
            return Some(format!(
                "leaks cannot be repaired: {found:?} {repaired:?} {again:?}"
            ));
        }
    }
    None
}

/// Describes a difference from before that a consistent bitmap does not record.
fn find_unrecorded(image: &Image, disk: &[u8], before: &Before) -> Option<String> {
    if !has_sound_bitmap(image) {
        return None;
    }
    let mut recorded = vec![false; disk.len().div_ceil(index(GRANULE))];
    let bitmaps = image.layer().bitmaps()?;
    let outcome = bitmaps.marked(BITMAP, &mut |range| {
        let granules = range.align_out(GRANULE);
        recorded[index(granules.start() / GRANULE)..index(granules.end() / GRANULE)].fill(true);
        Ok(())
    });
    if let Err(error) = outcome {
        return Some(format!("the bitmap cannot be read: {}", error.chain()));
    }
    let old = |at: usize| before.disk.get(at).copied().unwrap_or(0);
    let changed = |(granule, bytes): &(usize, &[u8])| {
        let start = granule * index(GRANULE);
        (start..).zip(*bytes).any(|(at, byte)| *byte != old(at))
    };
    let mut granules = disk.chunks(index(GRANULE)).enumerate();
    let (at, _) = granules.find(|granule| !recorded[granule.0] && changed(granule))?;
    Some(format!(
        "the bitmap lacks the granule at {:#x}",
        at * index(GRANULE)
    ))
}

/// Whether the bitmap exists and is consistent.
pub(super) fn has_sound_bitmap(image: &Image) -> bool {
    let bitmaps = image.layer().bitmaps().expect("version 3 has bitmaps");
    let list = bitmaps.list().expect("readable");
    list.iter()
        .any(|bitmap| bitmap.name == BITMAP && !bitmap.inconsistent)
}

/// Adds a snapshot named "s" to an image with one block of 16-bit refcounts, without using the tested code.
fn take_snapshot(file: &mut Vec<u8>) {
    let number = |file: &[u8], at: usize, len: usize| {
        file[at..at + len]
            .iter()
            .fold(0u64, |n, byte| n << 8 | u64::from(*byte))
    };
    let cluster = 1usize << number(file, 20, 4);
    let entries = number(file, 36, 4);
    let l1 = index(number(file, 40, 8));
    let block = index(number(file, index(number(file, 48, 8)), 8));
    let size = number(file, 24, 8);
    let count = |file: &mut Vec<u8>, offset: u64, count: u8| {
        let at = block + index(offset) / cluster * 2;
        file[at..at + 2].copy_from_slice(&[0, count]);
    };
    let shared = |file: &mut Vec<u8>, at: usize| -> usize {
        let offset = number(file, at, 8) & 0x00ff_ffff_ffff_fe00;
        if offset != 0 {
            file[at] &= 0x7f;
            count(file, offset, 2);
        }
        index(offset)
    };
    for entry in 0..index(entries) {
        let l2 = shared(file, l1 + entry * 8);
        for at in (l2..l2 + if l2 > 0 { cluster } else { 0 }).step_by(8) {
            shared(file, at);
        }
    }
    file.resize(file.len().next_multiple_of(cluster), 0);
    let (copy, table) = (file.len(), file.len() + cluster);
    file.extend_from_within(l1..l1 + cluster);
    let mut snapshot = Vec::new();
    snapshot.extend_from_slice(&(copy as u64).to_be_bytes());
    snapshot.extend_from_slice(&file[36..40]);
    snapshot.extend_from_slice(&[0, 1, 0, 1]);
    snapshot.extend_from_slice(&[0; 20]);
    snapshot.extend_from_slice(&16u32.to_be_bytes());
    snapshot.extend_from_slice(&[0; 8]);
    snapshot.extend_from_slice(&size.to_be_bytes());
    snapshot.extend_from_slice(b"1s");
    snapshot.resize(cluster, 0);
    file.extend_from_slice(&snapshot);
    count(file, copy as u64, 1);
    count(file, table as u64, 1);
    file[60..64].copy_from_slice(&1u32.to_be_bytes());
    file[64..72].copy_from_slice(&(table as u64).to_be_bytes());
}
