//! Tests against a model, with damage, crashes and faults, on images in memory.

use std::sync::Arc;

use diskimage_core::{
    BackingIdentity, ByteRange, Device, Format, Image, LOOSE, MemoryDevice, Preallocation, Probe,
    ResizeRequest, Result, StatusDetail, ZeroMode,
};
use diskimage_testing::{Journal, RecordingDevice, SparseBlock, VhdImage, VhdParent, open_image, overlay};
use proptest::prelude::*;

use super::Vpc;
use super::footer::{Footer, Kind};
use super::header::BLOCK as BLOCK_SIZE;
use crate::testing::{self, FailOnce, contents, follow, op};

fn create(options: &str, size: u64) -> Vec<u8> {
    testing::create(&Vpc, options, size).expect("created").contents()
}

fn open(file: Arc<dyn Device>) -> Result<Image> {
    testing::open(&Vpc, file, true)
}

fn open_bytes(bytes: &[u8]) -> Result<Image> {
    open(Arc::new(MemoryDevice::new(bytes.to_vec())))
}

const BLOCK: u64 = BLOCK_SIZE as u64;

fn grow(image: &Image, len: u64) -> Result<()> {
    image.resize_with(&ResizeRequest::new(len, Preallocation::Off))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_image_behaves_like_a_vector(
        is_fixed: bool,
        ops in prop::collection::vec(op(BLOCK, (0..300_u64).prop_map(|sectors| sectors * 3000 * 512)), 1..25),
    ) {
        let options = if is_fixed { "subformat=fixed,force_size=on" } else { "force_size=on" };
        let file = Arc::new(MemoryDevice::new(create(options, 4 * BLOCK + 1536)));
        let model = follow(&Vpc, &file, &ops, |_, longer| longer.min(40 * BLOCK));
        let again = open(file).expect("opens");
        prop_assert!(contents(&again) == model);
    }
}

#[test]
fn geometries_are_those_of_the_specification() {
    for (size, sectors, exact) in [
        (0, 0, false),
        (1, 68, false),
        (10 << 20, 20_536, false),
        (504 << 20, 1_032_192, false),
        (1 << 30, 2_097_648, false),
        (16 << 30, 33_555_312, false),
        (127 << 30, 266_338_320, false),
        (128 << 30, 268_435_456, false),
        (2040 << 30, 4_278_190_080, false),
        (10 << 20, 20_480, true),
    ] {
        let footer = Footer::new(size, Kind::Fixed, exact).expect("small enough");
        let len = footer.size(super::SizeBy::CurrentSize).expect("small enough");
        assert_eq!(len, sectors * 512, "{size:#x}");
        assert_eq!(footer.size(super::SizeBy::Creator).expect("small enough"), len);
    }
    assert!(Footer::new((2040 << 30) + 1, Kind::Fixed, false).is_err());
}

#[test]
fn a_table_without_room_moves_to_the_end() {
    let file = Arc::new(MemoryDevice::new(create("force_size=on", 3 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[1; 512], 2 * BLOCK).expect("writes");
    image.write_at(&[2; 512], 0).expect("writes");
    grow(&image, 1000 * BLOCK + 512).expect("grows");
    image.write_at(&[3; 512], 1000 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    let again = open_bytes(&file.contents()).expect("opens");
    assert_eq!(again.len(), 1000 * BLOCK + 512);
    for (at, byte) in [(2 * BLOCK, 1), (0, 2), (1000 * BLOCK, 3), (500 * BLOCK, 0)] {
        let mut sector = [0; 512];
        again.read_at(&mut sector, at).expect("reads");
        assert_eq!(sector, [byte; 512], "at {at:#x}");
    }
    // The copy at the start equals the footer at the end.
    let bytes = file.contents();
    assert_eq!(bytes[..512], bytes[bytes.len() - 512..]);
}

#[test]
fn an_empty_disk_is_one_run_however_large() {
    let image = open_bytes(&create("", 2040 << 30)).expect("opens");
    let whole = ByteRange::new(0, image.len());
    let extent = image.status(whole, StatusDetail::Zeroes).expect("a status");
    assert_eq!(extent.len, 2040 << 30);
    assert!(extent.kind.is_zero());
    image
        .write_zeroes(whole, ZeroMode::KeepAllocated)
        .expect("nothing to do");
    assert_eq!(
        image.status(whole, StatusDetail::Zeroes).expect("a status").len,
        2040 << 30
    );
}

/// Recomputes the checksum at `at` of a footer (512 bytes, at 64) or header (1024 bytes, at 36).
fn sum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

#[test]
fn damaged_headers_are_refused() {
    let good = create("force_size=on", 4 * BLOCK);
    let truncated =
        "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.";
    for (offset, bytes, message) in [
        (64, &[0][..], "Incorrect header checksum"),
        (16, &[0xff], "Error reading dynamic VHD header"),
        (
            16,
            &[0x7f, 0xff, 0xff, 0xff, 0xc0],
            "Error reading dynamic VHD header",
        ),
        (22, &[4], "Invalid header magic"),
        (60, &[0, 0, 0, 4], "The image does not say where its parent is"),
        (0x32, &[0xff, 0xff], "File too large"),
        (512, &[0], "Invalid header magic"),
        (512 + 0x1c, &[0, 0, 0, 3], "Page table too small"),
        (512 + 0x1c, &[0xff; 4], "Max Table Entries too large (-1)"),
        (512 + 0x1c, &[0x0f], truncated),
        (512 + 0x20, &[0, 0x30, 0, 0], "Invalid block size 3145728"),
        (512 + 0x20, &[0, 0, 1, 0], "Invalid block size 256"),
        (512 + 0x10, &[0xff], "Error reading pagetable"),
        (
            512 + 0x10,
            &[0x7f, 0xff, 0xff, 0xff, 0xc0],
            "Error reading pagetable",
        ),
        (512 + 0x10, &[0x7f], truncated),
        (0x600, &[0, 1, 0, 0], truncated),
    ] {
        let mut bad = good.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        if offset < 512 && offset != 64 {
            sum(&mut bad[..512], 64);
        }
        let error = open_bytes(&bad).expect_err("refused");
        let innermost = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        assert_eq!(
            innermost.last().map(ToString::to_string).as_deref(),
            Some(message)
        );
    }
    assert!(open_bytes(&[]).is_err() && open_bytes(&good[..400]).is_err());
}

#[test]
fn blocks_in_the_tables_cannot_be_written() {
    let file = Arc::new(MemoryDevice::new(create("force_size=on", 4 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[1; 512], 0).expect("writes");
    image.flush().expect("flushes");
    let mut bytes = file.contents();
    bytes[0x604..0x608].copy_from_slice(&1_u32.to_be_bytes());
    let image = open_bytes(&bytes).expect("opens");
    assert_eq!(
        image.write_at(&[1; 512], BLOCK).expect_err("refused").to_string(),
        "The block at 0x200 lies in the header of the image"
    );
    image.write_at(&[1; 512], 0).expect("another block");
}

#[test]
fn a_crash_leaves_what_was_flushed() {
    for options in ["force_size=on", "force_size=on,subformat=fixed"] {
        let before = {
            let file = Arc::new(MemoryDevice::new(create(options, 2 * BLOCK)));
            let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
            image.write_at(&[1; 4096], BLOCK).expect("writes");
            image.flush().expect("flushes");
            file.contents()
        };
        let journal: Arc<Journal> = Arc::default();
        let image = open(Arc::new(RecordingDevice::new(before.clone(), 0, &journal))).expect("opens");
        image.write_at(&[3; 4096], 0).expect("writes");
        image.flush().expect("flushes");
        let flushed = journal.len();
        grow(&image, 3 * BLOCK).expect("grows");
        let far = if options.ends_with("fixed") {
            4 * BLOCK
        } else {
            300 * BLOCK
        };
        grow(&image, far).expect("grows");
        image.write_at(&[4; 4096], far - 4096).expect("writes");
        image.flush().expect("flushes");
        let done = journal.len();
        let mut sizes = std::collections::BTreeSet::new();
        journal.crashes(&[before], 2, 0x5eed, |crash| {
            let moment = format!("{options} at {} ({})", crash.position, crash.kept);
            let image = open_bytes(&crash.files[0]).unwrap_or_else(|error| panic!("{moment}: {error}"));
            let sector = |at: u64| {
                let mut sector = [0; 512];
                image.read_at(&mut sector, at).expect("reads");
                assert!(sector.iter().all(|byte| *byte == sector[0]), "{moment}: {at:#x}");
                sector[0]
            };
            assert_eq!(sector(BLOCK), 1, "{moment}");
            let new = sector(0);
            assert!(new == 3 || (new == 0 && crash.position < flushed), "{moment}");
            if image.len() == far {
                let last = sector(far - 512);
                assert!(last == 4 || (last == 0 && crash.position < done), "{moment}");
            }
            sizes.insert(image.len() / BLOCK);
        });
        assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [2, 3, far / BLOCK]);
    }
}

#[test]
fn a_failed_request_leaves_the_image_as_it_was_or_done() {
    let test = FailOnce {
        format: &Vpc,
        before: create("force_size=on", 3 * BLOCK),
        block: BLOCK,
        written: [2, 1],
        grown: 200 * BLOCK,
    };
    let requests = test.run(|_, _| ());
    assert!(requests > 8, "{requests} requests");
}

#[test]
fn new_blocks_stay_clear_of_a_header_behind_the_table() {
    let mut bytes = create("force_size=on", 4 * BLOCK);
    // Puts the header between the table and the footer.
    let footer = bytes[..512].to_vec();
    let at = bytes.len() - 512;
    bytes.truncate(at);
    bytes.extend_from_within(512..1536);
    bytes.extend_from_slice(&footer);
    bytes[16..24].copy_from_slice(&(at as u64).to_be_bytes());
    sum(&mut bytes[..512], 64);
    let file = Arc::new(MemoryDevice::new(bytes));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&vec![5; 8 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let again = open_bytes(&file.contents()).expect("opens");
    assert!(contents(&again).iter().all(|byte| *byte == 5));
}

#[test]
fn blocks_that_overlap_are_not_written_to() {
    let file = Arc::new(MemoryDevice::new(create("force_size=on", 4 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&vec![1; 6 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let mut bytes = file.contents();
    let second = u32::from_be_bytes([bytes[0x604], bytes[0x605], bytes[0x606], bytes[0x607]]);
    bytes[0x600..0x604].copy_from_slice(&(second + 8).to_be_bytes());
    let file = Arc::new(MemoryDevice::new(bytes.clone()));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    for block in [0, 1] {
        assert!(image.write_at(&[2; 512], block * BLOCK).is_err(), "block {block}");
    }
    assert!(file.contents() == bytes);
    // Block 3 has no storage: a write to it allocates, and touches none of the overlapping blocks.
    image.write_at(&[2; 512], 3 * BLOCK).expect("has no storage yet");
}

#[test]
fn a_fixed_disk_ends_before_its_footer() {
    let mut bytes = create("force_size=on,subformat=fixed", 1 << 20);
    let footer = bytes.len() - 512;
    bytes[footer + 48..footer + 56].copy_from_slice(&(2_u64 << 20).to_be_bytes());
    sum(&mut bytes[footer..], 64);
    let file = Arc::new(MemoryDevice::new(bytes.clone()));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image
        .read_at(&mut [0; 512], (1 << 20) - 512)
        .expect("the last sector");
    assert!(image.read_at(&mut [0; 512], 1 << 20).is_err());
    assert!(image.write_at(&[1; 1024], (1 << 20) - 512).is_err());
    assert!(
        image
            .write_zeroes(ByteRange::at(0, 2 << 20), ZeroMode::KeepAllocated)
            .is_err()
    );
    assert!(grow(&image, 3 << 20).is_err());
    assert!(file.contents() == bytes);
}

#[test]
fn a_dynamic_disk_without_the_copy_of_its_footer_is_read_and_gets_the_copy_before_it_changes() {
    let file = Arc::new(MemoryDevice::new(create("force_size=on", 3 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&[1; 4096], BLOCK).expect("writes");
    image.flush().expect("flushes");
    let whole = file.contents();
    let mut bytes = whole.clone();
    bytes[..512].fill(0);
    assert_eq!(
        Vpc.probe(&probe(&bytes)),
        0,
        "a dynamic disk is not recognised by its end"
    );
    let file = Arc::new(MemoryDevice::new(bytes.clone()));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    assert!(contents(&image) == contents(&open_bytes(&whole).expect("opens")));
    assert!(file.contents() == bytes, "reading changes nothing");
    let journal: Arc<Journal> = Arc::default();
    let image = open(Arc::new(RecordingDevice::new(bytes.clone(), 0, &journal))).expect("opens");
    image.write_at(&[2; 4096], 0).expect("writes");
    image.flush().expect("flushes");
    journal.crashes(&[bytes], 2, 0x5eed, |crash| {
        let image = open_bytes(&crash.files[0]).unwrap_or_else(|error| panic!("{}: {error}", crash.position));
        let mut sector = [0; 512];
        image.read_at(&mut sector, BLOCK).expect("reads");
        assert_eq!(sector, [1; 512]);
    });
}

fn probe(bytes: &[u8]) -> Probe<'_> {
    Probe {
        head: &bytes[..bytes.len().min(2048)],
        tail: &bytes[bytes.len() - 512..],
        len: bytes.len() as u64,
        name: "x",
    }
}

#[test]
fn a_fixed_disk_is_recognised_by_its_footer_if_checksum_and_size_hold() {
    let good = create("force_size=on,subformat=fixed", 1 << 20);
    assert_eq!(Vpc.probe(&probe(&good)), LOOSE);
    let footer = good.len() - 512;
    for (at, byte, sealed) in [
        (50, 1, false),
        (50, 1, true),
        (63, 3, true),
        (63, 4, true),
        (0, 0, true),
    ] {
        let mut bad = good.clone();
        bad[footer + at] = byte;
        if sealed {
            sum(&mut bad[footer..], 64);
        }
        assert_eq!(Vpc.probe(&probe(&bad)), 0, "{byte} at {at}");
    }
    let mut longer = good.clone();
    longer.splice(0..0, [0; 512]);
    assert_eq!(
        Vpc.probe(&probe(&longer)),
        0,
        "the footer does not have the size of this file"
    );
}

/// A disk of two blocks of 0x11, with stale bytes of 0x55 in the second one where its bitmap is clear: in all sectors
/// but 8 to 23, 100 and the last one. Its contents come with it.
fn with_clear_bits() -> (Vec<u8>, Vec<u8>) {
    let file = Arc::new(MemoryDevice::new(create("force_size=on", 2 * BLOCK)));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    image.write_at(&vec![0x11; 4 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let mut bytes = file.contents();
    let sector = u32::from_be_bytes([bytes[0x604], bytes[0x605], bytes[0x606], bytes[0x607]]);
    let bitmap = usize::try_from(sector).expect("small") * 512;
    let mut model = contents(&open_bytes(&bytes).expect("opens"));
    bytes[bitmap..bitmap + 512].fill(0);
    for sector in 0..4096 {
        if (8..24).contains(&sector) || [100, 4095].contains(&sector) {
            bytes[bitmap + sector / 8] |= 0x80 >> (sector % 8);
        } else {
            bytes[bitmap + 512 + sector * 512..][..512].fill(0x55);
            model[(2 << 20) + sector * 512..][..512].fill(0);
        }
    }
    (bytes, model)
}

#[test]
fn sectors_with_clear_bits_read_as_zero_until_they_are_written() {
    let (bytes, mut model) = with_clear_bits();
    let file = Arc::new(MemoryDevice::new(bytes));
    let image = open(Arc::<MemoryDevice>::clone(&file)).expect("opens");
    assert!(contents(&image) == model);
    let mut at = BLOCK;
    let mut runs = Vec::new();
    while at < 2 * BLOCK {
        let extent = image
            .status(ByteRange::new(at, 2 * BLOCK), StatusDetail::Zeroes)
            .expect("a status");
        runs.push((extent.len / 512, extent.kind.is_zero()));
        at += extent.len;
    }
    let expected = [
        (8, true),
        (16, false),
        (76, true),
        (1, false),
        (3994, true),
        (1, false),
    ];
    assert_eq!(runs, expected);
    // Parts of sectors, across both states, whole sectors, and zeroes.
    for (at, len, byte) in [
        (100, 1, 2),
        (7 * 512 + 10, 1000, 3),
        (23 * 512 + 500, 100, 4),
        (99 * 512 + 1, 1500, 5),
        (200 * 512, 1024, 6),
        (4094 * 512 + 511, 2, 7),
    ] {
        let start = (2 << 20) + at;
        model[start..start + len].fill(byte);
        image
            .write_at(&model[start..start + len], start as u64)
            .expect("writes");
        assert!(contents(&image) == model, "after {at}");
    }
    let zeroes = ByteRange::at(BLOCK + 90 * 512, 20 * 512);
    model[(2 << 20) + 90 * 512..][..20 * 512].fill(0);
    image.write_zeroes(zeroes, ZeroMode::Unmap).expect("zeroes");
    assert!(contents(&image) == model);
    image.flush().expect("flushes");
    assert!(contents(&open_bytes(&file.contents()).expect("opens")) == model);
    grow(&image, 3 * BLOCK).expect("grows");
    model.resize(6 << 20, 0);
    assert!(contents(&open_bytes(&file.contents()).expect("opens")) == model);
}

#[test]
fn a_crash_never_exposes_what_a_clear_bit_hides() {
    let (bytes, model) = with_clear_bits();
    let journal: Arc<Journal> = Arc::default();
    let image = open(Arc::new(RecordingDevice::new(bytes.clone(), 0, &journal))).expect("opens");
    image
        .write_at(&[3; 1000], BLOCK + 50 * 512 + 100)
        .expect("writes");
    image.write_at(&[3; 4096], BLOCK + 1000 * 512).expect("writes");
    image.flush().expect("flushes");
    let flushed = journal.len();
    let end = contents(&image);
    let mut kept = 0;
    journal.crashes(&[bytes], 4, 0x5eed, |crash| {
        let found = contents(&open_bytes(&crash.files[0]).expect("opens"));
        for at in (0..found.len()).step_by(512) {
            let (found, before, after) = (&found[at..at + 512], &model[at..at + 512], &end[at..at + 512]);
            let is_new = found == after;
            assert!(is_new || found == before, "{} at {at:#x}", crash.position);
            assert!(
                is_new || crash.position < flushed,
                "{} at {at:#x}",
                crash.position
            );
            kept += usize::from(is_new && before != after);
        }
    });
    assert!(kept > 0);
}

/// A differencing disk on a disk with the ID that consists of ones.
fn child(blocks: &[SparseBlock]) -> VhdImage {
    VhdImage {
        unique_id: [2; 16],
        parent: Some(VhdParent {
            unique_id: [1; 16],
            locators: vec![(*b"W2ru", ".\\parent.vhd".to_owned())],
            ..VhdParent::default()
        }),
        blocks: blocks.to_vec(),
        ..VhdImage::default()
    }
}

fn block(index: u64, written: &[(std::ops::Range<u64>, u8)]) -> SparseBlock {
    SparseBlock {
        index,
        written: written.to_vec(),
        stale: 0x55,
    }
}

fn base() -> (VhdImage, Vec<u8>) {
    let base = VhdImage {
        blocks: vec![
            block(1, &[(0..4096, 0x11)]),
            block(0, &[(5..9, 0x12), (2000..3000, 0x13)]),
        ],
        ..VhdImage::default()
    };
    let mut model = vec![0; 8 << 20];
    overlay(&mut model, &base.blocks, BLOCK, 512);
    (base, model)
}

fn on_parent(file: Arc<dyn Device>, parent: &VhdImage) -> Image {
    let parent = open_bytes(&parent.build()).expect("opens");
    open_image(&Vpc, file, true, Some(Arc::new(parent))).expect("opens")
}

#[test]
fn a_differencing_disk_reads_its_written_sectors_and_the_rest_from_the_parent() {
    let (base, mut model) = base();
    let child = child(&[
        block(0, &[(0..6, 0x21), (4095..4096, 0x22)]),
        block(2, &[(7..8, 0x23)]),
    ]);
    overlay(&mut model, &child.blocks, BLOCK, 512);
    let file = Arc::new(MemoryDevice::new(child.build()));
    let image = on_parent(Arc::<MemoryDevice>::clone(&file), &base);
    assert!(contents(&image) == model);
    let depth = |at: u64| {
        let extent = image
            .status(ByteRange::at(at, 512), StatusDetail::Zeroes)
            .expect("a status");
        (extent.depth, extent.kind.is_zero())
    };
    let depths = [0, 6 * 512, 9 * 512, BLOCK, 2 * BLOCK + 7 * 512, 3 * BLOCK].map(depth);
    let expected = [
        (0, false),
        (1, false),
        (1, true),
        (1, false),
        (0, false),
        (1, true),
    ];
    assert_eq!(depths, expected);
    assert_eq!(image.layer().backing().expect("named").name.text(), "parent.vhd");
    // Writes of parts of sectors, to blocks with and without storage, and zeroes.
    for (at, len, byte) in [
        (100, 7, 2),
        (4000, 6000, 3),
        (6 << 20, 1, 4),
        ((4 << 20) + 100, 5000, 5),
    ] {
        model[at..at + len].fill(byte);
        image.write_at(&model[at..at + len], at as u64).expect("writes");
        assert!(contents(&image) == model, "after {at}");
    }
    let zeroes = ByteRange::at((2 << 20) - 1000, 3000);
    model[(2 << 20) - 1000..(2 << 20) + 2000].fill(0);
    image.write_zeroes(zeroes, ZeroMode::Unmap).expect("zeroes");
    assert!(contents(&image) == model);
    image.flush().expect("flushes");
    let again = on_parent(Arc::new(MemoryDevice::new(file.contents())), &base);
    assert!(contents(&again) == model);
    assert!(grow(&image, 9 << 20).is_err(), "has the size of its parent");
}

#[test]
fn the_paths_of_the_parent_are_not_overwritten_by_the_first_block() {
    let (base, mut model) = base();
    let file = Arc::new(MemoryDevice::new(child(&[]).build()));
    let image = on_parent(Arc::<MemoryDevice>::clone(&file), &base);
    image.write_at(&[7; 512], 3 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    model[6 << 20..][..512].fill(7);
    let again = on_parent(Arc::new(MemoryDevice::new(file.contents())), &base);
    assert!(contents(&again) == model);
    assert_eq!(again.layer().backing().expect("named").name.text(), "parent.vhd");
}

#[test]
fn a_crash_leaves_each_sector_of_a_differencing_disk_old_or_new() {
    let (base, _) = base();
    let bytes = child(&[block(0, &[(0..6, 0x21)])]).build();
    let before = contents(&on_parent(Arc::new(MemoryDevice::new(bytes.clone())), &base));
    let journal: Arc<Journal> = Arc::default();
    let image = on_parent(Arc::new(RecordingDevice::new(bytes.clone(), 0, &journal)), &base);
    image.write_at(&[3; 1024], BLOCK + 512).expect("writes");
    image.write_at(&[3; 1024], 10 * 512).expect("writes");
    image.flush().expect("flushes");
    let flushed = journal.len();
    let after = contents(&image);
    journal.crashes(&[bytes], 4, 0x5eed, |crash| {
        let file = Arc::new(MemoryDevice::new(crash.files[0].clone()));
        let found = contents(&on_parent(file, &base));
        for at in (0..found.len()).step_by(512) {
            let is_new = found[at..at + 512] == after[at..at + 512];
            let is_old = found[at..at + 512] == before[at..at + 512];
            let moment = format!("{} at {at:#x}", crash.position);
            assert!(is_new || (is_old && crash.position < flushed), "{moment}");
        }
    });
}

#[test]
fn a_parent_with_another_identity_is_refused_with_both() {
    let image = open_bytes(&child(&[]).build()).expect("opens");
    let check = |parent: &VhdImage| {
        let parent = open_bytes(&parent.build()).expect("opens");
        let identity = image.layer().check_backing(&**parent.layer());
        identity.map_err(|error| error.chain())
    };
    assert!(matches!(
        check(&VhdImage::default()),
        Ok(BackingIdentity::Recorded)
    ));
    let other = VhdImage {
        unique_id: [0xab; 16],
        ..VhdImage::default()
    };
    assert_eq!(
        check(&other).expect_err("another one"),
        "The parent has the unique ID abababab-abab-abab-abab-abababababab, but the image was created on the one with \
         01010101-0101-0101-0101-010101010101"
    );
    let mut timed = child(&[]);
    timed.parent.as_mut().expect("has one").time_stamp = 77;
    let image = open_bytes(&timed.build()).expect("opens");
    let parent = open_bytes(&VhdImage::default().build()).expect("opens");
    let identity = image.layer().check_backing(&**parent.layer());
    let Ok(BackingIdentity::MayHaveChanged(note)) = identity else {
        panic!("the ID is right, the time is another one: {identity:?}");
    };
    let text = note.text();
    assert!(text.contains("1000") && text.contains("77"), "{text}");
}

#[test]
fn a_guest_does_not_turn_its_fixed_disk_into_a_differencing_one() {
    let mut bytes = create("force_size=on,subformat=fixed", 4 << 20);
    let fake = child(&[]).build();
    bytes[..fake.len() - 512].copy_from_slice(&fake[..fake.len() - 512]);
    let image = open_bytes(&bytes).expect("opens");
    assert_eq!(image.len(), 4 << 20);
    assert_eq!(image.layer().backing(), None);
}
