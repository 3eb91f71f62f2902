//! Crashes at every moment: the image opens, has leaked clusters at worst, and holds what was made durable.

use std::sync::Arc;

use diskimage_core::Device;
use diskimage_testing::{Journal, Recorder};

use super::scenario::{
    Model, PLENTY, SCARCE, Scenario, find_fault, has_sound_bitmap, open_on, open_with_memory,
};
use super::{create, scenarios};
use crate::testing::Closed;

const SAMPLES: usize = 12;

/// How many crashes were tried.
fn crash_everywhere(scenario: &Scenario, memory: usize) -> usize {
    let (files, before, mut model) = scenario.prepare();
    let journal: Arc<Journal> = Arc::default();
    let devices: Vec<Arc<dyn Device>> = files
        .iter()
        .enumerate()
        .map(|(i, bytes)| Arc::new(Recorder::new(bytes.clone(), i, &journal)) as Arc<dyn Device>)
        .collect();
    // What may be found after a crash from a position of the journal on.
    let mut models: Vec<(usize, Model)> = vec![(0, model.clone())];
    let image = open_with_memory(&devices, memory).expect("opens");
    for step in &scenario.steps {
        model.begin(step);
        models.push((journal.len(), model.clone()));
        step.apply(&image).expect("nothing fails");
        model.done(step);
        models.push((journal.len(), model.clone()));
    }
    assert!(!scenario.bitmap || has_sound_bitmap(&image), "{}", scenario.name);
    let mut faults = Vec::new();
    let count = journal.crashes(&files, SAMPLES, 0x5eed, |crash| {
        let known = models.partition_point(|(position, _)| *position <= crash.position);
        let (_, model) = &models[known - 1];
        if let Some(fault) = find_fault(crash.files, &model.crashed, &before) {
            faults.push(format!("at {} ({}): {fault}", crash.position, crash.kept));
        }
    });
    assert!(
        faults.is_empty(),
        "{}: {} of {count} crashes\n{}",
        scenario.name,
        faults.len(),
        faults[..faults.len().min(10)].join("\n")
    );
    count
}

fn crash_in_all_scenarios(memory: usize) {
    for scenario in scenarios::all() {
        let count = crash_everywhere(&scenario, memory);
        let least = if scenario.only_amends() { 15 } else { 100 };
        assert!(count > least, "{}: {count} crashes", scenario.name);
    }
}

#[test]
fn a_crash_leaves_leaked_clusters_at_worst() {
    crash_in_all_scenarios(PLENTY);
}

#[test]
fn a_crash_while_tables_leave_memory_leaves_leaked_clusters_at_worst() {
    crash_in_all_scenarios(SCARCE);
}

#[test]
fn unknown_features_are_disclaimed_before_anything_changes() {
    const AUTOCLEAR: usize = 88;
    let mut file = create("cluster_size=4096", 1 << 16, &Closed).contents();
    // Bit 63, which nobody has given a meaning.
    file[AUTOCLEAR] = 0x80;
    let journal: Arc<Journal> = Arc::default();
    let device: Arc<dyn Device> = Arc::new(Recorder::new(file.clone(), 0, &journal));
    let image = open_on(&[device], true).expect("opens");
    image.write_at(&[1; 4096], 0).expect("writes");
    image.flush().expect("flushes");
    journal.crashes(&[file.clone()], SAMPLES, 0x5eed, |crash| {
        let left = &crash.files[0];
        assert!(*left == file || left[AUTOCLEAR] == 0, "at {}", crash.position);
    });
}
