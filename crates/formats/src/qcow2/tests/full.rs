//! Full disks: the file cannot grow beyond a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use diskimage_core::{
    ByteRange, ClosedGate, Device, Error, FilterDevice, Filtered, MemoryDevice, Preallocation, Repair,
    ResizeRequest, ZeroMode, errno,
};
use diskimage_testing::{FaultyDevice, Journal, RecordingDevice};

use super::scenario::{
    Model, PLENTY, Scenario, Step, find_fault, find_fault_ignoring_flags, open_on, open_with_memory, report,
};
use super::scenarios;

const SAMPLES: usize = 12;
/// The tried limits are multiples of this.
const SECTOR: u64 = 512;
/// The number of limits that are tried.
const STEPS: u64 = 100;

/// The outcome of a scenario with a limit.
struct Outcome {
    /// Whether a request hit the limit.
    met: bool,
    /// The number of snapshots that could not be created of a sound image within the limit.
    refused: u32,
}

/// Runs the steps of `scenario` on a file of at most `limit` bytes.
fn run_out_of_space(scenario: &Scenario, limit: u64) -> Result<Outcome, String> {
    let (files, before, mut model) = scenario.prepare();
    let memories: Vec<_> = files
        .iter()
        .map(|bytes| Arc::new(MemoryDevice::new(bytes.clone())))
        .collect();
    let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memories[0])));
    let devices: Vec<Arc<dyn Device>> = vec![
        Arc::<FaultyDevice>::clone(&faulty),
        Arc::<MemoryDevice>::clone(&memories[1]),
    ];
    let left = || {
        memories
            .iter()
            .map(|memory| memory.contents())
            .collect::<Vec<_>>()
    };
    let image = open_with_memory(&devices, PLENTY).map_err(|error| error.chain())?;
    faulty.limit_len(limit);
    let mut refused = 0;
    for step in &scenario.steps {
        let sound = matches!(step, Step::Take(_)) && image.flush().is_ok() && without_leaks(&left()).is_ok();
        model.begin(step);
        match step.apply(&image) {
            Ok(()) => model.done(step),
            // A snapshot that could not be created cannot be applied either: `find_snapshot` then returns EIO.
            Err(error) if [Some(errno::ENOSPC), Some(errno::EIO)].contains(&error.errno()) => {
                if sound {
                    refused += 1;
                    without_leaks(&left()).map_err(|wrong| format!("{step:?} failed: {wrong}"))?;
                }
            }
            Err(error) => return Err(format!("{step:?}: {}", error.chain())),
        }
        if let Some(fault) = find_fault(&left(), &model.crashed, &before) {
            return Err(format!("after {step:?}: {fault}"));
        }
    }
    let met = faulty.disarm() > 0;
    image.flush().map_err(|error| error.chain())?;
    match find_fault(&left(), &model.now, &before) {
        Some(fault) => Err(format!("in the end: {fault}")),
        None => Ok(Outcome { met, refused }),
    }
}

fn without_leaks(files: &[Vec<u8>]) -> Result<(), String> {
    let devices = super::scenario::in_memory(files);
    let image = open_on(&devices, false).map_err(|error| error.chain())?;
    match report(&**image.layer(), Repair::No).leaks {
        0 => Ok(()),
        leaks => Err(format!("{leaks} leaked clusters")),
    }
}

fn run_out_of_space_everywhere(scenarios: &[Scenario]) {
    for scenario in scenarios {
        let (files, ..) = scenario.prepare();
        let (mut count, mut refused) = (0, 0);
        for limit in (0..STEPS).map(|n| files[0].len() as u64 + n * 2 * SECTOR) {
            match run_out_of_space(scenario, limit) {
                Ok(outcome) if !outcome.met => break,
                Ok(outcome) => {
                    count += 1;
                    refused += outcome.refused;
                }
                Err(wrong) => panic!("{}, {limit} bytes: {wrong}", scenario.name),
            }
        }
        println!("{}: full at {count} lengths, {refused} refused", scenario.name);
        assert!(count > 5 && refused > 0, "{}: {count}, {refused}", scenario.name);
    }
}

#[test]
fn on_a_full_disk_a_snapshot_is_created_or_the_image_is_unchanged() {
    run_out_of_space_everywhere(&scenarios::snapshots());
}

#[test]
fn on_a_full_disk_snapshots_are_applied_and_deleted() {
    for scenario in scenarios::snapshots_on_full_disk() {
        let (files, before, mut model) = scenario.prepare();
        let memory = Arc::new(MemoryDevice::new(files[0].clone()));
        let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory)));
        faulty.limit_len(files[0].len() as u64);
        let data: Arc<dyn Device> = Arc::new(MemoryDevice::new(files[1].clone()));
        let image = open_on(
            &[Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>, data],
            true,
        )
        .expect("opens");
        for step in &scenario.steps {
            model.begin(step);
            let done = step.apply(&image);
            assert!(done.is_ok(), "{}: {step:?}: {done:?}", scenario.name);
            model.done(step);
            let left = vec![memory.contents(), Vec::new()];
            assert_eq!(find_fault(&left, &model.crashed, &before), None, "{step:?}");
            assert_eq!(without_leaks(&left), Ok(()), "{}: {step:?}", scenario.name);
        }
    }
}

/// Simulates crashes while snapshots change in place. Returns the number of crashes.
fn crash_on_full_disk(scenario: &Scenario) -> usize {
    let (files, before, mut model) = scenario.prepare();
    let journal: Arc<Journal> = Arc::default();
    let recorder = Arc::new(RecordingDevice::new(files[0].clone(), 0, &journal));
    let faulty = Arc::new(FaultyDevice::new(recorder));
    faulty.limit_len(files[0].len() as u64);
    let data: Arc<dyn Device> = Arc::new(MemoryDevice::new(files[1].clone()));
    let image = open_on(
        &[Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>, data],
        true,
    )
    .expect("opens");
    let mut models: Vec<(usize, Model)> = vec![(0, model.clone())];
    for step in &scenario.steps {
        model.begin(step);
        if let Step::Drop(name) = step {
            model.crashed.may_be_empty(name);
        }
        models.push((journal.len(), model.clone()));
        step.apply(&image).expect("needs no space");
        model.done(step);
        models.push((journal.len(), model.clone()));
    }
    let mut faults = Vec::new();
    let count = journal.crashes(&files, SAMPLES, 0x5eed, |crash| {
        let known = models.partition_point(|(position, _)| *position <= crash.position);
        let (_, model) = &models[known - 1];
        if let Some(fault) = find_fault_ignoring_flags(crash.files, &model.crashed, &before) {
            faults.push(format!("at {} ({}): {fault}", crash.position, crash.kept));
        }
    });
    let first = &faults[..faults.len().min(10)];
    assert!(
        faults.is_empty(),
        "{}: {} of {count} crashes\n{}",
        scenario.name,
        faults.len(),
        first.join("\n")
    );
    count
}

#[test]
fn a_crash_on_a_full_disk_leaves_a_sound_image() {
    for scenario in scenarios::snapshots_on_full_disk() {
        let count = crash_on_full_disk(&scenario);
        assert!(count > 100, "{}: {count} crashes", scenario.name);
    }
}

/// A file that `write_zeroes` allocates until the disk is full, and on which nothing can be written then, until storage is
/// given back.
#[derive(Debug)]
struct FillingDisk {
    below: Arc<dyn Device>,
    is_full: AtomicBool,
}

impl FilterDevice for FillingDisk {
    fn below(&self) -> &Arc<dyn Device> {
        &self.below
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> diskimage_core::Result<()> {
        match self.is_full.load(Ordering::Relaxed) {
            true => Err(Error::from_errno(errno::ENOSPC)),
            false => self.below.write_at(buf, offset),
        }
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> diskimage_core::Result<()> {
        if mode != ZeroMode::KeepAllocated {
            return self.below.write_zeroes(range, mode);
        }
        self.below
            .resize(range.start() + range.len() / 2, Preallocation::Off)?;
        self.is_full.store(true, Ordering::Relaxed);
        Err(Error::from_errno(errno::ENOSPC))
    }

    fn discard(&self, range: ByteRange) -> diskimage_core::Result<()> {
        self.is_full.store(false, Ordering::Relaxed);
        self.below.discard(range)
    }
}

#[test]
fn a_preallocation_that_fills_the_disk_gives_back_what_it_got() {
    let memory = super::create("", 1 << 20, &ClosedGate);
    let before = memory.len();
    let disk: Arc<dyn Device> = Arc::new(Filtered(FillingDisk {
        below: Arc::<MemoryDevice>::clone(&memory),
        is_full: AtomicBool::new(false),
    }));
    let empty: Arc<dyn Device> = Arc::new(MemoryDevice::default());
    let image = open_on(&[disk, empty], true).expect("opens");
    let error = image
        .resize_with(&ResizeRequest::new(64 << 20, Preallocation::Falloc))
        .expect_err("the disk is full");
    assert_eq!(error.errno(), Some(errno::ENOSPC));
    drop(image);
    // An L2 table may stay.
    assert!(
        memory.len() <= before.next_multiple_of(65536) + 65536,
        "{}",
        memory.len()
    );
    without_leaks(&[memory.contents(), Vec::new()]).expect("all clusters are freed");
}

#[test]
fn a_creation_that_fills_the_disk_says_what_did_not_fit() {
    for (mode, what) in [
        ("falloc", "Could not preallocate new data"),
        ("full", "Could not write zeros for preallocation"),
    ] {
        let disk = Arc::new(FaultyDevice::new(Arc::new(MemoryDevice::default())));
        disk.limit_len(1 << 20);
        let created = super::create_in(disk, &format!("preallocation={mode}"), 8 << 20, &ClosedGate);
        assert_eq!(
            created.expect_err("the disk is full").chain(),
            format!(
                "Could not resize image: Failed to resize underlying file: {what}: No space left on device"
            )
        );
    }
}
