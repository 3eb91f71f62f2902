//! What `check` prints.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn run(dir: &Path, words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split(' '))
        .current_dir(dir)
        .output()
        .expect("it runs")
}

#[test]
fn after_a_thousand_findings_only_their_number_is_printed() {
    let dir = tempfile::tempdir().expect("a directory");
    let created = run(
        dir.path(),
        "create -q -f qcow2 -o preallocation=metadata a.qcow2 96M",
    );
    assert!(created.status.success(), "{created:?}");
    let path = dir.path().join("a.qcow2");
    let mut bytes = fs::read(&path).expect("readable");
    // The refcounts of everything, behind the header and the refcount table.
    bytes[2 << 16..3 << 16].fill(0);
    fs::write(&path, bytes).expect("written");
    let checked = run(dir.path(), "check a.qcow2");
    let lines = String::from_utf8(checked.stderr).expect("is text");
    let findings = lines
        .lines()
        .filter(|line| line.starts_with("ERROR cluster "))
        .count();
    assert_eq!(findings, 1000);
    let report = String::from_utf8(checked.stdout).expect("is text");
    let errors = report
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok());
    let more = errors.map(|errors: usize| errors - findings);
    let last = more.map(|more| format!("{more} more findings are not printed"));
    assert_eq!(lines.lines().last().map(str::to_owned), last);
    assert_eq!(checked.status.code(), Some(2));
}
