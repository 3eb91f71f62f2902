//! The gates that a program can choose, and formats that have to be certain.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use diskimage::{
    BeneathGate, ClosedGate, Creation, Device, ErrorKind, FileGate, Gate, NodeOptions, OpenOptions, Origin,
    Permissions, Reference, Role, name, open,
};
use tempfile::TempDir;

struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().expect("is made"));
        fs::create_dir(scratch.0.path().join("here")).expect("is made");
        scratch
    }

    fn path(&self, name: &str) -> String {
        name::of_path(&self.0.path().join(name))
    }

    fn raw(&self, name: &str) {
        fs::write(self.0.path().join(name), vec![7; 4096]).expect("is written");
    }

    fn overlay(&self, name: &str, backing: &str) {
        let creation = Creation::new(self.path(name), "qcow2")
            .size(4096)
            .trust_backing(true);
        let creation = creation.backing_file(backing).backing_format("raw");
        creation
            .prepare()
            .and_then(|prepared| prepared.create())
            .expect("is made");
    }
}

fn beneath() -> OpenOptions {
    OpenOptions::new().gate_from(Arc::new(|files| Arc::new(BeneathGate::new(files))))
}

#[test]
fn a_beneath_gate_opens_what_lies_beside_the_image() {
    let scratch = Scratch::new();
    scratch.raw("here/base");
    scratch.overlay("here/top", "base");
    let image = open(&scratch.path("here/top"), &beneath()).expect("opens");
    let mut bytes = [0; 4096];
    image.read_at(&mut bytes, 0).expect("is read");
    assert_eq!(bytes, [7; 4096]);
}

#[test]
fn a_beneath_gate_refuses_what_lies_elsewhere_and_says_why() {
    let scratch = Scratch::new();
    scratch.raw("base");
    scratch.overlay("here/top", "../base");
    let error = open(&scratch.path("here/top"), &beneath()).expect_err("is elsewhere");
    assert_eq!(error.kind(), ErrorKind::Denied);
    let here = scratch.path("here");
    let refused = format!(
        "'{here}/top' may not refer to '{here}/../base': it is not beneath the directory of the image"
    );
    assert!(error.chain().ends_with(&refused), "{}", error.chain());
}

#[test]
fn a_closed_gate_refuses_every_reference() {
    let scratch = Scratch::new();
    scratch.raw("here/base");
    scratch.overlay("here/top", "base");
    let options = OpenOptions::new().gate(Arc::new(ClosedGate));
    let error = open(&scratch.path("here/top"), &options).expect_err("is closed");
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.chain().contains("refers to 'base'"), "{}", error.chain());
    open(&scratch.path("here/base"), &options).expect("refers to nothing");
}

#[test]
fn the_user_s_own_options_are_no_references() {
    let scratch = Scratch::new();
    scratch.raw("base");
    scratch.overlay("here/top", "nothing");
    let mut node = NodeOptions::new();
    node.set("backing.driver", "raw");
    node.set("backing.file.filename", scratch.path("base"));
    for options in [beneath(), OpenOptions::new().gate(Arc::new(ClosedGate))] {
        let options = options.node_options(node.clone());
        open(&scratch.path("here/top"), &options).expect("opens");
    }
}

#[test]
fn the_default_gate_minds_where_a_reference_comes_from() {
    let context = diskimage::OpenContext::default();
    let ask = |origin: Origin, options: &[(&str, &str)]| {
        let mut node = NodeOptions::new();
        options.iter().for_each(|(name, value)| node.set(name, *value));
        let reference = Reference {
            options: &node,
            from: "image",
            origin,
            role: Role::Backing,
            permissions: Permissions::READ,
            context: &context,
        };
        FileGate::default()
            .open(&reference)
            .map(|_| ())
            .map_err(|error| (error.kind(), error.chain()))
    };
    let guessed = Origin {
        format_is_stated: false,
        ..Origin::STATED
    };
    let remote = Origin {
        is_remote: true,
        ..Origin::STATED
    };
    let denied = |outcome: Result<(), (ErrorKind, String)>, what: &str| {
        let (kind, text) = outcome.expect_err(what);
        assert_eq!(kind, ErrorKind::Denied, "{what}: {text}");
        assert!(text.contains(what), "{text}");
    };
    let server = [("driver", "nbd"), ("host", "nowhere.invalid")];
    denied(ask(guessed, &server), "the server");
    denied(
        ask(Origin::STATED, &[("filename", "/dev/zero")]),
        "a character device",
    );
    denied(
        ask(remote, &[("filename", "/etc/passwd")]),
        "a file of this machine",
    );
    denied(
        ask(remote, &[("driver", "nbd"), ("path", "/socket")]),
        "a file of this machine",
    );
    let (kind, _) = ask(Origin::STATED, &server).expect_err("there is none");
    assert_ne!(kind, ErrorKind::Denied);
    if Path::new("/dev/loop0").exists() {
        denied(ask(guessed, &[("filename", "/dev/loop0")]), "the block device");
    }
}

#[test]
fn a_certain_format_is_demanded_of_backing_images_too() {
    let scratch = Scratch::new();
    let options = beneath().unambiguous(true);
    Creation::new(scratch.path("here/base"), "qcow2")
        .size(4096)
        .prepare()
        .and_then(|prepared| prepared.create())
        .expect("is made");
    let path = scratch.0.path().join("here/base");
    let mut bytes = fs::read(&path).expect("is read");
    bytes[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
    fs::write(&path, bytes).expect("is written");
    Creation::new(scratch.path("here/top"), "qcow")
        .size(4096)
        .trust_backing(true)
        .backing_file("base")
        .backing_format("raw")
        .prepare()
        .and_then(|prepared| prepared.create())
        .expect("is made");
    let error = open(&scratch.path("here/top"), &options).expect_err("it is ambiguous");
    assert!(
        error.chain().contains("it can be vdi or qcow2"),
        "{}",
        error.chain()
    );
    open(&scratch.path("here/base"), &options.format("qcow2")).expect("the user states it");
}
