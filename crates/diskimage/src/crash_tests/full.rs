//! A disk that is full, from some length of a file on.

use std::sync::Arc;

use diskimage_core::{Device, errno};
use diskimage_testing::FaultyDevice;

use super::disks::Disks;
use super::{Command, Expected};

/// Lengths that are tried for each file.
const STEPS: u64 = 24;
/// The unit that lengths are multiples of.
const SECTOR: u64 = 512;

/// How often the disk was full.
pub(super) fn everywhere(command: &Command, expected: &Expected, complaints: &mut Vec<String>) -> usize {
    let mut count = 0;
    for full in 0..command.files.len() {
        let len = command.files[full].len() as u64;
        // No command here takes more room than its files have.
        let step = (len / STEPS).next_multiple_of(SECTOR);
        for limit in (0..=STEPS).map(|n| len + n * step) {
            match run(command, expected, full, limit) {
                Ok(false) => break,
                Ok(true) => {}
                Err(wrong) => complaints.push(format!(
                    "{}: full at {limit} of file {full}, which has {len}: {wrong}",
                    command.name
                )),
            }
            count += 1;
        }
    }
    count
}

/// Whether the command met the limit; what is wrong with how it took it.
fn run(command: &Command, expected: &Expected, full: usize, limit: u64) -> Result<bool, String> {
    let memory = Disks::holding(&command.files);
    let mut disks = memory.clone();
    let faulty = Arc::new(FaultyDevice::new(Arc::clone(&memory.0[full])));
    disks.0[full] = Arc::<FaultyDevice>::clone(&faulty) as Arc<dyn Device>;
    faulty.limit_len(limit);
    let outcome = (command.run)(&disks);
    let met = faulty.disarm() > 0;
    let left = memory.contents();
    match outcome {
        Ok(()) => {
            let finished = expected.judge_finished(&left);
            finished.map_err(|wrong| format!("went unnoticed: {wrong}"))?;
        }
        Err(error) if error.errno() == Some(errno::ENOSPC) => {
            if let Some(wrong) = command.find_wrong(&left, expected) {
                return Err(wrong);
            }
        }
        Err(error) => return Err(format!("not the error of the device: {}", error.chain())),
    }
    Ok(met)
}
