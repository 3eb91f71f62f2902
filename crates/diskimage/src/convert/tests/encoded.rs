//! Encoded clusters that are copied as they are.

use diskimage_core::EncodedCluster;
use diskimage_core::options::{OptionDef, Options};
use diskimage_testing::Requests;

use super::*;

const CLUSTER: usize = 64 << 10;

/// Words of which each cluster has others.
fn words(cluster: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in cluster * 7919.. {
        bytes.extend_from_slice(format!("word {word} ").as_bytes());
        if bytes.len() >= CLUSTER {
            break;
        }
    }
    bytes.truncate(CLUSTER);
    bytes
}

/// An image of four clusters: two are stored in encoded form with `mark` at byte `at` of it, one is zero, and one is
/// stored as the format does. `mark` has no meaning for a decoder, and no encoder writes it.
fn marked(format: &str, options: &str, mark: &[u8], at: usize) -> (Arc<Image>, Vec<u8>) {
    let (source, _) = image(format, options, 4 * CLUSTER as u64);
    let mut all = Vec::new();
    let mut encoder = source.layer().encoder(None).unwrap().unwrap();
    for index in 0..4 {
        let offset = all.len() as u64;
        let bytes = if index == 1 {
            vec![0; CLUSTER]
        } else {
            words(index)
        };
        all.extend_from_slice(&bytes);
        let mut encoded = Vec::new();
        assert!(encoder.encode(&bytes, &mut encoded).unwrap());
        match index {
            1 => {}
            3 => source.write_at(&bytes, offset).unwrap(),
            _ => {
                encoded.splice(at..at, mark.iter().copied());
                source.write_encoded(offset, &encoded).unwrap();
            }
        }
    }
    assert_eq!(contents(&source), all, "the mark has no meaning");
    (source, all)
}

/// How often `file` has `mark`.
fn count(file: &[u8], mark: &[u8]) -> usize {
    file.windows(mark.len()).filter(|window| *window == mark).count()
}

/// An empty stored block.
const EMPTY_BLOCK: &[u8] = &[0, 0, 0, 0xff, 0xff];
/// A skippable frame with three bytes.
const SKIPPABLE_FRAME: &[u8] = &[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 0xab, 0xcd, 0xef];

const FORMS: [(&str, &str, &[u8], usize); 3] = [
    ("qcow2", "cluster_size=64k", EMPTY_BLOCK, 0),
    (
        "qcow2",
        "cluster_size=64k,compression_type=zstd",
        SKIPPABLE_FRAME,
        0,
    ),
    ("vmdk", "subformat=streamOptimized", EMPTY_BLOCK, 2),
];

#[test]
fn clusters_of_the_form_of_the_target_are_copied_as_they_are() {
    for (format, options, mark, at) in FORMS {
        let (source, all) = marked(format, options, mark, at);
        let mut lens = Vec::new();
        let mut sources = [source];
        for copy in 0..3 {
            let (target, file) = image(format, options, all.len() as u64);
            run(&sources, &target, |conversion| conversion.compress = true).unwrap();
            assert_eq!(contents(&target), all, "{options}");
            assert_eq!(
                count(&file.contents(), mark),
                2,
                "{options}, copy {copy}: marked clusters"
            );
            lens.push(file.contents().len());
            sources = [target];
        }
        assert!(
            lens[0] == lens[1] && lens[1] == lens[2],
            "{options}: copies grow: {lens:?}"
        );
    }
}

#[test]
fn clusters_of_another_form_are_encoded_again() {
    let (source, all) = marked("qcow2", "cluster_size=64k", EMPTY_BLOCK, 0);
    for options in ["cluster_size=32k", "cluster_size=128k", "compression_type=zstd"] {
        let (target, file) = image("qcow2", options, all.len() as u64);
        run(&[Arc::clone(&source)], &target, |conversion| {
            conversion.compress = true
        })
        .unwrap();
        assert_eq!(contents(&target), all, "{options}");
        assert_eq!(count(&file.contents(), EMPTY_BLOCK), 0, "{options}");
    }
}

#[test]
fn clusters_that_are_moved_are_encoded_again_unless_they_stay_whole() {
    for (before, marks) in [(CLUSTER, 2), (512, 0)] {
        let (source, all) = marked("qcow2", "cluster_size=64k", EMPTY_BLOCK, 0);
        let first = vec![b'x'; before];
        let (target, file) = image("qcow2", "cluster_size=64k", (before + all.len()) as u64);
        run(&[raw(first.clone()), source], &target, |conversion| {
            conversion.compress = true
        })
        .unwrap();
        assert_eq!(contents(&target), [first, all].concat(), "{before} bytes before");
        assert_eq!(
            count(&file.contents(), EMPTY_BLOCK),
            marks,
            "{before} bytes before"
        );
    }
}

#[test]
fn the_clusters_of_a_segment_are_one_write() {
    let bytes: Vec<u8> = (0..64).flat_map(words).collect();
    for (format, options) in [
        ("qcow2", "cluster_size=64k"),
        ("qcow2", "cluster_size=4k"),
        ("qcow", ""),
        ("vmdk", "subformat=streamOptimized"),
    ] {
        let (file, memory) = faulty(Vec::new());
        let device: Arc<dyn Device> = Arc::<FaultyDevice>::clone(&file);
        create(&device, format, options, bytes.len() as u64);
        let target = open(&device, format, None);
        // Sixteen segments, and writes of tables.
        file.arm(Fault::from(24).counting(Requests::Writes));
        run(&[raw(bytes.clone())], &target, |conversion| {
            conversion.compress = true
        })
        .unwrap_or_else(|error| panic!("{format} {options}: {}", error.chain()));
        file.disarm();
        drop(target);
        let device: Arc<dyn Device> = memory;
        assert!(
            contents(&open(&device, format, None)) == bytes,
            "{format} {options}"
        );
    }
}

#[test]
fn encoded_clusters_are_written_in_any_order_and_freed_if_they_are_not() {
    for (format, options) in [
        ("qcow2", "cluster_size=64k"),
        ("qcow2", "cluster_size=64k,compression_type=zstd"),
        ("vmdk", "subformat=streamOptimized"),
    ] {
        let [plain, dropped] = [false, true].map(|drops| {
            let (target, file) = image(format, options, 4 * CLUSTER as u64);
            let mut encoder = target.layer().encoder(None).unwrap().unwrap();
            let (mut clusters, mut all, mut one) = (Vec::new(), Vec::new(), Vec::new());
            for index in 0..4 {
                assert!(encoder.encode(&words(index), &mut one).unwrap());
                clusters.push(EncodedCluster {
                    offset: (index * CLUSTER) as u64,
                    bytes: all.len()..all.len() + one.len(),
                });
                all.extend_from_slice(&one);
            }
            if drops {
                drop(target.begin_encoded(&clusters[1..]).unwrap());
            }
            let first = target.begin_encoded(&clusters[..2]).unwrap();
            let second = target.begin_encoded(&clusters[2..]).unwrap();
            second.finish(&all).unwrap();
            assert!(first.finish(&all[..10]).is_err(), "bytes are missing");
            let first = target.begin_encoded(&clusters[..2]).unwrap();
            first.finish(&all).unwrap();
            target.flush().unwrap();
            assert!(
                contents(&target) == (0..4).flat_map(words).collect::<Vec<_>>(),
                "{format} {options}"
            );
            without_descriptor(format, &file.contents())
        });
        assert!(
            plain == dropped,
            "{format} {options}: what was dropped takes room"
        );
        let (target, _) = image(format, options, 4 * CLUSTER as u64);
        let cluster = |index: usize| EncodedCluster {
            offset: (index * CLUSTER) as u64,
            bytes: 0..9,
        };
        for wrong in [vec![], vec![cluster(1), cluster(1)], vec![cluster(1), cluster(0)]] {
            assert!(target.begin_encoded(&wrong).is_err(), "{format}: {wrong:?}");
        }
    }
}

#[test]
fn with_a_level_all_clusters_are_encoded_anew() {
    let (source, all) = marked("qcow2", "cluster_size=64k", EMPTY_BLOCK, 0);
    let lens = ["1", "9"].map(|number| {
        let mut options = Options::new(&[OptionDef::COMPRESSION_LEVEL]);
        options.set(CompressionLevel::OPTION, number).unwrap();
        let (target, file) = image("qcow2", "cluster_size=64k", source.len());
        run(&[Arc::clone(&source)], &target, |conversion| {
            conversion.compress = true;
            conversion.compression_level = CompressionLevel::from_options(&options).unwrap();
        })
        .unwrap();
        assert_eq!(contents(&target), all);
        assert_eq!(count(&file.contents(), EMPTY_BLOCK), 0);
        file.contents().len()
    });
    assert!(lens[0] > lens[1], "{lens:?}");
}

#[test]
fn clusters_that_decode_to_zeroes_take_no_storage() {
    let (source, _) = image("qcow2", "cluster_size=64k", 2 * CLUSTER as u64);
    let mut encoded = Vec::new();
    let mut encoder = source.layer().encoder(None).unwrap().unwrap();
    encoder.encode(&vec![0; CLUSTER], &mut encoded).unwrap();
    encoded.splice(0..0, EMPTY_BLOCK.iter().copied());
    source.write_encoded(0, &encoded).unwrap();
    let (target, _) = image("qcow2", "cluster_size=64k", 2 * CLUSTER as u64);
    run(&[source], &target, |conversion| conversion.compress = true).unwrap();
    let extent = target.status(ByteRange::new(0, 2 * CLUSTER as u64), StatusDetail::Allocation);
    assert_eq!(extent.unwrap().kind, ExtentKind::Unallocated);
}
