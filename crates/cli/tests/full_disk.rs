//! Conversions onto a disk that is full. A limit on the size of files stands in for it: the kernel refuses to write
//! beyond, with another error number than for a full disk, and that needs no privileges.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs `qemu-img` where files can have `limit` bytes, a multiple of 512.
fn qemu_img(dir: &Path, limit: u64, args: &[&str]) -> Output {
    let script = format!("ulimit -f {}; exec \"$0\" \"$@\"", limit / 512);
    Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_qemu-img")])
        .args(args)
        .current_dir(dir)
        .output()
        .expect("sh runs")
}

const UNLIMITED: u64 = 1 << 40;

/// A directory with two sources: `source.raw` of 8 MiB that does not compress, and `source.qcow2` of the same.
fn sources() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    })
    .take(8 << 20)
    .collect();
    fs::write(dir.path().join("source.raw"), noise).expect("written");
    succeed(dir.path(), "convert -f raw -O qcow2 source.raw source.qcow2");
    dir
}

fn succeed(dir: &Path, words: &str) {
    let args: Vec<&str> = words.split(' ').collect();
    let output = qemu_img(dir, UNLIMITED, &args);
    assert!(output.status.success(), "{words}: {output:?}");
}

/// Runs what cannot succeed; the one line that it says.
fn fail(dir: &Path, limit: u64, words: &str) -> String {
    let sources = ["source.raw", "source.qcow2"].map(|name| fs::read(dir.join(name)).expect("readable"));
    let args: Vec<&str> = words.split(' ').collect();
    let output = qemu_img(dir, limit, &args);
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{words}: {said}");
    assert!(output.stdout.is_empty(), "{words}");
    assert!(
        said.ends_with('\n') && said.lines().count() == 1,
        "{words}: {said}"
    );
    let after = ["source.raw", "source.qcow2"].map(|name| fs::read(dir.join(name)).expect("readable"));
    assert!(sources == after, "{words}: the sources have changed");
    said.trim_end().to_owned()
}

#[test]
fn a_new_target_is_left_empty() {
    let dir = sources();
    for form in [
        "-O qcow2",
        "-c -O qcow2",
        "-W -O qcow2",
        "-m 1 -O qcow2",
        "-S 0 -O qcow2",
        "-O qcow2 -o preallocation=metadata",
        "-O qcow2 -o preallocation=full",
        "-O raw",
        "-O raw -o preallocation=full",
    ] {
        for source in ["source.raw", "source.qcow2"] {
            let words = format!("convert {form} {source} target");
            let said = fail(dir.path(), 3 << 20, &words);
            assert!(
                said.starts_with("qemu-img: ") && said.ends_with(": File too large"),
                "{words}: {said}"
            );
            let left = fs::metadata(dir.path().join("target")).map_or(0, |file| file.len());
            assert_eq!(left, 0, "{words}");
        }
    }
}

#[test]
fn the_error_says_where_writing_failed() {
    let dir = sources();
    let said = fail(dir.path(), 3 << 20, "convert -m 1 -O qcow2 source.raw target");
    assert_eq!(
        said,
        "qemu-img: error while writing at byte 2097152: File too large"
    );
}

#[test]
fn a_target_that_was_there_stays_a_sound_image() {
    let dir = sources();
    succeed(dir.path(), "create -q -f qcow2 target 8M");
    fail(dir.path(), 3 << 20, "convert -n -O qcow2 source.qcow2 target");
    // Leaked clusters at worst, and those can be mended.
    succeed(dir.path(), "check -q -r leaks target");
    succeed(dir.path(), "check -q target");
    succeed(dir.path(), "convert -n -O qcow2 source.qcow2 target");
    succeed(dir.path(), "compare -q source.raw target");
}

#[test]
fn snapshots_are_applied_and_deleted_without_room() {
    let dir = sources();
    let path = dir.path();
    succeed(path, "convert -O qcow2 source.raw image");
    succeed(path, "snapshot -c first image");
    succeed(path, "bench -q -f qcow2 -w -c 16 -s 65536 --pattern=7 image");
    succeed(path, "snapshot -c second image");
    succeed(path, "bench -q -f qcow2 -w -c 32 -s 65536 --pattern=9 image");
    let full = fs::metadata(path.join("image")).expect("there").len() / 512 * 512;
    let said = fail(path, full, "snapshot -c third image");
    assert_eq!(
        said,
        "qemu-img: Could not create snapshot 'third': File too large"
    );
    succeed(path, "check -q image");
    for words in [
        "snapshot -a first image",
        "snapshot -d first image",
        "snapshot -d second image",
    ] {
        let args: Vec<&str> = words.split(' ').collect();
        let output = qemu_img(path, full, &args);
        assert!(output.status.success(), "{words}: {output:?}");
        succeed(path, "check -q image");
        succeed(path, "compare -q source.raw image");
    }
}
