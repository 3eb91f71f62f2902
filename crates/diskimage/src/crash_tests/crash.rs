//! A power failure at every moment of a command.

use std::sync::Arc;

use diskimage_core::Device;
use diskimage_testing::{Journal, RecordingDevice};

use super::disks::Disks;
use super::{Command, Expected};

/// Random choices of what is left, at each flush.
const SAMPLES: usize = 6;

/// How many crashes were tried.
pub(super) fn everywhere(command: &Command, expected: &Expected, complaints: &mut Vec<String>) -> usize {
    let journal: Arc<Journal> = Arc::default();
    let record = |(at, bytes): (usize, &Vec<u8>)| {
        Arc::new(RecordingDevice::new(bytes.clone(), at, &journal)) as Arc<dyn Device>
    };
    let disks = Disks(command.files.iter().enumerate().map(record).collect());
    (command.run)(&disks).expect(command.name);
    journal.crashes(&command.files, SAMPLES, 0x5eed, |crash| {
        if let Some(wrong) = command.find_wrong(crash.files, expected) {
            complaints.push(format!(
                "{}: crash at {} ({}): {wrong}",
                command.name, crash.position, crash.kept
            ));
        }
    })
}
