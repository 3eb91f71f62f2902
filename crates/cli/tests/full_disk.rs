//! Conversions to a full disk. The tests use a limit on the size of files instead: the kernel refuses writes beyond it
//! with another error number than on a full disk, and no privileges are needed.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs `qemu-img` with a file size limit of `limit` bytes, a multiple of 512.
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

/// A directory with `source.raw` of 8 MiB that does not compress, and `source.qcow2` with the same guest data.
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

/// Runs a command that must fail without changing the sources, and returns its line on standard error.
fn fail(dir: &Path, limit: u64, words: &str) -> String {
    let sources = ["source.raw", "source.qcow2"].map(|name| fs::read(dir.join(name)).expect("readable"));
    let args: Vec<&str> = words.split(' ').collect();
    let output = qemu_img(dir, limit, &args);
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{words}: {stderr}");
    assert!(output.stdout.is_empty(), "{words}");
    assert!(
        stderr.ends_with('\n') && stderr.lines().count() == 1,
        "{words}: {stderr}"
    );
    let after = ["source.raw", "source.qcow2"].map(|name| fs::read(dir.join(name)).expect("readable"));
    assert!(sources == after, "{words}: the sources have changed");
    stderr.trim_end().to_owned()
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
            let message = fail(dir.path(), 3 << 20, &words);
            assert!(
                message.starts_with("qemu-img: ") && message.ends_with(": File too large"),
                "{words}: {message}"
            );
            let left = fs::metadata(dir.path().join("target")).map_or(0, |file| file.len());
            assert_eq!(left, 0, "{words}");
        }
    }
}

#[test]
fn the_error_has_the_offset_of_the_failed_write() {
    let dir = sources();
    let message = fail(dir.path(), 3 << 20, "convert -m 1 -O qcow2 source.raw target");
    assert_eq!(
        message,
        "qemu-img: error while writing at byte 2097152: File too large"
    );
}

#[test]
fn an_existing_target_has_no_corruption_after_a_failure() {
    let dir = sources();
    succeed(dir.path(), "create -q -f qcow2 target 8M");
    fail(dir.path(), 3 << 20, "convert -n -O qcow2 source.qcow2 target");
    // It may have leaked clusters, which a check can repair.
    succeed(dir.path(), "check -q -r leaks target");
    succeed(dir.path(), "check -q target");
    succeed(dir.path(), "convert -n -O qcow2 source.qcow2 target");
    succeed(dir.path(), "compare -q source.raw target");
}

#[test]
fn snapshots_are_applied_and_deleted_on_a_full_disk() {
    let dir = sources();
    let path = dir.path();
    succeed(path, "convert -O qcow2 source.raw image");
    succeed(path, "snapshot -c first image");
    succeed(path, "bench -q -f qcow2 -w -c 16 -s 65536 --pattern=7 image");
    succeed(path, "snapshot -c second image");
    succeed(path, "bench -q -f qcow2 -w -c 32 -s 65536 --pattern=9 image");
    let full = fs::metadata(path.join("image")).expect("there").len() / 512 * 512;
    let message = fail(path, full, "snapshot -c third image");
    assert_eq!(
        message,
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
