//! Checks and repairs of damaged images in memory.

use std::sync::{Arc, Mutex};

use diskimage_core::{
    ByteRange, CheckReport, ClosedGate, Device, Extent, Format, Image, Limits, MemoryDevice, Note,
    OpenContext, OpenRequest, Preallocation, Progress, Repair, Result, StatusDetail, ZeroMode,
};
use proptest::prelude::*;

use crate::qcow2::Qcow2Format;
use crate::qcow2::tests::{FORMS, Op, SIZE, create, op, open, secrets, with_key};
use crate::testing::{OneFile, contents};

/// The outcome of a check and the lines that it reported.
#[derive(Debug)]
struct Found {
    report: Result<CheckReport>,
    lines: Vec<String>,
}

fn check_device(device: Arc<dyn Device>, repair: Repair) -> Found {
    // The data file is as long as the largest disk of these tests; a check does not read it.
    let gate = OneFile(Arc::new(MemoryDevice::new(vec![0; 8 << 20])));
    let context = OpenContext::new(Arc::new(gate)).with_objects(secrets("secret"));
    let lines = Mutex::new(Vec::new());
    let note = |note: &Note| lines.lock().expect("one thread").push(note.text().into_owned());
    let layer = Qcow2Format.open(OpenRequest {
        write: repair != Repair::No,
        for_check: true,
        ..OpenRequest::new(device, "test", &mut with_key(), &context)
    });
    let report = layer.and_then(|layer| layer.check(repair, &Progress::none().with_notes(&note)));
    Found {
        report,
        lines: lines.into_inner().expect("one thread"),
    }
}

fn check(file: &Arc<MemoryDevice>, repair: Repair) -> Found {
    check_device(Arc::<MemoryDevice>::clone(file), repair)
}

/// 1 MiB with 256 KiB written: header, refcount table, refcount block, L1 table, L2 table, data, a cluster each.
fn written() -> Arc<MemoryDevice> {
    let file = create("", 1 << 20, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    for i in 0..4u8 {
        let at = u64::from(i) << 16;
        image.write_at(&[i + 1; 1 << 16], at).expect("writes");
    }
    image.flush().expect("flushes");
    file
}

fn poke(file: &MemoryDevice, at: u64, number: u64) {
    file.write_at(&number.to_be_bytes(), at).expect("grows");
}

fn clean(file: &Arc<MemoryDevice>) {
    let found = check(file, Repair::No);
    let report = found.report.expect("checks");
    assert_eq!(report.corruptions, 0, "{:?}", found.lines);
    assert_eq!(report.leaks, 0, "{:?}", found.lines);
    assert_eq!(report.check_errors, 0, "{:?}", found.lines);
    assert!(found.lines.is_empty());
}

#[test]
fn statistics_match_qemu_img() {
    let report = check(&written(), Repair::No).report.expect("checks");
    assert_eq!(
        report,
        CheckReport {
            image_end_offset: 589_824,
            total_clusters: 16,
            allocated_clusters: 4,
            ..CheckReport::default()
        }
    );
}

#[test]
fn a_leak_is_freed() {
    let file = written();
    poke(&file, 0x40008, 0);
    let found = check(&file, Repair::Leaks);
    assert_eq!(
        found.lines,
        [
            "Leaked cluster 6 refcount=1 reference=0",
            "Repairing cluster 6 refcount=1 reference=0",
        ]
    );
    assert_eq!(found.report.expect("checks").leaks_fixed, 1);
    clean(&file);
}

#[test]
fn a_used_cluster_with_refcount_zero_needs_a_rebuild() {
    let file = written();
    let before = contents(&open(&file, false, &ClosedGate, None).expect("opens"));
    file.write_at(&[0, 0], 0x2000a).expect("pokes the block");
    assert_eq!(
        check(&file, Repair::No).lines,
        [
            "ERROR cluster 5 refcount=0 reference=1",
            "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=0",
        ]
    );
    let refused = check(&file, Repair::Leaks);
    assert_eq!(refused.lines[1], "ERROR need to rebuild refcount structures");
    assert_eq!(refused.report.expect_err("refuses").chain(), "Input/output error");
    let found = check(&file, Repair::All);
    assert_eq!(
        found.lines,
        [
            "ERROR cluster 5 refcount=0 reference=1",
            "Rebuilding refcount structure",
            "Repairing cluster 1 refcount=1 reference=0",
            "Repairing cluster 2 refcount=1 reference=0",
        ]
    );
    assert_eq!(found.report.expect("checks").corruptions_fixed, 1);
    clean(&file);
    assert_eq!(
        contents(&open(&file, false, &ClosedGate, None).expect("opens")),
        before
    );
}

#[test]
fn a_table_used_twice_is_counted_twice_and_loses_its_flags() {
    let file = create("", 1 << 30, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image.write_at(&[1; 1 << 16], 0).expect("writes");
    image.flush().expect("flushes");
    poke(&file, 0x30008, 0x8000_0000_0004_0000);
    let report = check(&file, Repair::All).report.expect("checks");
    assert_eq!(report.corruptions_fixed, 5);
    clean(&file);
}

#[test]
fn a_refcount_block_that_is_also_guest_data_is_not_written_with_one_bit_refcounts() {
    let file = create("cluster_size=4096,refcount_bits=1", 1 << 20, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image.write_at(&[0xff; 4096], 0).expect("writes");
    image.flush().expect("flushes");
    let bytes = contents(&image);
    // The second refcount block is the data cluster, whose bytes read as a refcount of one for every cluster.
    poke(&file, 0x1008, 0x5000);
    file.resize(40_000 * 4096, Preallocation::Off).expect("grows");
    check(&file, Repair::All).report.expect("checks");
    assert!(contents(&open(&file, false, &ClosedGate, None).expect("opens")) == bytes);
    clean(&file);
}

#[test]
fn a_table_referred_to_by_every_entry_is_checked_in_bounded_time() {
    let file = create("cluster_size=65536", 1 << 50, &ClosedGate);
    // All 2^21 L1 entries point to the same L2 table, and all its entries to the same cluster.
    let file_len = file.len();
    let l2 = file_len.next_multiple_of(1 << 16);
    let entries = 1u64 << 21;
    file.write_at(
        &(l2 | 1 << 63)
            .to_be_bytes()
            .repeat(usize::try_from(entries).expect("small")),
        0x30000,
    )
    .expect("writes the L1 table");
    file.write_at(&((l2 + (1 << 16)) | 1 << 63).to_be_bytes().repeat(8192), l2)
        .expect("writes the L2 table");
    poke(&file, l2 + (1 << 16), 1);
    let report = check(&file, Repair::No).report.expect("checks");
    assert!(report.corruptions > 0);
}

#[test]
fn entries_in_other_metadata_are_not_repaired() {
    let file = written();
    // The L1 entry makes the header an L2 table.
    poke(&file, 0x30000, 1);
    let header = file.contents()[..72].to_vec();
    let found = check(&file, Repair::All);
    assert!(found.report.is_ok());
    assert_eq!(file.contents()[..48], header[..48]);
    assert_eq!(file.contents()[60..72], header[60..72]);
}

#[test]
fn excess_snapshots_are_cut_only_if_all_repairs_are_allowed() {
    let file = written();
    file.write_at(&65537u32.to_be_bytes(), 60)
        .expect("pokes the header");
    poke(&file, 64, 0x9_0000);
    // The snapshot table is all zeroes.
    file.resize(0x9_0000 + 65537 * 40, Preallocation::Off)
        .expect("memory");
    let found = check(&file, Repair::No);
    assert_eq!(
        found.lines,
        [
            "ERROR snapshot table too large\nYou can force-remove all 1 overhanging snapshots with qemu-img check -r all"
        ]
    );
    assert_eq!(found.report.expect_err("refuses").chain(), "File too large");
    let found = check(&file, Repair::All);
    assert_eq!(found.lines[0], "Discarding 1 overhanging snapshots");
    assert_eq!(file.contents()[60..64], 65536u32.to_be_bytes());
}

#[test]
fn corrupt_and_dirty_bits_are_cleared_if_no_damage_remains() {
    let file = written();
    poke(&file, 72, 3);
    check(&file, Repair::All).report.expect("checks");
    assert_eq!(file.contents()[72..80], [0; 8]);
    poke(&file, 72, 2);
    poke(&file, 0x40008, 0x8000_0000_0100_0000);
    check(&file, Repair::All).report.expect("checks");
    assert_eq!(file.contents()[79], 2);
}

#[test]
fn a_dirty_image_is_repaired_when_opened_for_writing() {
    let file = written();
    poke(&file, 72, 1);
    file.write_at(&[0, 0], 0x2000a).expect("pokes the block");
    drop(open(&file, false, &ClosedGate, None).expect("opens"));
    assert_eq!(file.contents()[79], 1);
    drop(open(&file, true, &ClosedGate, None).expect("opens"));
    clean(&file);
}

fn change(image: &Image, op: &Op) {
    let range =
        |at: u64, n: u64| ByteRange::at(at.min(image.len() - 1), n).intersect(ByteRange::new(0, image.len()));
    match *op {
        Op::Write(at, n, byte) => {
            let range = range(at, n);
            let bytes = vec![byte; usize::try_from(range.len()).expect("small")];
            image.write_at(&bytes, range.start()).expect("writes");
        }
        Op::Zero(at, n, _) => image.write_zeroes(range(at, n), ZeroMode::Unmap).expect("zeroes"),
        Op::Discard(at, n) => image.discard(range(at, n)).expect("discards"),
        Op::Resize(_) | Op::Reopen => image.flush().expect("flushes"),
    }
}

/// An image after random operations, and the contents of its disk.
fn used(form: &str, ops: &[Op], gate: &OneFile) -> (Arc<MemoryDevice>, Vec<u8>) {
    let file = create(form, SIZE, gate);
    let image = open(&file, true, gate, None).expect("opens");
    for op in ops {
        change(&image, op);
    }
    image.flush().expect("flushes");
    let bytes = contents(&image);
    (file, bytes)
}

fn number(file: &MemoryDevice, at: usize) -> u64 {
    let bytes = file.contents();
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn used_images_are_clean(form in 0..FORMS.len(), ops in prop::collection::vec(op(), 1..20)) {
        let gate = OneFile(Arc::new(MemoryDevice::default()));
        let (file, _) = used(FORMS[form], &ops, &gate);
        clean(&file);
    }

    #[test]
    fn damaged_refcounts_are_repaired_without_loss_of_data(
        form in 0..FORMS.len(),
        ops in prop::collection::vec(op(), 1..12),
        pokes in prop::collection::vec((any::<bool>(), 0..64u64, any::<u8>()), 1..12),
    ) {
        let gate = OneFile(Arc::new(MemoryDevice::default()));
        let (file, bytes) = used(FORMS[form], &ops, &gate);
        let table = number(&file, 48);
        let block = number(&file, usize::try_from(table).expect("small"));
        for (in_table, at, byte) in pokes {
            // Only the low half of an offset changes: a larger file would not fit in memory.
            let at = if in_table { table + at / 4 * 8 + 4 + at % 4 } else { block + at };
            file.write_at(&[byte], at).expect("pokes");
        }
        let found = check(&file, Repair::All);
        prop_assume!(found.report.is_ok());
        clean(&file);
        let image = open(&file, false, &gate, None).expect("opens");
        prop_assert_eq!(contents(&image), bytes);
    }

    #[test]
    fn any_damage_never_panics_and_leaves_no_leak(
        form in 0..FORMS.len(),
        ops in prop::collection::vec(op(), 1..12),
        pokes in prop::collection::vec((0..12u64, 0..512u64, any::<u8>()), 1..12),
        headers in prop::collection::vec((24..112u64, any::<u8>()), 0..2),
    ) {
        let gate = OneFile(Arc::new(MemoryDevice::default()));
        let (file, _) = used(FORMS[form], &ops, &gate);
        let cluster = 1u64 << file.contents()[23];
        for &(at, byte) in &headers {
            file.write_at(&[byte], at).expect("pokes");
        }
        for (table, at, byte) in pokes {
            file.write_at(&[byte], (table + 1) * cluster + at).expect("pokes");
        }
        let _ = check(&file, Repair::No);
        if check(&file, Repair::All).report.is_ok() {
            let found = check(&file, Repair::No);
            let report = found.report.expect("checks");
            prop_assert_eq!(report.check_errors, 0, "{:?}", found.lines);
            // A snapshot table that overlaps other metadata reads differently once that metadata is repaired.
            prop_assert!(!headers.is_empty() || report.leaks == 0, "{:?}", found.lines);
        }
    }
}

/// Records every write, so that the state after any number of writes can be replayed.
#[derive(Debug)]
struct RecordingDevice {
    inner: Arc<MemoryDevice>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Device for RecordingDevice {
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.writes
            .lock()
            .expect("one thread")
            .push((offset, buf.to_vec()));
        self.inner.write_at(buf, offset)
    }
    fn write_zeroes(&self, range: ByteRange, _: ZeroMode) -> Result<()> {
        self.write_at(
            &vec![0; usize::try_from(range.len()).expect("small")],
            range.start(),
        )
    }
    fn discard(&self, range: ByteRange) -> Result<()> {
        self.write_zeroes(range, ZeroMode::Unmap)
    }
    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        self.inner.status(range, detail)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.inner.resize(len, preallocation)
    }
}

#[test]
fn an_interrupted_repair_loses_no_data_and_can_be_repeated() {
    let file = written();
    let bytes = contents(&open(&file, false, &ClosedGate, None).expect("opens"));
    file.write_at(&[0, 0, 0, 5], 0x2000a).expect("pokes the block");
    let start = file.contents();
    let recorder = Arc::new(RecordingDevice {
        inner: file,
        writes: Mutex::default(),
    });
    check_device(Arc::<RecordingDevice>::clone(&recorder), Repair::All)
        .report
        .expect("checks");
    let writes = recorder.writes.lock().expect("one thread").clone();
    assert!(writes.len() >= 4);
    for cut in 0..=writes.len() {
        let crashed = Arc::new(MemoryDevice::new(start.clone()));
        for (offset, written) in &writes[..cut] {
            crashed.write_at(written, *offset).expect("grows");
        }
        let image = open(&crashed, false, &ClosedGate, None).expect("opens");
        assert!(contents(&image) == bytes, "after {cut} writes");
        check(&crashed, Repair::All).report.expect("checks");
        clean(&crashed);
        assert!(contents(&open(&crashed, false, &ClosedGate, None).expect("opens")) == bytes);
    }
}
