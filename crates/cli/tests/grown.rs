//! Disks that grow in formats which the stock `qemu-img` cannot resize, checked with the stock `qemu-img`.
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

/// Whether the stock `qemu-img` is installed. If not, that is printed directly to standard error: the test harness
/// captures `eprintln!`.
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

/// The format and the options of `create`, and whether the stock `qemu-img` can check the format.
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
fn the_stock_qemu_img_reads_and_writes_grown_disks() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    if !has_stock(dir) {
        return;
    }
    // The size ends inside the clusters of all formats.
    let mut bytes = vec![0; 5 * MIB - 1536];
    bytes[MIB..2 * MIB].fill(7);
    let end = bytes.len();
    bytes[end - 1000..].fill(8);
    fs::write(dir.join("source"), &bytes).expect("written");
    fs::write(dir.join("expected"), &bytes).expect("written");
    let expected = fs::File::options().write(true).open(dir.join("expected"));
    expected
        .and_then(|file| file.set_len(150 << 20))
        .expect("is extended by a hole");
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
        // The stock `qemu-img` can allocate clusters in the range that was added.
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

const GIB: u64 = 1 << 30;

/// Creates a sparse file with runs of 64 KiB of one byte each: `runs` are their offsets and bytes.
fn sparse(path: &Path, len: u64, runs: &[(u64, u8)]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).expect("made");
    file.set_len(len).expect("extended by a hole");
    for (at, byte) in runs {
        file.write_all_at(&[*byte; 65536], *at).expect("written");
    }
}

/// Grows an image. Then both programs write to the range that was added, one at each of `offsets`, and both check it.
fn grow_and_write(dir: &Path, options: &str, len: u64, offsets: [u64; 2]) {
    let ours = env!("CARGO_BIN_EXE_qemu-img");
    let judge = |runs: &[(u64, u8)]| {
        sparse(&dir.join("expected"), len, runs);
        for tool in [ours, "qemu-img"] {
            succeed(tool, dir, "compare -q -f vmdk -F raw image expected");
            succeed(tool, dir, "check -q -f vmdk image");
        }
    };
    let mut runs = vec![(0, 1), (MIB as u64, 2)];
    sparse(&dir.join("source"), 3 * MIB as u64 + 512, &runs);
    succeed(
        ours,
        dir,
        &format!("convert -f raw -O vmdk -o {options} source image"),
    );
    succeed(ours, dir, &format!("resize -q -f vmdk image {len}"));
    judge(&runs);
    for (tool, at, byte) in [("qemu-img", offsets[0], 3), (ours, offsets[1], 4)] {
        succeed(
            tool,
            dir,
            &format!("bench -q -w -c 1 -s 64k -o {at} --pattern={byte} -f vmdk image"),
        );
        runs.push((at, byte));
        judge(&runs);
    }
}

#[test]
fn disks_in_several_files_get_further_files() {
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let temporary = tempfile::tempdir().expect("a directory");
        let dir = temporary.path();
        if !has_stock(dir) {
            return;
        }
        let options = format!("subformat={subformat}");
        grow_and_write(dir, &options, 5 * GIB + 512, [2 * GIB, 4 * GIB]);
        let ours = env!("CARGO_BIN_EXE_qemu-img");
        let kind = if subformat.ends_with("Flat") { "f" } else { "s" };
        // An existing file of that name is kept, and the files that were created before it are removed.
        let taken = format!("image-{kind}005");
        fs::write(dir.join(&taken), "mine").expect("written");
        let output = run(ours, dir, "resize -f vmdk image 9G").expect("runs");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            format!("qemu-img: Could not create '{taken}': File exists\n")
        );
        assert_eq!(fs::read(dir.join(&taken)).expect("exists"), b"mine");
        assert!(!dir.join(format!("image-{kind}004")).exists());
        succeed("qemu-img", dir, "compare -q -f vmdk -F raw image expected");
    }
}

#[test]
fn stream_optimized_disks_grow() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    if has_stock(dir) {
        // One length needs no further grain tables, the other one does.
        for len in [30 << 20, 5 * GIB + 512] {
            grow_and_write(dir, "subformat=streamOptimized", len, [10 << 20, 20 << 20]);
            fs::remove_file(dir.join("image")).expect("removed");
        }
    }
}
