//! Changes of an image are durable after a drop, a close and a flush.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use diskimage::{
    BucketConfig, ByteRange, Creation, Device, ErrorKind, Image, MemoryDevice, NewBitmap, NodeOptions,
    Object, Objects, OpenOptions, Preallocation, Progress, Repair, Secret, SnapshotSelector, ThrottleGroup,
    ThrottleLimits, ZeroMode, apply_snapshot, create_snapshot, delete_snapshot, list_snapshots, open,
    open_device, open_node, open_snapshot,
};
use diskimage_testing::{Fault, FaultyDevice, Requests, contents};

/// The formats that can be written, with options for new images.
const IMAGES: [(&str, &str); 24] = [
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "lazy_refcounts=on"),
    ("qcow2", "extended_l2=on,cluster_size=32k"),
    ("qcow2", "refcount_bits=64,cluster_size=512"),
    ("qcow2", "data_file=data"),
    ("qcow2", "data_file=data,data_file_raw=on"),
    (
        "qcow2",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
    ),
    ("qcow2", "encrypt.format=aes,encrypt.key-secret=key"),
    ("qcow", ""),
    ("qcow", "encrypt.format=aes,encrypt.key-secret=key"),
    ("qed", ""),
    ("qed", "cluster_size=4k,table_size=1"),
    ("vdi", ""),
    ("vpc", "force_size=on"),
    ("vpc", "force_size=on,subformat=fixed"),
    ("vmdk", ""),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=streamOptimized"),
    ("vhdx", ""),
    ("parallels", ""),
    ("luks", "key-secret=key,iter-time=10"),
];

const SIZE: u64 = 4 << 20;

/// A multiple of the clusters of all formats: every format can write, zero and discard whole units in place.
const UNIT: u64 = 64 << 10;

/// The ways to end the use of an image.
#[derive(Clone, Copy, Debug)]
enum End {
    Drop,
    Close,
    Flush,
}

const ENDS: [End; 3] = [End::Drop, End::Close, End::Flush];

impl End {
    fn of(self, image: Arc<Image>) {
        match self {
            Self::Drop => drop(image),
            Self::Close => image.close().expect("closes"),
            Self::Flush => image.flush().expect("flushes"),
        }
    }
}

/// The name of a change of a disk, and its function.
type Change = (&'static str, fn(&Image) -> diskimage::Result<()>);

/// The changes of a disk.
const CHANGES: [Change; 6] = [
    ("write", |image| image.write_at(&block(7), 9 * UNIT)),
    ("rewrite", |image| match image.layer().needs_encoding() {
        true => Ok(()),
        false => image.write_at(&block(8), UNIT),
    }),
    ("write zeroes", |image| {
        image.write_zeroes(ByteRange::at(11 * UNIT, 2 * UNIT), ZeroMode::Unmap)
    }),
    ("zero what has data", |image| {
        match image.layer().needs_encoding() {
            true => Ok(()),
            false => image.write_zeroes(ByteRange::at(2 * UNIT, 2 * UNIT), ZeroMode::KeepAllocated),
        }
    }),
    ("discard", |image| image.discard(ByteRange::at(UNIT, 3 * UNIT))),
    ("resize", |image| {
        match image.resize(2 * SIZE, Preallocation::Off) {
            Err(error) if error.kind() == ErrorKind::Unsupported || image.layer().format() == "vmdk" => {
                Ok(())
            }
            other => other,
        }
    }),
];

fn block(byte: u8) -> Vec<u8> {
    vec![byte; usize::try_from(UNIT).expect("small")]
}

/// A directory with an image, and the options to open it.
struct Scratch {
    dir: tempfile::TempDir,
    format: &'static str,
    objects: Arc<Objects>,
    encrypted: bool,
}

impl Scratch {
    /// Creates an image with data in its units 1 to 5.
    fn new(format: &'static str, options: &str) -> Self {
        let mut objects = Objects::default();
        objects
            .add("key", Object::Secret(Secret::new(b"0123456789abcdef".to_vec())))
            .expect("new");
        let scratch = Self {
            dir: tempfile::tempdir().expect("there is a temporary directory"),
            format,
            objects: Arc::new(objects),
            encrypted: options.contains("key-secret"),
        };
        let data = format!("data_file={}", scratch.path("data"));
        Creation::new(scratch.path("disk"), format)
            .size(SIZE)
            .options(options.replace("data_file=data", &data))
            .opening(OpenOptions::new().objects(Arc::clone(&scratch.objects)))
            .prepare()
            .and_then(|prepared| prepared.create())
            .expect("is made");
        let image = scratch.open(true);
        for unit in 1..6 {
            image.write_at(&block(1), unit * UNIT).expect("writes");
        }
        image.flush().expect("flushes");
        drop(image);
        scratch
    }

    fn path(&self, name: &str) -> String {
        let path: &Path = self.dir.path();
        path.join(name).to_str().expect("is text").to_owned()
    }

    fn open(&self, write: bool) -> Arc<Image> {
        let mut node = NodeOptions::new();
        if self.encrypted {
            let prefix = if self.format == "luks" { "" } else { "encrypt." };
            node.set(&format!("{prefix}key-secret"), "key");
        }
        let options = OpenOptions::new()
            .format(self.format)
            .write(write)
            .resize(write)
            .node_options(node)
            .objects(Arc::clone(&self.objects));
        open(&self.path("disk"), &options).expect("opens")
    }

    fn require_clean(&self, what: &str) {
        match self.open(false).layer().check(Repair::No, &Progress::none()) {
            Ok(report) => {
                assert_eq!(report.corruptions, 0, "{what}");
                assert_eq!(report.leaks, 0, "{what}");
                assert_eq!(report.check_errors, 0, "{what}");
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{what}: {error:?}"),
        }
    }
}

#[test]
fn every_change_of_every_format_is_kept() {
    for (format, options) in IMAGES {
        for (name, change) in CHANGES {
            for end in ENDS {
                let what = format!("{format} {options}: {name}, {end:?}");
                let scratch = Scratch::new(format, options);
                let image = scratch.open(true);
                change(&image).unwrap_or_else(|error| panic!("{what}: {error:?}"));
                let expected = contents(&image);
                end.of(image);
                assert!(contents(&scratch.open(false)) == expected, "{what}");
                scratch.require_clean(&what);
            }
        }
    }
}

#[test]
fn all_changes_together_are_kept() {
    for (format, options) in IMAGES {
        for end in ENDS {
            let what = format!("{format} {options}: {end:?}");
            let scratch = Scratch::new(format, options);
            let image = scratch.open(true);
            for (_, change) in CHANGES {
                change(&image).unwrap_or_else(|error| panic!("{what}: {error:?}"));
            }
            let expected = contents(&image);
            end.of(image);
            assert!(contents(&scratch.open(false)) == expected, "{what}");
            scratch.require_clean(&what);
        }
    }
}

#[test]
fn snapshots_and_writes_around_them_are_kept() {
    for (format, options) in IMAGES {
        for end in ENDS {
            let scratch = Scratch::new(format, options);
            let image = scratch.open(true);
            if image
                .layer()
                .snapshots()
                .is_none_or(|snapshots| snapshots.check_support().is_err())
            {
                continue;
            }
            image.write_at(&block(2), 9 * UNIT).expect("writes");
            create_snapshot(&image, "one", UNIX_EPOCH).expect("is taken");
            let one = contents(&image);
            image.write_at(&block(3), 9 * UNIT).expect("writes");
            create_snapshot(&image, "two", UNIX_EPOCH).expect("is taken");
            delete_snapshot(&image, "two").expect("is deleted");
            image.write_at(&block(4), 10 * UNIT).expect("writes");
            let last = contents(&image);
            end.of(image);
            let image = scratch.open(false);
            assert!(contents(&image) == last, "{options} {end:?}");
            assert_eq!(list_snapshots(&image).expect("readable").len(), 1);
            let snapshot = open_snapshot(&image, &SnapshotSelector::Either("one".to_owned())).expect("opens");
            assert!(contents(&snapshot) == one, "{options} {end:?}");
            drop((image, snapshot));
            scratch.require_clean(options);
            let image = scratch.open(true);
            image.write_at(&block(5), 10 * UNIT).expect("writes");
            apply_snapshot(&image, "one").expect("is applied");
            end.of(image);
            assert!(contents(&scratch.open(false)) == one, "{options} {end:?}");
            scratch.require_clean(options);
        }
    }
}

#[test]
fn bitmaps_and_their_dirty_ranges_are_kept() {
    for end in ENDS {
        let scratch = Scratch::new("qcow2", "");
        let image = scratch.open(true);
        let bitmaps = image.layer().bitmaps().expect("it has some");
        for (name, enabled) in [("on", true), ("off", false)] {
            let bitmap = NewBitmap {
                name,
                granularity: Some(UNIT),
                enabled,
            };
            bitmaps.add(&bitmap).expect("is added");
        }
        image.write_at(&block(2), 9 * UNIT).expect("writes");
        bitmaps
            .mark("off", &[ByteRange::at(3 * UNIT, 1)])
            .expect("is marked");
        image.write_at(&block(2), 11 * UNIT).expect("writes");
        end.of(image);
        let image = scratch.open(false);
        let bitmaps = image.layer().bitmaps().expect("it has some");
        let all = bitmaps.list().expect("readable");
        assert!(all.iter().all(|bitmap| !bitmap.inconsistent), "{end:?}: {all:?}");
        for (name, units) in [("on", vec![9, 11]), ("off", vec![3])] {
            let mut marked = Vec::new();
            let mut add = |range: ByteRange| {
                marked.extend(range.start() / UNIT..range.end() / UNIT);
                Ok(())
            };
            bitmaps.marked(name, &mut add).expect("readable");
            assert_eq!(marked, units, "{end:?}: {name}");
        }
        scratch.require_clean("bitmaps");
    }
}

/// Opens the nodes of an option list, in which `DIR` stands for the directory.
fn open_list(list: &str, scratch: &Scratch) -> Arc<Image> {
    let list = list.replace("DIR", &scratch.path(""));
    let options = OpenOptions::new()
        .write(true)
        .resize(true)
        .objects(Arc::clone(&scratch.objects));
    open_node(NodeOptions::from_list(&list).expect("options"), &options).expect("opens")
}

fn no_limits() -> Object {
    let rates = [BucketConfig {
        max_length: 1,
        ..BucketConfig::default()
    }; 3];
    let group = ThrottleGroup::new(ThrottleLimits {
        bytes: rates,
        requests: rates,
        request_size: 0,
    });
    Object::ThrottleGroup(Arc::new(group.expect("no contradiction")))
}

#[test]
fn writes_through_stacked_nodes_are_kept() {
    let stacks = [
        "driver=qcow2,file.driver=preallocate,file.prealloc-size=1M,file.file.filename=DIR/disk",
        "driver=throttle,throttle-group=limits,file.driver=qcow2,file.file.filename=DIR/disk",
        "driver=compress,file.driver=qcow2,file.file.filename=DIR/disk",
        "driver=raw,file.driver=qcow2,file.file.filename=DIR/disk",
        "driver=raw,size=4M,offset=0,file.driver=qcow2,file.file.driver=file,file.file.filename=DIR/disk",
        "driver=blkdebug,image.driver=qcow2,image.file.filename=DIR/disk",
        "driver=blklogwrites,file.driver=qcow2,file.file.filename=DIR/disk,log.filename=DIR/log",
        "driver=blkverify,test.driver=qcow2,test.file.filename=DIR/disk,raw.filename=DIR/copy",
        "driver=quorum,vote-threshold=1,children.0.driver=qcow2,children.0.file.filename=DIR/disk,\
         children.1.driver=raw,children.1.file.filename=DIR/copy",
    ];
    for stack in stacks {
        for end in [End::Drop, End::Close] {
            let mut scratch = Scratch::new("qcow2", "");
            Arc::get_mut(&mut scratch.objects)
                .expect("only one")
                .add("limits", no_limits())
                .expect("new");
            std::fs::write(scratch.path("copy"), contents(&scratch.open(false))).expect("is written");
            std::fs::write(scratch.path("log"), []).expect("is written");
            let image = open_list(stack, &scratch);
            image.write_at(&block(7), 9 * UNIT).expect(stack);
            image
                .write_zeroes(ByteRange::at(UNIT, UNIT), ZeroMode::Unmap)
                .expect(stack);
            let expected = contents(&image);
            end.of(image);
            assert!(contents(&scratch.open(false)) == expected, "{stack}: {end:?}");
            scratch.require_clean(stack);
            if stack.contains("log") {
                // The number of entries in the superblock.
                let log = std::fs::read(scratch.path("log")).expect("readable");
                assert_ne!(log[16..24], [0; 8], "{stack}: {end:?}");
            }
        }
    }
}

#[test]
fn data_copied_on_read_is_kept() {
    let scratch = Scratch::new("qcow2", "");
    let top = Creation::new(scratch.path("top"), "qcow2")
        .backing_file("disk")
        .backing_format("qcow2");
    top.prepare()
        .and_then(|prepared| prepared.create())
        .expect("is made");
    let image = open_list(
        "driver=copy-on-read,file.driver=qcow2,file.file.filename=DIR/top",
        &scratch,
    );
    let expected = contents(&image);
    drop(image);
    let options = OpenOptions::new().no_backing(true);
    assert!(contents(&open(&scratch.path("top"), &options).expect("opens")) == expected);
}

#[test]
fn an_image_with_another_reference_is_flushed_but_not_closed() {
    let scratch = Scratch::new("qcow2", "");
    let image = scratch.open(true);
    let other = Arc::clone(&image);
    image.write_at(&block(7), 0).expect("writes");
    let error = image.close().expect_err("it has another reference");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.chain(), "Image is still in use");
    other.write_at(&block(8), UNIT).expect("it is open");
    other.close().expect("it is the last reference");
}

/// The names and messages that `on_lost` was called with.
type Losses = Arc<Mutex<Vec<(String, String)>>>;

/// Opens the image in `bytes` on a faulty device, and records lost changes.
fn open_faulty(bytes: Vec<u8>) -> (Arc<Image>, Arc<FaultyDevice>, Arc<MemoryDevice>, Losses) {
    let memory = Arc::new(MemoryDevice::new(bytes));
    let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory)));
    let losses = Losses::default();
    let record = Arc::clone(&losses);
    let options = OpenOptions::new()
        .format("qcow2")
        .write(true)
        .on_lost(Arc::new(move |name, error| {
            record
                .lock()
                .expect("no panic")
                .push((name.to_owned(), error.chain()));
        }));
    let device: Arc<dyn Device> = Arc::<FaultyDevice>::clone(&faulty);
    let image = open_device(device, "disk", &options).expect("opens");
    (image, faulty, memory, losses)
}

#[test]
fn a_drop_reports_changes_that_cannot_be_written_back() {
    let scratch = Scratch::new("qcow2", "");
    let (image, faulty, _, losses) = open_faulty(std::fs::read(scratch.path("disk")).expect("readable"));
    image.write_at(&block(7), 9 * UNIT).expect("writes");
    faulty.arm(Fault::from(0));
    drop(image);
    let losses = losses.lock().expect("no panic");
    assert_eq!(*losses, [("disk".to_owned(), "Input/output error".to_owned())]);
}

#[test]
fn after_a_failed_write_back_a_drop_writes_nothing() {
    let scratch = Scratch::new("qcow2", "");
    let (image, faulty, memory, losses) = open_faulty(std::fs::read(scratch.path("disk")).expect("readable"));
    image.write_at(&block(7), 9 * UNIT).expect("writes");
    faulty.arm(Fault::once(0).counting(Requests::Writes));
    image.flush().expect_err("the first table cannot be written");
    let before = memory.contents();
    drop(image);
    assert!(memory.contents() == before);
    assert_eq!(losses.lock().expect("no panic").len(), 1);
}

#[test]
fn close_after_a_failed_write_back_is_an_error() {
    let scratch = Scratch::new("qcow2", "");
    let (image, faulty, ..) = open_faulty(std::fs::read(scratch.path("disk")).expect("readable"));
    image.write_at(&block(7), 9 * UNIT).expect("writes");
    faulty.arm(Fault::once(0).counting(Requests::Writes));
    image.flush().expect_err("the first table cannot be written");
    let error = image.close().expect_err("an earlier write back failed");
    assert_eq!(
        error.chain(),
        "Changes were not written back since an earlier one failed"
    );
}

#[test]
fn data_written_before_the_disk_was_full_is_kept() {
    let scratch = Scratch::new("qcow2", "");
    let (image, faulty, memory, losses) = open_faulty(std::fs::read(scratch.path("disk")).expect("readable"));
    image.write_at(&block(7), 9 * UNIT).expect("writes");
    faulty.limit_len(memory.len());
    image.write_at(&block(8), 10 * UNIT).expect_err("it is full");
    drop(image);
    assert!(losses.lock().expect("no panic").is_empty());
    let (image, ..) = open_faulty(memory.contents());
    let bytes = contents(&image);
    let unit = usize::try_from(UNIT).expect("small");
    assert!(bytes[9 * unit..10 * unit] == block(7) && bytes[10 * unit..11 * unit] == vec![0; unit]);
}

#[test]
fn a_refused_change_leaves_earlier_writes_intact() {
    let scratch = Scratch::new("qcow2", "");
    let image = scratch.open(true);
    image.write_at(&block(7), 9 * UNIT).expect("writes");
    image.write_at(&block(7), SIZE).expect_err("beyond the end");
    image.resize(1 << 62, Preallocation::Off).expect_err("too large");
    apply_snapshot(&image, "missing").expect_err("there is none");
    drop(image);
    let unit = usize::try_from(UNIT).expect("small");
    assert!(contents(&scratch.open(false))[9 * unit..10 * unit] == block(7));
}

#[test]
fn a_pending_write_that_is_dropped_changes_nothing() {
    for (format, options) in IMAGES {
        let scratch = Scratch::new(format, options);
        let image = scratch.open(true);
        let before = contents(&image);
        drop(image.begin_write(ByteRange::at(9 * UNIT, UNIT)).expect("begins"));
        drop(image);
        assert!(contents(&scratch.open(false)) == before, "{format} {options}");
        scratch.require_clean(format);
    }
}
