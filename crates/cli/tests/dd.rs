//! A read error of `dd` keeps the blocks before it and names the place that cannot be read.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn qemu_img(dir: &Path, words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split(' '))
        .current_dir(dir)
        .output()
        .expect("it runs")
}

/// A raw disk whose sector 1001 cannot be read.
const FAILS: &str = "driver=raw,file.driver=blkdebug,file.image.filename=a.raw,file.inject-error.0.event=read_aio,\
                     file.inject-error.0.errno=5,file.inject-error.0.sector=1001";
const PLACE: usize = 1001 * 512;

#[test]
fn blocks_before_a_read_error_are_kept_and_the_place_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let disk: Vec<u8> = (0..1u32 << 20).map(|at| (at / 512 % 251) as u8 | 1).collect();
    fs::write(path.join("a.raw"), &disk).expect("written");
    for (words, block, skipped) in [
        ("bs=512", 512, 0),
        ("bs=4k", 4096, 0),
        ("bs=3000", 3000, 0),
        ("bs=64k skip=2", 65_536, 2),
        ("bs=1M", 1 << 20, 0),
        ("-O qcow2 bs=64k", 65_536, 0),
        ("-O vdi bs=1000 skip=3", 1000, 3),
    ] {
        let output = qemu_img(path, &format!("dd --image-opts if={FAILS} of=out {words}"));
        assert_eq!(output.status.code(), Some(1), "{words}: {output:?}");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            message,
            format!(
                "qemu-img: error while reading from input image file at byte {PLACE}: Input/output error\n"
            ),
            "{words}"
        );
        let read = qemu_img(path, "convert -O raw out copy");
        assert!(read.status.success(), "{words}: {read:?}");
        let copy = fs::read(path.join("copy")).expect("written");
        let start = skipped * block;
        let kept = (PLACE - start) / block * block;
        assert_eq!(copy[..kept], disk[start..start + kept], "{words}");
        let rest = copy.get(kept..).unwrap_or_default();
        assert!(rest.iter().all(|byte| *byte == 0), "{words}: after the blocks");
        fs::remove_file(path.join("out")).expect("ours");
    }
}
