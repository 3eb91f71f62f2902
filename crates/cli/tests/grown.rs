//! Disks that grow in formats where the original cannot, judged by the original.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

fn run(tool: &str, dir: &Path, words: &str) -> std::io::Result<Output> {
    Command::new(tool)
        .args(words.split(' '))
        .current_dir(dir)
        .output()
}

fn succeed(tool: &str, dir: &Path, words: &str) {
    let output = run(tool, dir, words).expect("runs");
    assert!(output.status.success(), "{tool} {words}: {output:?}");
}

/// Whether the original is there; says so if not. Past the capture of output: whoever runs the tests is to see it.
fn has_stock(dir: &Path) -> bool {
    let found = run("qemu-img", dir, "--version").is_ok();
    let required = std::env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1");
    assert!(
        found || !required,
        "qemu-img is required (REQUIRE_STOCK_TOOLS=1) and not installed"
    );
    if !found {
        let _ = writeln!(std::io::stderr(), "skipped: qemu-img is not installed");
    }
    found
}

const MIB: usize = 1 << 20;

/// The format and the options of `create`, and whether the original checks it.
const FORMS: &[(&str, &str, bool)] = &[
    ("vdi", "", true),
    ("vdi", "-o static=on", true),
    ("vpc", "-o force_size=on", false),
    ("vpc", "-o force_size=on,subformat=fixed", false),
    ("vhdx", "", true),
    ("vhdx", "-o block_size=1M", true),
    ("vhdx", "-o subformat=fixed", true),
    ("vmdk", "", true),
    ("vmdk", "-o zeroed_grain=on", true),
    ("vmdk", "-o subformat=monolithicFlat", true),
    ("vmdk", "-o subformat=twoGbMaxExtentSparse", true),
    ("vmdk", "-o subformat=twoGbMaxExtentFlat", true),
];

#[test]
fn the_original_reads_and_writes_what_has_grown() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    if !has_stock(dir) {
        return;
    }
    // Ends inside the units of all formats.
    let mut bytes = vec![0; 5 * MIB - 1536];
    bytes[MIB..2 * MIB].fill(7);
    let end = bytes.len();
    bytes[end - 1000..].fill(8);
    fs::write(dir.join("source"), &bytes).expect("written");
    fs::write(dir.join("expected"), &bytes).expect("written");
    let expected = fs::File::options().write(true).open(dir.join("expected"));
    expected
        .and_then(|file| file.set_len(150 << 20))
        .expect("is as long as a hole makes it");
    for (format, options, is_checked) in FORMS {
        let ours = env!("CARGO_BIN_EXE_qemu-img");
        let convert = format!("convert -f raw -O {format} {options} source image");
        succeed(ours, dir, &convert.replace("  ", " "));
        succeed(ours, dir, &format!("resize -q -f {format} image 150M"));
        for tool in [ours, "qemu-img"] {
            succeed(
                tool,
                dir,
                &format!("compare -q -f {format} -F raw image expected"),
            );
            if *is_checked {
                succeed(tool, dir, &format!("check -q -f {format} image"));
            }
        }
        // What is new has a place for what the original writes.
        succeed(
            "qemu-img",
            dir,
            &format!("convert -n -f raw -O {format} expected image"),
        );
        succeed(
            ours,
            dir,
            &format!("compare -q -f {format} -F raw image expected"),
        );
        fs::remove_file(dir.join("image")).expect("removed");
    }
}
