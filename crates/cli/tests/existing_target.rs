//! Conversions into storage that exists, which are killed: what is there then is not taken for a complete image.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The length of the disk.
const LEN: usize = 8 << 20;

/// The head of a disk that comes last.
const HEAD: usize = 4096;

/// The formats with their options, and whether an image says of itself that it is not complete.
const MARKED: &[(&str, &str, bool)] = &[
    ("raw", "size=8M", false),
    ("vpc", "subformat=fixed,force_size=on", false),
    ("qcow2", "compat=1.1", true),
    ("qcow2", "lazy_refcounts=on", true),
];

/// The formats with their options.
const FORMATS: &[(&str, &str)] = &[
    ("raw", "size=8M"),
    ("qcow2", "compat=1.1"),
    ("qcow2", "compat=0.10"),
    ("qed", "size=8M"),
    ("qcow", "size=8M"),
    ("vdi", "size=8M"),
    ("vpc", "force_size=on"),
    ("vhdx", "size=8M"),
    ("parallels", "size=8M"),
    ("vmdk", "size=8M"),
];

fn run(dir: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words)
        .current_dir(dir)
        .output()
        .expect("it runs")
}

fn run_well(dir: &Path, words: &[&str]) -> String {
    let output = run(dir, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn disk(seed: u32) -> Vec<u8> {
    (0..u32::try_from(LEN).expect("fits"))
        .map(|at| (at ^ seed).wrapping_mul(2_654_435_761).to_be_bytes()[0] | 1)
        .collect()
}

fn inputs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("old.raw"), disk(0x5555)).expect("written");
    fs::write(dir.path().join("disk.raw"), disk(0)).expect("written");
    dir
}

/// Starts a conversion that takes several seconds.
fn convert(dir: &Path, words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(["convert", "-r", "1M", "-f", "raw"])
        .args(words)
        .current_dir(dir)
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts")
}

/// Kills the process once it has written some data to the file.
fn kill_when_written(mut child: Child, file: &Path, what: &str) {
    let begin = Instant::now();
    // Guest data of the second megabyte, which no other file has.
    let piece = &disk(0)[(1 << 20) + 512..(1 << 20) + 1024];
    loop {
        assert!(
            child.try_wait().expect("is known").is_none(),
            "{what}: it has ended"
        );
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{what}: nothing is written"
        );
        let bytes = fs::read(file).expect("readable");
        if bytes.chunks(512).any(|sector| sector == piece) {
            break;
        }
        sleep(Duration::from_millis(20));
    }
    child.kill().expect("it runs");
    let status = child.wait().expect("it ends");
    assert_eq!(status.signal(), Some(9), "{what}");
}

#[test]
fn an_existing_image_is_marked_until_the_conversion_into_it_is_complete() {
    for (format, options, has_bit) in MARKED {
        let what = format!("{format} {options}");
        let dir = inputs();
        let dir = dir.path();
        let new = |seed: &str| {
            run_well(
                dir,
                &[
                    "convert", "-f", "raw", "-O", format, "-o", options, seed, "target",
                ],
            );
        };
        let facts = || run_well(dir, &["info", "-f", format, "--output=json", "target"]);
        new("old.raw");
        let into = ["-n", "-O", format, "disk.raw", "target"];
        kill_when_written(convert(dir, &into), &dir.join("target"), &what);
        if *has_bit {
            assert!(facts().contains("\"dirty-flag\": true"), "{what}: {}", facts());
        } else {
            run_well(dir, &["convert", "-f", format, "-O", "raw", "target", "seen.raw"]);
            let seen = fs::read(dir.join("seen.raw")).expect("readable");
            assert!(seen[..HEAD].iter().all(|byte| *byte == 0), "{what}");
        }
        // The same once more, to the end.
        run_well(
            dir,
            &["convert", "-f", "raw", "-n", "-O", format, "disk.raw", "target"],
        );
        assert!(!facts().contains("\"dirty-flag\": true"), "{what}");
        run_well(dir, &["compare", "-f", "raw", "-F", format, "disk.raw", "target"]);
    }
}

#[test]
fn a_file_that_cannot_be_replaced_is_no_image_until_it_is_complete() {
    for (format, options) in FORMATS {
        let what = format!("{format} {options}");
        let dir = inputs();
        let dir = dir.path();
        fs::write(dir.join("target"), "other contents").expect("written");
        fs::hard_link(dir.join("target"), dir.join("other")).expect("linked");
        let into = ["-O", format, "-o", options, "disk.raw", "target"];
        kill_when_written(convert(dir, &into), &dir.join("target"), &what);
        let mut head = [1; HEAD];
        let file = fs::File::open(dir.join("target")).expect("opens");
        file.read_exact_at(&mut head, 0).expect("readable");
        assert!(head.iter().all(|byte| *byte == 0), "{what}");

        run_well(dir, &[&["convert", "-f", "raw"][..], &into].concat());
        run_well(dir, &["compare", "-f", "raw", "-F", format, "disk.raw", "other"]);
    }
}

/// A server, which ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_export_holds_no_image_until_it_is_complete() {
    let required = std::env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1");
    let has_server = Command::new("qemu-nbd").arg("--version").output().is_ok();
    assert!(
        has_server || !required,
        "qemu-nbd is required (REQUIRE_STOCK_TOOLS=1) and not installed"
    );
    if !has_server {
        eprintln!("skipped: qemu-nbd is not installed");
        return;
    }
    for (format, words) in [
        ("qcow2", ["-O", "qcow2"].as_slice()),
        ("raw", &["-n", "-O", "raw"]),
    ] {
        let dir = inputs();
        let dir = dir.path();
        let export = fs::File::create(dir.join("export")).expect("created");
        export.set_len(LEN as u64 * 2).expect("grows");
        let socket = format!("nbd+unix:///?socket={}", dir.join("socket").display());
        let server = Command::new("qemu-nbd")
            .args(["-t", "-f", "raw", "-k"])
            .arg(dir.join("socket"))
            .arg(dir.join("export"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let server = Server(server);
        while !dir.join("socket").exists() {
            sleep(Duration::from_millis(10));
        }
        let into = [words, &["disk.raw", &socket]].concat();
        kill_when_written(convert(dir, &into), &dir.join("export"), format);
        let mut head = [1; HEAD];
        let file = fs::File::open(dir.join("export")).expect("opens");
        file.read_exact_at(&mut head, 0).expect("readable");
        assert!(head.iter().all(|byte| *byte == 0), "{format}");
        run_well(dir, &[&["convert", "-f", "raw"][..], &into].concat());
        drop(server);
        run_well(dir, &["compare", "-f", "raw", "-F", format, "disk.raw", "export"]);
    }
}
