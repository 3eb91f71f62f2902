//! Every request of a command fails in turn.

use std::sync::Arc;

use diskimage_core::{Device, Error, errno};
use diskimage_testing::{Fault, FaultyDevice};

use super::disks::Disks;
use super::{Command, Expected};

/// Ways to fail from or at the n-th request.
const KINDS: [fn(u64) -> Fault; 3] = [Fault::once, Fault::from, |n| Fault::once(n).torn()];

/// How many faults were met.
pub(super) fn everywhere(command: &Command, expected: &Expected, complaints: &mut Vec<String>) -> usize {
    let mut count = 0;
    for failing in 0..command.files.len() {
        for kind in KINDS {
            for n in 0.. {
                let fault = kind(n);
                match meet(command, expected, failing, fault) {
                    Ok(false) => break,
                    Ok(true) => {}
                    Err(wrong) => {
                        complaints.push(format!("{}: {fault:?} of file {failing}: {wrong}", command.name))
                    }
                }
                count += 1;
            }
        }
    }
    count
}

/// Whether the command met the fault; what is wrong with how it took it.
fn meet(command: &Command, expected: &Expected, failing: usize, fault: Fault) -> Result<bool, String> {
    let memory = Disks::holding(&command.files);
    let mut disks = memory.clone();
    let faulty = Arc::new(FaultyDevice::new(Arc::clone(&memory.0[failing])));
    disks.0[failing] = Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>;
    faulty.arm(fault);
    let outcome = (command.run)(&disks);
    if faulty.disarm() == 0 {
        return match outcome {
            Ok(()) => Ok(false),
            Err(error) => Err(format!("fails without a reason: {}", error.chain())),
        };
    }
    let left = memory.contents();
    match outcome {
        // It may do without: a failed discard, for one, costs nothing but space.
        Ok(()) => expected
            .judge_finished(&left)
            .map_err(|wrong| format!("went unnoticed: {wrong}"))?,
        Err(error) if is_device_error(&error) => {
            if let Some(wrong) = command.find_wrong(&left, expected) {
                return Err(wrong);
            }
        }
        Err(error) => return Err(format!("not the error of the device: {}", error.chain())),
    }
    Ok(true)
}

fn is_device_error(error: &Error) -> bool {
    error.errno() == Some(errno::EIO)
}
