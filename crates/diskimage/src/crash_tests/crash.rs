//! The program is killed, or the power fails, after every request of a command.

use std::sync::{Arc, Mutex};

use diskimage_core::Device;
use diskimage_testing::{Journal, RecordingDevice};

use super::disks::Disks;
use super::{Command, Effort, Expected, Found};

/// The number of random choices of which unflushed writes survive, at each flush.
const SAMPLES: usize = 6;

/// Judges the files after the crashes, and returns the number of crashes.
pub(super) fn everywhere(command: &Command, expected: &Expected, effort: Effort, found: &mut Found) -> usize {
    let journal: Arc<Journal> = Arc::default();
    let record = |(at, bytes): (usize, &Vec<u8>)| {
        Arc::new(RecordingDevice::new(bytes.clone(), at, &journal)) as Arc<dyn Device>
    };
    let devices = command.files.iter().enumerate().map(record).collect();
    let moments: Arc<Mutex<Vec<usize>>> = Arc::default();
    let disks = Disks::on(&command.cast, devices).hearing({
        let (moments, journal) = (Arc::clone(&moments), Arc::clone(&journal));
        move |_| moments.lock().expect("no test has failed").push(journal.len())
    });
    (command.run)(&disks).expect(&command.name);
    disks.acknowledge();
    let moments = moments.lock().expect("no test has failed");
    journal.some_crashes(&command.files, (SAMPLES, effort.most), 0x5eed, |crash| {
        let acknowledged = moments.iter().filter(|at| **at <= crash.position).count();
        let judged = command.judge_cut_off(crash.files, expected, acknowledged);
        let tally = match crash.is_power_cut {
            true => &mut found.power_cuts,
            false => &mut found.kills,
        };
        tally.count(judged, &mut found.defects, |defect| {
            let (at, kept) = (crash.position, crash.kept);
            format!(
                "{}: crash at {at} of {} ({kept}): {defect}",
                command.name,
                journal.len()
            )
        });
    })
}
