//! A full disk: a file cannot grow beyond a length.

use std::sync::Arc;

use diskimage_core::{Device, errno};
use diskimage_testing::FaultyDevice;

use super::disks::Disks;
use super::{Command, Expected, Found};

/// The number of lengths that are tried for each file.
const STEPS: u64 = 24;
/// Lengths are multiples of this.
const SECTOR: u64 = 512;

/// Runs the command with every length, and returns the number of runs.
pub(super) fn everywhere(command: &Command, expected: &Expected, found: &mut Found) -> usize {
    let mut count = 0;
    for full in 0..command.files.len() {
        let len = command.files[full].len() as u64;
        // No command of these tests doubles the length of a file.
        let step = (len / STEPS).next_multiple_of(SECTOR);
        for limit in (0..=STEPS).map(|n| len + n * step) {
            match run(command, expected, full, limit) {
                Ok(false) => break,
                Ok(true) => {}
                Err(defect) => found.defects.push(format!(
                    "{}: full at {limit} of file {full}, which has {len}: {defect}",
                    command.name
                )),
            }
            count += 1;
        }
    }
    count
}

/// Runs the command with one length. Returns whether a request was refused; a defect is the error.
fn run(command: &Command, expected: &Expected, full: usize, limit: u64) -> Result<bool, String> {
    let memory = Disks::of(&command.cast, &command.files);
    let faulty = Arc::new(FaultyDevice::new(Arc::clone(&memory.devices[full])));
    let disks = memory.with(full, Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>);
    faulty.limit_len(limit);
    let outcome = (command.run)(&disks);
    let met = faulty.disarm() > 0;
    let left = memory.contents();
    match outcome {
        Ok(()) => {
            let finished = expected.judge_finished(&left);
            finished.map_err(|defect| format!("the full disk is not reported: {defect}"))?;
        }
        Err(error) if error.errno() == Some(errno::ENOSPC) => {
            command.judge_cut_off(&left, expected, 0)?;
        }
        Err(error) => return Err(format!("not the error of the device: {}", error.chain())),
    }
    Ok(met)
}
