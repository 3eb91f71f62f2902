//! A fault of every request of a command in turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use diskimage_core::{Device, Error, errno};
use diskimage_testing::{Fault, FaultyDevice};

use super::disks::Disks;
use super::{Command, Effort, Expected, Found, Verdict};

/// The faults of the n-th request: it fails, it and all later ones fail, it fails and leaves a torn write, the disk is
/// full from then on.
const KINDS: [fn(u64) -> Fault; 4] = [
    Fault::once,
    Fault::from,
    |n| Fault::once(n).torn(),
    |n| {
        Fault::from(n)
            .torn()
            .full()
            .counting(diskimage_testing::Requests::Writes)
    },
];

/// Runs the command with the faults, and returns their number.
pub(super) fn everywhere(command: &Command, expected: &Expected, effort: Effort, found: &mut Found) -> usize {
    let mut count = 0;
    let most = effort.most / KINDS.len();
    for failing in 0..command.files.len() {
        for kind in KINDS {
            // As many as there are, unless threads make it another number each time.
            let requests = requests(command, failing, kind(u64::MAX));
            let tried = requests.min(most.max(1) as u64);
            for n in (0..tried).map(|nth| nth * requests / tried) {
                let fault = kind(n);
                let judged = match run(command, expected, failing, fault) {
                    Ok(None) => break,
                    Ok(Some(verdict)) => Ok(verdict),
                    Err(defect) => Err(defect),
                };
                found.faults.count(judged, &mut found.defects, |defect| {
                    let name = &command.cast.roles[failing].name;
                    format!("{}: {fault:?} of '{name}': {defect}", command.name)
                });
                count += 1;
            }
        }
    }
    count
}

/// How many requests to one file there are that `fault` counts.
fn requests(command: &Command, failing: usize, fault: Fault) -> u64 {
    let (disks, _, faulty) = faulty(command, failing, fault);
    (command.run)(&disks).expect(&command.name);
    faulty.seen()
}

/// The files, those below in memory, and the device of the file that fails.
fn faulty(command: &Command, failing: usize, fault: Fault) -> (Disks, Disks, Arc<FaultyDevice>) {
    let memory = Disks::of(&command.cast, &command.files);
    let faulty = Arc::new(FaultyDevice::new(Arc::clone(&memory.devices[failing])));
    let disks = memory.with(failing, Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>);
    faulty.arm(fault);
    (disks, memory, faulty)
}

/// Runs the command with one fault of one file. `None` if the fault did not occur; a defect is the error.
fn run(
    command: &Command,
    expected: &Expected,
    failing: usize,
    fault: Fault,
) -> Result<Option<Verdict>, String> {
    let (disks, memory, faulty) = faulty(command, failing, fault);
    let acknowledged: Arc<AtomicUsize> = Arc::default();
    let disks = disks.hearing({
        let acknowledged = Arc::clone(&acknowledged);
        move |_| {
            acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    });
    let outcome = (command.run)(&disks);
    drop(disks);
    if faulty.disarm() == 0 {
        return match outcome {
            Ok(()) => Ok(None),
            Err(error) => Err(format!("fails without a fault: {}", error.chain())),
        };
    }
    let left = memory.contents();
    match outcome {
        // Some requests may fail without harm: a failed discard costs nothing but space.
        Ok(()) => expected
            .judge_finished(&left)
            .map_err(|defect| format!("the fault is not reported: {defect}"))
            .map(|()| Some(Verdict::New)),
        Err(error) if is_device_error(&error) => command
            .judge_cut_off(&left, expected, acknowledged.load(Ordering::Relaxed))
            .map(Some),
        Err(error) => Err(format!("not the error of the device: {}", error.chain())),
    }
}

fn is_device_error(error: &Error) -> bool {
    // As in qemu-img, a disk without room for the name of a backing image has the message of a header without room.
    matches!(error.errno(), Some(errno::EIO | errno::ENOSPC))
        || error.root() == "No space left in the file header"
}
