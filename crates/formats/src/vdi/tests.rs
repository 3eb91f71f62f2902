//! Tests against a model, with damage, crashes and faults, on images in memory.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use diskimage_core::{
    ByteRange, CheckReport, Device, Image, MemoryDevice, Preallocation, Progress, Repair, ResizeRequest,
    Result, StatusDetail, ZeroMode,
};
use diskimage_testing::{Journal, RecordingDevice};
use proptest::prelude::*;

use super::header::BLOCK;
use super::{NO_BLOCK, Vdi};
use crate::testing::{self, FailOnce, contents, follow, op};

fn create(options: &str, size: u64) -> Vec<u8> {
    testing::create(&Vdi, options, size).expect("created").contents()
}

fn open(file: Arc<dyn Device>) -> Result<Image> {
    testing::open(&Vdi, file, true)
}

fn open_bytes(bytes: &[u8]) -> Result<Image> {
    open(Arc::new(MemoryDevice::new(bytes.to_vec())))
}

fn check(image: &Image) -> CheckReport {
    let report = image.layer().check(Repair::No, &Progress::none());
    report.expect("checks")
}

fn grow(image: &Image, len: u64) -> Result<()> {
    image.resize_with(&ResizeRequest::new(len, Preallocation::Off))
}

/// The size of a disk whose map cannot grow in place: 128 entries fill the one sector of the map.
const FULL_MAP: u64 = 128 * BLOCK;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_image_behaves_like_a_vector(
        is_static: bool,
        ops in prop::collection::vec(op(BLOCK, (0..300_u64).prop_map(|sectors| sectors * 3000 * 512)), 1..25),
    ) {
        let options = if is_static { "static=on" } else { "" };
        let file = Arc::new(MemoryDevice::new(create(options, 4 * BLOCK + 1536)));
        // At most slightly beyond the blocks of the smallest map, so that the blocks move once.
        let model = follow(&Vdi, &file, &ops, |len, longer| {
            let longer = longer.min(130 * BLOCK);
            if is_static { longer.min(len + BLOCK) } else { longer }
        });
        let again = open(file).expect("opens");
        prop_assert_eq!(check(&again), CheckReport::default());
        prop_assert!(contents(&again) == model);
    }
}

#[test]
fn a_map_without_room_moves_the_first_blocks_away() {
    let file = Arc::new(MemoryDevice::new(create("", FULL_MAP)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    for block in [5, 0, 127] {
        let byte = u8::try_from(block + 1).expect("small");
        image.write_at(&[byte; 512], block * BLOCK).expect("writes");
    }
    grow(&image, FULL_MAP + 512).expect("grows");
    image.write_at(&[9; 512], FULL_MAP).expect("writes");
    image.flush().expect("flushes");
    let again = open(file).expect("opens");
    assert_eq!(check(&again), CheckReport::default());
    assert_eq!(again.len(), FULL_MAP + 512);
    for (at, byte) in [(5 * BLOCK, 6), (0, 1), (127 * BLOCK, 128), (FULL_MAP, 9)] {
        let mut sector = [0; 512];
        again.read_at(&mut sector, at).expect("reads");
        assert_eq!(sector, [byte; 512], "at {at:#x}");
    }
}

#[test]
fn growing_waits_for_writes_in_flight() {
    let image = open_bytes(&create("", 2 * BLOCK)).expect("opens");
    let write = image.begin_write(ByteRange::at(0, 512)).expect("is planned");
    thread::scope(|scope| {
        let growing = scope.spawn(|| grow(&image, 8 * BLOCK));
        // Long enough for growing to finish if it did not wait.
        thread::sleep(Duration::from_millis(100));
        assert!(!growing.is_finished(), "a block is in flight");
        write.finish(&[1; 512]).expect("writes");
        growing.join().expect("does not panic").expect("grows");
    });
    image.write_at(&[2; 512], BLOCK).expect("writes");
    let content = contents(&image);
    assert!(
        content[..512].iter().all(|byte| *byte == 1),
        "no other block has its slot"
    );
    image.flush().expect("flushes");
    assert_eq!(check(&image), CheckReport::default());
}

#[test]
fn growing_clears_what_lay_behind_the_disk() {
    let mut bytes = create("static=on", 512);
    let start = bytes.len() - usize::try_from(BLOCK).expect("small");
    bytes[start..].fill(7);
    let image = open_bytes(&bytes).expect("opens");
    grow(&image, 2 * BLOCK).expect("grows");
    let content = contents(&image);
    assert!(content[..512].iter().all(|byte| *byte == 7) && content[512..].iter().all(|byte| *byte == 0));
}

#[test]
fn an_empty_disk_is_one_run_however_large() {
    let image = open_bytes(&create("", 2 << 40)).expect("opens");
    let whole = ByteRange::new(0, image.len());
    let extent = image.status(whole, StatusDetail::Zeroes).expect("a status");
    assert_eq!(extent.len, 2 << 40);
    assert!(extent.kind.is_zero());
    image
        .write_zeroes(whole, ZeroMode::KeepAllocated)
        .expect("nothing to do");
    assert_eq!(
        image.status(whole, StatusDetail::Zeroes).expect("a status").len,
        2 << 40
    );
}

/// The offsets of the map and of the header's count of blocks.
const MAP: usize = 512;
const ALLOCATED: usize = 0x184;

#[test]
fn what_was_leaked_is_used_again_and_nothing_is_overwritten() {
    let file = Arc::new(MemoryDevice::new(create("", 8 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[1; 3 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let mut bytes = file.contents();
    // The block in slot 1 is leaked, and the header's count is too low.
    bytes[MAP + 4..MAP + 8].copy_from_slice(&NO_BLOCK);
    bytes[ALLOCATED] = 1;
    let file = Arc::new(MemoryDevice::new(bytes));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    assert_eq!(check(&image).corruptions, 1);
    image.write_at(&[2; 512], 5 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    let again = open_bytes(&file.contents()).expect("opens");
    assert_eq!(check(&again), CheckReport::default());
    let content = contents(&again);
    let mut expected = vec![0; content.len()];
    let block = usize::try_from(BLOCK).expect("small");
    expected[..block].fill(1);
    expected[2 * block..3 * block].fill(1);
    expected[5 * block..5 * block + 512].fill(2);
    assert!(content == expected);
}

#[test]
fn damaged_headers_are_refused() {
    let good = create("", 4 * BLOCK);
    for (offset, bytes, message) in [
        (0x40, &[0][..], "Image not in VDI format (bad signature beda1000)"),
        (0x44, &[2], "unsupported VDI image (version 1.2)"),
        (
            0x154,
            &[1],
            "unsupported VDI image (unaligned block map offset 0x201)",
        ),
        (0x158, &[1], "unsupported VDI image (unaligned data offset 0x401)"),
        (0x168, &[1], "unsupported VDI image (sector size 513 is not 512)"),
        (
            0x178,
            &[1],
            "unsupported VDI image (block size 1048577 is not 1048576)",
        ),
        (
            0x170,
            &[0xff; 8],
            "Unsupported VDI image size (size is 0xffffffffffffffff, max supported is 0x1fffff8000000)",
        ),
        (
            0x180,
            &[3],
            "unsupported VDI image (disk size 4194304, image bitmap has room for 3145728)",
        ),
        (
            0x180,
            &[0xff; 4],
            "unsupported VDI image (too many blocks 4294967295, max is 536870784)",
        ),
        (0x1a8, &[1], "unsupported VDI image (non-NULL link UUID)"),
        (0x1b8, &[1], "unsupported VDI image (non-NULL parent UUID)"),
        (
            0x48,
            &[0x7f],
            "unsupported VDI image (header of 383 bytes, at least 384 are needed)",
        ),
        (0x4c, &[0], "unsupported VDI image (image type 0)"),
        (
            0x4c,
            &[3],
            "unsupported VDI image (undo image, its parent would be needed)",
        ),
        (
            0x4c,
            &[4],
            "unsupported VDI image (differencing image, its parent would be needed)",
        ),
        (0x4c, &[5], "unsupported VDI image (image type 5)"),
        (
            0x17d,
            &[2],
            "unsupported VDI image (512 bytes of extra data per block)",
        ),
    ] {
        let mut bad = good.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        let error = open_bytes(&bad).expect_err("refused");
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn a_map_beyond_the_end_of_the_file_is_reported_but_not_used() {
    let mut bytes = create("", 0);
    // The largest disk.
    bytes[0x170..0x178].copy_from_slice(&0x1_ffff_f800_0000_u64.to_le_bytes());
    bytes[0x180..0x184].copy_from_slice(&0x1fff_ff80_u32.to_le_bytes());
    let image = open_bytes(&bytes).expect("opens");
    assert_eq!(image.len(), 0x1_ffff_f800_0000);
    assert!(image.read_at(&mut [0; 512], 0).is_err() && image.write_at(&[0; 512], 0).is_err());
    assert!(image.layer().check(Repair::No, &Progress::none()).is_err());
    assert!(grow(&image, image.len()).is_err());
}

#[test]
fn blocks_beyond_the_end_of_the_file_cannot_be_read_or_moved_onto() {
    let mut bytes = create("", 4 * BLOCK);
    bytes[MAP] = 77;
    bytes[MAP + 1..MAP + 4].fill(0);
    let image = open_bytes(&bytes).expect("opens");
    assert!(image.read_at(&mut [0; 512], 0).is_err());
    assert_eq!(check(&image).corruptions, 1);
}

#[test]
fn a_slot_of_two_blocks_is_reported_with_both_blocks() {
    let mut bytes = create("static=on", 4 * BLOCK);
    for (block, slot) in [(1, 0_u32), (2, 3), (3, 0)] {
        bytes[MAP + block * 4..][..4].copy_from_slice(&slot.to_le_bytes());
    }
    let lines = std::sync::Mutex::new(Vec::new());
    let note = |note: &diskimage_core::Note| lines.lock().expect("one thread").push(note.clone());
    let report = open_bytes(&bytes)
        .expect("opens")
        .layer()
        .check(Repair::No, &Progress::none().with_notes(&note))
        .expect("checks");
    assert_eq!(report.corruptions, 2);
    let line = |text: &str| diskimage_core::Note::Line(text.to_owned());
    assert_eq!(
        lines.into_inner().expect("one thread"),
        [
            line("ERROR: block index 1 also used by 0"),
            line("ERROR: block index 3 also used by 0")
        ]
    );
}

/// Writes and growth, with the contents that the disk may have at each moment of the journal.
#[test]
fn a_crash_leaves_what_was_flushed_and_no_damage() {
    let size = 127 * BLOCK;
    let before = {
        let file = Arc::new(MemoryDevice::new(create("", size)));
        let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
        image.write_at(&[1; 4096], 0).expect("writes");
        image.write_at(&[2; 4096], 3 * BLOCK).expect("writes");
        image.flush().expect("flushes");
        file.contents()
    };
    let journal: Arc<Journal> = Arc::default();
    let image = open(Arc::new(RecordingDevice::new(before.clone(), 0, &journal))).expect("opens");
    image.write_at(&[3; 4096], 5 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    let flushed = journal.len();
    grow(&image, 128 * BLOCK).expect("grows in place");
    grow(&image, 140 * BLOCK).expect("grows with a longer map");
    image.write_at(&[4; 4096], 139 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    let done = journal.len();
    let mut sizes = std::collections::BTreeSet::new();
    let count = journal.crashes(&[before], 4, 0x5eed, |crash| {
        let moment = format!("at {} ({})", crash.position, crash.kept);
        let image = open_bytes(&crash.files[0]).expect(&moment);
        let sector = |at: u64| {
            let mut sector = [0; 512];
            image.read_at(&mut sector, at).expect("reads");
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "{moment}: {at:#x} {sector:?}"
            );
            sector[0]
        };
        assert_eq!(sector(0), 1, "{moment}");
        assert_eq!(sector(3 * BLOCK), 2, "{moment}");
        let new = sector(5 * BLOCK);
        assert!(new == 3 || (new == 0 && crash.position < flushed), "{moment}");
        if image.len() == 140 * BLOCK {
            let last = sector(139 * BLOCK);
            assert!(last == 4 || (last == 0 && crash.position < done), "{moment}");
        }
        // The header counts too many blocks at worst, and no two blocks share a slot.
        assert!(check(&image).corruptions <= 1, "{moment}");
        let counted = u32::from_le_bytes(*crash.files[0][ALLOCATED..].first_chunk().expect("a header"));
        assert!(counted >= 2, "{moment}");
        sizes.insert(image.len() / BLOCK);
    });
    assert!(count > 40, "{count} crashes");
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [127, 128, 140]);
}

#[test]
fn a_failed_request_leaves_the_image_as_it_was_or_done() {
    let test = FailOnce {
        format: &Vdi,
        before: create("", 128 * BLOCK),
        block: BLOCK,
        written: [2, 4],
        grown: 129 * BLOCK,
    };
    let requests = test.run(|image, after| assert_eq!(check(image).corruptions, 0, "after {after}"));
    assert!(requests > 10, "{requests} requests");
}

#[test]
fn nothing_is_written_where_something_else_is() {
    let file = Arc::new(MemoryDevice::new(create("", 8 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[1; 2 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let good = file.contents();
    // The offset of the map, the offset of the data, an entry of the map.
    for (at, number, is_read) in [
        (0x154, 0_u32, false),
        (0x158, 0, false),
        (0x158, 512, false),
        (MAP, 1, true),
        (MAP, 5, false),
        (MAP, 0x00ff_ffff, false),
    ] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&number.to_le_bytes());
        let file = Arc::new(MemoryDevice::new(bad.clone()));
        let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
        assert_eq!(
            image.read_at(&mut [0; 512], 0).is_ok(),
            is_read,
            "{number} at {at:#x}"
        );
        assert!(image.write_at(&[2; 512], 0).is_err(), "{number} at {at:#x}");
        let zeroed = image.write_zeroes(ByteRange::at(0, BLOCK), ZeroMode::Unmap);
        assert!(zeroed.is_err(), "{number} at {at:#x}");
        image.flush().expect("flushes");
        assert!(file.contents() == bad, "{number} at {at:#x}");
    }
}

#[test]
fn a_file_that_was_cut_off_is_not_made_longer() {
    let file = Arc::new(MemoryDevice::new(create("", 8 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[1; 3 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let mut bytes = file.contents();
    bytes.truncate(1024 + (2 << 20));
    let file = Arc::new(MemoryDevice::new(bytes.clone()));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    let errors = [image.write_at(&[2; 512], 5 * BLOCK), grow(&image, 1000 * BLOCK)];
    for error in errors {
        assert_eq!(
            error.expect_err("refused").chain(),
            "Bytes at offset 0x200400 are missing: 'memory' ends at 0x200400 and looks cut off"
        );
    }
    image.read_at(&mut [0; 512], BLOCK).expect("is there");
    assert!(file.contents() == bytes);
}

#[test]
fn new_blocks_stay_clear_of_a_map_behind_others() {
    // The map of an image without data overlaps the second slot.
    let mut bytes = create("", 4 * BLOCK);
    let map = bytes[MAP..MAP + 512].to_vec();
    let offset = 1024 + (1 << 20) + 512;
    bytes.resize(offset + 512, 0);
    bytes[offset..].copy_from_slice(&map);
    bytes[0x154..0x158].copy_from_slice(&u32::try_from(offset).expect("small").to_le_bytes());
    let file = Arc::new(MemoryDevice::new(bytes));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[9; 3 << 20], 0).expect("writes");
    image
        .write_at(&[9; 512], 3 * BLOCK)
        .expect_err("the slot overlaps the map");
    image.flush().expect("flushes");
    let again = open_bytes(&file.contents()).expect("opens");
    assert!(contents(&again)[..3 << 20] == [9; 3 << 20]);
}
