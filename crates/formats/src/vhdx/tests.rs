//! Tests against a model, with damage, crashes and faults, on images in memory.

use std::sync::Arc;

use diskimage_core::{
    BackingIdentity, ByteRange, CheckReport, Device, Format, Image, MemoryDevice, Preallocation, Probe,
    Progress, Repair, Result, StatusDetail,
};
use diskimage_testing::{
    FULLY_PRESENT, Fault, FaultyDevice, Journal, PARTIALLY_PRESENT, RecordingDevice, SparseBlock, VhdxImage,
    guid, overlay,
};
use proptest::prelude::*;

use super::Vhdx;
use super::header::{HEADERS, Header, MIB};
use crate::testing::{self, contents, follow, op, open, use_damaged};

const BLOCK: u64 = MIB;

fn create(options: &str, size: u64) -> Vec<u8> {
    testing::create(&Vhdx, options, size).expect("created").contents()
}

fn on(bytes: &[u8]) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(bytes.to_vec()))
}

fn open_on(file: &Arc<MemoryDevice>, write: bool) -> Result<Image> {
    open(&Vhdx, Arc::<MemoryDevice>::clone(file), write)
}

fn check(image: &Image) -> CheckReport {
    image
        .layer()
        .check(Repair::No, &Progress::none())
        .expect("checks")
}

const FORMS: [&str; 3] = [
    "block_size=1M",
    "block_size=1M,block_state_zero=off",
    "block_size=1M,subformat=fixed",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_image_behaves_like_a_vector(
        form in 0..FORMS.len(),
        ops in prop::collection::vec(op(BLOCK, (0..3000_u64).prop_map(|sectors| sectors * 512)), 1..20),
    ) {
        let file = on(&create(FORMS[form], 4 * BLOCK + 1536));
        let model = follow(&Vhdx, &file, &ops, |_, longer| longer);
        let again = open_on(&file, false).expect("opens");
        prop_assert_eq!(check(&again), CheckReport::default());
        prop_assert!(contents(&again) == model);
    }

    #[test]
    fn damage_of_a_differencing_disk_never_panics(
        // Headers, the table with the entry of a sector bitmap, metadata with the parent locator.
        at in prop_oneof![
            0x20000..0x20060_usize, 0x200000..0x200040_usize, 0x208000..0x208008_usize, 0x400000..0x4000f0_usize,
            0x410000..0x410200_usize,
        ],
        bytes in prop::collection::vec(any::<u8>(), 1..9),
    ) {
        let (_, child, _, _) = differencing(512);
        let mut damaged = child.build();
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        super::header::set_checksum(&mut damaged[0x20000..0x21000]);
        // Opening may fail with any error.
        if let Ok(image) = open_on(&on(&damaged), false) {
            use_damaged(&image, false, &[MIB - 512, 4 * MIB]);
            if image.len() < 1 << 40 {
                drop(image.layer().check(Repair::No, &Progress::none()));
            }
        }
    }

    #[test]
    fn damage_never_panics(
        // Headers, region tables, log, table, metadata; checksums are recomputed, so that damaged fields are parsed.
        at in prop_oneof![
            0x10000..0x10060_usize, 0x30000..0x30060_usize, 0x200000..0x200040_usize, 0x300000..0x3000c0_usize,
            0x310000..0x310030_usize,
        ],
        bytes in prop::collection::vec(any::<u8>(), 1..9),
    ) {
        let mut damaged = create("block_size=1M", 4 * BLOCK);
        // Invalidates the second header, so that the first one is current.
        damaged[0x20000] = 0;
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        super::header::set_checksum(&mut damaged[0x10000..0x11000]);
        super::header::set_checksum(&mut damaged[0x30000..0x40000]);
        for write in [false, true] {
            // Opening may fail with any error.
            let Ok(image) = open_on(&on(&damaged), write) else { continue };
            use_damaged(&image, write, &[]);
            if image.len() < 1 << 40 {
                drop(image.layer().check(Repair::No, &Progress::none()));
            }
        }
    }
}

#[test]
fn an_empty_disk_is_one_run_however_large() {
    let image = open_on(&on(&create("", 2 << 40)), true).expect("opens");
    let whole = ByteRange::new(0, image.len());
    let extent = image.status(whole, StatusDetail::Zeroes).expect("a status");
    assert_eq!((extent.len, extent.kind.is_zero()), (2 << 40, true));
}

#[test]
fn what_is_made_is_recognised() {
    let head = &create("", MIB)[..2048];
    assert_eq!(
        Vhdx.probe(&Probe {
            head,
            tail: &[],
            len: 2048,
            name: "x"
        }),
        100
    );
}

#[test]
fn a_parent_without_a_locator_is_refused() {
    let mut bytes = create("", MIB);
    bytes[0x31_0004] = 2;
    let error = open_on(&on(&bytes), false).expect_err("has a parent");
    assert_eq!(error.chain(), "The image has a parent, but no parent locator");
}

const LINKAGE: &str = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}";

fn block(index: u64, written: &[(std::ops::Range<u64>, u8)]) -> SparseBlock {
    SparseBlock {
        index,
        written: written.to_vec(),
        stale: 0x55,
    }
}

/// A parent and a differencing disk on it, with sectors of `sector` bytes, and the contents of both.
fn differencing(sector: u32) -> (VhdxImage, VhdxImage, Vec<u8>, Vec<u8>) {
    let per_block = MIB / u64::from(sector);
    let whole = |byte| [(0..per_block, byte)];
    let base = VhdxImage {
        sector,
        data_write: guid(LINKAGE),
        blocks: vec![
            (FULLY_PRESENT, block(1, &whole(0x11))),
            (FULLY_PRESENT, block(5, &whole(0x15))),
        ],
        ..VhdxImage::default()
    };
    let child = VhdxImage {
        data_write: [2; 16],
        parent: Some(vec![
            ("parent_linkage".to_owned(), LINKAGE.to_uppercase()),
            ("relative_path".to_owned(), ".\\parent.vhdx".to_owned()),
            ("absolute_win32_path".to_owned(), "C:\\vm\\parent.vhdx".to_owned()),
        ]),
        blocks: vec![
            (
                PARTIALLY_PRESENT,
                block(
                    1,
                    &[(0..3, 0x21), (100..101, 0x22), (per_block - 1..per_block, 0x23)],
                ),
            ),
            (FULLY_PRESENT, block(3, &whole(0x24))),
            (PARTIALLY_PRESENT, block(4, &[(9..20, 0x25)])),
        ],
        // Block 5 is zero whatever the parent has.
        states: vec![(5, 2)],
        ..base.clone()
    };
    let mut below = vec![0; 8 << 20];
    let stored = |image: &VhdxImage| {
        image
            .blocks
            .iter()
            .map(|(_, block)| block.clone())
            .collect::<Vec<_>>()
    };
    overlay(&mut below, &stored(&base), MIB, sector.into());
    let mut top = below.clone();
    overlay(&mut top, &stored(&child), MIB, sector.into());
    top[5 << 20..6 << 20].fill(0);
    (base, child, below, top)
}

#[test]
fn a_differencing_disk_reads_its_sectors_and_the_rest_from_the_parent() {
    for sector in [512, 4096] {
        let (base, child, below, top) = differencing(sector);
        let parent = open_on(&on(&base.build()), false).expect("opens");
        assert!(contents(&parent) == below, "{sector}");
        let child = open_on(&on(&child.build()), false).expect("opens");
        assert_eq!(check(&child), CheckReport::default());
        let identity = child.layer().check_backing(&**parent.layer());
        assert!(
            matches!(identity, Ok(BackingIdentity::Recorded)),
            "{sector}: {identity:?}"
        );
        let chain = Image::new(Arc::clone(child.layer()), Some(Arc::new(parent)), "child", false);
        assert!(contents(&chain) == top, "{sector}");
        let depth = |at: u64| {
            let extent = chain
                .status(ByteRange::at(at, 512), StatusDetail::Zeroes)
                .expect("a status");
            (extent.depth, extent.kind.is_zero())
        };
        let depths = [MIB, MIB + 3 * u64::from(sector), 3 * MIB, 5 * MIB, 7 * MIB].map(depth);
        assert_eq!(
            depths,
            [(0, false), (1, false), (0, false), (0, true), (1, true)],
            "{sector}"
        );
    }
}

#[test]
fn a_differencing_disk_is_read_only_and_has_one_parent() {
    let (base, child, _, _) = differencing(512);
    let error = open_on(&on(&child.build()), true).expect_err("is only read");
    assert_eq!(
        error.chain(),
        "Differencing VHDX images are opened for reading only"
    );
    let image = open_on(&on(&child.build()), false).expect("opens");
    let other = VhdxImage {
        data_write: [0xab; 16],
        ..base
    };
    let other = open_on(&on(&other.build()), false).expect("opens");
    let error = image
        .layer()
        .check_backing(&**other.layer())
        .expect_err("another one");
    assert_eq!(
        error.chain(),
        format!(
            "The parent has the DataWriteGuid {{abababab-abab-abab-abab-abababababab}}, but the image was created on \
             the one with {LINKAGE}"
        )
    );
}

#[test]
fn a_missing_sector_bitmap_is_an_error_and_found_by_the_check() {
    let (_, child, _, _) = differencing(512);
    let mut bytes = child.build();
    // The entry of the first chunk's bitmap: the chunk ratio is 4096.
    let entry = (2 << 20) + 4096 * 8;
    assert_eq!(bytes[entry] & 7, 6);
    bytes[entry..entry + 8].fill(0);
    let image = open_on(&on(&bytes), false).expect("opens");
    assert_eq!(check(&image).corruptions, 2);
    assert!(image.read_at(&mut [0; 512], MIB).is_err());
    image.read_at(&mut [0; 512], 3 * MIB).expect("needs no bitmap");
}

#[test]
fn sectors_of_4096_bytes_make_longer_chunks() {
    let image = VhdxImage {
        sector: 4096,
        size: 40 << 30,
        ..VhdxImage::default()
    };
    let file = on(&image.build());
    let image = open_on(&file, true).expect("opens");
    // The blocks before and behind the entry of the first sector bitmap: the chunk ratio is 32768.
    for (block, byte) in [(32_767, 1), (32_768, 2)] {
        image.write_at(&[byte; 4096], block * MIB).expect("writes");
    }
    assert!(image.resize((40 << 30) + 512, Preallocation::Off).is_err());
    image
        .resize((40 << 30) + 4096, Preallocation::Off)
        .expect("grows");
    let again = open_on(&file, false).expect("opens");
    assert_eq!(
        (check(&again), again.len()),
        (CheckReport::default(), (40 << 30) + 4096)
    );
    for (block, byte) in [(32_767, 1), (32_768, 2), (32_766, 0), (32_769, 0)] {
        let mut sector = [9; 4096];
        again.read_at(&mut sector, block * MIB).expect("reads");
        assert_eq!(sector, [byte; 4096], "{block}");
    }
    let entry = |nth: usize| file.contents()[(2 << 20) + nth * 8] & 7;
    assert_eq!([32_767, 32_768, 32_769].map(entry), [6, 0, 6]);
}

#[test]
fn blocks_in_tables_or_beyond_the_end_are_found_and_not_written() {
    for (entry, written) in [
        (6_u64, false),
        (0x1000_0006, false),
        (0x70_0006, false),
        (0x80_0006, true),
    ] {
        let mut bytes = create("block_size=1M,subformat=fixed", 2 * BLOCK);
        bytes[0x20_0000..0x20_0008].copy_from_slice(&entry.to_le_bytes());
        let image = open_on(&on(&bytes), true).expect("opens");
        // A block may lie between the metadata and the first block: these bytes are free.
        let is_sound = written || entry == 0x70_0006;
        assert_eq!(check(&image).corruptions, u64::from(!is_sound), "{entry:#x}");
        assert_eq!(image.write_at(&[1; 512], 0).is_ok(), is_sound, "{entry:#x}");
    }
}

/// The file after a crash between the write of the log and that of the table.
fn log_left_by_a_crash() -> Vec<u8> {
    let file = on(&create("block_size=1M", 4 * BLOCK));
    let before = file.contents();
    let image = open_on(&file, true).expect("opens");
    image.write_at(&[5; 1000], 2 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    let mut after = file.contents();
    // The table is the old one, and the header still has the GUID of the log's entry.
    after[0x20_0000..0x20_1000].copy_from_slice(&before[0x20_0000..0x20_1000]);
    let device = on(&after);
    let (mut header, slot) = Header::read(&*device).expect("has one");
    header.log_guid.copy_from_slice(&after[0x10_0020..0x10_0030]);
    header.replace(&*device, slot).expect("writes");
    device.contents()
}

#[test]
fn a_log_is_replayed_in_memory_for_readers_and_in_the_file_for_writers() {
    let left = log_left_by_a_crash();
    let file = on(&left);
    let mut expected = vec![0; 4 << 20];
    expected[2 << 20..(2 << 20) + 1000].fill(5);
    let image = open_on(&file, false).expect("opens");
    assert!(contents(&image) == expected);
    assert!(file.contents() == left, "a reader writes nothing");
    let image = open_on(&file, true).expect("opens");
    assert!(contents(&image) == expected);
    let report = image
        .layer()
        .check(Repair::All, &Progress::none())
        .expect("checks");
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    let (header, _) = Header::read(&*file).expect("has one");
    assert_eq!(header.log_guid, [0; 16]);
    assert!(contents(&open_on(&file, false).expect("opens")) == expected);
}

#[test]
fn a_log_without_a_whole_entry_has_changed_nothing() {
    let mut left = log_left_by_a_crash();
    left[0x10_1000] ^= 1;
    let file = on(&left);
    for (write, repair) in [(false, Repair::No), (true, Repair::All)] {
        let image = open_on(&file, write).expect("the torn entry is none");
        assert!(contents(&image).iter().all(|byte| *byte == 0));
        let report = image.layer().check(repair, &Progress::none());
        assert_eq!(report.expect("checks"), CheckReport::default());
        let (header, _) = Header::read(&*file).expect("has one");
        assert_eq!(
            header.log_guid == [0; 16],
            write,
            "only a writer takes the name away"
        );
    }
}

#[test]
fn a_torn_header_leaves_the_other_one() {
    let mut bytes = create("", MIB);
    for offset in HEADERS {
        let offset = usize::try_from(offset).expect("small");
        bytes[offset + 100] = 1;
        let whole = open_on(&on(&bytes), false).is_ok();
        assert_eq!(whole, offset == 0x10000);
    }
}

#[test]
fn crashes_leave_what_was_flushed_and_no_damage() {
    // A disk whose table is too short for the size that it grows to.
    let size = 131_072 * BLOCK - 511 * BLOCK;
    let file = on(&create("block_size=1M,block_state_zero=off", size));
    let image = open_on(&file, true).expect("opens");
    image.write_at(&[1; 4096], 0).expect("writes");
    image.flush().expect("flushes");
    let before = file.contents();
    let journal: Arc<Journal> = Arc::default();
    let recorded: Arc<dyn Device> = Arc::new(RecordingDevice::new(before.clone(), 0, &journal));
    let image = open(&Vhdx, recorded, true).expect("opens");
    image.write_at(&[2; 4096], 5 * BLOCK).expect("writes");
    image.flush().expect("flushes");
    let flushed = journal.len();
    let grown = size + 2048 * BLOCK;
    image.resize(grown, Preallocation::Off).expect("grows");
    let done = journal.len();
    let mut sizes = std::collections::BTreeSet::new();
    let count = journal.crashes(&[before], 4, 0x5eed, |crash| {
        for write in [false, true] {
            let image = open_on(&on(&crash.files[0]), write).expect("opens after a crash");
            let first = |offset: u64| {
                let mut sector = [0; 512];
                image.read_at(&mut sector, offset).expect("reads");
                sector[0]
            };
            assert_eq!(first(0), 1);
            assert!(crash.position < flushed || first(5 * BLOCK) == 2);
            assert!(image.len() == size || image.len() == grown);
            assert!(crash.position < done || image.len() == grown);
            sizes.insert(image.len());
            assert_eq!(check(&image).corruptions, 0, "at {}", crash.position);
        }
    });
    assert_eq!(sizes.len(), 2);
    assert!(count > 50, "{count} crashes");
}

#[test]
fn faults_are_errors_and_leave_a_sound_image() {
    let before = create("block_size=1M", 4 * BLOCK);
    let mut failed = 0;
    for after in 0.. {
        let memory = on(&before);
        let below: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let faulty = Arc::new(FaultyDevice::new(below));
        let image = open(&Vhdx, Arc::<FaultyDevice>::clone(&faulty), true).expect("opens");
        faulty.arm(Fault::once(after));
        let outcome = image
            .write_at(&[1; 4096], BLOCK - 2048)
            .and_then(|()| image.flush())
            .and_then(|()| image.resize(6 * BLOCK, Preallocation::Off));
        drop(image);
        let image = open_on(&memory, true).expect("opens");
        assert_eq!(check(&image).corruptions, 0, "fault {after}");
        if outcome.is_ok() {
            assert_eq!(image.len(), 6 * BLOCK);
            break;
        }
        failed += 1;
    }
    assert!(failed > 20, "{failed} faults");
}

#[test]
fn a_write_that_finds_damage_releases_its_claims() {
    let mut bytes = create("block_size=1M", 3 * BLOCK);
    // Gives the second block a state that is not defined.
    bytes[0x20_0008] = 4;
    let image = open_on(&on(&bytes), true).expect("opens");
    let error = image
        .write_at(&vec![1; 4096], BLOCK - 2048)
        .expect_err("reaches into it");
    assert_eq!(error.chain(), "Input/output error");
    image
        .write_at(&[2; 512], 0)
        .expect("the claim on the first block is released");
    let mut sector = [0; 512];
    image.read_at(&mut sector, 0).expect("reads");
    assert_eq!(sector, [2; 512]);
}

#[test]
fn blocks_that_overlap_are_not_written_to() {
    let mut bytes = create("block_size=2M,subformat=fixed", 6 << 20);
    let first = u64::from_le_bytes(*bytes[0x20_0000..].first_chunk().expect("an entry"));
    // The second block overlaps the first one.
    bytes[0x20_0008..0x20_0010].copy_from_slice(&(first + MIB).to_le_bytes());
    let file = on(&bytes);
    let image = open_on(&file, true).expect("opens");
    for block in [0, 1] {
        let error = image.write_at(&[1; 512], block * 2 * MIB).expect_err("shared");
        assert!(error.chain().ends_with("has more than one user"), "{error}");
    }
    assert!(file.contents() == bytes);
    image.write_at(&[1; 512], 4 * MIB).expect("another one");
}

#[test]
fn a_file_that_was_cut_off_gets_no_new_blocks() {
    let file = on(&create("block_size=1M", 4 * BLOCK));
    let image = open_on(&file, true).expect("opens");
    image.write_at(&[1; 2 << 20], 0).expect("writes");
    image.flush().expect("flushes");
    let mut bytes = file.contents();
    bytes.truncate(bytes.len() - (1 << 20));
    let file = on(&bytes);
    let image = open_on(&file, true).expect("opens");
    assert!(image.write_at(&[1; 512], 3 * BLOCK).is_err());
    assert!(image.resize(8 * BLOCK, Preallocation::Off).is_err());
    assert!(file.contents() == bytes);
}

/// Adds an unknown region of a mebibyte at `offset`, which is not required, to both tables.
fn add_region(bytes: &mut [u8], offset: u64) {
    for table in [192 << 10, 256 << 10] {
        bytes[table + 8] = 3;
        let entry = table + 16 + 2 * 32;
        bytes[entry..entry + 16].fill(0xab);
        bytes[entry + 16..entry + 24].copy_from_slice(&offset.to_le_bytes());
        bytes[entry + 24..entry + 28].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        super::header::set_checksum(&mut bytes[table..table + (64 << 10)]);
    }
}

#[test]
fn unknown_regions_are_kept() {
    let size = 131_072 * BLOCK - 511 * BLOCK;
    let mut bytes = create("block_size=1M", size);
    let region = bytes.len();
    add_region(&mut bytes, region as u64);
    bytes.resize(region + (1 << 20), 0x77);
    // A block that overlaps the region is not written to.
    let mut bad = bytes.clone();
    bad[0x20_0000..0x20_0008].copy_from_slice(&(region as u64 | 6).to_le_bytes());
    let image = open_on(&on(&bad), true).expect("opens");
    assert!(image.write_at(&[1; 512], 0).is_err());
    let file = on(&bytes);
    let image = open_on(&file, true).expect("opens");
    image.write_at(&[1; 512], 0).expect("writes");
    image
        .resize(size + 2048 * BLOCK, Preallocation::Off)
        .expect("the table moves");
    drop(image);
    let after = file.contents();
    assert!(after[region..region + (1 << 20)].iter().all(|byte| *byte == 0x77));
    let (header, _) = Header::read(&*file).expect("has one");
    let regions = super::header::Regions::read(&*file, header.log).expect("has some");
    let kept: Vec<_> = regions.others.iter().map(|(range, _)| *range).collect();
    assert_eq!(kept, [ByteRange::at(region as u64, MIB)]);
}

#[test]
fn a_log_that_leads_to_the_headers_or_itself_is_refused() {
    let good = log_left_by_a_crash();
    // The offset field of the first descriptor, which comes after the entry's header.
    let at = 0x10_0000 + 64 + 16;
    for target in [0_u64, 0x1_0000, 0x2_0000, 0x10_0000, 0x1f_f000] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&target.to_le_bytes());
        let len = usize::try_from(u32::from_le_bytes(
            *bad[0x10_0008..].first_chunk().expect("a length"),
        ));
        let len = len.expect("small");
        super::header::set_checksum(&mut bad[0x10_0000..0x10_0000 + len]);
        for write in [false, true] {
            let file = on(&bad);
            let error = open_on(&file, write).expect_err("refused").chain();
            assert!(
                error.starts_with(&format!("The change at {target:#x} lies in the")),
                "{error}"
            );
            assert!(file.contents() == bad);
        }
    }
}

#[test]
fn a_log_that_damages_the_image_is_not_replayed() {
    let mut bad = log_left_by_a_crash();
    // Changes the descriptor of the table so that it overwrites the metadata.
    let at = 0x10_0000 + 64 + 16;
    bad[at..at + 8].copy_from_slice(&0x30_0000_u64.to_le_bytes());
    let len = u32::from_le_bytes(*bad[0x10_0008..].first_chunk().expect("a length"));
    let len = usize::try_from(len).expect("small");
    super::header::set_checksum(&mut bad[0x10_0000..0x10_0000 + len]);
    let file = on(&bad);
    assert!(open_on(&file, true).is_err());
    assert!(file.contents() == bad);
}
