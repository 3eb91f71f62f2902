//! Requests that fail in the middle of a command: the message says which step of it failed, also where `qemu-img` does not
//! report the error, or not the reason.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Output};

/// Runs `qemu-img` with words that are separated by blanks.
fn qemu_img(dir: &Path, words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split_whitespace())
        .current_dir(dir)
        .output()
        .expect("it runs")
}

/// The options of a node `driver` on `name`, where requests of the kind `kind` fail with `EIO`.
fn failing(driver: &str, name: &str, kind: &str) -> String {
    format!(
        "driver={driver},file.driver=blkdebug,file.image.driver=file,file.image.filename={name},\
         file.inject-error.0.event=none,file.inject-error.0.iotype={kind},file.inject-error.0.errno=5"
    )
}

#[test]
fn the_message_names_the_step_that_failed() {
    let dir = tempfile::tempdir().expect("a directory");
    let unreadable = r#"json:{"driver":"raw","file":{"driver":"blkdebug","image":{"driver":"file","filename":"other"},"inject-error":[{"event":"none","iotype":"read","once":false}]}}"#;
    for (words, message) in [
        (
            "rebase -b new -F raw on-unreadable".to_owned(),
            "error while reading from old backing file: Input/output error",
        ),
        (
            format!("rebase -b {unreadable} -F raw top"),
            "error while reading from new backing file: Input/output error",
        ),
        (
            format!(
                "convert -n -f raw --target-image-opts new {}",
                failing("raw", "base", "flush")
            ),
            "Could not flush 'json:",
        ),
        (
            format!(
                "resize --image-opts {} 2M",
                failing("qcow2", "top", "read,file.inject-error.0.sector=512")
            ),
            "Failed to free clusters beyond the end of the disk: Input/output error",
        ),
        (
            format!(
                "amend --image-opts -o lazy_refcounts=on {}",
                failing("qcow2", "top", "flush")
            ),
            "Could not flush the image: Input/output error",
        ),
    ] {
        std::fs::write(dir.path().join("base"), vec![1; 1 << 20]).expect("written");
        std::fs::write(dir.path().join("other"), vec![3; 1 << 20]).expect("written");
        std::fs::write(dir.path().join("new"), vec![2; 1 << 20]).expect("written");
        for prepare in [
            "create -q -f qcow2 -b base -F raw top".to_owned(),
            // Of its own, so that there is an L2 table.
            "bench -q -f qcow2 -c 1 -w top".to_owned(),
            format!("create -q -f qcow2 -u -b {unreadable} -F raw on-unreadable 1M"),
        ] {
            let output = qemu_img(dir.path(), &prepare);
            assert!(output.status.success(), "{prepare}: {output:?}");
        }
        let output = qemu_img(dir.path(), &words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}: {stderr}");
        assert!(
            stderr.starts_with(&format!("qemu-img: {message}")),
            "{words}: {stderr}"
        );
    }
}
