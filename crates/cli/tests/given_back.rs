//! Zeroes that are written over data give its storage back.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

fn qemu_img(dir: &Path, words: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split(' '))
        .current_dir(dir)
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{words}: {output:?}");
}

/// The bytes of storage that a file takes.
fn storage(path: &Path) -> u64 {
    path.metadata().expect("it exists").blocks() * 512
}

const LEN: u64 = 4 << 20;

/// A directory with a disk of nines and one of zeroes.
fn disks() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("nines"), vec![9; 4 << 20]).expect("written");
    let zeroes = fs::File::create(dir.path().join("zeroes")).expect("created");
    zeroes.set_len(LEN).expect("grows");
    dir
}

#[test]
fn convert_over_existing_data_gives_storage_back() {
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on"] {
        let dir = disks();
        let path = dir.path();
        qemu_img(path, &format!("convert -O qcow2 -o {options} nines t"));
        assert!(storage(&path.join("t")) > LEN, "{options}");
        qemu_img(path, "convert -n -O qcow2 zeroes t");
        assert!(storage(&path.join("t")) < LEN / 4, "{options}");
        qemu_img(path, "compare t zeroes");
        qemu_img(path, "check t");
    }
}

#[test]
fn a_data_file_does_not_keep_what_was_overwritten_with_zeroes() {
    for raw in ["on", "off"] {
        let dir = disks();
        let path = dir.path();
        qemu_img(
            path,
            &format!("convert -O qcow2 -o data_file=d,data_file_raw={raw} nines t"),
        );
        qemu_img(path, "convert -n -O qcow2 zeroes t");
        assert!(storage(&path.join("d")) < LEN / 4, "{raw}");
        let left = fs::read(path.join("d")).expect("readable");
        assert!(left.iter().all(|byte| *byte == 0), "{raw}");
        qemu_img(path, "compare t zeroes");
    }
}

#[test]
fn commit_of_zeroes_gives_storage_back() {
    for options in ["compat=1.1", "compat=0.10", "data_file=d"] {
        let dir = disks();
        let path = dir.path();
        qemu_img(path, &format!("convert -O qcow2 -o {options} nines base"));
        qemu_img(path, "create -q -f qcow2 -b base -F qcow2 top");
        qemu_img(path, "convert -n -O qcow2 zeroes top");
        qemu_img(path, "commit -q top");
        let taken = storage(&path.join(if options == "data_file=d" { "d" } else { "base" }));
        assert!(taken < LEN / 4, "{options}: {taken}");
        qemu_img(path, "compare top zeroes");
        qemu_img(path, "check base");
    }
}

#[test]
fn what_a_snapshot_shares_is_kept() {
    let dir = disks();
    let path = dir.path();
    qemu_img(path, "convert -O qcow2 nines t");
    qemu_img(path, "snapshot -c s t");
    qemu_img(path, "convert -n -O qcow2 zeroes t");
    qemu_img(path, "convert -l snapshot.name=s -O raw t old");
    qemu_img(path, "compare -f raw old nines");
    qemu_img(path, "compare t zeroes");
}
