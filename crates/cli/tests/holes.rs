//! Holes of a source stay holes inside the large blocks of a target, and those of an image take no time.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

#[test]
fn conversions_write_no_zeroes_around_the_data_of_a_block() {
    let dir = tempfile::tempdir().expect("there is one");
    let source = File::create(dir.path().join("in.raw")).expect("is made");
    source.set_len(32 << 20).expect("has room");
    // Runs of 4 KiB to 512 KiB with holes of the same lengths between them.
    let (mut at, mut data) = (0, 0);
    for shift in (12..20).cycle() {
        let len = 1_u64 << shift;
        if at + 2 * len > 32 << 20 {
            break;
        }
        source
            .write_all_at(&vec![0x5a; 1 << shift], at)
            .expect("has room");
        at += 2 * len;
        data += len;
    }
    source.sync_all().expect("is written");
    let used = |name: &str| fs::metadata(dir.path().join(name)).expect("exists").blocks() * 512;
    assert!(used("in.raw") < data + (1 << 20), "the file system has holes");
    for format in ["vdi", "vpc", "vhdx", "parallels"] {
        let status = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
            .args(["convert", "-f", "raw", "-O", format, "in.raw", format])
            .current_dir(dir.path())
            .status();
        assert!(status.expect("runs").success());
        File::open(dir.path().join(format))
            .expect("exists")
            .sync_all()
            .expect("is written");
        // Tables, and a page for each end of a block.
        assert!(
            used(format) < data + (2 << 20),
            "{format}: {} for {data}",
            used(format)
        );
    }
}

#[test]
fn an_image_with_terabytes_of_holes_shrinks_at_once() {
    let dir = tempfile::tempdir().expect("there is one");
    let run = |words: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
            .args(words.split(' '))
            .current_dir(dir.path())
            .output()
            .expect("runs");
        assert!(output.status.success(), "{words}: {output:?}");
    };
    run("create -q -f qcow2 -o cluster_size=512 x.qcow2 1M");
    let file = File::options().write(true).open(dir.path().join("x.qcow2"));
    // Some file systems end at 16 TiB.
    let lengthened = file.expect("exists").set_len(15 << 40);
    lengthened.expect("has holes");
    run("resize -q -f qcow2 --shrink x.qcow2 512K");
    run("check -q x.qcow2");
    let len = fs::metadata(dir.path().join("x.qcow2")).expect("exists").len();
    assert!(len < 64 << 10, "{len}");
}
