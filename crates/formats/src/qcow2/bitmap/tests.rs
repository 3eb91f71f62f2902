//! Bitmaps of images in memory.

use std::sync::Arc;

use diskimage_core::{
    BitmapInfo, Bitmaps, ByteRange, ClosedGate, Device, Image, MemoryDevice, NewBitmap, Repair,
};
use diskimage_core::{
    NodeOptions, OpenContext, OpenRequest, Preallocation, Progress, ResizeRequest, Result, ZeroMode,
};
use diskimage_testing::{Journal, RecordingDevice};

use crate::qcow2::Qcow2;
use crate::qcow2::tests::create;

fn open(file: &Arc<MemoryDevice>, write: bool) -> Result<(Arc<Qcow2>, Image)> {
    open_on(Arc::<MemoryDevice>::clone(file), write)
}

fn open_on(device: Arc<dyn Device>, write: bool) -> Result<(Arc<Qcow2>, Image)> {
    let layer = Qcow2::open(OpenRequest {
        write,
        ..OpenRequest::new(device, "test", &mut NodeOptions::new(), &OpenContext::default())
    })?;
    let image = Image::new(Arc::<Qcow2>::clone(&layer), None, "test", write);
    Ok((layer, image))
}

fn add(layer: &Qcow2, name: &str, granularity: u64, enabled: bool) {
    layer
        .add(&NewBitmap {
            name,
            granularity: Some(granularity),
            enabled,
        })
        .expect("added");
}

/// The marked guest ranges, adjacent ones joined.
fn marked(layer: &Qcow2, name: &str) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    layer
        .marked(name, &mut |range| {
            match found.last_mut() {
                Some(last) if last.1 == range.start() => last.1 = range.end(),
                _ => found.push((range.start(), range.end())),
            }
            Ok(())
        })
        .expect("readable");
    found
}

fn list(file: &Arc<MemoryDevice>) -> Vec<BitmapInfo> {
    open(file, false).expect("opens").0.list().expect("readable")
}

fn check(file: &Arc<MemoryDevice>) {
    let (layer, _) = open(file, false).expect("opens");
    let report = layer.check_impl(Repair::No, &Progress::none()).expect("checks");
    assert_eq!(report.corruptions, 0);
    assert_eq!(report.leaks, 0);
}

fn resize(image: &Image, len: u64) -> Result<()> {
    image.resize_with(&ResizeRequest::new(len, Preallocation::Off))
}

#[test]
fn writes_are_marked_in_enabled_bitmaps_alone() {
    let file = create("cluster_size=4096", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "on", 512, true);
    add(&layer, "off", 512, false);
    image.write_at(&[1; 1000], 5000).expect("writes");
    image
        .write_zeroes(ByteRange::new(8192, 16384), ZeroMode::Unmap)
        .expect("zeroes");
    image.discard(ByteRange::new(1 << 19, 1 << 20)).expect("discards");
    let in_use: Vec<bool> = list(&file).iter().map(|bitmap| bitmap.inconsistent).collect();
    assert_eq!(in_use, [true, false], "a crash now would leave the bitmap in use");
    image.flush().expect("flushes");
    check(&file);
    let (layer, _) = open(&file, false).expect("opens");
    assert!(
        layer
            .list()
            .expect("readable")
            .iter()
            .all(|bitmap| !bitmap.inconsistent)
    );
    assert_eq!(
        marked(&layer, "on"),
        [(4608, 6144), (8192, 16384), (1 << 19, 1 << 20)]
    );
    assert_eq!(marked(&layer, "off"), []);
}

#[test]
fn opening_without_writing_does_not_change_the_file() {
    let file = create("", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "b", 65536, true);
    drop((layer, image));
    let before = file.contents();
    let (_, image) = open(&file, true).expect("opens");
    image.flush().expect("flushes");
    assert!(file.contents() == before);
}

#[test]
fn bits_follow_the_size_of_the_disk() {
    // Clusters of 512 bytes hold the bits of 2 MiB.
    let file = create("cluster_size=512", 8 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "b", 512, false);
    layer
        .mark("b", &[ByteRange::new(100, 101), ByteRange::new(1 << 20, 7 << 20)])
        .expect("marks");
    resize(&image, (3 << 20) + 512).expect("shrinks");
    assert_eq!(marked(&layer, "b"), [(0, 512), (1 << 20, (3 << 20) + 512)]);
    resize(&image, 64 << 20).expect("grows");
    image.flush().expect("flushes");
    check(&file);
    let (layer, _) = open(&file, false).expect("opens");
    assert_eq!(marked(&layer, "b"), [(0, 512), (1 << 20, (3 << 20) + 512)]);
}

#[test]
fn inconsistent_bitmaps_forbid_resizing_and_change_nothing() {
    let file = create("", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "b", 65536, true);
    image.write_at(&[1; 1 << 20], 0).expect("writes");
    // Not flushed: these are the bytes after a crash.
    let file = Arc::new(MemoryDevice::new(file.contents()));
    drop((layer, image));
    let (layer, image) = open(&file, true).expect("opens");
    let before = file.contents();
    let error = resize(&image, 1000 * 512).expect_err("refused");
    assert_eq!(error.chain(), "Bitmap 'b' is inconsistent and cannot be used");
    assert_eq!(
        error.hint_lines().first().map(String::as_str),
        Some("Remove the bitmap with 'qemu-img bitmap --remove FILENAME b', then resize.")
    );
    assert!(file.contents() == before);
    layer.remove("b").expect("removed");
    resize(&image, 1000 * 512).expect("shrinks");
}

#[test]
fn a_bitmap_that_would_be_too_large_forbids_growing() {
    let file = create("", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "b", 512, true);
    let error = resize(&image, (2 << 40) + 512).expect_err("refused");
    assert_eq!(
        error.chain(),
        "Bitmap 'b' doesn't satisfy the constraints: Too much space will be occupied by the bitmap. Use larger granularity"
    );
    assert_eq!(image.len(), 1 << 20);
}

#[test]
fn bitmaps_are_added_changed_and_removed() {
    let file = create("", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    let new = |name, granularity| NewBitmap {
        name,
        granularity,
        enabled: true,
    };
    let long = "n".repeat(1024);
    for (bitmap, message) in [
        (new("", None), "Bitmap name cannot be empty"),
        (
            new("b", Some(256)),
            "Granularity must be power of 2 and at least 512",
        ),
        (
            new("b", Some(1000)),
            "Granularity must be power of 2 and at least 512",
        ),
        (
            new("b", Some(0)),
            "Granularity must be power of 2 and at least 512",
        ),
        (new(&long, None), "Name length exceeds maximum (1023 characters)"),
    ] {
        assert_eq!(layer.add(&bitmap).map_err(|e| e.chain()), Err(message.to_owned()));
    }
    layer.add(&new("a", None)).expect("added");
    add(&layer, "b", 512, false);
    assert_eq!(
        layer.add(&new("a", None)).map_err(|e| e.chain()),
        Err("Bitmap already exists: a".to_owned())
    );
    layer.set_enabled("b", true).expect("exists");
    image.write_at(&[1], 70000).expect("writes");
    assert_eq!(marked(&layer, "a"), [(65536, 131072)]);
    assert_eq!(marked(&layer, "b"), [(69632, 70144)]);
    layer.clear("a").expect("exists");
    assert_eq!(marked(&layer, "a"), []);
    layer.remove("a").expect("exists");
    assert_eq!(
        layer.remove("a").map_err(|e| e.chain()),
        Err("Dirty bitmap 'a' not found".to_owned())
    );
    assert_eq!(
        list(&file).iter().map(|b| b.name.as_str()).collect::<Vec<_>>(),
        ["b"]
    );
    layer.remove("b").expect("exists");
    assert_eq!(list(&file), []);
    image.flush().expect("flushes");
    check(&file);
}

#[test]
fn whole_clusters_of_set_bits_need_no_storage() {
    let file = create("cluster_size=512", 64 << 20, &ClosedGate);
    let (layer, _) = open(&file, true).expect("opens");
    add(&layer, "b", 512, false);
    let before = file.len();
    layer
        .mark("b", &[ByteRange::new(2 << 20, 60 << 20)])
        .expect("marks");
    assert_eq!(marked(&layer, "b"), [(2 << 20, 60 << 20)]);
    assert!(file.len() - before < 4096);
    layer.mark("b", &[ByteRange::new(0, 64 << 20)]).expect("marks");
    assert_eq!(marked(&layer, "b"), [(0, 64 << 20)]);
    check(&file);
}

#[test]
fn more_writes_than_the_limit_are_all_marked() {
    let file = create("cluster_size=65536", 256 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "b", 512, true);
    let mut state = layer.lock();
    for i in 0..super::written::MAX_RANGES as u64 * 3 / 2 {
        layer
            .note_write(&mut state, ByteRange::at(i * 2048, 1))
            .expect("noted");
    }
    assert!(state.bitmaps.extension().is_some());
    drop(state);
    image.flush().expect("flushes");
    assert_eq!(marked(&layer, "b").len(), super::written::MAX_RANGES * 3 / 2);
    check(&file);
}

#[test]
fn the_name_of_the_backing_file_survives_new_bitmaps() {
    let file = create("backing_file=below.raw,backing_fmt=raw", 1 << 20, &ClosedGate);
    let (layer, _) = open(&file, true).expect("opens");
    add(&layer, "b", 65536, true);
    let (layer, _) = open(&file, false).expect("opens");
    let backing = diskimage_core::Backed::backing(&*layer).expect("exists");
    assert_eq!(backing.name.text(), "below.raw");
    assert_eq!(backing.format.as_deref(), Some("raw"));
    check(&file);
}

/// The image has the bitmap "a" before. Some backing file names leave the header extension in the first sector, others
/// move bytes beyond it from one sector to another.
#[test]
fn a_crash_leaves_the_bitmaps_from_before_or_after() {
    let long = format!("backing_file={},backing_fmt=raw", "below".repeat(100));
    for options in [
        "cluster_size=512",
        "",
        "backing_file=below,backing_fmt=raw",
        &long,
    ] {
        let file = create(options, 1 << 20, &ClosedGate);
        add(&open(&file, true).expect("opens").0, "a", 65536, true);
        let changes: [fn(&Qcow2); 2] = [
            |layer| add(layer, "b", 65536, true),
            |layer| layer.set_enabled("a", false).expect("exists"),
        ];
        for change in changes {
            let before = file.contents();
            let journal: Arc<Journal> = Arc::default();
            let recorder: Arc<dyn Device> = Arc::new(RecordingDevice::new(before.clone(), 0, &journal));
            change(&open_on(recorder, true).expect("opens").0);
            let mut known = vec![list(&file)];
            let after = Arc::new(MemoryDevice::new(before.clone()));
            change(&open(&after, true).expect("opens").0);
            known.push(list(&after));
            assert_ne!(known[0], known[1]);
            journal.crashes(&[before], 12, 0x5eed, |crash| {
                let left = Arc::new(MemoryDevice::new(crash.files[0].clone()));
                let found = list(&left);
                let crash_point = (crash.position, crash.kept);
                assert!(known.contains(&found), "{options}: {crash_point:?}: {found:?}");
            });
        }
    }
}

#[test]
fn damaged_structures_never_panic() {
    let file = create("cluster_size=512", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "b", 512, true);
    layer.mark("b", &[ByteRange::new(0, 5000)]).expect("marks");
    drop((layer, image));
    let sound = file.contents();
    let start = sound.len().saturating_sub(2048);
    for at in start..sound.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = sound.clone();
            bytes[at] = value;
            let damaged = Arc::new(MemoryDevice::new(bytes));
            // Errors are fine, panics are not.
            let Ok((layer, image)) = open(&damaged, true) else {
                continue;
            };
            let _ = layer.marked("b", &mut |_| Ok(()));
            let _ = image.write_at(&[1; 512], 0);
            let _ = image.flush();
            let _ = resize(&image, 3 << 20);
            let _ = layer.clear("b");
            let _ = layer.remove("b");
        }
    }
}

/// An image with data and the bitmaps `bad` and `good`, and the host offset of the directory.
fn with_two_bitmaps() -> (Vec<u8>, usize) {
    let file = create("cluster_size=4096", 1 << 20, &ClosedGate);
    let (layer, image) = open(&file, true).expect("opens");
    add(&layer, "bad", 512, true);
    add(&layer, "good", 512, true);
    image.write_at(&[1; 5000], 0).expect("writes");
    image.flush().expect("flushes");
    let extension = open(&file, false).expect("opens").0.header.bitmaps();
    let at = extension.expect("has bitmaps").directory_offset.get();
    (file.contents(), usize::try_from(at).expect("small"))
}

/// Each leaves the second bitmap readable.
fn damage_of_one_bitmap(bytes: &[u8], at: usize) -> Vec<(&'static str, Vec<u8>)> {
    let table =
        usize::try_from(u64::from_be_bytes(*bytes[at..].first_chunk().expect("inside"))).expect("small");
    let damages: [(_, usize, &[u8]); 7] = [
        ("the table beyond the end", at, &[0, 0, 0, 1]),
        ("the table not aligned", at + 7, &[1]),
        ("another size of the table", at + 8, &[0, 0, 1, 0]),
        ("unknown flags", at + 12, &[0xff]),
        ("an unknown type", at + 16, &[9]),
        ("a granularity out of range", at + 17, &[0x63]),
        ("an invalid entry of the table", table, &[0xff; 8]),
    ];
    let damaged = |(what, at, field): (_, usize, &[u8])| {
        let mut bytes = bytes.to_vec();
        bytes[at..at + field.len()].copy_from_slice(field);
        (what, bytes)
    };
    damages.map(damaged).into()
}

#[test]
fn a_damaged_bitmap_can_be_shown_and_is_dropped_by_a_repair() {
    let (bytes, at) = with_two_bitmaps();
    for (what, bytes) in damage_of_one_bitmap(&bytes, at) {
        let file = Arc::new(MemoryDevice::new(bytes));
        let (layer, image) = open(&file, false).expect("opens");
        assert_eq!(layer.bitmap_warnings().expect("readable").len(), 1, "{what}");
        assert!(
            layer.info_impl().is_ok() && image.read_at(&mut [0; 512], 0).is_ok(),
            "{what}"
        );
        let found = layer.check_impl(Repair::No, &Progress::none()).expect("checks");
        assert!(found.corruptions > 0, "{what}");
        let request = |file: &Arc<MemoryDevice>| {
            Qcow2::open(OpenRequest {
                write: true,
                for_check: true,
                ..OpenRequest::new(
                    Arc::<MemoryDevice>::clone(file),
                    "test",
                    &mut NodeOptions::new(),
                    &OpenContext::default(),
                )
            })
        };
        let checked = request(&file).expect("opens");
        let report = checked
            .check_impl(Repair::All, &Progress::none())
            .expect("repairs");
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{what}");
        check(&file);
        let left = list(&file);
        assert!(
            left.len() == 1 && left[0].name == "good" && !left[0].inconsistent,
            "{what}"
        );
        let (layer, _) = open(&file, false).expect("opens");
        assert_eq!(marked(&layer, "good"), [(0, 5120)], "{what}");
    }
}

#[test]
fn a_damaged_bitmap_forbids_writes_and_can_be_removed() {
    let (bytes, at) = with_two_bitmaps();
    for (what, bytes) in damage_of_one_bitmap(&bytes, at) {
        let file = Arc::new(MemoryDevice::new(bytes));
        let (layer, image) = open(&file, true).expect("opens");
        // The damage of a table is found when its bits are needed.
        let outcome = image.write_at(&[2; 512], 0).and_then(|()| image.flush());
        assert!(outcome.is_err(), "{what}");
        drop((layer, image));
        let (layer, image) = open(&file, true).expect("opens");
        layer.remove("bad").expect(what);
        image.write_at(&[2; 512], 1 << 16).expect("writes");
        image.flush().expect("flushes");
        let (layer, _) = open(&file, false).expect("opens");
        let left = list(&file);
        assert!(
            left.len() == 1 && left[0].name == "good" && !left[0].inconsistent,
            "{what}"
        );
        assert_eq!(
            marked(&layer, "good").last(),
            Some(&(1 << 16, (1 << 16) + 512)),
            "{what}"
        );
    }
}

#[test]
fn a_directory_that_cannot_be_read_is_dropped_by_a_repair() {
    let (intact, at) = with_two_bitmaps();
    let damages: [(_, usize, &[u8]); 3] = [
        ("a name beyond the directory", at + 18, &[0xff]),
        ("too much extra data", at + 20, &[0x7f]),
        ("an empty entry", at, &[0; 24]),
    ];
    for (what, at, field) in damages {
        let mut bytes = intact.clone();
        bytes[at..at + field.len()].copy_from_slice(field);
        let file = Arc::new(MemoryDevice::new(bytes));
        let (layer, _) = open(&file, false).expect("opens");
        assert!(!layer.bitmap_warnings().expect("readable").is_empty(), "{what}");
        for (repair, works) in [(Repair::Leaks, false), (Repair::All, true)] {
            let layer = Qcow2::open(OpenRequest {
                write: true,
                for_check: true,
                ..OpenRequest::new(
                    Arc::<MemoryDevice>::clone(&file),
                    "test",
                    &mut NodeOptions::new(),
                    &OpenContext::default(),
                )
            })
            .expect("opens");
            assert_eq!(
                layer.check_impl(repair, &Progress::none()).is_ok(),
                works,
                "{what}"
            );
        }
        check(&file);
        assert!(list(&file).iter().all(|bitmap| !bitmap.inconsistent), "{what}");
    }
}
