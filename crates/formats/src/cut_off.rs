//! Tests of all formats: bytes that a truncated file has lost are an error, and never zeroes.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Image, MemoryDevice, Preallocation, Progress, Repair, ZeroMode};

use diskimage_testing::{
    FULLY_PRESENT, PARTIALLY_PRESENT, SparseBlock, VhdImage, VhdParent, VhdxImage, overlay,
};

use crate::format_by_name;
use crate::testing::{contents, create, open};

/// Formats and their options, with small units.
const FORMS: &[(&str, &str)] = &[
    ("qcow2", "cluster_size=4k"),
    ("qcow2", "cluster_size=64k,extended_l2=on"),
    ("qcow2", "cluster_size=4k,preallocation=metadata"),
    ("qed", "cluster_size=4k,table_size=1"),
    ("qcow", ""),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vmdk", ""),
    ("vpc", "force_size=on"),
    ("vpc", "force_size=on,subformat=fixed"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "block_size=1M,subformat=fixed"),
    ("parallels", "cluster_size=16k"),
];

/// The disk's size, which is not a multiple of any format's unit.
const SIZE: u64 = (3 << 20) + 5 * 512;

fn opened(name: &str, file: &Arc<MemoryDevice>, write: bool) -> diskimage_core::Result<Image> {
    let format = format_by_name(name).expect("known");
    open(format, Arc::<MemoryDevice>::clone(file), write)
}

fn image(name: &str, options: &str) -> Arc<MemoryDevice> {
    create(format_by_name(name).expect("known"), options, SIZE).expect("creates")
}

/// An image with a few written sectors, among them the last one of the disk, and the contents of the disk.
fn with_sectors(name: &str, options: &str) -> (Arc<MemoryDevice>, Vec<u8>) {
    let file = image(name, options);
    let image = opened(name, &file, true).expect("opens");
    let mut model = vec![0; usize::try_from(SIZE).expect("small")];
    for (at, byte) in (1..)
        .zip([1 << 20, 40_000, (2 << 20) + 7000, SIZE - 512, 100])
        .map(|(n, at)| (at, n))
    {
        image.write_at(&[byte; 512], at).expect("writes");
        let range = usize::try_from(at).expect("small")..;
        model[range][..512].fill(byte);
    }
    image.flush().expect("flushes");
    (file, model)
}

#[test]
fn a_unit_that_is_partly_written_is_all_there_before_and_after_a_flush() {
    for (name, options) in FORMS {
        for at in [0, 512, 40_000, SIZE - 512] {
            let file = image(name, options);
            let writer = opened(name, &file, true).expect("opens");
            writer.write_at(&[7; 512], at).expect("writes");
            let mut model = vec![0; usize::try_from(SIZE).expect("small")];
            model[usize::try_from(at).expect("small")..][..512].fill(7);
            assert!(contents(&writer) == model, "{name} {options} {at}: before");
            writer.flush().expect("flushes");
            let reader = opened(name, &file, false).expect("opens");
            assert!(contents(&reader) == model, "{name} {options} {at}: after");
            if name == &"vpc" {
                continue;
            }
            if let Ok(report) = reader.layer().check(Repair::No, &Progress::none()) {
                assert_eq!(report.corruptions, 0, "{name} {options} {at}");
            }
        }
    }
}

/// The lengths that a file of `len` bytes is truncated to.
fn cuts(len: usize) -> impl Iterator<Item = usize> {
    let near = [
        1,
        2,
        511,
        512,
        513,
        4095,
        4096,
        4097,
        65_536,
        100_000,
        1 << 20,
        2 << 20,
    ];
    let near = near.into_iter().filter_map(move |cut| len.checked_sub(cut));
    near.chain((0..len).step_by(len / 40 + 1))
}

/// Images made by hand, of kinds that are not created: their names, formats, files and contents.
fn made() -> Vec<(&'static str, &'static str, Vec<u8>, Vec<u8>)> {
    let block = |sectors: u64| SparseBlock {
        index: 1,
        written: vec![(0..3, 0x11), (sectors / 2..sectors - 9, 0x12)],
        stale: 0x55,
    };
    let vhd = |parent| VhdImage {
        size: SIZE,
        block_size: 1 << 20,
        blocks: vec![block(2048)],
        parent,
        ..VhdImage::default()
    };
    let vhdx = |sector: u32, parent, state| VhdxImage {
        size: SIZE / 4096 * 4096,
        sector,
        blocks: vec![(state, block((1 << 20) / u64::from(sector)))],
        parent,
        ..VhdxImage::default()
    };
    let locator = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let parent = vec![
        locator("parent_linkage", "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}"),
        locator("relative_path", "parent.vhdx"),
    ];
    let vhd_parent = VhdParent {
        locators: vec![(*b"W2ru", "parent.vhd".to_owned())],
        ..VhdParent::default()
    };
    let contents = |len: u64, sector: u64| {
        let mut model = vec![0; usize::try_from(len).expect("small")];
        overlay(&mut model, &[block((1 << 20) / sector)], 1 << 20, sector);
        model
    };
    let mut large = vhdx(4096, None, FULLY_PRESENT);
    // All sectors of a whole block count.
    large.blocks[0].1.stale = 0;
    let large_len = large.size;
    vec![
        ("clear bits", "vpc", vhd(None).build(), contents(SIZE, 512)),
        (
            "differencing",
            "vpc",
            vhd(Some(vhd_parent)).build(),
            contents(SIZE, 512),
        ),
        (
            "sectors of 4096",
            "vhdx",
            large.build(),
            contents(large_len, 4096),
        ),
        (
            "differencing",
            "vhdx",
            vhdx(512, Some(parent), PARTIALLY_PRESENT).build(),
            contents(large_len, 512),
        ),
    ]
}

#[test]
fn a_file_that_was_cut_off_is_refused_or_an_error_or_whole() {
    let created = FORMS.iter().map(|(name, options)| {
        let (file, model) = with_sectors(name, options);
        (*options, *name, file.contents(), model)
    });
    for (options, name, bytes, model) in created.chain(made()) {
        let size = model.len() as u64;
        for len in cuts(bytes.len()) {
            let file = Arc::new(MemoryDevice::new(bytes[..len].to_vec()));
            let Ok(image) = opened(name, &file, false) else {
                continue;
            };
            let mut sector = [0; 512];
            let mut missing = false;
            for at in (0..size).step_by(512) {
                match image.read_at(&mut sector, at) {
                    Ok(()) => {
                        let there = &model[usize::try_from(at).expect("small")..][..512];
                        assert!(sector == there, "{name} {options}: cut to {len}, at {at}");
                    }
                    Err(_) => missing = true,
                }
            }
            let mut all = vec![0; model.len()];
            assert_eq!(
                image.read_at(&mut all, 0).is_err(),
                missing,
                "{name} {options} {len}"
            );
            if missing {
                let report = image.layer().check(Repair::No, &Progress::none());
                let silent = report.is_ok_and(|report| report.corruptions + report.check_errors == 0);
                assert!(!silent, "{name} {options}: a check does not see the cut to {len}");
            }
        }
    }
}

#[test]
fn a_file_that_was_cut_off_is_not_made_longer() {
    for (name, options) in FORMS {
        // As in qemu-img, its repair drops entries that refer to missing clusters.
        if *name == "parallels" {
            continue;
        }
        let (file, model) = with_sectors(name, options);
        let bytes = file.contents();
        for len in cuts(bytes.len()) {
            let file = Arc::new(MemoryDevice::new(bytes[..len].to_vec()));
            let Ok(image) = opened(name, &file, true) else {
                continue;
            };
            let mut model = model.clone();
            for at in [300_000_u64, 1_500_160, 900_096] {
                if image.write_at(&[9; 512], at / 512 * 512).is_ok() {
                    model[usize::try_from(at / 512 * 512).expect("small")..][..512].fill(9);
                }
            }
            let range = ByteRange::at(65_536, 65_536);
            if image.write_zeroes(range, ZeroMode::Unmap).is_ok() {
                model[65_536..131_072].fill(0);
            }
            let _ = image.flush();
            drop(image);
            let Ok(image) = opened(name, &file, false) else {
                continue;
            };
            let mut sector = [0; 512];
            for at in (0..SIZE).step_by(512) {
                if image.read_at(&mut sector, at).is_ok() {
                    let there = &model[usize::try_from(at).expect("small")..][..512];
                    assert!(
                        sector == there,
                        "{name} {options}: cut to {len}, written, at {at}"
                    );
                }
            }
        }
    }
}

#[test]
fn padding_that_other_programs_leave_out_is_no_loss_and_is_there_when_the_disk_grows() {
    for (name, options, padding) in [
        ("qcow2", "cluster_size=64k", 65_536 - 5 * 512),
        ("vdi", "", (1 << 20) - 5 * 512),
        ("vhdx", "block_size=1M", (1 << 20) - 5 * 512),
        ("vmdk", "", 65_536 - 5 * 512),
    ] {
        let file = image(name, options);
        let writer = opened(name, &file, true).expect("opens");
        writer.write_at(&[7; 512], SIZE - 512).expect("writes");
        writer.flush().expect("flushes");
        drop(writer);
        let bytes = file.contents();
        if name == "qcow2" {
            assert_eq!(bytes.len() % 65_536, 0);
        }
        // Only if the cluster is the last one in the file.
        let Some(end) = bytes
            .windows(513)
            .position(|bytes| bytes[..512] == [7; 512] && bytes[512] == 0)
        else {
            panic!("{name}: not there");
        };
        if end + 512 + padding != bytes.len() {
            continue;
        }
        let file = Arc::new(MemoryDevice::new(bytes[..end + 512].to_vec()));
        let mut model = vec![0; usize::try_from(SIZE).expect("small")];
        model[usize::try_from(SIZE).expect("small") - 512..].fill(7);
        assert!(
            contents(&opened(name, &file, false).expect("opens")) == model,
            "{name}"
        );
        let image = opened(name, &file, true).expect("opens");
        image.resize(SIZE + 4096, Preallocation::Off).expect("grows");
        image.flush().expect("flushes");
        model.resize(model.len() + 4096, 0);
        assert!(
            contents(&opened(name, &file, false).expect("opens")) == model,
            "{name}: grown"
        );
    }
}
