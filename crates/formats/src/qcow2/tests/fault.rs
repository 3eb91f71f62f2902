//! Injects a fault into each request in turn: the operation returns an error, no durable data is lost, and the image
//! still works afterwards.

use std::sync::Arc;

use diskimage_core::{Device, Image, MemoryDevice};
use diskimage_testing::{Fault, FaultyDevice};

use super::scenario::{Before, Files, Model, PLENTY, SCARCE, Scenario, Step, find_fault, open_with_memory};
use super::scenarios;
use crate::testing::contents;

/// Faulty devices and the memory behind them.
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

/// The outcome of a scenario with a fault.
struct Outcome {
    /// Whether a request hit the fault.
    met: bool,
    complaint: Option<String>,
}

struct Attempt<'a> {
    scenario: &'a Scenario,
    model: Model,
    before: &'a Before,
    disks: Disks,
    /// The device with the fault.
    failing: usize,
    /// The memory for cached pages.
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

    /// Runs the scenario. Returns whether a request hit the fault, or a description of what is wrong afterwards.
    fn go(&mut self) -> Result<bool, String> {
        let mut errors = 0;
        let mut image = match open_with_memory(&self.disks.devices(), self.memory) {
            Ok(image) => image,
            Err(error) => {
                expect_ours(&error)?;
                let _ = self.disks.faulty[self.failing].disarm();
                self.check_contents(&self.model.crashed, "after it did not open")?;
                return Ok(true);
            }
        };
        // The files as after a process that ends here, or after the step that follows the failure.
        let mut watch = false;
        for step in &self.scenario.steps {
            let failed = self.step(&image, step)?;
            if watch {
                self.check_contents(&self.model.crashed, "one step later")?;
            }
            watch = failed && errors == 0;
            errors += u32::from(failed);
        }
        self.check_contents(&self.model.crashed, "before healing")?;
        let failed = self.disks.faulty[self.failing].disarm();
        if failed == 0 {
            return Ok(false);
        }
        if errors == 0 {
            return Err(format!("{failed} requests failed and no step reported it"));
        }
        if self
            .scenario
            .steps
            .iter()
            .any(|step| matches!(step, Step::Amend(_)))
        {
            // A failed amend may have changed some options, so the image is opened again.
            image = open_with_memory(&self.disks.devices(), self.memory)
                .map_err(|error| format!("does not open again: {}", error.chain()))?;
        }
        // The image still works, and new data does not overwrite clusters in use.
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
                self.check_contents(&self.model.now, "after healing")?;
                let disk = contents(&image);
                if let Some(wrong) = self.model.now.refuse(&disk) {
                    return Err(format!("read through the image: {wrong}"));
                }
            }
        }
        Ok(true)
    }

    /// Runs a step. Returns whether it failed.
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

    fn check_contents(&self, state: &super::scenario::State, when: &str) -> Result<(), String> {
        match find_fault(&self.disks.contents(), state, self.before) {
            Some(fault) => Err(format!("{when}: {fault}")),
            None => Ok(()),
        }
    }
}

fn expect_ours(error: &diskimage_core::Error) -> Result<(), String> {
    // The only note is that of qemu-img for a snapshot whose clusters could not be freed.
    let is_expected =
        |note: &diskimage_core::Note| note.text() == "qcow2_free_clusters failed: Input/output error";
    if error.errno() == Some(5) && error.preceding_note().is_none_or(is_expected) {
        Ok(())
    } else {
        Err(format!(
            "not the error of the device: {error:?} after {:?}",
            error.preceding_note()
        ))
    }
}

/// Makes the fault for the n-th request.
type Kind = fn(u64) -> Fault;

/// Returns how many faults were hit, and the first errors found.
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
fn a_failed_request_is_reported_and_loses_no_data() {
    fail_in_all_scenarios(PLENTY, &[Fault::once, Fault::from, |n| Fault::once(n).torn()]);
}

#[test]
fn a_failed_request_while_pages_are_evicted_is_reported_and_loses_no_data() {
    // The scenario has many requests. A fault after which it continues finds the most errors, so only that kind is
    // used.
    fail_in_all_scenarios(SCARCE, &[Fault::once]);
}
