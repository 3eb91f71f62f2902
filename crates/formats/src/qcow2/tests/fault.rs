//! Every request in turn fails: the operation says so, nothing that was durable is lost, and the image goes on working.

use std::sync::Arc;

use diskimage_core::{Device, Image, MemoryDevice};
use diskimage_testing::{Fault, FaultyDevice};

use super::scenario::{Before, Files, Model, PLENTY, SCARCE, Scenario, Step, find_fault, open_with_memory};
use super::scenarios;
use crate::testing::contents;

/// Devices in memory that fail, and what they hold.
struct Disks {
    memories: Vec<Arc<MemoryDevice>>,
    faulty: Vec<Arc<FaultyDevice>>,
}

impl Disks {
    fn new(files: &Files) -> Self {
        let memories: Vec<_> = files
            .iter()
            .map(|bytes| Arc::new(MemoryDevice::new(bytes.clone())))
            .collect();
        let faulty = memories
            .iter()
            .map(|memory| Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(memory))))
            .collect();
        Self { memories, faulty }
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.faulty
            .iter()
            .map(|device| Arc::<FaultyDevice>::clone(device) as Arc<dyn Device>)
            .collect()
    }

    fn contents(&self) -> Files {
        self.memories.iter().map(|memory| memory.contents()).collect()
    }
}

/// What went wrong with a scenario.
struct Outcome {
    /// Whether the fault was met.
    met: bool,
    complaint: Option<String>,
}

struct Attempt<'a> {
    scenario: &'a Scenario,
    model: Model,
    before: &'a Before,
    disks: Disks,
    /// The device that fails.
    failing: usize,
    /// For cached pages of tables.
    memory: usize,
}

impl Attempt<'_> {
    fn run(mut self, fault: Fault) -> Outcome {
        self.disks.faulty[self.failing].arm(fault);
        let complaint = self.go();
        let met = complaint.as_ref().err().is_some() || complaint == Ok(true);
        Outcome {
            met,
            complaint: complaint.err(),
        }
    }

    /// Whether the fault was met; what is wrong afterwards.
    fn go(&mut self) -> Result<bool, String> {
        let mut errors = 0;
        let mut image = match open_with_memory(&self.disks.devices(), self.memory) {
            Ok(image) => image,
            Err(error) => {
                expect_ours(&error)?;
                let _ = self.disks.faulty[self.failing].disarm();
                self.judge(&self.model.crashed, "after it did not open")?;
                return Ok(true);
            }
        };
        // As if the process had ended after the step that follows the failure, or here.
        let mut watch = false;
        for step in &self.scenario.steps {
            let failed = self.step(&image, step)?;
            if watch {
                self.judge(&self.model.crashed, "one step later")?;
            }
            watch = failed && errors == 0;
            errors += u32::from(failed);
        }
        self.judge(&self.model.crashed, "before healing")?;
        let failed = self.disks.faulty[self.failing].disarm();
        if failed == 0 {
            return Ok(false);
        }
        if errors == 0 {
            return Err(format!("{failed} requests failed and nobody said so"));
        }
        if self
            .scenario
            .steps
            .iter()
            .any(|step| matches!(step, Step::Amend(_)))
        {
            // It is another image now, at least as far as that had got.
            image = open_with_memory(&self.disks.devices(), self.memory)
                .map_err(|error| format!("does not open again: {}", error.chain()))?;
        }
        // It goes on working, and what is written now does not end up in places that are in use.
        let part = image.len() / 8 / 512 * 512;
        let again = [
            Step::Flush,
            Step::Write(part, part, 6),
            Step::Write(5 * part + 100, part, 7),
            Step::Flush,
            Step::Write(3 * part, 2 * part, 5),
            Step::Flush,
        ];
        for step in &again {
            if self.step(&image, step)? {
                return Err(format!("{step:?} fails after healing"));
            }
            if matches!(step, Step::Flush) {
                self.judge(&self.model.now, "after healing")?;
                let disk = contents(&image);
                if let Some(wrong) = self.model.now.refuse(&disk) {
                    return Err(format!("read through the image: {wrong}"));
                }
            }
        }
        Ok(true)
    }

    /// Whether it failed.
    fn step(&mut self, image: &Image, step: &Step) -> Result<bool, String> {
        self.model.begin(step);
        match step.apply(image) {
            Ok(()) => {
                self.model.done(step);
                Ok(false)
            }
            Err(error) => {
                expect_ours(&error)?;
                Ok(true)
            }
        }
    }

    fn judge(&self, state: &super::scenario::State, when: &str) -> Result<(), String> {
        match find_fault(&self.disks.contents(), state, self.before) {
            Some(fault) => Err(format!("{when}: {fault}")),
            None => Ok(()),
        }
    }
}

fn expect_ours(error: &diskimage_core::Error) -> Result<(), String> {
    if error.errno() == Some(5) && error.preceding_note().is_none() {
        Ok(())
    } else {
        Err(format!(
            "not the error of the device: {error:?} after {:?}",
            error.preceding_note()
        ))
    }
}

/// Makes the fault that hits the n-th request.
type Kind = fn(u64) -> Fault;

/// How many faults were met, and the first complaints.
fn fail_everywhere(scenario: &Scenario, memory: usize, kinds: &[Kind]) -> (u32, Vec<String>) {
    let (files, before, model) = scenario.prepare();
    let mut count = 0;
    let mut complaints = Vec::new();
    for failing in 0..files.len() {
        for kind in kinds {
            for n in 0.. {
                let attempt = Attempt {
                    scenario,
                    model: model.clone(),
                    before: &before,
                    disks: Disks::new(&files),
                    failing,
                    memory,
                };
                let outcome = attempt.run(kind(n));
                if let Some(complaint) = outcome.complaint {
                    complaints.push(format!("{:?} of device {failing}: {complaint}", kind(n)));
                }
                if !outcome.met {
                    break;
                }
                count += 1;
            }
        }
    }
    complaints.truncate(10);
    (count, complaints)
}

fn fail_in_all_scenarios(memory: usize, kinds: &[Kind]) {
    let mut all = Vec::new();
    for scenario in scenarios::all() {
        let (count, complaints) = fail_everywhere(&scenario, memory, kinds);
        let least = if scenario.only_amends() { 10 } else { 30 };
        assert!(count > least, "{}: {count} faults", scenario.name);
        all.extend(
            complaints
                .into_iter()
                .map(|text| format!("{}: {text}", scenario.name)),
        );
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn a_failed_request_is_reported_and_harms_nothing() {
    fail_in_all_scenarios(PLENTY, &[Fault::once, Fault::from, |n| Fault::once(n).torn()]);
}

#[test]
fn a_failed_request_while_tables_leave_memory_is_reported_and_harms_nothing() {
    // Many requests: the kind that the rest of the scenario goes on after is the one that finds most.
    fail_in_all_scenarios(SCARCE, &[Fault::once]);
}
