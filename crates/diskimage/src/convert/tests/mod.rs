//! Conversions of images in memory.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use diskimage_core::{ByteRange, Device, ExtentKind, StatusDetail, ZeroMode};
use diskimage_testing::{Fault, FaultyDevice};
use proptest::prelude::*;

use super::*;
use crate::testing::{contents, create, faulty, image, open, raw};

mod encoded;
mod fault;

const KIB: u64 = 1024;

/// Runs of repeated letters, random bytes, and single bytes between zeroes.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut state = seed | 1;
    let mut at = 0;
    while at < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let run = usize::try_from(state >> 15).unwrap().min(len - at);
        match state >> 8 & 3 {
            0 => bytes[at..at + run].fill(b'a' + (state >> 10 & 7) as u8),
            1 => {
                for byte in &mut bytes[at..at + run] {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    *byte = (state >> 24) as u8;
                }
            }
            2 => bytes[at] = 1,
            _ => {}
        }
        at += run.max(1);
    }
    bytes
}

fn run<'a>(
    sources: &'a [Arc<Image>],
    target: &'a Image,
    change: impl FnOnce(&mut Conversion<'a>),
) -> Result<()> {
    let mut conversion = Conversion::new(sources, target);
    change(&mut conversion);
    conversion.run()?;
    target.flush()
}

/// The bytes of a file. That of a VMDK has random numbers in its descriptor, which is in front of the grains.
fn without_descriptor(format: &str, file: &[u8]) -> Vec<u8> {
    let skipped = if format == "vmdk" { 64 << 10 } else { 0 };
    file[skipped..].to_vec()
}

fn threads(count: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(count)
}

#[test]
fn sources_are_concatenated_in_whole_sectors() {
    let sources = [raw(pattern(700, 1)), raw(pattern(5000, 2)), raw(vec![3; 512])];
    assert_eq!(total_len(&sources), 1024 + 5120 + 512);
    let (target, file) = image("raw", "", total_len(&sources));
    run(&sources, &target, |_| ()).unwrap();
    let all: Vec<u8> = sources.iter().flat_map(|image| contents(image)).collect();
    assert_eq!(file.contents(), all);
}

#[test]
fn a_target_that_is_too_small_is_refused() {
    let (target, _) = image("raw", "", 1024);
    let error = run(&[raw(vec![1; 1025])], &target, |_| ()).unwrap_err();
    assert_eq!(error.chain(), "output file is smaller than input file");
}

#[test]
fn the_file_is_the_same_whatever_the_number_of_threads() {
    let bytes = pattern(9 << 20, 7);
    for (format, options, compress) in [
        ("qcow2", "cluster_size=64k", false),
        ("qcow2", "cluster_size=512", false),
        ("qcow2", "cluster_size=64k,extended_l2=on", false),
        ("qcow2", "cluster_size=2M", false),
        ("qcow2", "cluster_size=64k", true),
        ("qcow2", "cluster_size=2M", true),
        ("qcow2", "cluster_size=512,refcount_bits=2", true),
        ("qcow2", "cluster_size=4k,compression_type=zstd", true),
        ("qcow", "", true),
        ("vmdk", "subformat=streamOptimized", true),
    ] {
        let files = [1, 2, 4, 16].map(|count| {
            let (target, file) = image(format, options, bytes.len() as u64);
            run(&[raw(bytes.clone())], &target, |conversion| {
                conversion.compress = compress;
                conversion.parallel = threads(count);
            })
            .unwrap();
            assert!(contents(&target) == bytes, "{format} {options}");
            without_descriptor(format, &file.contents())
        });
        assert!(
            files.iter().all(|file| *file == files[0]),
            "{format} {options} {compress}"
        );
    }
}

#[test]
fn many_more_workers_than_processors_write_the_same_file() {
    for (format, options, compress, len) in [
        ("qcow2", "", false, 65 << 20),
        ("qcow2", "cluster_size=4k", false, 65 << 20),
        ("qcow2", "", true, 17 << 20),
        ("vmdk", "subformat=streamOptimized", true, 17 << 20),
    ] {
        let source = [raw(pattern(len, 9))];
        let files = [1, 64].map(|workers| {
            let (target, file) = image(format, options, len as u64);
            let mut conversion = Conversion::new(&source, &target);
            conversion.compress = compress;
            conversion.run_on(workers).unwrap();
            target.flush().unwrap();
            without_descriptor(format, &file.contents())
        });
        assert!(files[0] == files[1], "{format} {options} {compress}");
    }
}

#[test]
fn zeroes_are_left_out_unless_sparse_is_zero() {
    let mut bytes = vec![0; 1 << 20];
    bytes[300 * 1024] = 1;
    for (sparse, data) in [(4096, 64 * KIB), (0, 1 << 20)] {
        let (target, _) = image("qcow2", "", bytes.len() as u64);
        run(&[raw(bytes.clone())], &target, |conversion| {
            conversion.sparse = sparse
        })
        .unwrap();
        let mut allocated = 0;
        let mut rest = ByteRange::new(0, target.len());
        while !rest.is_empty() {
            let extent = target.status(rest, StatusDetail::Allocation).unwrap();
            if extent.kind == ExtentKind::Data {
                allocated += extent.len;
            }
            rest = rest.skip(extent.len);
        }
        assert_eq!(allocated, data);
    }
}

#[test]
fn old_data_of_the_target_is_overwritten_with_zeroes() {
    let mut bytes = vec![0; 256 * 1024];
    bytes[70_000] = 1;
    for format in ["raw", "qcow2"] {
        let (target, _) = image(format, "", 300 * KIB);
        target.write_at(&vec![9; 300 * 1024], 0).unwrap();
        run(&[raw(bytes.clone())], &target, |conversion| {
            conversion.target_is_zero = false
        })
        .unwrap();
        let after = contents(&target);
        assert!(after[..bytes.len()] == bytes, "{format}");
        assert!(
            after[bytes.len()..].iter().all(|byte| *byte == 9),
            "beyond the source nothing changes"
        );
    }
}

#[test]
fn with_a_backing_image_only_data_of_the_overlay_is_copied() {
    let base = raw(vec![9; 256 * 1024]);
    let overlay = || {
        let memory: Arc<dyn Device> = Arc::new(diskimage_core::MemoryDevice::default());
        create(&memory, "qcow2", "", 384 * KIB);
        open(&memory, "qcow2", Some(Arc::clone(&base)))
    };
    let source = overlay();
    source.write_at(&[1; 5000], 64 * KIB).unwrap();
    source
        .write_zeroes(ByteRange::at(128 * KIB, 64 * KIB), ZeroMode::Unmap)
        .unwrap();
    for compress in [false, true] {
        let target = overlay();
        run(&[Arc::clone(&source)], &target, |conversion| {
            conversion.backing_len = Some(256 * KIB);
            conversion.compress = compress;
        })
        .unwrap();
        assert!(contents(&target) == contents(&source));
        let at = |offset| {
            target
                .status(ByteRange::at(offset, 512), StatusDetail::Allocation)
                .unwrap()
        };
        assert_eq!(at(0).depth, 1);
        assert_eq!(at(128 * KIB).depth, 0);
        assert_eq!(at(128 * KIB).kind, ExtentKind::Zero);
        assert_eq!(at(320 * KIB).kind, ExtentKind::Unallocated);
    }
}

#[test]
fn an_empty_disk_of_any_size_takes_no_time() {
    let (source, _) = image("qcow2", "cluster_size=2M", 1 << 50);
    let (target, _) = image("qcow2", "cluster_size=2M", 1 << 50);
    run(&[source], &target, |_| ()).unwrap();
}

#[test]
fn lost_sectors_become_zeroes_when_salvaging() {
    let (device, _) = faulty(vec![5; 4096]);
    let below: Arc<dyn Device> = Arc::<FaultyDevice>::clone(&device);
    let source = open(&below, "raw", None);
    // Two status requests succeed; the read and the reads of three single sectors fail.
    device.arm(Fault::from(2));
    let (target, file) = image("raw", "", 4096);
    let lost = Mutex::new(Vec::new());
    let on_lost = |error: &Error| {
        let mut lost = lost.lock().unwrap();
        lost.push(error.to_string());
        if lost.len() == 3 {
            device.disarm();
        }
    };
    let sources = [source];
    run(&sources, &target, |conversion| {
        conversion.salvage = true;
        conversion.on_lost = Some(&on_lost);
    })
    .unwrap();
    let mut expected = vec![5; 4096];
    expected[..3 * 512].fill(0);
    assert_eq!(file.contents(), expected);
    let messages = [0, 512, 1024].map(|offset| format!("error while reading offset {offset}"));
    assert_eq!(*lost.lock().unwrap(), messages);
}

#[test]
fn invalid_sparse_sizes_are_refused() {
    for sparse in [1, 513, MAX_SPARSE + 512] {
        let (target, _) = image("raw", "", 512);
        let result = run(&[raw(vec![0; 512])], &target, |conversion| {
            conversion.sparse = sparse
        });
        assert!(result.is_err());
    }
    let (target, _) = image("raw", "", 512);
    assert!(
        run(&[raw(vec![0; 512])], &target, |conversion| conversion.compress =
            true)
        .is_err()
    );
}

#[derive(Clone, Debug)]
enum Fill {
    Write(u64, u64, u8),
    Zero(u64, u64),
}

fn fill() -> impl Strategy<Value = Fill> {
    let range = (0..DISK, 1..200_000_u64);
    prop_oneof![
        (range.clone(), any::<u8>()).prop_map(|((at, len), byte)| Fill::Write(at, len.min(DISK - at), byte)),
        range.prop_map(|(at, len)| Fill::Zero(at, len.min(DISK - at))),
    ]
}

const DISK: u64 = 5 << 20;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_layout_is_copied(
        in_base in prop::collection::vec(fill(), 0..6),
        in_overlay in prop::collection::vec(fill(), 0..12),
        source_cluster in 9..17_u32,
        target_options in prop::sample::select(vec![
            "", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "compat=0.10", "refcount_bits=1", "raw",
        ]),
        sparse in prop::sample::select(vec![0_u64, 512, 4096, 12288, 1 << 20]),
        (compress, out_of_order, count) in (any::<bool>(), any::<bool>(), 1..6_u32),
    ) {
        let apply = |image: &Image, fills: &[Fill]| {
            for fill in fills {
                match *fill {
                    Fill::Write(at, len, byte) => {
                        image.write_at(&vec![byte; usize::try_from(len).unwrap()], at).unwrap();
                    }
                    Fill::Zero(at, len) => image.write_zeroes(ByteRange::at(at, len), ZeroMode::Unmap).unwrap(),
                }
            }
        };
        let (base, _) = image("qcow2", "cluster_size=4k", DISK);
        apply(&base, &in_base);
        let memory: Arc<dyn Device> = Arc::new(diskimage_core::MemoryDevice::default());
        create(&memory, "qcow2", &format!("cluster_size={}", 1 << source_cluster), DISK);
        let source = open(&memory, "qcow2", Some(base));
        apply(&source, &in_overlay);
        let (target, _) = if target_options == "raw" {
            image("raw", "", DISK)
        } else {
            image("qcow2", target_options, DISK)
        };
        run(&[Arc::clone(&source)], &target, |conversion| {
            conversion.sparse = sparse;
            conversion.compress = compress && target_options != "raw";
            conversion.out_of_order = out_of_order;
            conversion.parallel = threads(count);
        }).unwrap();
        prop_assert!(contents(&target) == contents(&source));
    }
}
