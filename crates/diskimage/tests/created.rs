//! Files that a creation must not take from others, or must leave behind.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use diskimage::{Creation, ErrorKind, Image, OpenOptions, Result, open};

/// The contents of a file that existed before.
const OLD: [u8; 4096] = [7; 4096];

fn create(dir: &Path, format: &str, options: &str, size: u64) -> Result<()> {
    let name = dir.join("x.img").display().to_string();
    Creation::new(name, format)
        .options(options.replace("DIR", &dir.display().to_string()))
        .size(size)
        .prepare()?
        .create()
}

/// Opens a file for writing as a raw image, which others may write as well.
fn hold(path: &Path) -> Arc<Image> {
    let options = OpenOptions::new().format("raw").write(true);
    open(&path.display().to_string(), &options).expect("opens")
}

#[test]
fn a_file_in_use_is_not_emptied() {
    for (format, options, file) in [
        ("vmdk", "subformat=monolithicFlat", "x-flat.img"),
        ("vmdk", "subformat=twoGbMaxExtentFlat", "x-f001.img"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "x-s001.img"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "x-s002.img"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "x.img"),
        ("vmdk", "", "x.img"),
        ("qcow2", "", "x.img"),
        ("qcow2", "data_file=DIR/data", "x.img"),
        ("qed", "", "x.img"),
        ("vdi", "", "x.img"),
        ("vpc", "", "x.img"),
        ("vhdx", "", "x.img"),
        ("parallels", "", "x.img"),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let own = dir.path().join("x.img");
        let used = dir.path().join(file);
        fs::write(&own, OLD).expect("writes");
        fs::write(&used, OLD).expect("writes");
        let holder = hold(&used);
        let error = create(dir.path(), format, options, 3 << 30).expect_err("is in use");
        assert_eq!(error.kind(), ErrorKind::Locked, "{format} {options}: {error:?}");
        drop(holder);
        assert!(
            fs::read(&used).expect("is there") == OLD,
            "{format} {options}: {file}"
        );
        assert!(fs::read(&own).expect("is there") == OLD, "{format} {options}");
    }
}

#[test]
fn a_data_file_may_be_in_use() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    fs::write(&data, OLD).expect("writes");
    let holder = hold(&data);
    create(dir.path(), "qcow2", "data_file=DIR/data", 1 << 20).expect("as by qemu-img");
    drop(holder);
}

#[test]
fn a_failed_creation_removes_the_files_that_it_made_only() {
    for existing in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name| dir.path().join(name);
        if existing {
            fs::write(path("x-s001.img"), OLD).expect("writes");
        }
        fs::create_dir(path("x-s002.img")).expect("makes");
        fs::write(path("x-s003.img"), OLD).expect("writes");
        create(dir.path(), "vmdk", "subformat=twoGbMaxExtentSparse", 5 << 30).expect_err("is a directory");
        assert!(!path("x.img").exists());
        assert_eq!(path("x-s001.img").exists(), existing);
        assert!(path("x-s002.img").is_dir());
        assert!(fs::read(path("x-s003.img")).expect("is there") == OLD);
    }
}
