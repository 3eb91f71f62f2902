//! A valid VHDX image with a log to replay, modified by arbitrary bytes. The checksums are corrected, since no mutation
//! would find them. Only some structures are modified, since most of the 4 MiB of the smallest image are unused.
#![no_main]

use std::sync::{Arc, OnceLock};

use diskimage_core::options::Options;
use diskimage_core::{CreateRequest, Device, Format, Image, NewFiles, NodeOptions, OpenContext, OpenRequest};
use diskimage_formats::Vhdx;
use diskimage_fuzz::{PagedFile, change, change_parts, file_of};

/// The parts of the file that the input modifies, one after the other: offset and length.
const PARTS: [(u64, usize); 8] = [
    (HEADERS[0], 80),
    (REGION_TABLE, 16 + 3 * 32),
    // The log's entry: its header, a descriptor, and the start and the end of a data sector.
    (LOG, 64 + 2 * 32),
    (LOG + 4096, 64),
    (LOG + 2 * 4096 - 4, 4),
    // The block allocation table, then the metadata: their table, and the items that it points to.
    (TABLE, 64),
    (3 << 20, 32 + 5 * 32),
    ((3 << 20) + (64 << 10), 64),
];

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLE: u64 = 192 << 10;
const LOG: u64 = 1 << 20;
const TABLE: u64 = 2 << 20;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    static SOUND: OnceLock<Arc<[u8]>> = OnceLock::new();
    let file = file_of(Arc::clone(SOUND.get_or_init(valid_image)));
    change_parts(&file, &PARTS, input);
    for (at, len) in [(HEADERS[0], 4096), (REGION_TABLE, 64 << 10), (LOG, 2 * 4096)] {
        change(&file, at, len, fix_checksum);
    }
    diskimage_fuzz::exercise_file(&Vhdx, &file);
});

/// Sets the CRC-32C of a structure, which is in bytes 4 to 7.
fn fix_checksum(structure: &mut [u8]) {
    structure[4..8].fill(0);
    let sum = crc32c::crc32c(structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// A disk of four blocks of 1 MiB, one of which is allocated only in the log.
fn valid_image() -> Arc<[u8]> {
    let file = Arc::new(file_of(Arc::default()));
    let mut options = Options::new(<dyn Format>::create_options(&Vhdx));
    options.parse("block_size=1M").expect("valid");
    let objects = Arc::default();
    let plan = Vhdx.plan_create(CreateRequest {
        name: "fuzz",
        size: 4 << 20,
        options: &options,
        objects: &objects,
    });
    let write = |files: NewFiles<'_>| plan.and_then(|plan| plan.write(files));
    NewFiles::only(Arc::<PagedFile>::clone(&file), write).expect("makes it");
    let mut table = vec![0; 4096];
    file.read_at(&mut table, TABLE).expect("inside");
    let layer = Vhdx
        .open(OpenRequest {
            write: true,
            ..OpenRequest::new(
                Arc::<PagedFile>::clone(&file),
                "fuzz",
                &mut NodeOptions::new(),
                &OpenContext::default(),
            )
        })
        .expect("opens it");
    let image = Image::new(layer, None, "fuzz", true);
    image.write_at(&[5; 1000], 2 << 20).expect("writes");
    image.flush().expect("flushes");
    // As after a crash: the BAT is the old one, and the current header has the GUID of the log.
    file.write_at(&table, TABLE).expect("has room");
    let mut guid = [0; 16];
    file.read_at(&mut guid, LOG + 32).expect("inside");
    file.write_at(&guid, HEADERS[0] + 48).expect("has room");
    file.write_at(&[0; 4], HEADERS[1]).expect("has room");
    file.contents().into()
}
