//! A fault of every request of a command in turn.

use std::sync::Arc;

use diskimage_core::{Device, Error, errno};
use diskimage_testing::{Fault, FaultyDevice};

use super::disks::Disks;
use super::{Command, Expected};

/// The faults of the n-th request: it fails, it and all later ones fail, it fails and leaves a torn write.
const KINDS: [fn(u64) -> Fault; 3] = [Fault::once, Fault::from, |n| Fault::once(n).torn()];

/// Runs the command with every fault, and returns the number of faults.
pub(super) fn everywhere(command: &Command, expected: &Expected, defects: &mut Vec<String>) -> usize {
    let mut count = 0;
    for failing in 0..command.files.len() {
        for kind in KINDS {
            for n in 0.. {
                let fault = kind(n);
                match run(command, expected, failing, fault) {
                    Ok(false) => break,
                    Ok(true) => {}
                    Err(defect) => {
                        defects.push(format!("{}: {fault:?} of file {failing}: {defect}", command.name))
                    }
                }
                count += 1;
            }
        }
    }
    count
}

/// Runs the command with one fault of one file. Returns whether the fault occurred; a defect is the error.
fn run(command: &Command, expected: &Expected, failing: usize, fault: Fault) -> Result<bool, String> {
    let memory = Disks::holding(&command.files);
    let mut disks = memory.clone();
    let faulty = Arc::new(FaultyDevice::new(Arc::clone(&memory.0[failing])));
    disks.0[failing] = Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>;
    faulty.arm(fault);
    let outcome = (command.run)(&disks);
    if faulty.disarm() == 0 {
        return match outcome {
            Ok(()) => Ok(false),
            Err(error) => Err(format!("fails without a fault: {}", error.chain())),
        };
    }
    let left = memory.contents();
    match outcome {
        // Some requests may fail without harm: a failed discard costs nothing but space.
        Ok(()) => expected
            .judge_finished(&left)
            .map_err(|defect| format!("the fault is not reported: {defect}"))?,
        Err(error) if is_device_error(&error) => {
            if let Some(defect) = command.find_defect(&left, expected) {
                return Err(defect);
            }
        }
        Err(error) => return Err(format!("not the error of the device: {}", error.chain())),
    }
    Ok(true)
}

fn is_device_error(error: &Error) -> bool {
    error.errno() == Some(errno::EIO)
}
