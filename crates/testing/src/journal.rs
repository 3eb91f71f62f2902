//! Devices that record changes, and the contents that a crash can leave.
//!
//! Changes before a completed flush are durable. Of the changes after it, any subset can survive a crash, and of a
//! write any subset of its sectors.
//!
//! ```text
//!   journal   write  write  FLUSH  write  discard  write  FLUSH
//!             └─ durable ────────┘ └─ pending ─────────┘ ▲
//!                                     each kept, lost or torn: one Crash for each choice
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    ByteRange, Device, Extent, Limits, MemoryDevice, Preallocation, Result, StatusDetail, ZeroMode,
};

/// The changes of some devices, in order.
#[derive(Debug, Default)]
pub struct Journal {
    entries: Mutex<Vec<Entry>>,
}

/// One change of one of the devices.
#[derive(Clone, Debug)]
struct Entry {
    device: usize,
    change: Change,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Zeroes(ByteRange),
    Discard(ByteRange),
    Resize(u64),
    Flush,
}

/// The state after a crash.
#[derive(Debug)]
pub struct Crash<'a> {
    /// The number of journal entries before the crash.
    pub position: usize,
    /// The contents of the devices, in the order in which they were recorded.
    pub files: &'a [Vec<u8>],
    /// Whether pending changes were lost or torn. Otherwise only the program has ended.
    pub is_power_cut: bool,
    /// Which of the pending changes survived, as text.
    pub kept: &'a str,
}

/// The outcome of one pending change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Lost,
    Torn,
}

/// The unit that a disk writes atomically.
const SECTOR: u64 = 512;

/// The contents of a discarded range: code must not rely on zeroes there.
const DISCARDED: u8 = 0xa5;

impl Journal {
    /// The number of entries.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `check` with states after a crash, for devices that held `before` when recording began: after each entry,
    /// the state with all changes in order; at each flush also with all pending changes but one, with one alone, and
    /// with `samples` random choices, which include torn writes. Returns the number of calls.
    pub fn crashes(
        &self,
        before: &[Vec<u8>],
        samples: usize,
        seed: u64,
        check: impl FnMut(&Crash<'_>),
    ) -> usize {
        self.some_crashes(before, (samples, usize::MAX), seed, check)
    }

    /// [`Journal::crashes`] with `most` of the states at most that have all changes in order, and `most` of the others:
    /// spread over the journal, the last ones always among them.
    pub fn some_crashes(
        &self,
        before: &[Vec<u8>],
        (samples, most): (usize, usize),
        seed: u64,
        mut check: impl FnMut(&Crash<'_>),
    ) -> usize {
        let entries = self.lock().clone();
        let cuts = some_cuts(all_cuts(&entries, samples), most);
        let mut random = Random(seed | 1);
        let mut durable = before.to_vec();
        let mut pending: Vec<&Entry> = Vec::new();
        for position in 0..=entries.len() {
            for cut in cuts.iter().filter(|cut| cut.position == position) {
                let fates = cut.kept.fates(pending.len(), &mut random);
                let mut files = durable.clone();
                for (entry, fate) in pending.iter().zip(&fates) {
                    apply(&mut files[entry.device], &entry.change, *fate, &mut random);
                }
                check(&Crash {
                    position,
                    files: &files,
                    is_power_cut: cut.kept != Kept::All,
                    kept: &cut.kept.text(pending.len()),
                });
            }
            match entries.get(position) {
                Some(entry) if matches!(entry.change, Change::Flush) => {
                    for done in pending.iter().filter(|done| done.device == entry.device) {
                        apply(&mut durable[done.device], &done.change, Fate::Kept, &mut random);
                    }
                    pending.retain(|done| done.device != entry.device);
                }
                Some(entry) => pending.push(entry),
                None => {}
            }
        }
        cuts.len()
    }
}

/// A moment of a crash, and which of the pending changes survive it.
#[derive(Clone, Copy, Debug)]
struct Cut {
    position: usize,
    kept: Kept,
}

/// Which of the pending changes survive a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// All of them, as if the program was killed and the machine went on.
    All,
    AllBut(usize),
    Only(usize),
    /// A random choice.
    Sample(usize),
}

impl Kept {
    fn fates(self, pending: usize, random: &mut Random) -> Vec<Fate> {
        let one = |usual, at: usize, other| {
            let mut fates = vec![usual; pending];
            fates[at] = other;
            fates
        };
        match self {
            Self::All => vec![Fate::Kept; pending],
            Self::AllBut(at) => one(Fate::Kept, at, Fate::Lost),
            Self::Only(at) => one(Fate::Lost, at, Fate::Kept),
            Self::Sample(_) => (0..pending).map(|_| random.fate()).collect(),
        }
    }

    fn text(self, pending: usize) -> String {
        match self {
            Self::All => "all in order".to_owned(),
            Self::AllBut(at) => format!("all but {at} of {pending}"),
            Self::Only(at) => format!("only {at} of {pending}"),
            Self::Sample(number) => format!("sample {number}"),
        }
    }
}

/// All crashes that [`Journal::crashes`] is about, in the order of the journal.
fn all_cuts(entries: &[Entry], samples: usize) -> Vec<Cut> {
    let mut cuts = Vec::new();
    let mut pending: Vec<usize> = Vec::new();
    for position in 0..=entries.len() {
        let mut cut = |kept| cuts.push(Cut { position, kept });
        cut(Kept::All);
        let next = entries.get(position);
        let flushed = next.filter(|entry| matches!(entry.change, Change::Flush));
        if (flushed.is_some() || next.is_none()) && !pending.is_empty() {
            for one in 0..pending.len() {
                cut(Kept::AllBut(one));
                cut(Kept::Only(one));
            }
            (0..samples).map(Kept::Sample).for_each(cut);
        }
        match (flushed, next) {
            (Some(flush), _) => pending.retain(|device| *device != flush.device),
            (None, Some(entry)) => pending.push(entry.device),
            (None, None) => {}
        }
    }
    cuts
}

/// At most `most` of the cuts of each kind, spread evenly, the last one always among them.
fn some_cuts(cuts: Vec<Cut>, most: usize) -> Vec<Cut> {
    let (kills, power_cuts): (Vec<Cut>, Vec<Cut>) =
        cuts.iter().copied().partition(|cut| cut.kept == Kept::All);
    if kills.len().max(power_cuts.len()) <= most {
        return cuts;
    }
    let some = spread(&kills, most).chain(spread(&power_cuts, most));
    some.collect()
}

/// At most `most` of `all`, spread evenly, the last one among them.
fn spread<T: Copy>(all: &[T], most: usize) -> impl Iterator<Item = T> {
    let count = all.len().min(most);
    (1..=count).map(move |nth| all[nth * all.len() / count - 1])
}

fn apply(file: &mut Vec<u8>, change: &Change, fate: Fate, random: &mut Random) {
    if fate == Fate::Lost {
        return;
    }
    match change {
        Change::Write(offset, bytes) => {
            let whole = ByteRange::at(*offset, bytes.len() as u64);
            if fate == Fate::Torn && whole.len() > SECTOR {
                // File systems may record a new length before the bytes.
                put(file, whole.skip(whole.len()), |_| {});
            }
            let mut rest = whole;
            while !rest.is_empty() {
                let part = rest.first(SECTOR - rest.start() % SECTOR);
                rest = rest.skip(part.len());
                if fate == Fate::Kept || random.next() & 1 == 0 {
                    let from = index(part.start() - whole.start());
                    put(file, part, |into| {
                        into.copy_from_slice(&bytes[from..from + into.len()]);
                    });
                }
            }
        }
        Change::Zeroes(range) => put(file, *range, |into| into.fill(0)),
        Change::Discard(range) => {
            let inside = range.intersect(ByteRange::new(0, file.len() as u64));
            file[index(inside.start())..index(inside.end())].fill(DISCARDED);
        }
        Change::Resize(len) => file.resize(index(*len), 0),
        Change::Flush => {}
    }
}

/// Changes the bytes of `range`, and extends the file if necessary.
fn put(file: &mut Vec<u8>, range: ByteRange, change: impl FnOnce(&mut [u8])) {
    let (start, end) = (index(range.start()), index(range.end()));
    if file.len() < end {
        file.resize(end, 0);
    }
    change(&mut file[start..end]);
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("devices in memory are small")
}

/// Pseudorandom numbers from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn fate(&mut self) -> Fate {
        match self.next() % 8 {
            0..4 => Fate::Kept,
            4..6 => Fate::Lost,
            _ => Fate::Torn,
        }
    }
}

/// A device in memory that records its changes.
#[derive(Debug)]
pub struct RecordingDevice {
    below: MemoryDevice,
    device: usize,
    journal: Arc<Journal>,
}

impl RecordingDevice {
    /// A device with these bytes, number `device` of those of `journal`.
    pub fn new(bytes: Vec<u8>, device: usize, journal: &Arc<Journal>) -> Self {
        Self {
            below: MemoryDevice::new(bytes),
            device,
            journal: Arc::clone(journal),
        }
    }

    fn note(&self, change: Change) {
        let device = self.device;
        self.journal.lock().push(Entry { device, change });
    }
}

impl Device for RecordingDevice {
    fn len(&self) -> u64 {
        self.below.len()
    }
    fn name(&self) -> String {
        self.below.name()
    }
    fn limits(&self) -> &Limits {
        self.below.limits()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.below.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.note(Change::Write(offset, buf.to_vec()));
        self.below.write_at(buf, offset)
    }
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.note(Change::Zeroes(range));
        self.below.write_zeroes(range, mode)
    }
    fn discard(&self, range: ByteRange) -> Result<()> {
        self.note(Change::Discard(range));
        let inside = range.intersect(ByteRange::new(0, self.len()));
        self.below
            .write_at(&vec![DISCARDED; index(inside.len())], inside.start())
    }
    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        self.below.status(range, detail)
    }
    fn flush(&self) -> Result<()> {
        self.note(Change::Flush);
        self.below.flush()
    }
    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.note(Change::Resize(len));
        self.below.resize(len, preallocation)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn flushed_changes_are_durable_and_others_may_be_lost() {
        let journal = Arc::default();
        let device = RecordingDevice::new(vec![0; 1], 0, &journal);
        device.write_at(b"a", 0).expect("memory");
        device.flush().expect("memory");
        device.write_at(b"b", 0).expect("memory");
        device.write_at(b"c", 1).expect("memory");
        let mut seen = BTreeSet::new();
        journal.crashes(&[vec![0]], 20, 1, |crash| {
            seen.insert((crash.position, crash.files[0].clone()));
        });
        let at = |position| -> Vec<Vec<u8>> {
            let here = seen.iter().filter(|(at, _)| *at == position);
            here.map(|(_, file)| file.clone()).collect()
        };
        assert_eq!(at(0), [b"\0"]);
        assert_eq!(at(1), [b"\0", b"a"]);
        assert_eq!(at(2), [b"a"]);
        assert_eq!(at(3), [b"b"]);
        assert_eq!(at(4), [&b"a"[..], b"ac", b"b", b"bc"]);
    }

    #[test]
    fn a_sample_is_spread_and_has_the_last_crashes() {
        let journal = Arc::default();
        let device = RecordingDevice::new(vec![0; 4096], 0, &journal);
        for at in 0..20 {
            device.write_at(&[1], at).expect("memory");
            if at % 5 == 4 {
                device.flush().expect("memory");
            }
        }
        let mut positions = [Vec::new(), Vec::new()];
        let count = journal.some_crashes(&[vec![0; 4096]], (4, 3), 1, |crash| {
            positions[usize::from(crash.is_power_cut)].push(crash.position);
        });
        assert_eq!(count, 6);
        assert_eq!(positions[0], [7, 15, 24], "kills");
        assert_eq!(positions[1].len(), 3, "power cuts");
        assert_eq!(positions[1][2], 23, "nothing is pending after the last flush");
    }

    #[test]
    fn writes_are_torn_between_sectors_only() {
        let journal = Arc::default();
        let device = RecordingDevice::new(vec![0; 2048], 0, &journal);
        device.write_at(&[1; 1000], 300).expect("memory");
        let mut seen = BTreeSet::new();
        journal.crashes(&[vec![0; 2048]], 100, 1, |crash| {
            let sectors = [300..512, 512..1024, 1024..1300].map(|part| {
                let part = &crash.files[0][part];
                assert!(part.iter().all(|byte| *byte == part[0]));
                part[0]
            });
            seen.insert(sectors);
        });
        assert_eq!(seen.len(), 8);
    }
}
