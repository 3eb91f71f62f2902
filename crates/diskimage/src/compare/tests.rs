//! Comparisons of images in memory. `qemu-img` has the same outcome for files of the same layout.

use super::*;
use crate::testing::{image, raw};

fn compare(first: &Image, second: &Image, strict: bool) -> Verdict {
    Comparison {
        first,
        second,
        names: ["first", "second"],
        strict,
        steps: false,
        progress: Progress::none(),
    }
    .run()
    .expect("readable")
}

fn bytes(len: usize, set: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (at, byte) in set {
        bytes[*at] = *byte;
    }
    bytes
}

#[test]
fn the_first_sector_that_differs_is_reported() {
    let one = raw(bytes(5 << 20, &[(100, 1), (71_000, 2), (4_000_000, 1)]));
    let other = raw(bytes(5 << 20, &[(100, 1), (71_000, 3), (3_000_000, 1)]));
    for _ in 0..20 {
        let verdict = compare(&one, &other, false);
        assert_eq!(verdict.difference, Some(Difference::Content(70_656)));
        assert!(!verdict.sizes_differ);
    }
}

#[test]
fn a_longer_image_is_the_same_if_the_rest_is_zero() {
    let short = raw(bytes(1 << 20, &[(5, 1)]));
    let long = raw(bytes(3 << 20, &[(5, 1)]));
    let same = Verdict {
        sizes_differ: true,
        difference: None,
    };
    assert_eq!(compare(&short, &long, false), same);
    assert_eq!(compare(&long, &short, false), same);
    assert_eq!(compare(&long, &short, true).difference, Some(Difference::Size));
    let longer = raw(bytes(3 << 20, &[(5, 1), (1_119_800, 1)]));
    let verdict = compare(&longer, &short, false);
    assert_eq!(verdict.difference, Some(Difference::Content(1_119_744)));
    assert!(verdict.sizes_differ);
}

#[test]
fn strict_mode_distinguishes_zero_clusters_from_unallocated_ones() {
    let (unallocated, _) = image("qcow2", "", 1 << 20);
    let (zeroes, _) = image("qcow2", "", 1 << 20);
    let range = ByteRange::new(65536, 1 << 20);
    zeroes
        .write_zeroes(range, diskimage_core::ZeroMode::Unmap)
        .expect("zeroed");
    assert_eq!(compare(&unallocated, &zeroes, false).difference, None);
    assert_eq!(compare(&unallocated, &unallocated, true).difference, None);
    // The extent at 0 of one image is its last; that of the other is not.
    assert_eq!(
        compare(&unallocated, &zeroes, true).difference,
        Some(Difference::Status(0))
    );
}

#[test]
fn empty_images_are_identical() {
    let empty = raw(Vec::new());
    assert_eq!(compare(&empty, &empty, true).difference, None);
    let (vast, _) = image("qcow2", "cluster_size=2M", 1 << 50);
    let verdict = compare(&vast, &empty, false);
    let only_sizes = Verdict {
        sizes_differ: true,
        difference: None,
    };
    assert_eq!(verdict, only_sizes);
}
