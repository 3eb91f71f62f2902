//! Tests of qcow on devices in memory.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    Backing, ByteRange, CreateRequest, Device, EncodedCluster, Format, Image, Layer, MeasureSource,
    MemoryDevice, NewFiles, NodeOptions, Object, Objects, OpenContext, OpenRequest, Preallocation, Result,
    RunKind, Secret, ZeroMode,
};
use diskimage_testing::{Fault, FaultyDevice, Journal, RecordingDevice};
use proptest::prelude::*;

use super::QcowFormat;
use crate::testing::{contents, fill_in_steps, require_a_state_around};

/// A disk that needs more than one L2 table in every geometry but the largest.
const SIZE: u64 = 3 << 20;

const AES: &str = "encrypt.format=aes,encrypt.key-secret=s";

fn secrets() -> Arc<Objects> {
    let mut objects = Objects::new();
    let secret = Object::Secret(Secret::new(b"secret".to_vec()));
    objects.add("s", secret).expect("a new identifier");
    Arc::new(objects)
}

fn try_create(text: &str, size: u64) -> Result<Arc<MemoryDevice>> {
    let file = Arc::new(MemoryDevice::default());
    let mut options = Options::new(<dyn Format>::create_options(&QcowFormat));
    options.parse(text).expect("valid options");
    let objects = secrets();
    let plan = QcowFormat.plan_create(CreateRequest {
        name: "test",
        size,
        options: &options,
        objects: &objects,
    })?;
    NewFiles::only(Arc::<MemoryDevice>::clone(&file), |files| plan.write(files))?;
    Ok(file)
}

#[test]
fn a_file_is_as_long_as_was_measured() {
    for text in ["", "backing_file=below,backing_fmt=raw"] {
        let mut options = Options::new(<dyn Format>::create_options(&QcowFormat));
        options.parse(text).expect("valid options");
        let measured = |source: MeasureSource<'_>| {
            let measure = QcowFormat.measure(&options, source, &Objects::new());
            measure.expect("measures")
        };
        let file = create(text, SIZE);
        let empty = measured(MeasureSource::Size(SIZE));
        // Clusters that need not be copied, because the backing image has them, are not known.
        assert!(empty.required == file.len() || !text.is_empty());
        let backing = open_on(create("", SIZE), None);
        let image = open_on(file, (!text.is_empty()).then_some(&Arc::new(backing)));
        if text.is_empty() {
            image.write_at(&[1; 5000], 1 << 20).expect("writes");
            image.write_at(&[2; 1], 2 << 20).expect("writes");
            image.flush().expect("flushes");
            let used = measured(MeasureSource::Image(&image)).required;
            assert_eq!(used, image.layer().file().len());
        }
        image.write_at(&vec![3; index(SIZE)], 0).expect("writes");
        image.flush().expect("flushes");
        assert_eq!(empty.fully_allocated, image.layer().file().len(), "{text}");
    }
}

fn create(text: &str, size: u64) -> Arc<MemoryDevice> {
    try_create(text, size).expect("creates")
}

/// An empty image with clusters and L2 tables of other sizes than `create` makes.
fn with_geometry(text: &str, size: u64, cluster_bits: u8, l2_bits: u8) -> Arc<MemoryDevice> {
    let file = create(text, size);
    file.write_at(&[cluster_bits, l2_bits], 32).expect("memory");
    let mut l1_offset = [0; 8];
    file.read_at(&mut l1_offset, 40).expect("memory");
    let l1_len = size.div_ceil(1 << (cluster_bits + l2_bits)) * 8;
    let end = u64::from_be_bytes(l1_offset) + l1_len;
    let len = file.len().max(end);
    file.resize(len, Preallocation::Off).expect("memory");
    file
}

fn open_layer(file: Arc<dyn Device>, write: bool) -> Result<Arc<dyn Layer>> {
    let mut options = NodeOptions::new();
    options.set("encrypt.key-secret", "s");
    QcowFormat.open(OpenRequest {
        write,
        ..OpenRequest::new(
            file,
            "test",
            &mut options,
            &OpenContext::default().with_objects(secrets()),
        )
    })
}

fn open_on(file: Arc<dyn Device>, backing: Option<&Arc<Image>>) -> Image {
    let layer = open_layer(file, true).expect("opens");
    Image::new(layer, backing.cloned(), "test", true)
}

fn memory(bytes: &[u8]) -> Arc<dyn Device> {
    Arc::new(MemoryDevice::new(bytes.to_vec()))
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("small")
}

/// Writes the cluster at `guest` in its encoded form, as a conversion does.
fn write_compressed(image: &Image, guest: u64, cluster: &[u8]) -> Result<bool> {
    let mut out = Vec::new();
    let mut encoder = image.layer().encoder(None)?.expect("has one");
    let fits = encoder.encode(cluster, &mut out)?;
    if fits {
        image.write_encoded(guest, &out)?;
    }
    Ok(fits)
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Compressed(u64, u8),
    Zero(u64, u64, bool),
    Reopen,
    Empty,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = prop_oneof![
        0..SIZE,
        Just(2 << 20),
        (0..700u64).prop_map(|cluster| cluster * 4096)
    ];
    let step = prop_oneof![
        10 => (at.clone(), 1..20_000usize, 1..255u8).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        10 => (at.clone(), 1..255u8).prop_map(|(at, byte)| Step::Compressed(at, byte)),
        6 => (at, 1..50_000u64, any::<bool>()).prop_map(|(at, len, unmap)| Step::Zero(at, len, unmap)),
        3 => Just(Step::Reopen),
        1 => Just(Step::Empty),
    ];
    prop::collection::vec(step, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn an_image_is_a_vector_of_bytes(
        steps in steps(),
        backed in any::<bool>(),
        encrypted in any::<bool>(),
        bits in prop_oneof![Just((12, 9)), Just((9, 12)), Just((9, 6)), Just((16, 13)), Just((14, 6))],
    ) {
        let backing = backed.then(|| {
            let image = open_on(create("", SIZE - (512 << 10)), None);
            image.write_at(&vec![0xbb; index(image.len())], 0).expect("writes");
            Arc::new(image)
        });
        let mut text = if encrypted { AES.to_owned() } else { String::new() };
        if backed {
            text.push_str(if encrypted { ",backing_file=below" } else { "backing_file=below" });
        }
        let fresh = || {
            let mut bytes = vec![0; index(SIZE)];
            let shown = backing.as_ref().map_or(0, |backing| index(backing.len()));
            bytes[..shown].fill(0xbb);
            bytes
        };
        let file = with_geometry(&text, SIZE, bits.0, bits.1);
        let mut model = fresh();
        let mut image = open_on(file.clone(), backing.as_ref());
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    let at = index(at);
                    let end = (at + len).min(model.len());
                    model[at..end].fill(byte);
                    image.write_at(&model[at..end], at as u64).expect("writes");
                }
                Step::Compressed(at, byte) => {
                    let size = 1 << bits.0;
                    let at = at / size * size;
                    let mut cluster = vec![byte; index(size)];
                    cluster[7] = 0;
                    prop_assert!(write_compressed(&image, at, &cluster).expect("writes"));
                    let there = index(size.min(SIZE - at));
                    model[index(at)..][..there].copy_from_slice(&cluster[..there]);
                }
                Step::Zero(at, len, unmap) => {
                    let range = ByteRange::at(at, len).intersect(ByteRange::new(0, image.len()));
                    let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::KeepAllocated };
                    image.write_zeroes(range, mode).expect("zeroes");
                    model[index(range.start())..index(range.end())].fill(0);
                }
                Step::Reopen => {
                    image.flush().expect("flushes");
                    image = open_on(file.clone(), backing.as_ref());
                }
                Step::Empty => {
                    image.layer().make_empty().expect("empties");
                    image = open_on(file.clone(), backing.as_ref());
                    model = fresh();
                    prop_assert!(file.len() < 4096);
                }
            }
        }
        prop_assert!(contents(&image) == model);
        image.flush().expect("flushes");
        prop_assert!(contents(&open_on(file.clone(), backing.as_ref())) == model);
        prop_assert!(owners_of(&file.contents()).is_ok());
    }

    #[test]
    fn damage_is_no_panic(at in 0..20_000usize, bytes in prop::collection::vec(any::<u8>(), 1..12)) {
        let file = create("", SIZE);
        let image = open_on(file.clone(), None);
        image.write_at(&[7; 9000], 1000).expect("writes");
        prop_assert!(write_compressed(&image, 16_384, &[5; 4096]).expect("writes"));
        image.flush().expect("flushes");
        let mut damaged = file.contents();
        // Mostly in the header and at the start of tables.
        let at = [at % 64, 48 + at % 16, 4096 + at % 64, 12_288 + at % 128, at][at % 5];
        let end = (at + bytes.len()).min(damaged.len());
        if at < end {
            damaged[at..end].copy_from_slice(&bytes[..end - at]);
        }
        if let Ok(layer) = open_layer(memory(&damaged), true) {
            let image = Image::new(layer, None, "test", true);
            let len = image.len().min(1 << 20);
            let mut buf = vec![0; index(len)];
            let _ = image.read_at(&mut buf, 0);
            let _ = image.write_at(&buf, 0);
            let _ = image.write_zeroes(ByteRange::new(0, len), ZeroMode::Unmap);
            let _ = image.flush();
            let _ = image.layer().make_empty();
        }
    }
}

/// Parses the tables independently of the driver, and checks that no byte of the file has two owners and that the file
/// has all of them. Returns the number of clusters.
fn owners_of(bytes: &[u8]) -> std::result::Result<usize, String> {
    let word = |at: usize| {
        let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
        word.map_or(0, u64::from_be_bytes)
    };
    let (cluster_bits, l2_bits) = (bytes[32], bytes[33]);
    let l1 = index(word(40));
    let entries = word(24).div_ceil(1 << (cluster_bits + l2_bits));
    let mut owners = vec![(0, l1 + index(entries) * 8)];
    let mut clusters = 0;
    for entry in 0..index(entries) {
        let l2 = index(word(l1 + entry * 8));
        if l2 == 0 {
            continue;
        }
        owners.push((l2, l2 + (8 << l2_bits)));
        for entry in 0..1 << l2_bits {
            let entry = word(l2 + entry * 8);
            let shift = 63 - cluster_bits;
            if entry == 0 {
                continue;
            }
            clusters += 1;
            owners.push(if entry >> 63 == 1 {
                let start = index(entry & ((1 << shift) - 1));
                (start, start + index((entry << 1) >> (shift + 1)))
            } else {
                (index(entry), index(entry) + (1 << cluster_bits))
            });
        }
    }
    owners.sort_unstable();
    let overlap = owners.windows(2).find(|pair| pair[0].1 > pair[1].0);
    match (overlap, owners.last()) {
        (Some(pair), _) => Err(format!("{:x?} and {:x?} overlap", pair[0], pair[1])),
        (None, Some(last)) if last.1 > bytes.len() => Err(format!("{last:x?} is beyond the end")),
        _ => Ok(clusters),
    }
}

/// Changes the disk in steps, some of them with compressed clusters. Calls `seen` with the contents after each.
fn story(image: &Image, seen: impl FnMut(Vec<u8>)) {
    let steps = [
        (1000, 3000, 1),
        (2_097_152, 9000, 2),
        (500, 100, 3),
        (102_400, 4096, 4),
        (2_600_000, 4096, 0),
        (101_000, 10_000, 5),
        (1_003_520, 4096, 6),
    ];
    let write = |image: &Image, offset: u64, bytes: &[u8]| {
        if bytes[0].is_multiple_of(2) && bytes.len() == 4096 {
            assert!(write_compressed(image, offset, bytes)?);
            return Ok(());
        }
        image.write_at(bytes, offset)
    };
    fill_in_steps(image, &steps, write, seen);
}

#[test]
fn a_crash_leaves_leaked_clusters_at_worst() {
    let start = create("", SIZE).contents();
    let journal: Arc<Journal> = Arc::default();
    let image = open_on(Arc::new(RecordingDevice::new(start.clone(), 0, &journal)), None);
    let mut states = vec![(0, contents(&image))];
    story(&image, |state| states.push((journal.len(), state)));
    let mut most = 0;
    let count = journal.crashes(&[start], 12, 0x5eed, |crash| {
        let bytes = &crash.files[0];
        let position = format!("at {} ({})", crash.position, crash.kept);
        let clusters = owners_of(bytes).unwrap_or_else(|error| panic!("{error} {position}"));
        most = most.max(clusters);
        let layer = open_layer(memory(bytes), false).expect("opens");
        // Every byte is as it was after one of the steps around the crash.
        let now = contents(&Image::new(layer, None, "test", false));
        require_a_state_around(&states, crash, &now);
    });
    assert!(count > 50 && most > 5, "{count} crashes, {most} clusters");
}

#[test]
fn a_crash_leaves_an_image_as_it_was_or_empty() {
    let file = create("", SIZE);
    let image = open_on(file.clone(), None);
    image.write_at(&[1; 10_000], 0).expect("writes");
    image.write_at(&[2; 10_000], 2 << 20).expect("writes");
    image.flush().expect("flushes");
    let (start, full) = (file.contents(), contents(&image));
    let journal: Arc<Journal> = Arc::default();
    let layer = open_layer(Arc::new(RecordingDevice::new(start.clone(), 0, &journal)), true).expect("opens");
    layer.make_empty().expect("empties");
    layer.flush().expect("flushes");
    let mut seen = [false; 2];
    journal.crashes(&[start], 12, 7, |crash| {
        let layer = open_layer(memory(&crash.files[0]), false).expect("opens");
        let now = contents(&Image::new(layer, None, "test", false));
        // Each table is either durable or missing.
        for half in [0..1 << 20, 2 << 20..3 << 20] {
            let is_empty = now[half.clone()].iter().all(|byte| *byte == 0);
            assert!(is_empty || now[half.clone()] == full[half]);
            seen[usize::from(is_empty)] = true;
        }
    });
    assert_eq!(seen, [true; 2]);
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    for (after, compressed) in (0..12).flat_map(|after| [(after, false), (after, true)]) {
        let below = create("", SIZE);
        let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&below)));
        let image = open_on(Arc::<FaultyDevice>::clone(&faulty), None);
        image.write_at(&[1; 8192], 0).expect("writes");
        image.flush().expect("flushes");
        faulty.arm(Fault::once(after));
        let written = if compressed {
            write_compressed(&image, 2 << 20, &[2; 4096]).map(drop)
        } else {
            image.write_at(&[2; 4096], 2 << 20)
        };
        let failed = written.is_err() | image.flush().is_err();
        faulty.disarm();
        image.write_at(&[3; 4096], 4096).expect("writes again");
        assert!(write_compressed(&image, 8192, &[4; 4096]).expect("writes again"));
        image.flush().expect("flushes again");
        let now = contents(&open_on(below.clone(), None));
        assert_eq!(now[0], 1);
        assert_eq!(now[4096], 3);
        assert_eq!(now[8192], 4);
        let later = &now[2 << 20..(2 << 20) + 4096];
        assert!(later == [2; 4096] || failed && later == [0; 4096], "{after}");
        owners_of(&below.contents()).expect("one owner each");
    }
}

#[test]
fn many_threads_write_at_once() {
    for text in ["", AES] {
        let file = create(text, SIZE);
        let image = open_on(file.clone(), None);
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let image = &image;
                scope.spawn(move || {
                    for i in 0..40u64 {
                        let at = (i * 4 + u64::from(thread)) * 16_384;
                        image.write_at(&[thread + 1; 5000], at).expect("writes");
                        let cluster = [thread + 11; 4096];
                        assert!(write_compressed(image, at + 8192, &cluster).expect("writes"));
                    }
                });
            }
        });
        image.flush().expect("flushes");
        let now = contents(&open_on(file.clone(), None));
        for (chunk, bytes) in now.chunks(16_384).take(160).enumerate() {
            let thread = u8::try_from(chunk % 4).expect("small");
            assert!(bytes[..5000].iter().all(|byte| *byte == thread + 1), "{chunk}");
            assert!(
                bytes[8192..12_288].iter().all(|byte| *byte == thread + 11),
                "{chunk}"
            );
        }
        assert_eq!(owners_of(&file.contents()), Ok(160 * 3));
    }
}

#[test]
fn a_cluster_that_has_a_place_can_be_compressed_all_the_same() {
    let file = create("", SIZE);
    let image = open_on(file.clone(), None);
    image.write_at(&[1; 8192], 0).expect("writes");
    assert!(write_compressed(&image, 0, &[2; 4096]).expect("writes"));
    assert!(write_compressed(&image, 0, &[3; 4096]).expect("writes"));
    image.write_at(&[4; 10], 100).expect("writes");
    let now = contents(&image);
    assert_eq!(now[0], 3);
    assert_eq!(now[100], 4);
    assert_eq!(now[110], 3);
    assert_eq!(now[4096], 1);
    image.flush().expect("flushes");
    owners_of(&file.contents()).expect("one owner each");
}

#[test]
fn compressed_clusters_have_a_length_in_their_entry() {
    for bits in [9, 12, 16] {
        let file = with_geometry("", SIZE, bits, 9);
        let image = open_on(file.clone(), None);
        let size = 1 << bits;
        assert!(write_compressed(&image, 0, &vec![9; size]).expect("writes"));
        image.flush().expect("flushes");
        let RunKind::Encoded(encoded) = image.layer().map(ByteRange::at(10, 1)).expect("maps").kind else {
            panic!("not encoded");
        };
        assert_eq!(encoded.cluster, ByteRange::at(0, size as u64));
        assert_eq!(encoded.offset + encoded.stored, file.len());
        assert!(encoded.offset.is_multiple_of(512));
    }
}

#[test]
fn encoded_forms_that_are_none_are_refused() {
    let write_encoded = |layer: &Arc<dyn Layer>, offset, bytes: &[u8]| {
        let codec = layer.codec().expect("qcow compresses");
        let bytes_of = 0..bytes.len();
        codec
            .plan_encoded(&[EncodedCluster {
                offset,
                bytes: bytes_of,
            }])?
            .finish(bytes)
    };
    let layer = open_layer(create("", SIZE), true).expect("opens");
    for (offset, len) in [(0, 0), (0, 4096), (100, 10)] {
        assert!(
            write_encoded(&layer, offset, &vec![1; len]).is_err(),
            "{offset} {len}"
        );
    }
    let layer = open_layer(create("", SIZE), false).expect("opens");
    assert!(write_encoded(&layer, 0, &[1; 10]).is_err());
    assert!(layer.make_empty().is_err());
}

#[test]
fn small_clusters_lie_over_other_images() {
    let long = "n".repeat(1023);
    for name in ["below", &long] {
        let file = create(&format!("backing_file={name}"), SIZE);
        let layer = open_layer(file.clone(), true).expect("opens");
        assert_eq!(layer.granularity(), 512);
        let backing = Backing {
            name: name.into(),
            format: None,
        };
        assert_eq!(layer.backing(), Some(backing.clone()));
        let len = file.len();
        layer.make_empty().expect("empties");
        assert_eq!(
            open_layer(file.clone(), true).expect("opens").backing(),
            Some(backing)
        );
        assert!(file.len() <= len);
    }
    assert!(try_create(&format!("backing_file={long}n"), SIZE).is_err());
}

#[test]
fn disks_are_as_large_as_the_table_may_be() {
    let most = ((1 << 28) - 1) << 21;
    let file = create("", 4 << 20);
    file.write_at(&u64::to_be_bytes(most), 24).expect("memory");
    let layer = open_layer(file.clone(), false).expect("opens");
    // The file has one sector of the table, 64 entries.
    let run = layer.map(ByteRange::new(2 << 20, most)).expect("maps");
    assert_eq!(run.len, 63 << 21);
    assert!(layer.map(ByteRange::new(64 << 21, most)).is_err(), "cut off");
    file.write_at(&u64::to_be_bytes(most + 1), 24).expect("memory");
    let error = open_layer(file, false)
        .map(drop)
        .map_err(|error| error.to_string());
    assert_eq!(error, Err("Image too large".to_owned()));
    let error = try_create("", most + 1)
        .map(drop)
        .map_err(|error| error.to_string());
    assert_eq!(error, Err("Image too large".to_owned()));
}

#[test]
fn nothing_lies_in_the_table_or_beyond_the_end() {
    let file = create("", SIZE);
    let image = open_on(file.clone(), None);
    image.write_at(&[1; 8192], 0).expect("writes");
    image.flush().expect("flushes");
    let good = file.contents();
    let l2 = 4096_u64;
    for (at, word) in [
        (48, l2 + 1),
        (48, 1 << 40),
        (48, good.len() as u64),
        (48, (good.len() - 512) as u64),
        (l2, 8193),
        (l2, good.len() as u64),
        (l2, 1 << 62),
        (l2, (1 << 63) | (1 << 51) | good.len() as u64),
        (l2, (1 << 63) | (100 << 51) | (good.len() - 50) as u64),
    ] {
        let bad = MemoryDevice::new(good.clone());
        bad.write_at(&word.to_be_bytes(), at).expect("memory");
        let image = open_on(Arc::new(bad), None);
        assert!(image.read_at(&mut [0; 100], 0).is_err(), "{word:#x} at {at}");
    }
    let beyond = MemoryDevice::new(good.clone());
    beyond.write_at(&u64::to_be_bytes(1 << 40), 40).expect("memory");
    let beyond: Arc<dyn Device> = Arc::new(beyond);
    assert!(open_layer(Arc::clone(&beyond), true).is_err());
    assert!(open_layer(beyond, false).is_ok());
    // The header's L1 table offset is that of a cluster.
    let moved = MemoryDevice::new(good.clone());
    moved.write_at(&8192_u64.to_be_bytes(), 40).expect("memory");
    moved.write_at(&l2.to_be_bytes(), 8192).expect("memory");
    let image = open_on(Arc::new(moved), None);
    assert!(image.read_at(&mut [0; 100], 0).is_err());
    assert!(image.read_at(&mut [0; 100], 4096).is_ok());
}

#[test]
fn a_table_over_the_header_is_neither_read_nor_written() {
    let file = create("", SIZE);
    for at in [0_u64, 8, 40] {
        file.write_at(&at.to_be_bytes(), 40).expect("memory");
        assert!(open_layer(Arc::<MemoryDevice>::clone(&file) as Arc<dyn Device>, true).is_err());
        let layer = open_layer(Arc::<MemoryDevice>::clone(&file) as Arc<dyn Device>, false)
            .expect("opens for reading");
        let image = Image::new(layer, None, "test", false);
        let error = image.read_at(&mut [0; 512], 0).expect_err("no table");
        assert_eq!(error.chain(), "The L1 table overlaps the header");
    }
}

#[test]
fn nothing_is_written_where_tables_are_or_seem_to_be() {
    let file = create("", SIZE);
    let image = open_on(file.clone(), None);
    image.write_at(&[7; 4096], 0).expect("writes");
    image.flush().expect("flushes");
    let (good, l1, l2, cluster) = (file.contents(), 48, 4096, 8192_u64);
    for (at, word, guest) in [
        (l2, 4096_u64, 0),
        (l2, 4096 + 512, 0),
        (l2, 512, 0),
        (l1, cluster, 8192),
        (l1, cluster + 512, 8192),
        // Another L1 entry refers to the same table.
        (l1 + 8, 4096, (2 << 20) + 8192),
    ] {
        let bad = Arc::new(MemoryDevice::new(good.clone()));
        bad.write_at(&word.to_be_bytes(), at).expect("memory");
        let before = bad.contents();
        let image = open_on(bad.clone(), None);
        assert!(image.write_at(&[1; 512], guest).is_err(), "{word:#x} at {at:#x}");
        image.flush().expect("flushes");
        assert!(bad.contents() == before, "{word:#x} at {at:#x}");
    }
}

/// One plan, whose clusters two L2 tables map: it allocates once for each table.
#[test]
fn a_dropped_plan_frees_all_that_it_allocated() {
    let file = create("", SIZE);
    let border = 2 << 20;
    let image = open_on(file.clone(), None);
    image.write_at(&[7; 512], 0).expect("writes");
    image.write_at(&[7; 512], border + 65536).expect("writes");
    drop(image);
    let before = file.contents();
    let layer = open_layer(file.clone(), true).expect("opens");
    let plan = layer.plan_write(ByteRange::new(border - 8192, border + 8192));
    assert_eq!(file.len() - before.len() as u64, 16384);
    drop(plan.expect("has storage"));
    assert_eq!(file.len(), before.len() as u64);
}
