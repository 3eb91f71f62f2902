//! Changes of images with one damaged table entry: all data that was readable before reads the same afterwards, or as
//! the change has written it.
//!
//! ```text
//!   sound image ── damage to one entry ──► bytes that are still readable and equal: kept
//!                                      └──► a change, which may fail ──► each kept byte: the old one, or the new one
//! ```

use std::sync::Arc;

use diskimage_core::{
    ByteRange, ClosedGate, Device, Image, MemoryDevice, NewBitmap, Preallocation, Progress, Repair, Result,
    ZeroMode,
};

use super::create;
use super::scenario::{Step, in_memory, open_layer, open_on};

/// The default number of cases.
const CASES: u64 = 3000;
/// The environment variable with another number of cases.
const CASES_VARIABLE: &str = "DAMAGE_STEPS";

const SIZE: u64 = 40 * CLUSTER;
const CLUSTER: u64 = 4096;

const FORMS: [&str; 6] = [
    "cluster_size=4096",
    "cluster_size=4096,compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=4096,refcount_bits=64,lazy_refcounts=on",
    "cluster_size=4096,extended_l2=off,compression_type=zstd",
    "cluster_size=16384,extended_l2=on",
];

/// A generator of reproducible random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % end.max(1)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).expect("small")]
    }
}

/// The bytes of a disk; `None` for those that cannot be read.
type Disk = Vec<Option<u8>>;

/// Reads a disk in small parts, so that an unreadable part does not hide others.
fn disk(image: &Image) -> Disk {
    let mut disk = Disk::new();
    let (mut at, end) = (0, image.len().min(SIZE));
    while at < end {
        let len = usize::try_from((end - at).min(512)).expect("small");
        let mut bytes = vec![0xee; len];
        match image.read_at(&mut bytes, at) {
            Ok(()) => disk.extend(bytes.iter().map(|byte| Some(*byte))),
            Err(_) => disk.extend(std::iter::repeat_n(None, len)),
        }
        at += len as u64;
    }
    disk
}

/// The contents of an image: its disk, and the disk of each snapshot.
#[derive(Clone, Debug)]
struct Contents {
    disk: Disk,
    kept: Vec<(String, Disk)>,
}

fn contents_of(file: &[u8]) -> Result<Contents> {
    let image = open_on(&in_memory(&[file.to_vec()]), false)?;
    let mut kept = Vec::new();
    let snapshots = image.layer().snapshots().expect("qcow2 has snapshots");
    for info in snapshots.list()? {
        let layer = snapshots.open(Some(&info.id), None)?;
        kept.push((info.name, disk(&Image::new(layer, None, "snapshot", false))));
    }
    Ok(Contents {
        disk: disk(&image),
        kept,
    })
}

/// Drops the clusters, of `unit` bytes, that the damage itself has changed: they may read as bytes of a table.
fn keep_same(sound: &Disk, damaged: &mut Disk, unit: u64) {
    let unit = usize::try_from(unit).expect("small");
    for (at, cluster) in damaged.chunks_mut(unit).enumerate() {
        if sound.get(at * unit..at * unit + cluster.len()) != Some(&*cluster) {
            cluster.fill(None);
        }
    }
}

fn sound_image(random: &mut Random) -> (Vec<u8>, bool) {
    let form = random.of(&FORMS);
    let file = create(form, SIZE, &ClosedGate);
    let devices = [Arc::<MemoryDevice>::clone(&file) as Arc<dyn Device>];
    let image = open_on(&devices, true).expect("opens");
    let compresses = !form.contains("refcount_bits=1");
    let mut value = 0;
    let mut write = |random: &mut Random| {
        value = value % 250 + 1;
        let at = random.below(SIZE);
        let len = (random.below(5 * CLUSTER) + 1).min(SIZE - at);
        let bytes = vec![value; usize::try_from(len).expect("small")];
        image.write_at(&bytes, at).expect("the image is not damaged yet");
    };
    for _ in 0..1 + random.below(8) {
        write(random);
    }
    if compresses && random.below(2) == 0 {
        let unit = image.layer().granularity();
        for _ in 0..3 {
            let at = random.below(SIZE / unit) * unit;
            Step::Compressed(at, 7)
                .apply(&image)
                .expect("the image is not damaged yet");
        }
    }
    // A cluster that a snapshot shares needs a refcount of two.
    let snapshot = compresses && random.below(2) == 0;
    if snapshot {
        image.flush().expect("the image is not damaged yet");
        Step::Take("s")
            .apply(&image)
            .expect("the image is not damaged yet");
        for _ in 0..random.below(4) {
            write(random);
        }
    }
    if random.below(3) == 0 {
        add_bitmap(&image, "b").unwrap_or(());
    }
    if random.below(3) == 0 {
        Step::Discard(random.below(SIZE / 2), random.below(SIZE / 2))
            .apply(&image)
            .expect("the image is not damaged yet");
    }
    image.flush().expect("the image is not damaged yet");
    drop(image);
    (file.contents(), snapshot)
}

fn add_bitmap(image: &Image, name: &str) -> Result<()> {
    match image.layer().bitmaps() {
        Some(bitmaps) => bitmaps.add(&NewBitmap {
            name,
            granularity: Some(4096),
            enabled: true,
        }),
        None => Ok(()),
    }
}

/// The parsed structures of a sound image, as far as damaging it needs them.
struct Layout<'a> {
    file: &'a [u8],
    cluster: u64,
    /// The width of a refcount in bits.
    refcount_bits: u64,
    /// The host offsets of all table entries.
    entries: Vec<u64>,
    /// The host offsets of structures and data.
    offsets: Vec<u64>,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl<'a> Layout<'a> {
    fn new(file: &'a [u8]) -> Self {
        let mut layout = Self {
            file,
            cluster: 0,
            refcount_bits: 16,
            entries: vec![40, 48],
            offsets: vec![0],
        };
        layout.cluster = 1 << layout.short(20);
        if layout.short(4) >= 3 {
            layout.refcount_bits = 1 << layout.short(96);
        }
        layout.l1(layout.number(40), layout.short(36));
        let table = layout.number(48);
        layout.offsets.push(table);
        for i in 0..3 {
            layout.entries.push(table + i * 8);
            layout.offsets.push(layout.number(table + i * 8) & OFFSET);
        }
        if layout.short(60) > 0 {
            let entry = layout.number(64);
            layout.offsets.push(entry);
            layout.entries.extend([64, entry]);
            layout.l1(layout.number(entry), layout.short(entry + 8));
        }
        layout
    }

    fn number(&self, at: u64) -> u64 {
        let bytes = usize::try_from(at)
            .ok()
            .and_then(|at| self.file.get(at..)?.first_chunk());
        u64::from_be_bytes(*bytes.unwrap_or(&[0; 8]))
    }

    fn short(&self, at: u64) -> u64 {
        self.number(at) >> 32
    }

    fn l1(&mut self, table: u64, count: u64) {
        self.offsets.push(table);
        for i in 0..count {
            self.entries.push(table + i * 8);
            let l2 = self.number(table + i * 8) & OFFSET;
            if l2 == 0 {
                continue;
            }
            self.offsets.push(l2);
            for index in 0..SIZE / CLUSTER {
                let at = l2 + index * 8;
                self.entries.push(at);
                self.offsets.push(self.number(at) & OFFSET & !(self.cluster - 1));
            }
        }
    }

    /// The file with one damaged entry, and a description of the damage.
    fn damage(&self, random: &mut Random) -> (Vec<u8>, String) {
        let mut file = self.file.to_vec();
        let clusters = file.len() as u64 / self.cluster;
        if random.below(3) == 0 {
            // One refcount, in the only block of these small images.
            let block = self.number(self.number(48)) & OFFSET;
            let cluster = random.below(clusters);
            let bit = cluster * self.refcount_bits;
            let at = usize::try_from(block + bit / 8).expect("small");
            let value = random.of(&[0, 0, 0, 1, 2, 0xff]);
            if self.refcount_bits < 8 {
                file[at] &= !(1 << (bit % 8));
                return (file, format!("refcount of cluster {cluster} 0"));
            }
            let last = at + usize::try_from(self.refcount_bits / 8).expect("small") - 1;
            file[at..last].fill(0);
            file[last] = value;
            return (file, format!("refcount of cluster {cluster} {value}"));
        }
        let at = random.of(&self.entries);
        let value = match random.below(8) {
            0 => 0,
            1 => random.of(&[1, 1 << 63, u64::MAX, 1 << 62, 0x200]),
            2 => ((clusters + random.below(3)) * self.cluster) | random.of(&[0, 1 << 63]),
            3 => random.below(clusters) * self.cluster + 512,
            4 => self.number(at) ^ (1 << random.below(64)),
            _ => random.of(&self.offsets) | random.of(&[0, 1 << 63, 1 << 63, 1 << 62]),
        };
        let start = usize::try_from(at).expect("small");
        file[start..start + 8].copy_from_slice(&value.to_be_bytes());
        (
            file,
            format!("entry at {at:#x} {:#x} -> {value:#x}", self.number(at)),
        )
    }
}

/// A change of an image.
#[derive(Clone, Copy, Debug)]
enum Change {
    Step(Step),
    Bitmap,
    Check(Repair),
}

fn change(random: &mut Random, unit: u64, snapshot: bool) -> Change {
    let at = random.below(SIZE);
    let len = (random.below(6 * CLUSTER) + 1).min(SIZE - at);
    let units = ByteRange::new(at, at + len)
        .align_out(unit)
        .intersect(ByteRange::new(0, SIZE));
    let other = random.below(20);
    Change::Step(match random.below(15) {
        0..4 => Step::Write(at, len, 6),
        4 => Step::Zero(
            units.start(),
            units.len(),
            random.of(&[ZeroMode::Unmap, ZeroMode::KeepAllocated]),
        ),
        5 => Step::Discard(units.start(), units.len()),
        6 => Step::Compressed(at / unit * unit, 5),
        7 => Step::Resize(SIZE + random.of(&[4096, 1 << 20, 1 << 33]), Preallocation::Off),
        8 => Step::Resize(random.below(SIZE / 512) * 512, Preallocation::Off),
        9 => Step::Take("t"),
        10 if snapshot => Step::Apply("s"),
        11 if snapshot => Step::Drop("s"),
        12 if other == 0 => Step::Empty,
        12 => Step::Amend(random.of(&[
            "lazy_refcounts=on",
            "refcount_bits=32",
            "compat=1.1",
            "compat=0.10",
        ])),
        13 => return Change::Bitmap,
        14 => return Change::Check(random.of(&[Repair::All, Repair::Leaks])),
        _ => Step::Flush,
    })
}

fn apply(file: &Arc<MemoryDevice>, change: Change) -> Result<()> {
    let devices = [Arc::<MemoryDevice>::clone(file) as Arc<dyn Device>];
    if let Change::Check(repair) = change {
        let image = open_layer(&devices, true, true)?;
        return diskimage_core::Check::check(&*image, repair, &Progress::none()).map(|_| ());
    }
    let image = open_on(&devices, true)?;
    match change {
        Change::Step(step) => step.apply(&image)?,
        _ => add_bitmap(&image, "c")?,
    }
    image.flush()
}

/// The value that the kept byte at guest offset `at` has after `change`, if the change succeeds. `old` is its old
/// value. `None` if any value is allowed.
fn new_value(change: Change, at: usize, old: Option<u8>, kept: Option<&Disk>, unit: u64) -> Option<u8> {
    let inside = |start: u64, len: u64| (start..start + len).contains(&(at as u64));
    match change {
        Change::Step(Step::Write(start, len, value)) if inside(start, len) => Some(value),
        Change::Step(Step::Zero(start, len, _)) if inside(start, len) => Some(0),
        Change::Step(Step::Discard(start, len)) if inside(start, len) => None,
        Change::Step(Step::Compressed(start, value)) if inside(start, unit) => Some(value),
        Change::Step(Step::Empty) => Some(0),
        Change::Step(Step::Apply(_)) => kept.and_then(|kept| kept.get(at).copied().flatten()),
        _ => old,
    }
}

/// Describes the first wrong byte after a change, if there is one.
fn find_loss(
    before: &Contents,
    after: &Contents,
    change: Change,
    outcome: &Result<()>,
    unit: u64,
) -> Option<String> {
    let applied = before
        .kept
        .iter()
        .find(|(name, _)| name == "s")
        .map(|(_, disk)| disk);
    let shorter = match change {
        Change::Step(Step::Resize(len, _)) => usize::try_from(len).unwrap_or(usize::MAX),
        _ => usize::MAX,
    };
    for (at, old) in before.disk.iter().enumerate() {
        let new = new_value(change, at, *old, applied, unit);
        let Some(old) = old else { continue };
        let now = after.disk.get(at).copied();
        if now.is_none() && at >= shorter {
            break;
        }
        let now = now.flatten();
        let is_new = match new {
            Some(new) => now == Some(new),
            // The byte was discarded, or is from a part of the snapshot that could not be read before.
            None => true,
        };
        if !is_new && (outcome.is_ok() || now != Some(*old)) {
            return Some(format!(
                "byte {at:#x} was {old:#x}, would be {new:x?}, is {now:x?}"
            ));
        }
    }
    for (name, disk) in &before.kept {
        let Some((_, now)) = after.kept.iter().find(|(other, _)| other == name) else {
            if matches!(change, Change::Step(Step::Drop(_))) {
                continue;
            }
            return Some(format!("snapshot {name} is lost"));
        };
        let differs = disk
            .iter()
            .zip(now)
            .position(|(old, now)| old.is_some() && old != now);
        if let Some(at) = differs {
            return Some(format!(
                "snapshot {name}: byte {at:#x} was {:x?}, is {:x?}",
                disk[at], now[at]
            ));
        }
    }
    None
}

/// Runs one case. Returns whether the change failed, or a description of lost data.
fn run(seed: u64) -> std::result::Result<bool, String> {
    let mut random = Random(seed);
    let (sound, snapshot) = sound_image(&mut random);
    let layout = Layout::new(&sound);
    let unit = layout.cluster;
    let (damaged, damage) = layout.damage(&mut random);
    let held = contents_of(&sound).expect("a sound image");
    let Ok(mut before) = contents_of(&damaged) else {
        return Ok(true);
    };
    keep_same(&held.disk, &mut before.disk, unit);
    before
        .kept
        .retain(|(name, _)| held.kept.iter().any(|(other, _)| other == name));
    for (name, disk) in &mut before.kept {
        if let Some((_, held)) = held.kept.iter().find(|(other, _)| other == name) {
            keep_same(held, disk, unit);
        }
    }
    let change = change(&mut random, unit, snapshot);
    let file = Arc::new(MemoryDevice::new(damaged));
    let outcome = apply(&file, change);
    let story = || format!("seed {seed}: {damage}; {change:?}: {:?}", outcome.as_ref().err());
    let after = contents_of(&file.contents())
        .map_err(|error| format!("{}: does not open any more: {}", story(), error.chain()))?;
    match find_loss(&before, &after, change, &outcome, unit) {
        None => Ok(outcome.is_err()),
        Some(wrong) => Err(format!("{}: {wrong}", story())),
    }
}

#[test]
fn a_change_of_a_damaged_image_loses_no_readable_data() {
    let given = std::env::var(CASES_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let cases = given.unwrap_or(CASES);
    let (mut failed, mut wrong) = (0, Vec::new());
    for seed in 0..cases {
        match run(seed) {
            Ok(refused) => failed += u64::from(refused),
            Err(complaint) => wrong.push(complaint),
        }
    }
    println!(
        "{cases} cases, {failed} changes refused, {} findings",
        wrong.len()
    );
    for complaint in wrong.iter().take(40) {
        println!("{complaint}");
    }
    assert!(
        wrong.is_empty(),
        "{} of {cases} cases lost something",
        wrong.len()
    );
}
