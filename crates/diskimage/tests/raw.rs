//! Raw images through the public functions of the library.

use std::fs;
use std::sync::{Arc, Mutex};

use diskimage::{
    ByteRange, CacheMode, Creation, Device, ErrorKind, ExtentKind, MeasureSource, Note, Objects, OpenOptions,
    StatusDetail, ZeroMode, format_by_name, open, options::Options,
};

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is a temporary directory"))
    }

    fn path(&self, name: &str) -> String {
        let path = self.0.path().join(name);
        path.to_str().expect("is text").to_owned()
    }

    fn create(&self, name: &str, size: u64, options: &str) -> diskimage::Result<()> {
        Creation::new(self.path(name), "raw")
            .size(size)
            .options(options)
            .prepare()?
            .create()
    }
}

fn raw() -> OpenOptions {
    OpenOptions::new().format("raw")
}

fn message<T>(result: diskimage::Result<T>) -> String {
    result.map(drop).expect_err("fails").chain()
}

#[test]
fn a_new_image_has_whole_sectors_and_one_block() {
    let scratch = Scratch::new();
    scratch.create("a", 1000, "").expect("is made");
    let image = open(&scratch.path("a"), &raw()).expect("opens");
    assert_eq!(image.len(), 1024);
    scratch.create("b", 1 << 20, "").expect("is made");
    let image = open(&scratch.path("b"), &raw()).expect("opens");
    assert!(image.allocated_bytes() > Some(0), "the first block is allocated");
    assert!(image.layer().is_zero_when_new());
}

#[test]
fn the_rest_of_the_last_sector_reads_as_zero() {
    let scratch = Scratch::new();
    let path = scratch.path("a");
    fs::write(&path, vec![7; 1000]).expect("is written");
    let image = open(&path, &raw()).expect("opens");
    let mut bytes = vec![1; 1024];
    image.read_at(&mut bytes, 0).expect("reads");
    assert!(bytes[..1000].iter().all(|b| *b == 7) && diskimage::is_zero(&bytes[1000..]));
    let data = image
        .status(ByteRange::new(0, 1024), StatusDetail::Zeroes)
        .expect("is known");
    assert_eq!(data.len, 1000);
    assert_eq!(data.kind, ExtentKind::Data);
    let rest = image
        .status(ByteRange::new(1000, 1024), StatusDetail::Zeroes)
        .expect("is known");
    assert_eq!(rest.len, 24);
    assert_eq!(rest.kind, ExtentKind::Zero);
    assert_eq!(rest.host.map(|(_, offset)| offset), Some(1000));
}

#[test]
fn unknown_preallocation_modes_are_refused_before_the_file_is_emptied() {
    let scratch = Scratch::new();
    for mode in ["falloc", "full"] {
        scratch
            .create(mode, 1 << 20, &format!("preallocation={mode}"))
            .expect("is made");
        let image = open(&scratch.path(mode), &raw()).expect("opens");
        assert!(image.allocated_bytes() >= Some(1 << 20), "{mode}");
    }
    fs::write(scratch.path("a"), "kept").expect("is written");
    assert_eq!(
        message(scratch.create("a", 512, "preallocation=foo")),
        "invalid parameter value: foo"
    );
    assert_eq!(
        message(scratch.create("a", 512, "extent_size_hint=5G")),
        "Extent size hint is too large"
    );
    assert_eq!(fs::read(scratch.path("a")).expect("is there"), b"kept");
    assert_eq!(
        message(scratch.create("a", 512, "preallocation=metadata")),
        "Unsupported preallocation mode: metadata"
    );
}

#[test]
fn refused_creations_have_the_messages_of_qemu_img() {
    let scratch = Scratch::new();
    let prepare = |creation: Creation| message(creation.prepare());
    assert_eq!(prepare(Creation::new("x", "foo")), "Unknown file format 'foo'");
    assert_eq!(prepare(Creation::new("foo:x", "raw")), "Unknown protocol 'foo'");
    assert_eq!(
        prepare(Creation::new("x", "raw")),
        "Image creation needs a size parameter"
    );
    assert_eq!(
        prepare(Creation::new("x", "raw").backing_file("y").size(1)),
        "Backing file not supported for file format 'raw'"
    );
    assert_eq!(
        prepare(Creation::new("x", "raw").backing_format("raw").size(1)),
        "Backing file format not supported for file format 'raw'"
    );
    assert_eq!(
        prepare(Creation::new("x", "raw").size(1).options("size=2")),
        "The image size must be specified only once"
    );
    assert_eq!(
        message(scratch.create("a", i64::MAX.unsigned_abs(), "")),
        "Could not resize file: Invalid argument"
    );
    let missing = scratch.path("no/a");
    assert_eq!(
        message(scratch.create("no/a", 1, "")),
        format!("Could not create '{missing}': No such file or directory")
    );
    assert_eq!(
        message(
            Creation::new("/dev/null", "raw")
                .size(512)
                .prepare()
                .and_then(|p| p.create())
        ),
        "Cannot grow device files"
    );
}

#[test]
fn the_summary_lists_format_and_options() {
    let prepared = Creation::new("x", "raw")
        .size(1000)
        .options("nocow=on,preallocation=off")
        .prepare()
        .expect("is fine");
    assert_eq!(prepared.summary(), "fmt=raw size=1000 nocow=on preallocation=off");
}

#[test]
fn a_warning_is_printed_for_a_probed_raw_image_only() {
    let scratch = Scratch::new();
    let path = scratch.path("a");
    scratch.create("a", 4096, "").expect("is made");
    let notes = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&notes);
    let options = OpenOptions::new().on_note(Arc::new(move |note: &Note| {
        sink.lock()
            .expect("is not poisoned")
            .push(note.text().into_owned())
    }));
    drop(open(&path, &options).expect("opens"));
    drop(open(&path, &options.clone().format("raw").write(true)).expect("opens"));
    assert!(notes.lock().expect("is not poisoned").is_empty());

    let image = open(&path, &options.write(true)).expect("opens");
    assert_eq!(notes.lock().expect("is not poisoned").len(), 1);
    assert!(notes.lock().expect("is not poisoned")[0].starts_with(&format!(
        "WARNING: Image format was not specified for '{path}' and probing guessed raw.\n"
    )));
    image.write_at(b"no header", 0).expect("writes");
}

#[test]
fn a_fixed_vhd_is_recognised_with_a_warning_and_no_raw_disk_becomes_one() {
    let scratch = Scratch::new();
    let (disk, raw_disk) = (scratch.path("a"), scratch.path("b"));
    let vhd = "subformat=fixed,force_size=on";
    Creation::new(&disk, "vpc")
        .options(vhd)
        .size(1 << 20)
        .prepare()
        .and_then(|prepared| prepared.create())
        .expect("is made");
    let notes = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&notes);
    let options = OpenOptions::new().on_note(Arc::new(move |note: &Note| {
        sink.lock()
            .expect("is not poisoned")
            .push(note.text().into_owned())
    }));
    for format in ["raw", "vpc"] {
        let image = open(&disk, &options.clone().format(format)).expect("opens");
        assert_eq!(image.layer().format(), format);
        assert!(notes.lock().expect("is not poisoned").is_empty());
    }
    let image = open(&disk, &options).expect("opens");
    assert_eq!((image.layer().format(), image.len()), ("vpc", 1 << 20));
    let told = notes.lock().expect("is not poisoned").join("\n");
    assert!(
        told.starts_with(&format!("'{disk}' is taken for an image of the format vpc")),
        "{told}"
    );
    drop(image);
    let bytes = std::fs::read(&disk).expect("reads");
    let footer = &bytes[bytes.len() - 512..];
    scratch.create("b", (1 << 20) + 512, "").expect("is made");
    let image = open(&raw_disk, &options.clone().write(true)).expect("opens");
    image.write_at(footer, 4096).expect("is not at the end");
    image.write_at(footer, 1 << 20).expect_err("is a footer");
    image.write_at(&footer[..60], 1 << 20).expect("is no footer yet");
    image
        .write_at(&footer[60..], (1 << 20) + 60)
        .expect_err("completes it");
    assert_eq!(open(&raw_disk, &options).expect("opens").layer().format(), "raw");
}

#[test]
fn failed_opens_have_the_messages_of_qemu_img() {
    let scratch = Scratch::new();
    let missing = scratch.path("a");
    assert_eq!(
        message(open(&missing, &OpenOptions::new())),
        format!("Could not open '{missing}': Could not open '{missing}': No such file or directory")
    );
    assert_eq!(
        message(open("x", &OpenOptions::new().format("foo"))),
        "Could not open 'x': Unknown driver 'foo'"
    );
    assert_eq!(
        message(open("", &OpenOptions::new())),
        "Could not open '': The 'file' block driver requires a file name"
    );
}

#[test]
fn an_exclusive_reader_and_a_writer_exclude_each_other() {
    let scratch = Scratch::new();
    let path = scratch.path("a");
    scratch.create("a", 4096, "").expect("is made");
    let writer = open(&path, &raw().write(true)).expect("opens");
    drop(open(&path, &raw().write(true)).expect("raw images can have two writers"));
    drop(open(&path, &raw()).expect("and readers that are not exclusive"));
    let error = open(&path, &raw().exclusive(true)).expect_err("is in use");
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert_eq!(
        error.chain(),
        format!("Could not open '{path}': Failed to get shared \"write\" lock")
    );
    assert_eq!(
        error.hint_lines().first().map(String::as_str),
        Some(&*format!("Is another process using the image [{path}]?"))
    );
    drop(open(&path, &raw().exclusive(true).force_share(true)).expect("takes no lock"));
    drop(writer);
    let source = open(&path, &raw().exclusive(true)).expect("opens");
    assert_eq!(
        message(open(&path, &raw().write(true))),
        format!("Could not open '{path}': Failed to get \"write\" lock")
    );
    drop(source);
}

#[test]
fn zeroes_discards_and_resizes_change_the_file_at_once() {
    let scratch = Scratch::new();
    let path = scratch.path("a");
    for cache in ["none", "writeback", "unsafe", "directsync", "writethrough"] {
        scratch.create("a", 1 << 20, "").expect("is made");
        let cache = CacheMode::from_name(cache).expect("is a mode");
        let image = match open(&path, &raw().write(true).resize(true).cache(cache)) {
            Ok(image) => image,
            Err(error) => {
                eprintln!("skipped {cache:?}: {}", error.chain());
                continue;
            }
        };
        image.write_at(&[3; 100_001], 3).expect("writes");
        image
            .write_zeroes(ByteRange::new(5, 70_000), ZeroMode::Unmap)
            .expect("zeroes");
        image.discard(ByteRange::new(90_000, 100_000)).expect("discards");
        image
            .resize(3 << 20, diskimage::Preallocation::Off)
            .expect("grows");
        image.write_at(b"end", (3 << 20) - 3).expect("writes");
        image.flush().expect("flushes");
        let bytes = fs::read(&path).expect("is there");
        assert_eq!(bytes.len(), 3 << 20);
        assert_eq!(bytes[2..6], [0, 3, 3, 0], "{cache:?}");
        assert_eq!(bytes[69_999..70_001], [0, 3], "{cache:?}");
        assert_eq!(bytes[100_003..100_005], [3, 0], "{cache:?}");
        assert_eq!(&bytes[(3 << 20) - 3..], b"end");
    }
}

#[test]
fn measuring_rounds_up() {
    let format = format_by_name("raw").expect("is in the table");
    let options = Options::merged(&[format.create_options()]);
    let measure = format
        .measure(&options, MeasureSource::Size(1000), &Objects::new())
        .expect("is known");
    assert_eq!(measure.required, 1024);
    assert_eq!(measure.fully_allocated, 1024);
}
