//! Simulated crashes at every request: the image opens, has leaked clusters at worst, and holds all durable data.

use std::sync::Arc;

use diskimage_core::{ClosedGate, Device, MemoryDevice, Preallocation, Repair};
use diskimage_testing::{Journal, RecordingDevice};

use super::scenario::{
    Model, PLENTY, SCARCE, Scenario, find_fault, has_sound_bitmap, in_memory, open_on, open_with_memory,
    report,
};
use super::{create, scenarios};
use crate::testing::contents;

const SAMPLES: usize = 12;

/// Simulates crashes at all requests of a scenario. Returns the number of crashes.
fn crash_everywhere(scenario: &Scenario, memory: usize) -> usize {
    let (files, before, mut model) = scenario.prepare();
    let journal: Arc<Journal> = Arc::default();
    let devices: Vec<Arc<dyn Device>> = files
        .iter()
        .enumerate()
        .map(|(i, bytes)| Arc::new(RecordingDevice::new(bytes.clone(), i, &journal)) as Arc<dyn Device>)
        .collect();
    // The states that are allowed after a crash, by the journal position from which on they apply.
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
fn a_crash_while_pages_are_evicted_leaves_leaked_clusters_at_worst() {
    crash_in_all_scenarios(SCARCE);
}

#[test]
fn unknown_autoclear_features_are_cleared_before_anything_changes() {
    const AUTOCLEAR: usize = 88;
    let mut file = create("cluster_size=4096", 1 << 16, &ClosedGate).contents();
    // Bit 63 has no meaning in any specification.
    file[AUTOCLEAR] = 0x80;
    let journal: Arc<Journal> = Arc::default();
    let device: Arc<dyn Device> = Arc::new(RecordingDevice::new(file.clone(), 0, &journal));
    let image = open_on(&[device], true).expect("opens");
    image.write_at(&[1; 4096], 0).expect("writes");
    image.flush().expect("flushes");
    journal.crashes(&[file.clone()], SAMPLES, 0x5eed, |crash| {
        let left = &crash.files[0];
        assert!(*left == file || left[AUTOCLEAR] == 0, "at {}", crash.position);
    });
}

#[test]
fn clusters_left_beyond_the_end_by_a_crash_do_not_reappear() {
    const OLD: u64 = 256 << 10;
    // The sizes end inside a cluster; with small clusters the disk has more than one L2 table.
    const NEW: u64 = 100 << 10 | 512;
    for options in [
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=16384,extended_l2=on",
        "cluster_size=4096,compat=0.10",
    ] {
        let memory = create(options, OLD, &ClosedGate);
        let image = open_on(&[Arc::<MemoryDevice>::clone(&memory) as Arc<dyn Device>], true).expect("opens");
        image
            .write_at(&vec![1; usize::try_from(OLD).expect("small")], 0)
            .expect("writes");
        image.flush().expect("flushes");
        drop(image);
        let file = memory.contents();
        let journal: Arc<Journal> = Arc::default();
        let device: Arc<dyn Device> = Arc::new(RecordingDevice::new(file.clone(), 0, &journal));
        let image = open_on(&[device], true).expect("opens");
        image.resize(NEW, Preallocation::Off).expect("shrinks");
        image.flush().expect("flushes");
        let mut sizes = [0, 0];
        journal.crashes(&[file], SAMPLES, 0x5eed, |crash| {
            let devices = in_memory(crash.files);
            let image = open_on(&devices, true).expect("opens");
            let len = image.len();
            sizes[usize::from(len == NEW)] += 1;
            assert!(
                [OLD, NEW].contains(&len),
                "{options} at {}: {len}",
                crash.position
            );
            image.resize(OLD + 512, Preallocation::Off).expect("grows");
            let disk = contents(&image);
            let (kept, added) = disk.split_at(usize::try_from(len).expect("small"));
            assert!(
                kept.iter().all(|byte| *byte == 1),
                "{options} at {}",
                crash.position
            );
            assert!(
                added.iter().all(|byte| *byte == 0),
                "{options} at {}",
                crash.position
            );
            image.flush().expect("flushes");
            let found = report(&**image.layer(), Repair::No);
            assert_eq!(found.corruptions, 0, "{options} at {}", crash.position);
        });
        assert!(sizes[0] > 0 && sizes[1] > 5, "{options}: {sizes:?}");
    }
}
