//! Backing chains.

use std::fs;
use std::sync::Arc;

use diskimage::{
    Backing, Creation, Device, Error, ErrorKind, FileGate, Gate, OpenOptions, Reference, Result, Role, open,
};
use diskimage_testing::RecordingGate;

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is a temporary directory"))
    }

    fn path(&self, name: &str) -> String {
        let path = self.0.path().join(name);
        path.to_str().expect("is text").to_owned()
    }

    /// Creates a qcow2 image of 1 MiB whose backing file name is `backing`; that file need not exist.
    fn overlay(&self, name: &str, backing: &str, format: &str) {
        Creation::new(self.path(name), "qcow2")
            .size(1 << 20)
            .backing_file(backing)
            .backing_format(format)
            .trust_backing(true)
            .prepare()
            .and_then(|prepared| prepared.create())
            .expect("is made");
    }

    /// The same with a name that creation would refuse: the name is written to the header of an existing image.
    fn rename_backing(&self, name: &str, backing: &str, format: &str) {
        self.overlay(name, "missing", "raw");
        let options = OpenOptions::new().no_backing(true).write(true);
        let backing = Backing {
            name: backing.into(),
            format: Some(format.to_owned()),
        };
        open(&self.path(name), &options)
            .and_then(|image| image.layer().set_backing(Some(&backing)))
            .expect("is renamed");
    }

    fn open(&self, name: &str) -> Result<Arc<diskimage::Image>> {
        open(&self.path(name), &OpenOptions::new())
    }
}

/// The message of an error, and its hint.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    message: String,
    hint: Option<String>,
}

impl Refusal {
    fn new(message: &str, hint: &str) -> Self {
        Self {
            message: message.to_owned(),
            hint: Some(hint.to_owned()),
        }
    }
}

fn refusal<T>(result: Result<T>) -> Refusal {
    let error = result.map(drop).expect_err("fails");
    Refusal {
        message: error.chain(),
        hint: error.hint_lines().first().map(String::as_str).map(str::to_owned),
    }
}

#[test]
fn bytes_come_from_the_bottom_of_the_chain() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("dir")).expect("is made");
    fs::write(scratch.path("base:raw"), vec![5; 4096]).expect("is written");
    scratch.overlay("dir/middle", "../base:raw", "raw");
    scratch.overlay("top", "file:dir/middle", "qcow2");
    // The middle's name is relative to the current directory as soon as it has a protocol.
    assert!(scratch.open("top").is_err());
    scratch.overlay("top", "dir/middle", "qcow2");
    let image = scratch.open("top").expect("opens");
    let mut bytes = vec![1; 8192];
    image.read_at(&mut bytes, 0).expect("reads");
    assert!(bytes[..4096].iter().all(|b| *b == 5) && diskimage::is_zero(&bytes[4096..]));
    assert_eq!(
        image
            .backing()
            .and_then(|middle| middle.backing())
            .map(|base| base.name()),
        Some(scratch.path("dir/../base:raw"))
    );
}

#[test]
fn a_missing_backing_file_is_reported_with_all_its_overlays() {
    let scratch = Scratch::new();
    scratch.overlay("a", "none", "raw");
    scratch.overlay("b", "a", "qcow2");
    let (top, none) = (scratch.path("b"), scratch.path("none"));
    assert_eq!(
        refusal(scratch.open("b")).message,
        format!(
            "Could not open '{top}': Could not open backing file: Could not open backing file: \
             Could not open '{none}': No such file or directory"
        )
    );
    drop(open(&top, &OpenOptions::new().no_backing(true)).expect("the backing image is not opened"));
}

#[test]
fn a_loop_ends() {
    let scratch = Scratch::new();
    scratch.rename_backing("a", "b", "qcow2");
    scratch.rename_backing("b", "a", "qcow2");
    let a = scratch.path("a");
    assert_eq!(
        refusal(scratch.open("a")).message,
        format!(
            "Could not open '{a}': Could not open backing file: Could not open backing file: \
             Backing file '{a}' creates an infinite loop"
        )
    );
    // The same file opened as raw has no backing image.
    scratch.rename_backing("c", "c", "raw");
    drop(scratch.open("c").expect("opens"));
}

#[test]
fn a_long_chain_is_refused_and_not_followed() {
    let scratch = Scratch::new();
    fs::write(scratch.path("0"), [0; 512]).expect("is written");
    for n in 1..=200 {
        scratch.overlay(
            &n.to_string(),
            &(n - 1).to_string(),
            if n == 1 { "raw" } else { "qcow2" },
        );
    }
    drop(scratch.open("199").expect("opens"));
    let error = scratch.open("200").expect_err("is too long");
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert_eq!(error.root(), "More than 200 images in a chain");
}

#[test]
fn the_backing_image_is_checked_before_an_overlay_is_created() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base"), vec![0; 5000]).expect("is written");
    let new = scratch.path("new");
    let creation = |backing: &str| Creation::new(&new, "qcow2").backing_file(backing);
    let refused = |creation: Creation| refusal(creation.prepare());
    let none = scratch.path("none");
    assert_eq!(
        refused(creation("none").backing_format("raw")),
        Refusal::new(
            &format!("Could not open '{none}': No such file or directory"),
            "Could not open backing image."
        )
    );
    assert_eq!(
        refused(creation("base")),
        Refusal::new(
            "Backing file specified without backing format",
            "Detected format of raw."
        )
    );
    assert_eq!(
        refused(creation("base").backing_format("qcow2")),
        Refusal::new("Image is not in qcow2 format", "Could not open backing image.")
    );
    assert_eq!(
        refused(creation("").backing_format("raw")).message,
        "Expected backing file name, got empty string"
    );
    assert_eq!(
        refused(creation(&new).backing_format("raw")).message,
        "Error: Trying to create an image with the same filename as the backing file"
    );
    assert_eq!(
        refused(creation("none").backing_format("raw").trust_backing(true)).message,
        "Image creation needs a size parameter"
    );
    assert!(!fs::exists(&new).expect("can be asked"));
    let prepared = creation("base").backing_format("raw").prepare().expect("is fine");
    assert_eq!(prepared.size(), 5120);
}

#[test]
fn the_file_of_a_failed_creation_is_removed() {
    let scratch = Scratch::new();
    let new = scratch.path("new");
    let failed = Creation::new(&new, "qcow2")
        .size(512)
        .options("cluster_size=3")
        .prepare()
        .and_then(|prepared| prepared.create());
    assert_eq!(
        refusal(failed).message,
        "Cluster size must be a power of two between 512 and 2048k"
    );
    assert!(!fs::exists(&new).expect("can be asked"));
}

#[test]
fn a_probed_raw_image_refuses_headers_of_other_formats() {
    let scratch = Scratch::new();
    let path = scratch.path("a");
    fs::write(&path, vec![0; 4096]).expect("is written");
    let image = open(&path, &OpenOptions::new().write(true)).expect("opens");
    let eperm = Err(Some(1));
    assert_eq!(
        image.write_at(b"QFI\xfb\0\0\0\x03", 0).map_err(|e| e.errno()),
        eperm
    );
    image.write_at(b"QFI", 0).expect("is no header yet");
    assert_eq!(image.write_at(b"\xfb\0\0\0\x03", 3).map_err(|e| e.errno()), eperm);
    let image = open(&path, &OpenOptions::new().write(true).format("raw")).expect("opens");
    image
        .write_at(b"QFI\xfb\0\0\0\x03", 0)
        .expect("was asked for by name");
}

#[test]
fn an_exclusive_image_locks_its_backing_images() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base"), vec![0; 4096]).expect("is written");
    scratch.overlay("top", "base", "raw");
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    let writer = open(&base, &OpenOptions::new().format("raw").write(true)).expect("opens");
    drop(scratch.open("top").expect("does not mind"));
    assert_eq!(
        refusal(open(&top, &OpenOptions::new().exclusive(true))),
        Refusal::new(
            &format!("Could not open '{top}': Failed to get shared \"write\" lock"),
            &format!("Is another process using the image [{base}]?")
        )
    );
    drop(writer);
    drop(open(&top, &OpenOptions::new().exclusive(true)).expect("opens"));
}

/// Opens backing files only.
fn open_backing(reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
    match reference.role {
        Role::Backing => FileGate::default().open(reference),
        Role::Data => Err(Error::new(ErrorKind::Denied, "No data files here")),
    }
}

#[test]
fn nothing_is_opened_past_the_gate() {
    let scratch = Scratch::new();
    let gate = Arc::new(RecordingGate::new(open_backing));
    let options = OpenOptions::new().gate(Arc::clone(&gate) as Arc<dyn Gate>);
    scratch.overlay("a", "none", "raw");
    scratch.overlay("b", "a", "qcow2");
    assert!(open(&scratch.path("b"), &options).is_err());
    assert_eq!(gate.names(), [scratch.path("a"), scratch.path("none")]);

    let path = scratch.path("c");
    let data = scratch.path("data");
    Creation::new(&path, "qcow2")
        .size(1 << 20)
        .options(format!("data_file={data}"))
        .prepare()
        .and_then(|prepared| prepared.create())
        .expect("is made");
    assert_eq!(
        refusal(open(&path, &options)).message,
        format!("Could not open '{path}': No data files here")
    );
    drop(open(&path, &OpenOptions::new()).expect("opens"));
}
