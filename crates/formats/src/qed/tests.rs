//! Tests of qed on devices in memory.

use std::sync::Arc;

use diskimage_core::{
    Backing, ByteRange, Device, ErrorKind, Format, Image, Layer, MemoryDevice, NodeOptions, OpenContext,
    OpenRequest, Preallocation, Progress, Repair, ResizeRequest, Result, ZeroMode,
};
use diskimage_testing::{Fault, FaultyDevice, Journal, RecordingDevice};
use proptest::prelude::*;

use super::QedFormat;
use crate::testing::{self, contents, fill_in_steps, require_a_state_around};

fn create(text: &str, size: u64) -> Arc<MemoryDevice> {
    testing::create(&QedFormat, text, size).expect("creates")
}

fn open_layer(file: Arc<dyn Device>, write: bool, for_check: bool) -> Result<Arc<dyn Layer>> {
    QedFormat.open(OpenRequest {
        write,
        for_check,
        ..OpenRequest::new(file, "test", &mut NodeOptions::new(), &OpenContext::default())
    })
}

fn open_on(file: Arc<dyn Device>, backing: Option<&Arc<Image>>) -> Image {
    let layer = open_layer(file, true, false).expect("opens");
    Image::new(layer, backing.cloned(), "test", true)
}

fn memory(bytes: &[u8]) -> Arc<dyn Device> {
    Arc::new(MemoryDevice::new(bytes.to_vec()))
}

const SMALL: &str = "cluster_size=4k,table_size=1";
/// A disk that two L2 tables map.
const SIZE: u64 = 3 << 20;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Reopen,
    Grow(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = prop_oneof![
        0..SIZE,
        Just(2 << 20),
        (0..700u64).prop_map(|cluster| cluster * 4096)
    ];
    let step = prop_oneof![
        5 => (at.clone(), 1..20_000usize, 1..255u8).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        3 => (at, 1..50_000u64, any::<bool>()).prop_map(|(at, len, unmap)| Step::Zero(at, len, unmap)),
        1 => Just(Step::Reopen),
        1 => (1..400u64).prop_map(|sectors| Step::Grow(sectors * 512)),
    ];
    prop::collection::vec(step, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn an_image_is_a_vector_of_bytes(steps in steps(), backed in any::<bool>()) {
        let backing = backed.then(|| {
            let image = open_on(create(SMALL, SIZE + (512 << 10)), None);
            image.write_at(&vec![0xbb; 3_500_000], 0).expect("writes");
            Arc::new(image)
        });
        let file = create(SMALL, SIZE);
        let mut model = vec![if backed { 0xbb } else { 0 }; usize::try_from(SIZE).expect("small")];
        let mut image = open_on(file.clone(), backing.as_ref());
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    let at = usize::try_from(at).expect("small");
                    let end = (at + len).min(model.len());
                    model[at..end].fill(byte);
                    image.write_at(&model[at..end], at as u64).expect("writes");
                }
                Step::Zero(at, len, unmap) => {
                    let range = ByteRange::at(at, len).intersect(ByteRange::new(0, image.len()));
                    let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::KeepAllocated };
                    image.write_zeroes(range, mode).expect("zeroes");
                    model[usize::try_from(range.start()).expect("small")..][..usize::try_from(range.len()).expect("small")].fill(0);
                }
                Step::Reopen => {
                    image.flush().expect("flushes");
                    image = open_on(file.clone(), backing.as_ref());
                }
                Step::Grow(more) => {
                    let len = image.len() + more;
                    image.resize(len, Preallocation::Off).expect("grows");
                    model.resize(usize::try_from(len).expect("small"), 0);
                }
            }
        }
        prop_assert!(contents(&image) == model);
        image.flush().expect("flushes");
        prop_assert!(contents(&open_on(file.clone(), backing.as_ref())) == model);
        let report = image.layer().check(Repair::No, &Progress::none()).expect("checks");
        prop_assert_eq!((report.corruptions, report.leaks), (0, 0));
        prop_assert_eq!(file.contents()[16], 0);
    }

    #[test]
    fn damage_is_no_panic(at in 0..20_000usize, bytes in prop::collection::vec(any::<u8>(), 1..12)) {
        let file = create("cluster_size=4k,table_size=2", SIZE);
        let image = open_on(file.clone(), None);
        image.write_at(&[7; 9000], 1000).expect("writes");
        image.flush().expect("flushes");
        let mut damaged = file.contents();
        // Mostly in the header and at the start of tables.
        let at = [at % 64, 4096 + at % 64, 12_288 + at % 128, 24_576 + at % 64, at][at % 5];
        let end = (at + bytes.len()).min(damaged.len());
        damaged[at..end].copy_from_slice(&bytes[..end - at]);
        for repair in [Repair::No, Repair::All] {
            if let Ok(layer) = open_layer(memory(&damaged), true, true) {
                let found = layer.check(repair, &Progress::none()).expect("checks");
                let again = layer.check(Repair::No, &Progress::none()).expect("checks");
                prop_assert!(again.corruptions <= found.corruptions);
                let image = Image::new(layer, None, "test", true);
                let len = image.len().min(1 << 20);
                let mut buf = vec![0; usize::try_from(len).expect("small")];
                let _ = image.read_at(&mut buf, 0);
                let _ = image.write_at(&buf, 0);
                let _ = image.flush();
            }
        }
    }
}

/// Changes the disk in steps. Calls `seen` with the contents after each.
fn story(image: &Image, seen: impl FnMut(Vec<u8>)) {
    let steps = [
        (1000, 3000, 1),
        (2_097_152, 9000, 2),
        (500, 100, 3),
        (100_000, 4096, 4),
        (2_600_000, 4096, 0),
        (101_000, 10_000, 5),
    ];
    let write = |image: &Image, offset: u64, bytes: &[u8]| image.write_at(bytes, offset);
    fill_in_steps(image, &steps, write, seen);
}

#[test]
fn a_crash_leaves_leaked_clusters_at_worst() {
    let start = create(SMALL, SIZE).contents();
    let journal: Arc<Journal> = Arc::default();
    let image = open_on(Arc::new(RecordingDevice::new(start.clone(), 0, &journal)), None);
    let mut states = vec![(0, contents(&image))];
    story(&image, |state| states.push((journal.len(), state)));
    let (mut marked, mut leaking) = (0, 0);
    let count = journal.crashes(&[start], 12, 0x5eed, |crash| {
        let bytes = &crash.files[0];
        let layer = open_layer(memory(bytes), false, false).expect("opens");
        let report = layer.check(Repair::No, &Progress::none()).expect("checks");
        assert_eq!(report.corruptions, 0, "at {} ({})", crash.position, crash.kept);
        let needs_check = bytes[16] & 2 != 0;
        assert!(report.leaks == 0 || needs_check, "leaks at {}", crash.position);
        marked += u32::from(needs_check);
        leaking += u32::from(report.leaks > 0);
        // Every byte is as it was after one of the steps around the crash.
        let now = contents(&Image::new(layer, None, "test", false));
        require_a_state_around(&states, crash, &now);
    });
    assert!(count > 50 && marked > 10 && leaking > 0, "{count} crashes");
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    for after in 0..12 {
        let below = create(SMALL, SIZE);
        let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&below)));
        let image = open_on(Arc::<FaultyDevice>::clone(&faulty), None);
        image.write_at(&[1; 8192], 0).expect("writes");
        image.flush().expect("flushes");
        faulty.arm(Fault::once(after));
        let failed = image.write_at(&[2; 8192], 2 << 20).is_err() | image.flush().is_err();
        faulty.disarm();
        image.write_at(&[3; 4096], 4096).expect("writes again");
        image.flush().expect("flushes again");
        let now = contents(&open_on(below, None));
        assert_eq!(now[0], 1);
        assert_eq!(now[4096], 3);
        let later = &now[2 << 20..(2 << 20) + 8192];
        assert!(
            later == [2; 8192] || failed && later.iter().all(|byte| matches!(byte, 0 | 2)),
            "{after}"
        );
    }
}

#[test]
fn names_of_the_image_below_change_at_once() {
    let long = |byte: &str, len| Backing {
        name: byte.repeat(len).into(),
        format: None,
    };
    let names = [
        long("a", 40),
        long("b", 300),
        long("c", 900),
        long("d", 1500),
        long("e", 20),
        long("f", 1200),
    ];
    let mut start = create(SMALL, SIZE).contents();
    let mut old = None;
    for new in names.into_iter().map(Some).chain([None]) {
        let journal: Arc<Journal> = Arc::default();
        let device: Arc<dyn Device> = Arc::new(RecordingDevice::new(start.clone(), 0, &journal));
        let layer = open_layer(Arc::clone(&device), true, false).expect("opens");
        layer.set_backing(new.as_ref()).expect("there is room");
        journal.crashes(&[start.clone()], 8, 1, |crash| {
            let found = open_layer(memory(&crash.files[0]), false, false)
                .expect("opens")
                .backing();
            assert!(found == old || found == new, "{found:?}");
        });
        start = vec![0; start.len()];
        device.read_at(&mut start, 0).expect("reads");
        let found = open_layer(memory(&start), false, false).expect("opens").backing();
        assert_eq!(found, new);
        old = new;
    }
    let error = open_layer(memory(&start), true, false)
        .expect("opens")
        .set_backing(Some(&long("g", 4033)));
    assert_eq!(error.map_err(|error| error.kind()), Err(ErrorKind::NoSpace));
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let good = create("cluster_size=4k,table_size=2", SIZE).contents();
    for (at, bytes) in [
        (4, &[0, 8, 0, 0][..]),
        (8, &[17]),
        (12, &[0xff, 0xff, 0xff, 0xff]),
        (16, &[8]),
        (40, &[1]),
        (47, &[0x80]),
        (48, &[1]),
        (55, &[0x7f]),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        assert!(open_layer(memory(&bad), false, false).is_err(), "at {at}");
    }
}

#[test]
fn disks_only_grow_within_what_their_tables_are_for() {
    let layer = open_layer(create(SMALL, SIZE), true, false).expect("opens");
    let resize = |len| {
        let request = ResizeRequest::new(len, Preallocation::Off);
        layer.resize(&request).map_err(|error| error.to_string())
    };
    assert_eq!(
        resize((1 << 30) + 512),
        Err("Invalid image size specified".to_owned())
    );
    assert_eq!(
        resize(SIZE - 512),
        Err("Shrinking images is currently not supported".to_owned())
    );
    assert_eq!(resize(1 << 30), Ok(()));
    assert_eq!(layer.len(), 1 << 30);
}

#[test]
fn a_new_name_stays_clear_of_the_fields_of_a_damaged_header() {
    let file = create("cluster_size=4k,table_size=1,backing_file=abc", SIZE);
    // The name's offset is that of the header.
    file.write_at(&[0; 4], 56).expect("memory");
    let layer = open_layer(Arc::<MemoryDevice>::clone(&file), true, false).expect("opens");
    let name = "n".repeat(500);
    let backing = Backing {
        name: name.as_str().into(),
        format: None,
    };
    layer.set_backing(Some(&backing)).expect("has room");
    drop(layer);
    let layer = open_layer(file, false, false).expect("the header is whole");
    assert_eq!(layer.backing().expect("has one").name, name.as_str().into());
}

/// Host offsets of the two L2 tables of [`two_tables`] and of the first cluster.
const TABLES: [u64; 2] = [0x3000, 0x5000];
const CLUSTER: u64 = 0x2000;

/// An image with a cluster before each of its L2 tables.
fn two_tables() -> Arc<MemoryDevice> {
    let file = create(SMALL, SIZE);
    let image = open_on(Arc::<MemoryDevice>::clone(&file), None);
    for at in [0, 2 << 20] {
        image.write_at(&[7; 4096], at).expect("writes");
        image.flush().expect("flushes");
    }
    let entry = |at| {
        let mut entry = [0; 8];
        file.read_at(&mut entry, at).expect("inside");
        u64::from_le_bytes(entry)
    };
    assert_eq!([0x1000, 0x1008].map(entry), TABLES);
    assert_eq!(entry(TABLES[0]), CLUSTER);
    file
}

#[test]
fn nothing_is_written_where_tables_are_or_seem_to_be() {
    let good = two_tables().contents();
    for (at, entry, guest, is_read) in [
        // The L2 entry refers to the L1 table, the other L2 table, its own table.
        (TABLES[0], 0x1000, 0, false),
        (TABLES[0], TABLES[1], 0, true),
        (TABLES[0], TABLES[0], 0, true),
        // The L1 entry refers to the L1 table, the other L2 table, a cluster.
        (0x1000, 0x1000, 0, false),
        (0x1000, TABLES[1], 8192, true),
        (0x1008, TABLES[0], (2 << 20) + 8192, true),
        (0x1008, CLUSTER, (2 << 20) + 8192, false),
    ] {
        let bad = MemoryDevice::new(good.clone());
        bad.write_at(&entry.to_le_bytes(), at).expect("memory");
        let bad = Arc::new(bad);
        let before = bad.contents();
        let image = open_on(Arc::<MemoryDevice>::clone(&bad), None);
        assert_eq!(
            image.read_at(&mut [0; 512], guest).is_ok(),
            is_read,
            "{entry:#x} at {at:#x}"
        );
        assert!(image.write_at(&[1; 512], guest).is_err(), "{entry:#x} at {at:#x}");
        image
            .write_zeroes(ByteRange::at(guest, 4096), ZeroMode::Unmap)
            .expect_err("nor zeroed");
        image.flush().expect("flushes");
        assert!(bad.contents() == before, "{entry:#x} at {at:#x}");
    }
}

#[test]
fn a_repair_changes_nothing_in_what_may_be_guest_data() {
    let file = two_tables();
    // The second L1 entry refers to the guest's first cluster.
    file.write_at(&CLUSTER.to_le_bytes(), 0x1008).expect("memory");
    let before = file.contents();
    let layer = open_layer(Arc::<MemoryDevice>::clone(&file), true, true).expect("opens");
    let report = layer.check(Repair::All, &Progress::none()).expect("checks");
    assert!(report.corruptions > 0);
    assert_eq!(report.corruptions_fixed, 0);
    assert!(file.contents() == before);
}
