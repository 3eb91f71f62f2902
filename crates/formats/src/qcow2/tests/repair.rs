//! Crashes and faults during a repair: the disk reads as before, and the next repair completes the work.

use std::sync::Arc;

use diskimage_core::{Check, Device, Image, MemoryDevice, Progress, Repair};
use diskimage_testing::{Fault, FaultyDevice, Journal, RecordingDevice};

use super::scenario::Step::{Resize, Write};
use super::scenario::{Files, Scenario, in_memory, open_layer, open_on, report, snapshots};
use crate::testing::contents;

/// A damaged image, and the operation that repairs it.
struct Damage {
    name: &'static str,
    options: &'static str,
    snapshot: bool,
    repair: Repair,
    harm: fn(&mut Vec<u8>),
}

const CLUSTER: usize = 4096;

fn number(file: &[u8], at: usize) -> usize {
    let field = file[at..at + 8]
        .iter()
        .fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    usize::try_from(field & 0x00ff_ffff_ffff_fe00).expect("small")
}

fn refcount_table(file: &[u8]) -> usize {
    number(file, 48)
}

fn l1(file: &[u8]) -> usize {
    number(file, 40)
}

/// The host offset of the first L2 table.
fn l2(file: &[u8]) -> usize {
    number(file, l1(file))
}

/// The host offset of the guest cluster `cluster`.
fn data(file: &[u8], cluster: usize) -> usize {
    number(file, l2(file) + cluster * 8)
}

fn set_count(file: &mut [u8], offset: usize, count: u8) {
    let block = number(file, refcount_table(file));
    let at = block + offset / CLUSTER * 2;
    file[at..at + 2].copy_from_slice(&[0, count]);
}

/// Sets refcounts of clusters in use to zero: the refcount structures must be rebuilt.
fn uncount(file: &mut [u8]) {
    for cluster in [0, 3, 9] {
        let offset = data(file, cluster);
        set_count(file, offset, 0);
    }
    let table = l2(file);
    set_count(file, table, 0);
}

fn leak(file: &mut Vec<u8>) {
    let end = file.len();
    file.resize(end + 3 * CLUSTER, 0x55);
    for cluster in 0..3 {
        set_count(file, end + cluster * CLUSTER, 1);
    }
    for cluster in [2, 7] {
        let offset = data(file, cluster);
        set_count(file, offset, 2);
    }
}

fn dirty(file: &mut [u8]) {
    file[79] |= 1;
}

fn damages() -> Vec<Damage> {
    let damage = |name, snapshot, repair, harm| Damage {
        name,
        options: "cluster_size=4096",
        snapshot,
        repair,
        harm,
    };
    let (all, leaks) = (Repair::All, Repair::Leaks);
    vec![
        damage("leaks", false, leaks, leak),
        damage("leaks beside a snapshot", true, leaks, |file| {
            let offset = data(file, 5);
            set_count(file, offset, 3);
        }),
        damage("leaks and all", false, all, leak),
        damage("clusters that count as free", false, all, |file| uncount(file)),
        damage("clusters of a snapshot that count as free", true, all, |file| {
            uncount(file)
        }),
        damage("low counts", true, all, |file| {
            for cluster in 0..12 {
                let offset = data(file, cluster);
                set_count(file, offset, 1);
            }
        }),
        damage("flags", false, all, |file| {
            for cluster in [1, 4] {
                let at = l2(file) + cluster * 8;
                file[at] ^= 0x80;
            }
            let at = l1(file);
            file[at] ^= 0x80;
        }),
        damage("no refcount table", false, all, |file| {
            let at = refcount_table(file);
            file[at..at + 8].fill(0);
        }),
        damage("a refcount block that is not aligned", false, all, |file| {
            let at = refcount_table(file) + 6;
            file[at] ^= 2;
        }),
        damage("a refcount block beyond the end", false, all, |file| {
            let at = refcount_table(file) + 8;
            file[at..at + 8].copy_from_slice(&0x10_0000u64.to_be_bytes());
        }),
        damage("an incomplete snapshot", true, all, |file| {
            let at = number(file, 64);
            file[at + 39] = 8;
            file[at + 48..at + 50].copy_from_slice(b"1s");
        }),
        Damage {
            options: "cluster_size=4096,lazy_refcounts=on",
            ..damage("an image that was not closed", false, all, |file| {
                leak(file);
                uncount(file);
                dirty(file);
            })
        },
    ]
}

impl Damage {
    fn files(&self) -> Files {
        let scenario = Scenario {
            name: self.name,
            options: self.options,
            size: 256 << 10,
            setup: vec![
                Write(0, 100_000, 1),
                Write(150_000, 40_000, 2),
                // A table that was moved leaves free clusters.
                Resize(3 << 20, diskimage_core::Preallocation::Off),
                Write(2_500_000, 5000, 3),
            ],
            snapshot: self.snapshot,
            bitmap: false,
            steps: Vec::new(),
        };
        let (mut files, _, _) = scenario.prepare();
        (self.harm)(&mut files[0]);
        files
    }

    fn repair(&self, devices: &[Arc<dyn Device>]) -> diskimage_core::Result<bool> {
        let layer = open_layer(devices, true, true)?;
        let report = layer.check(self.repair, &Progress::none())?;
        Ok(report.corruptions == 0 && report.check_errors == 0)
    }

    /// Describes what is wrong after an interrupted repair and the next one, if anything is.
    fn find_fault(&self, files: &[Vec<u8>], before: &[Vec<u8>]) -> Option<String> {
        match disks(files, self.snapshot) {
            Ok(now) if now == before => {}
            Ok(_) => return Some("the disk has changed".to_owned()),
            Err(error) => return Some(format!("cannot be read: {}", error.chain())),
        }
        let devices = in_memory(files);
        // A refcount beyond the end of the file becomes a leak once a repair grows the file that far.
        for round in 0..2 {
            match self.repair(&devices) {
                Ok(true) => {}
                other => return Some(format!("cannot be repaired: {other:?}")),
            }
            let found = report(&**open_on(&devices, false).expect("opens").layer(), Repair::No);
            if (found.corruptions, found.check_errors) != (0, 0) || (round > 0 && found.leaks > 0) {
                return Some(format!("not repaired: {found:?}"));
            }
        }
        let repaired: Vec<Vec<u8>> = devices.iter().map(bytes_of).collect();
        match disks(&repaired, self.snapshot) {
            Ok(now) if now == before => None,
            _ => Some("the disk has changed by the repair".to_owned()),
        }
    }
}

fn bytes_of(device: &Arc<dyn Device>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(device.len()).expect("small")];
    device.read_at(&mut bytes, 0).expect("memory");
    bytes
}

/// The contents of the disk and of its snapshot.
fn disks(files: &[Vec<u8>], snapshot: bool) -> diskimage_core::Result<Vec<Vec<u8>>> {
    let image = open_on(&in_memory(files), false)?;
    let mut all = vec![contents(&image)];
    if snapshot {
        let layer = snapshots(&image).open(None, Some("s"))?;
        all.push(contents(&Image::new(layer, None, "snapshot", false)));
    }
    Ok(all)
}

#[test]
fn after_a_crash_during_a_repair_the_next_repair_succeeds() {
    for damage in damages() {
        let files = damage.files();
        let before = disks(&files, damage.snapshot).expect("readable");
        let journal: Arc<Journal> = Arc::default();
        let recorder: Arc<dyn Device> = Arc::new(RecordingDevice::new(files[0].clone(), 0, &journal));
        assert!(damage.repair(&[recorder]).expect("repairs"), "{}", damage.name);
        assert!(!journal.is_empty(), "{}", damage.name);
        let mut faults = Vec::new();
        let count = journal.crashes(&files[..1], 30, 0x5eed, |crash| {
            if let Some(fault) = damage.find_fault(crash.files, &before) {
                faults.push(format!("at {} ({}): {fault}", crash.position, crash.kept));
            }
        });
        assert!(count > 20, "{}: {count} crashes", damage.name);
        faults.truncate(10);
        assert!(faults.is_empty(), "{}\n{}", damage.name, faults.join("\n"));
    }
}

#[test]
fn a_failed_request_during_a_repair_is_reported_and_the_next_repair_succeeds() {
    for damage in damages() {
        let files = damage.files();
        let before = disks(&files, damage.snapshot).expect("readable");
        let kinds: [fn(u64) -> Fault; 3] = [Fault::once, Fault::from, |n| Fault::once(n).torn()];
        let mut count = 0;
        for kind in kinds {
            for n in 0.. {
                let memory = Arc::new(MemoryDevice::new(files[0].clone()));
                let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory)));
                faulty.arm(kind(n));
                let outcome = damage.repair(&[Arc::<FaultyDevice>::clone(&faulty)]);
                if faulty.disarm() == 0 {
                    break;
                }
                count += 1;
                if let Ok(true) = outcome {
                    // The repair succeeded in another way.
                    let image = open_on(&in_memory(&[memory.contents()]), false).expect("opens");
                    let found = report(&**image.layer(), Repair::No);
                    let fault = (found.corruptions, found.check_errors) != (0, 0);
                    assert!(!fault, "{}: {:?} went unnoticed", damage.name, kind(n));
                }
                if let Err(error) = outcome {
                    assert_eq!(
                        error.errno(),
                        Some(5),
                        "{}: {:?}: {error:?}",
                        damage.name,
                        kind(n)
                    );
                }
                let fault = damage.find_fault(&[memory.contents()], &before);
                assert!(fault.is_none(), "{}: {:?}: {fault:?}", damage.name, kind(n));
            }
        }
        assert!(count > 20, "{}: {count} faults", damage.name);
    }
}
