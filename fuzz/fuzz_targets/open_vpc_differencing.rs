//! A valid differencing VHD, modified by arbitrary bytes: the fields of the footer and the header, the locators of the
//! parent with their paths, the table, and the bitmap of a block. The checksums are corrected, since no mutation would find
//! them.
#![no_main]

use std::sync::{Arc, OnceLock};

use diskimage_formats::Vpc;
use diskimage_fuzz::{change, change_parts, file_of};
use diskimage_testing::{SparseBlock, VhdImage, VhdParent};

/// The parts of the file that the input modifies, one after the other: offset and length.
const PARTS: [(u64, usize); 7] = [
    // The copy of the footer up to the disk's ID.
    (0, 84),
    // The header up to the parent's ID and its name, then the locators.
    (HEADER, 64 + 16),
    (HEADER + LOCATORS, 3 * 24),
    (TABLE, 16),
    // The paths of the locators.
    (TABLE + 512, 64),
    (TABLE + 2 * 512, 64),
    // The bitmap of the only block.
    (TABLE + 3 * 512, 64),
];

const HEADER: u64 = 512;
/// The offset of the locators in the header.
const LOCATORS: u64 = 576;
const TABLE: u64 = 1536;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    static SOUND: OnceLock<Arc<[u8]>> = OnceLock::new();
    let file = file_of(Arc::clone(SOUND.get_or_init(valid_image)));
    change_parts(&file, &PARTS, input);
    change(&file, 0, 512, |footer| fix_checksum(footer, 64));
    change(&file, HEADER, 1024, |header| fix_checksum(header, 36));
    diskimage_fuzz::exercise_on_any_parent(&Vpc, &file);
});

/// Sets the checksum of a structure, which is in the four bytes from `at` on.
fn fix_checksum(structure: &mut [u8], at: usize) {
    structure[at..at + 4].fill(0);
    let sum: u32 = structure.iter().map(|byte| u32::from(*byte)).sum();
    structure[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A disk of four blocks of 4 KiB, one of which has two sectors of its own, on a parent that two paths name.
fn valid_image() -> Arc<[u8]> {
    let image = VhdImage {
        size: 16 << 10,
        block_size: 4 << 10,
        parent: Some(VhdParent {
            unique_id: [1; 16],
            time_stamp: 1000,
            name: "base.vhd".to_owned(),
            locators: vec![
                (*b"W2ru", ".\\base.vhd".to_owned()),
                (*b"W2ku", "C:\\disks\\base.vhd".to_owned()),
            ],
        }),
        blocks: vec![SparseBlock {
            index: 1,
            written: vec![(1..3, 5)],
            stale: 0xee,
        }],
        ..VhdImage::default()
    };
    image.build().into()
}
