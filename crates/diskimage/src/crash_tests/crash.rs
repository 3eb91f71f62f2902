//! A power failure after every request of a command.

use std::sync::Arc;

use diskimage_core::Device;
use diskimage_testing::{Journal, RecordingDevice};

use super::disks::Disks;
use super::{Command, Expected};

/// The number of random choices of which unflushed writes survive, at each flush.
const SAMPLES: usize = 6;

/// Judges the files after every crash, and returns the number of crashes.
pub(super) fn everywhere(command: &Command, expected: &Expected, defects: &mut Vec<String>) -> usize {
    let journal: Arc<Journal> = Arc::default();
    let record = |(at, bytes): (usize, &Vec<u8>)| {
        Arc::new(RecordingDevice::new(bytes.clone(), at, &journal)) as Arc<dyn Device>
    };
    let disks = Disks(command.files.iter().enumerate().map(record).collect());
    (command.run)(&disks).expect(command.name);
    journal.crashes(&command.files, SAMPLES, 0x5eed, |crash| {
        if let Some(defect) = command.find_defect(crash.files, expected) {
            defects.push(format!(
                "{}: crash at {} ({}): {defect}",
                command.name, crash.position, crash.kept
            ));
        }
    })
}
