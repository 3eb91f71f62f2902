//! Tests against a model, with damage, crashes and faults, on images in memory.

use std::sync::{Arc, Mutex};

use crate::encryption::HashAlg;
use diskimage_core::options::Options;
use diskimage_core::{
    Bitmaps, ByteRange, CheckReport, Device, Format, Image, Layer, MeasureSource, MemoryDevice, NodeOptions,
    Note, Objects, OpenContext, OpenRequest, Progress, Repair, ResizeRequest, Result, StatusDetail, ZeroMode,
};
use diskimage_testing::{Fault, FaultyDevice, Journal, RecordingDevice};
use proptest::prelude::*;

use super::Parallels;
use crate::testing::{self, contents, fill_in_steps, require_a_state_around};

const CLUSTER: u64 = 4096;
const SMALL: &str = "cluster_size=4k";
/// Offsets of header fields and of the table.
const IN_USE: usize = 44;
const DATA_OFF: usize = 48;
const EXT_OFF: usize = 56;
const TABLE: usize = 64;

fn create(options: &str, size: u64) -> Result<Vec<u8>> {
    Ok(testing::create(&Parallels, options, size)?.contents())
}

fn memory(bytes: &[u8]) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(bytes.to_vec()))
}

fn open(file: Arc<dyn Device>) -> Image {
    testing::open(&Parallels, file, true).expect("opens")
}

fn open_layer(
    file: Arc<dyn Device>,
    write: bool,
    for_check: bool,
    options: &mut NodeOptions,
) -> Result<Arc<dyn Layer>> {
    Parallels.open(OpenRequest {
        write,
        for_check,
        ..OpenRequest::new(file, "test", options, &OpenContext::default())
    })
}

fn read_only(bytes: &[u8]) -> Result<Arc<dyn Layer>> {
    open_layer(memory(bytes), false, false, &mut NodeOptions::new())
}

/// The report of a check, and the lines that it prints.
fn check(layer: &dyn Layer, repair: Repair) -> (CheckReport, Vec<String>) {
    let lines = Mutex::new(Vec::new());
    let note = |note: &Note| lines.lock().expect("one thread").push(note.text().into_owned());
    let report = layer
        .check(repair, &Progress::none().with_notes(&note))
        .expect("checks");
    let lines = lines.lock().expect("one thread").clone();
    (report, lines)
}

fn is_clean(bytes: &[u8]) -> bool {
    let report = check(&*read_only(bytes).expect("opens"), Repair::No).0;
    report.corruptions == 0 && report.leaks == 0 && bytes[IN_USE..IN_USE + 4] == [0; 4]
}

fn entry(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(*bytes[TABLE + 4 * index..].first_chunk().expect("an entry"))
}

fn set_entry(bytes: &mut [u8], index: usize, value: u32) {
    bytes[TABLE + 4 * index..TABLE + 4 * index + 4].copy_from_slice(&value.to_le_bytes());
}

/// An image of the old kind with four clusters of 63 sectors, two of them allocated.
fn old(data_off: u32) -> Vec<u8> {
    let start = data_off.max(1);
    let mut bytes = b"WithoutFreeSpace".to_vec();
    for field in [
        2_u32,
        16,
        1,
        63,
        4,
        252,
        0,
        0,
        data_off,
        0,
        0,
        0,
        start + 63,
        start,
    ] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.resize(512 * usize::try_from(start).expect("small"), 0);
    bytes.resize(bytes.len() + 63 * 512, 2);
    bytes.resize(bytes.len() + 63 * 512, 1);
    bytes
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
}

const SIZE: u64 = 40 * CLUSTER + 1536;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..SIZE, 1..6 * CLUSTER);
    let step = prop_oneof![
        5 => (range.clone(), 1..=255_u8).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        3 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        2 => range.prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

fn index(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).expect("small")..usize::try_from(range.end()).expect("small")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn an_image_is_a_vector_of_bytes(steps in steps(), is_old: bool) {
        let bytes = if is_old { old(9) } else { create(SMALL, SIZE).expect("creates") };
        let file = memory(&bytes);
        let mut image = open(Arc::<MemoryDevice>::clone(&file));
        let disk = ByteRange::new(0, image.len());
        let within = |at: u64, len| ByteRange::at(at % disk.len(), len).intersect(disk);
        let mut model = contents(&image);
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    let range = index(within(at, len));
                    model[range.clone()].fill(byte);
                    image.write_at(&model[range.clone()], range.start as u64).expect("writes");
                }
                Step::Zero(at, len, unmap) => {
                    let range = within(at, len);
                    model[index(range)].fill(0);
                    let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::KeepAllocated };
                    image.write_zeroes(range, mode).expect("zeroes");
                }
                Step::Discard(at, len) => {
                    let cluster = image.layer().granularity();
                    let range = within(at, len).align_in(cluster);
                    if !range.is_empty() {
                        image.layer().discard(range).expect("discards");
                        model[index(range)].fill(0);
                    }
                }
                Step::Flush => image.flush().expect("flushes"),
                Step::Reopen => {
                    image.flush().expect("flushes");
                    prop_assert_eq!(&file.contents()[IN_USE..IN_USE + 4], &[0; 4]);
                    image = open(Arc::<MemoryDevice>::clone(&file));
                }
            }
            prop_assert!(contents(&image) == model);
        }
        image.flush().expect("flushes");
        let after = file.contents();
        let report = check(&*read_only(&after).expect("opens"), Repair::No).0;
        prop_assert_eq!(report.corruptions, 0);
        prop_assert_eq!(&after[IN_USE..IN_USE + 4], &[0; 4]);
        prop_assert!(contents(&testing::open(&Parallels, file, false).expect("opens")) == model);
    }
}

#[test]
fn an_empty_disk_is_one_run_however_large() {
    let bytes = create("cluster_size=64k", 1 << 40).expect("creates");
    let image = open(memory(&bytes));
    let whole = ByteRange::new(0, image.len());
    let extent = image.status(whole, StatusDetail::Zeroes).expect("a status");
    assert_eq!(extent.len, 1 << 40);
    assert!(extent.kind.is_zero());
    image.write_zeroes(whole, ZeroMode::Unmap).expect("nothing to do");
}

#[test]
fn nothing_changes_in_the_file_of_an_image_that_is_only_opened() {
    let bytes = create(SMALL, SIZE).expect("creates");
    let file = memory(&bytes);
    let image = open(Arc::<MemoryDevice>::clone(&file));
    image.read_at(&mut [0; 512], 0).expect("reads");
    image.flush().expect("flushes");
    drop(image);
    assert!(file.contents() == bytes);
}

#[test]
fn an_image_is_in_use_from_the_first_change_until_it_is_flushed() {
    let file = memory(&create(SMALL, SIZE).expect("creates"));
    let image = open(Arc::<MemoryDevice>::clone(&file));
    let mark = || file.contents()[IN_USE..IN_USE + 4].to_vec();
    image.write_at(&[1; 512], 0).expect("writes");
    assert_eq!(mark(), 0x746f_6e59_u32.to_le_bytes());
    image.flush().expect("flushes");
    assert_eq!(mark(), [0; 4]);
    image.write_at(&[2; 512], 0).expect("writes");
    assert_eq!(mark(), 0x746f_6e59_u32.to_le_bytes());
}

#[test]
fn released_slots_are_reused_once_the_table_is_durable() {
    let file = memory(&create(SMALL, SIZE).expect("creates"));
    let image = open(Arc::<MemoryDevice>::clone(&file));
    image.write_at(&[1; 3 * 4096], 0).expect("writes");
    image.flush().expect("flushes");
    image
        .write_zeroes(ByteRange::at(CLUSTER, CLUSTER), ZeroMode::Unmap)
        .expect("zeroes");
    image.write_at(&[2; 512], 5 * CLUSTER).expect("writes");
    image.flush().expect("flushes");
    image.write_at(&[3; 512], 6 * CLUSTER).expect("writes");
    image.flush().expect("flushes");
    let bytes = file.contents();
    let entries: Vec<u32> = (0..7).map(|at| entry(&bytes, at)).collect();
    assert_eq!(entries, [1, 0, 3, 0, 0, 4, 2]);
    assert!(is_clean(&bytes));
}

#[test]
fn old_images_count_in_sectors() {
    for data_off in [0, 1, 9, 64] {
        let file = memory(&old(data_off));
        let image = open(Arc::<MemoryDevice>::clone(&file));
        let content = contents(&image);
        let (first, second) = (63 * 512, 2 * 63 * 512);
        assert!(content[..first].iter().all(|byte| *byte == 1));
        assert!(content[first..second].iter().all(|byte| *byte == 2));
        assert!(content[second..].iter().all(|byte| *byte == 0));
        image.write_at(&[3; 512], 3 * 63 * 512).expect("writes");
        image.flush().expect("flushes");
        let bytes = file.contents();
        assert_eq!(entry(&bytes, 3), data_off.max(1) + 2 * 63);
        assert!(is_clean(&bytes));
    }
}

#[test]
fn damaged_headers_are_refused() {
    let good = create(SMALL, SIZE).expect("creates");
    for (offset, bytes, message) in [
        (0, &b"X"[..], "Image not in Parallels format"),
        (16, &[3], "Image not in Parallels format"),
        (28, &[0, 0], "Invalid image: Zero sectors per track"),
        (28, &[0, 0, 0x40], "Invalid image: Too big cluster"),
        (32, &[0xff; 4], "Catalog too large"),
        (36, &[0xff; 8], "Could not refresh total sector count"),
        (EXT_OFF, &[0xff; 8], "Invalid image: Too big offset"),
        (
            EXT_OFF,
            &[1],
            "Wrong parallels Format Extension magic: 0x0, expected: 0xab234cef23dcea87",
        ),
    ] {
        let mut bad = good.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        assert_eq!(read_only(&bad).expect_err("refused").to_string(), message);
    }
}

#[test]
fn disks_that_the_table_cannot_hold_are_not_made() {
    let message = |options: &str, size| create(options, size).expect_err("refused").to_string();
    let too_large = "Image size is too large for this cluster size";
    assert_eq!(message("cluster_size=0", 1 << 20), too_large);
    assert_eq!(message("cluster_size=512", 512 << 29), too_large);
    assert_eq!(message("cluster_size=4k", u64::MAX), too_large);
    assert_eq!(message("cluster_size=2G", 1 << 20), "Cluster size is too large");
}

/// An image with four clusters, each filled with its number.
fn four() -> Vec<u8> {
    let file = memory(&create(SMALL, 4 * CLUSTER).expect("creates"));
    let image = open(Arc::<MemoryDevice>::clone(&file));
    for byte in 1..=4 {
        image
            .write_at(&[byte; 4096], u64::from(byte - 1) * CLUSTER)
            .expect("writes");
    }
    image.flush().expect("flushes");
    file.contents()
}

#[test]
fn everything_is_found_and_repaired() {
    let mut bytes = four();
    bytes[IN_USE..IN_USE + 4].copy_from_slice(b"Ynot");
    bytes[DATA_OFF] = 0;
    set_entry(&mut bytes, 0, 9);
    set_entry(&mut bytes, 2, 2);
    bytes.resize(bytes.len() + 5000, 7);
    let findings = [
        "image was not closed correctly",
        "data_off field has incorrect value",
        "cluster 0 is outside image",
        "space leaked at the end of the image 5000",
        "duplicate offset in BAT entry 2",
    ];
    let (report, lines) = check(&*read_only(&bytes).expect("opens"), Repair::No);
    assert_eq!(lines, findings.map(|finding| format!("ERROR {finding}")));
    assert_eq!(report.corruptions, 4);
    assert_eq!(report.leaks, 2);
    let file = memory(&bytes);
    let layer = open_layer(file.clone(), true, true, &mut NodeOptions::new()).expect("opens");
    let (report, lines) = check(&*layer, Repair::All);
    assert_eq!(lines, findings.map(|finding| format!("Repairing {finding}")));
    assert_eq!(report.corruptions_fixed, 4);
    assert_eq!(report.leaks_fixed, 2);
    assert!(is_clean(&file.contents()));
    let content = contents(&open(Arc::<MemoryDevice>::clone(&file)));
    let firsts: Vec<u8> = content.iter().step_by(4096).copied().collect();
    assert_eq!(firsts, [0, 2, 2, 4]);
    // Opening the image for writing makes the same repairs.
    let file = memory(&bytes);
    let image = open(Arc::<MemoryDevice>::clone(&file));
    let told = findings.map(|finding| Note::Line(format!("Repairing {finding}")));
    assert_eq!(image.layer().notes(), told);
    assert!(is_clean(&file.contents()));
}

#[test]
fn what_is_left_of_a_cluster_is_not_leaked() {
    let mut bytes = four();
    bytes.truncate(bytes.len() - 1000);
    let (report, lines) = check(&*read_only(&bytes).expect("opens"), Repair::No);
    assert_eq!(lines, ["ERROR cluster 3 is outside image"]);
    assert_eq!((report.corruptions, report.leaks), (1, 0));
}

#[test]
fn leaks_alone_are_repaired_where_nothing_is_lost() {
    let mut bytes = four();
    bytes.resize(bytes.len() + 1, 7);
    // The last byte belongs to nothing, or to a cluster at slot 5.
    for (entry, fixed) in [(1, 1), (5, 0)] {
        set_entry(&mut bytes, 0, entry);
        let file = memory(&bytes);
        let layer = open_layer(file.clone(), true, true, &mut NodeOptions::new()).expect("opens");
        let report = check(&*layer, Repair::Leaks).0;
        assert_eq!((report.leaks, report.leaks_fixed), (0, fixed));
        assert_eq!(file.len(), bytes.len() as u64 - fixed);
    }
}

#[test]
fn clusters_before_the_data_are_reported_and_not_written_to() {
    let mut bytes = four();
    bytes[DATA_OFF] = 16;
    let file = memory(&bytes);
    let image = open(Arc::<MemoryDevice>::clone(&file));
    assert_eq!(
        image.layer().notes(),
        [Note::Line("ERROR cluster 0 lies before the data area".to_owned())]
    );
    assert!(image.write_at(&[9; 512], 0).is_err());
    image.write_at(&[9; 512], CLUSTER).expect("writes");
    image
        .write_zeroes(ByteRange::at(0, CLUSTER), ZeroMode::Unmap)
        .expect("zeroes");
    image.flush().expect("flushes");
    // The bytes there are unchanged.
    assert!(file.contents()[4096..8192].iter().all(|byte| *byte == 1));
}

#[test]
fn a_table_that_is_cut_off_is_neither_read_nor_written_to() {
    let bytes = &four()[..70];
    let layer = read_only(bytes).expect("opens");
    let report = check(&*layer, Repair::No).0;
    assert_eq!(report.corruptions, 2, "data_off and the entry that is there");
    let image = Image::new(layer, None, "test", false);
    for cluster in 0..4 {
        let error = image.read_at(&mut [0; 512], cluster * CLUSTER);
        let error = error.expect_err("nothing of it is there").chain();
        assert!(error.contains("looks cut off"), "{error}");
    }
    assert!(testing::open(&Parallels, memory(bytes), true).is_err());
}

#[test]
fn the_file_grows_as_the_user_wants() {
    let bytes = create(SMALL, SIZE).expect("creates");
    for (mode, more, expected) in [
        ("truncate", "0", 3 * CLUSTER),
        ("falloc", "40000", 2 * CLUSTER + 40000),
    ] {
        let mut options = NodeOptions::new();
        options.set("prealloc-mode", mode);
        options.set("prealloc-size", more);
        let file = memory(&bytes);
        let layer = open_layer(file.clone(), true, false, &mut options).expect("opens");
        let image = Image::new(layer, None, "test", true);
        image.write_at(&[1; 512], 0).expect("writes");
        assert_eq!(file.len(), expected);
        image.flush().expect("flushes");
        assert_eq!(file.len(), 2 * CLUSTER);
    }
    let mut options = NodeOptions::new();
    options.set("prealloc-mode", "full");
    let error = open_layer(memory(&bytes), false, false, &mut options).expect_err("refused");
    assert_eq!(error.to_string(), "invalid parameter value: full");
}

#[test]
fn what_a_write_does_not_cover_of_a_new_cluster_reads_as_zero() {
    let cluster = usize::try_from(CLUSTER).expect("small");
    let file = memory(&create(SMALL, SIZE).expect("creates"));
    let image = open(file.clone());
    image.write_at(&vec![1; 2 * cluster], 0).expect("writes");
    image.flush().expect("flushes");
    let len = file.len();
    image
        .write_zeroes(ByteRange::new(0, CLUSTER), ZeroMode::Unmap)
        .expect("releases");
    image.flush().expect("flushes");
    // The slot is allocated again, with the old bytes in it.
    image.write_at(&[2; 512], 2 * CLUSTER + 1024).expect("writes");
    image
        .write_zeroes(ByteRange::new(CLUSTER + 512, CLUSTER + 1024), ZeroMode::Unmap)
        .expect("zeroes a part");
    image.flush().expect("flushes");
    assert_eq!(file.len(), len, "no other slot was allocated");
    let mut expected = vec![0; 3 * cluster];
    expected[cluster..2 * cluster].fill(1);
    expected[cluster + 512..cluster + 1024].fill(0);
    expected[2 * cluster + 1024..2 * cluster + 1536].fill(2);
    let mut found = vec![9; expected.len()];
    image.read_at(&mut found, 0).expect("reads");
    assert!(found == expected);
}

#[test]
fn disks_do_not_change_their_size() {
    let image = open(memory(&four()));
    let request = ResizeRequest::new(8 * CLUSTER, diskimage_core::Preallocation::Off);
    let error = image.resize_with(&request).expect_err("refused");
    assert_eq!(error.to_string(), "Image format driver does not support resize");
}

/// The image of [`four`] with a dirty bitmap of 512 bytes per bit: bits 1, 2 and 8 are set.
fn with_bitmap(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = four();
    let mut cluster = vec![0; 4096];
    let put = |cluster: &mut [u8], at: usize, number: u64| {
        cluster[at..at + 8].copy_from_slice(&number.to_le_bytes());
    };
    put(&mut cluster, 0, 0xab23_4cef_23dc_ea87);
    put(&mut cluster, 24, 0x2038_5fae_252c_b34a);
    put(&mut cluster, 40, 40);
    put(&mut cluster, 48, 32);
    cluster[56..72].copy_from_slice(&[0xab; 16]);
    put(&mut cluster, 72, 1 | 1 << 32);
    put(&mut cluster, 80, 48);
    change(&mut cluster);
    let sum = HashAlg::Md5.digest(&[&cluster[24..]]);
    cluster[8..24].copy_from_slice(&sum);
    bytes.extend(cluster);
    bytes.extend([0b110, 1]);
    bytes.resize(7 * 4096, 0);
    bytes[EXT_OFF] = 40;
    bytes
}

#[test]
fn dirty_bitmaps_are_read() {
    let name = "abababab-abab-abab-abab-abababababab";
    let ranges = |entry: Option<u64>| {
        let bytes = with_bitmap(|cluster| {
            if let Some(entry) = entry {
                cluster[80..88].copy_from_slice(&entry.to_le_bytes());
            }
        });
        let layer = read_only(&bytes).expect("opens");
        let bitmaps: &dyn Bitmaps = layer.bitmaps().expect("has one");
        let info = bitmaps.list().expect("a list").remove(0);
        assert_eq!(&*info.name, name);
        assert_eq!(info.granularity, 512);
        assert!(bitmaps.remove(name).is_err() && bitmaps.marked("x", &mut |_| Ok(())).is_err());
        let mut marked = Vec::new();
        let outcome = bitmaps.marked(name, &mut |range| {
            marked.push((range.start(), range.end()));
            Ok(())
        });
        outcome.map(|()| marked)
    };
    assert_eq!(ranges(None).expect("readable"), [(512, 1536), (4096, 4608)]);
    assert_eq!(ranges(Some(0)).expect("readable"), []);
    assert_eq!(ranges(Some(1)).expect("readable"), [(0, 4 * CLUSTER)]);
    assert!(ranges(Some(1 << 40)).is_err());
    assert!(ranges(Some(u64::MAX)).is_err());
}

#[test]
fn damaged_extensions_are_refused() {
    let message = |at: usize, value: u64| {
        let bytes = with_bitmap(|cluster| cluster[at..at + 8].copy_from_slice(&value.to_le_bytes()));
        read_only(&bytes).map(drop).map_err(|error| error.to_string())
    };
    for (at, value, expected) in [
        (24, 0x1234, "Unknown feature: 0x1234"),
        (32, 1, "Flags for extension feature are unsupported"),
        (
            40,
            8,
            "Too small Bitmap Feature area in Parallels Format Extension: 8 bytes, expected at least 32 bytes",
        ),
        (
            40,
            0xffff_ffff,
            "Feature data_size exceedes Format Extension cluster",
        ),
        (
            48,
            5,
            "Bitmap size (in sectors) 5 differs from disk size in sectors 32",
        ),
        (
            72,
            3 | 1 << 32,
            "Bitmap granularity (in sectors) 3 is no power of two up to 4194304",
        ),
        (
            72,
            1,
            "Bitmap table size 0 does not correspond to bitmap size and cluster size. Expected 1",
        ),
        (
            72,
            1 | 2 << 32,
            "Bitmaps feature corrupted: l1 table exceeds extension data_size",
        ),
    ] {
        assert_eq!(message(at, value), Err(expected.to_owned()));
    }
    let mut bytes = with_bitmap(|_| ());
    bytes[5 * 4096 + 100] = 1;
    assert_eq!(
        read_only(&bytes).expect_err("refused").to_string(),
        "Wrong checksum in Format Extension header. Format extension is corrupted."
    );
}

#[test]
fn an_image_that_is_written_to_loses_its_bitmaps() {
    let file = memory(&with_bitmap(|_| ()));
    let image = open(Arc::<MemoryDevice>::clone(&file));
    assert_eq!(
        image.layer().notes(),
        [Note::Warning("Format Extension ignored in RW mode".to_owned())]
    );
    assert!(image.layer().bitmaps().is_none());
    image.flush().expect("flushes");
    assert_eq!(file.contents()[EXT_OFF], 40, "not as long as nothing changes");
    image.write_at(&[9; 512], 0).expect("writes");
    image.flush().expect("flushes");
    assert_eq!(file.contents()[EXT_OFF], 0);
    assert!(is_clean(&file.contents()));
}

#[test]
fn a_crash_leaves_leaks_at_worst_and_says_so() {
    let start = four();
    let mut start = start.clone();
    // A disk of 12 clusters: the bytes in front of the data have room for the table.
    start[32] = 12;
    start[36] = 12 * 8;
    let journal: Arc<Journal> = Arc::default();
    let image = open(Arc::new(RecordingDevice::new(start.clone(), 0, &journal)));
    let mut states = vec![(0, contents(&image))];
    let steps = [
        (6, 2, 5),
        (1, 1, 0),
        (9, 1, 6),
        (0, 2, 7),
        (6, 1, 0),
        (10, 2, 8),
        (3, 1, 9),
    ]
    .map(|(at, len, byte)| (at * CLUSTER, len * CLUSTER, byte));
    let write = |image: &Image, offset: u64, bytes: &[u8]| image.write_at(bytes, offset);
    fill_in_steps(&image, &steps, write, |state| states.push((journal.len(), state)));
    let (mut marked, mut leaking) = (0, 0);
    let count = journal.crashes(&[start], 12, 0x5eed, |crash| {
        let bytes = &crash.files[0];
        let moment = format!("at {} ({})", crash.position, crash.kept);
        let layer = read_only(bytes).expect("opens");
        let (report, lines) = check(&*layer, Repair::No);
        let in_use = bytes[IN_USE..IN_USE + 4] != [0; 4];
        assert_eq!(report.corruptions, u64::from(in_use), "{moment}: {lines:?}");
        marked += u32::from(in_use);
        leaking += u32::from(report.leaks > 0);
        let now = contents(&Image::new(layer, None, "test", false));
        require_a_state_around(&states, crash, &now);
        // The image can be opened for writing again.
        let file = memory(bytes);
        open(Arc::<MemoryDevice>::clone(&file)).flush().expect("flushes");
        assert!(is_clean(&file.contents()) || report.leaks > 0, "{moment}");
    });
    assert!(count > 50 && marked > 10 && leaking > 0, "{count} crashes");
}

#[test]
fn a_failed_request_leaves_the_image_as_it_was_or_done() {
    let before = create(SMALL, SIZE).expect("creates");
    for after in 0.. {
        let file = memory(&before);
        let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&file)));
        let image = open(Arc::<FaultyDevice>::clone(&faulty));
        image.write_at(&[1; 4096], 0).expect("writes");
        image.flush().expect("flushes");
        faulty.arm(Fault::once(after));
        let outcomes = [
            image.write_at(&[2; 4096], 2 * CLUSTER),
            image.flush(),
            image.write_zeroes(ByteRange::at(0, CLUSTER), ZeroMode::Unmap),
            image.write_at(&[3; 4096], 4 * CLUSTER),
        ];
        let failed = faulty.disarm();
        image.flush().expect("flushes");
        let bytes = file.contents();
        let report = check(&*read_only(&bytes).expect("opens"), Repair::No).0;
        assert_eq!(report.corruptions, 0, "after {after}");
        let content = contents(&open(file));
        for (at, before, byte, outcome) in [
            (0, 1, 0, &outcomes[2]),
            (2, 0, 2, &outcomes[0]),
            (4, 0, 3, &outcomes[3]),
        ] {
            let found = content[at * 4096];
            assert!(
                found == byte || (outcome.is_err() && found == before),
                "after {after}: {at}"
            );
        }
        if failed == 0 {
            assert!(after > 10 && outcomes.iter().all(Result::is_ok));
            break;
        }
    }
}

#[test]
fn threads_that_write_and_zero_do_not_use_each_others_slots() {
    const EACH: u64 = 8;
    let file = memory(&create(SMALL, 4 * EACH * CLUSTER).expect("creates"));
    let image = open(Arc::<MemoryDevice>::clone(&file));
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let image = &image;
            scope.spawn(move || {
                let start = u64::from(thread) * EACH * CLUSTER;
                for round in 0..60_u8 {
                    let at = start + u64::from(round) * 5 % EACH * CLUSTER;
                    if round % 3 == 2 {
                        image
                            .write_zeroes(ByteRange::at(at, CLUSTER), ZeroMode::Unmap)
                            .expect("zeroes");
                    } else {
                        image.write_at(&[thread + 1; 4096], at).expect("writes");
                        let mut bytes = [0; 4096];
                        image.read_at(&mut bytes, at).expect("reads");
                        assert_eq!(bytes, [thread + 1; 4096]);
                    }
                    if round % 7 == 0 {
                        image.flush().expect("flushes");
                    }
                }
            });
        }
    });
    image.flush().expect("flushes");
    let content = contents(&image);
    for thread in 0..4 {
        for cluster in 0..8 {
            let at = (thread * 8 + cluster) * 4096;
            let found = &content[at..at + 4096];
            let byte = u8::try_from(thread + 1).expect("small");
            assert!(found.iter().all(|other| *other == found[0]) && (found[0] == byte || found[0] == 0));
        }
    }
    let report = check(&*read_only(&file.contents()).expect("opens"), Repair::No).0;
    assert_eq!(report.corruptions, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn damage_ends_in_errors_or_answers(
        kind in 0..3,
        // Not the cluster size at offset 28: the file in memory would grow to the size of a cluster.
        damage in prop::collection::vec((32..128_usize, any::<u8>()), 0..8),
        further in prop::collection::vec((20_480..20_600_usize, any::<u8>()), 0..3),
        cut in 0..30_000_usize,
    ) {
        let mut bytes = match kind {
            0 => four(),
            1 => old(9),
            _ => with_bitmap(|_| ()),
        };
        for (at, byte) in damage.into_iter().chain(further) {
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut / 2));
        for write in [false, true] {
            let Ok(image) = testing::open(&Parallels, memory(&bytes), write) else { continue };
            let whole = ByteRange::new(0, image.len());
            if !whole.is_empty() {
                let _ = image.status(whole, StatusDetail::Zeroes);
                let _ = image.read_at(&mut [0; 512], 0);
                let _ = image.write_at(&[1; 512], image.len() - 512);
                let _ = image.write_zeroes(whole.first(1 << 20), ZeroMode::Unmap);
            }
            let _ = image.flush();
            let _ = image.layer().check(Repair::No, &Progress::none());
        }
        if let Ok(layer) = open_layer(memory(&bytes), true, true, &mut NodeOptions::new()) {
            let _ = layer.check(Repair::All, &Progress::none());
        }
    }
}

#[test]
fn a_file_is_as_long_as_was_measured() {
    let mut options = Options::new(<dyn Format>::create_options(&Parallels));
    options.parse(SMALL).expect("valid options");
    let measured = |source: MeasureSource<'_>| {
        let measure = Parallels.measure(&options, source, &Objects::new());
        measure.expect("measures")
    };
    let size = 10 * CLUSTER - 512;
    let file = memory(&create(SMALL, size).expect("creates"));
    let empty = measured(MeasureSource::Size(size));
    assert_eq!(empty.required, file.len());
    let image = open(Arc::<MemoryDevice>::clone(&file));
    image.write_at(&[1; 5000], 3 * CLUSTER).expect("writes");
    image.flush().expect("flushes");
    assert_eq!(measured(MeasureSource::Image(&image)).required, file.len());
    let all = vec![2; usize::try_from(size).expect("small")];
    image.write_at(&all, 0).expect("writes");
    image.flush().expect("flushes");
    assert_eq!(empty.fully_allocated, file.len());
}

#[test]
fn a_table_that_is_too_long_is_not_repaired_in_guest_data() {
    let mut bytes = four();
    // The table overlaps the clusters, whose bytes are entries with offsets outside the image.
    bytes[32..36].copy_from_slice(&2000_u32.to_le_bytes());
    let before = read_only(&bytes).expect("opens");
    let before = contents(&Image::new(before, None, "test", false));
    let file = memory(&bytes);
    let image = open(Arc::<MemoryDevice>::clone(&file));
    assert!(image.write_at(&[9; 512], 0).is_err());
    image.flush().expect("flushes");
    drop(image);
    let after = read_only(&file.contents()).expect("opens");
    assert!(contents(&Image::new(after, None, "test", false)) == before);
}

#[test]
fn clusters_in_the_table_are_not_read() {
    let mut bytes = create(SMALL, 2000 * CLUSTER).expect("creates");
    set_entry(&mut bytes, 0, 1);
    let image = Image::new(read_only(&bytes).expect("opens"), None, "test", false);
    let error = image.read_at(&mut [0; 512], 0).expect_err("no cluster");
    assert_eq!(
        error.chain(),
        "The cluster at 0x1000 lies in the table of the image"
    );
    image.read_at(&mut [0; 512], CLUSTER).expect("another one");
}
