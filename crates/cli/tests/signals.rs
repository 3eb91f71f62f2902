//! Signals that commands ignore: they neither end a command nor change its result.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu_img_rs::commands;

/// A command line of each command.
const RUNS: [&str; 17] = [
    "amend -o compat=0.10 disk.qcow2",
    "bench -q -w -c 300 -f qcow2 disk.qcow2",
    "bitmap --add disk.qcow2 b",
    "check disk.qcow2",
    "commit top.qcow2",
    "compare disk.raw disk.qcow2",
    "convert -O qcow2 disk.raw new",
    "convert -r 40M -p -O raw disk.qcow2 new",
    "create -f qcow2 -o preallocation=full new 16M",
    "dd -O qcow2 if=disk.raw of=new",
    "info disk.qcow2",
    "map disk.qcow2",
    "measure -O qcow2 disk.raw",
    "rebase -b other.raw -F raw top.qcow2",
    "resize -f raw --preallocation=full disk.raw 96M",
    "resize -f raw --preallocation=falloc disk.raw 96M",
    "snapshot -d one kept.qcow2",
];

const SIGNALS: [Signal; 3] = [Signal::SIGUSR1, Signal::SIGALRM, Signal::SIGIO];

/// A directory with the images of the commands.
fn images() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let noise: Vec<u8> = (0..16_u32 << 20)
        .map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    fs::write(dir.path().join("disk.raw"), &noise).expect("written");
    fs::write(dir.path().join("other.raw"), &noise[1 << 20..]).expect("written");
    for words in [
        "convert -f raw -O qcow2 disk.raw disk.qcow2",
        "convert -f raw -O qcow2 disk.raw kept.qcow2",
        "snapshot -c one kept.qcow2",
        "create -q -f qcow2 -b disk.raw -F raw top.qcow2",
        "bench -q -w -c 100 -d 1 -s 64k -f qcow2 top.qcow2",
    ] {
        let output = program(dir.path(), words).output().expect("it runs");
        assert!(output.status.success(), "{words}: {output:?}");
    }
    dir
}

fn program(dir: &Path, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qemu-img"));
    command.args(words.split(' ')).current_dir(dir);
    command
}

/// Runs a command, with signals all the time if `disturbed`. It first waits for the list of trace events from a pipe,
/// so that the first signals arrive before it has done anything else.
fn run(dir: &Path, words: &str, disturbed: bool) -> Output {
    let pipe = dir.join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs");
    assert!(made.success());
    let words = format!("-T events=pipe {words}");
    let mut child = program(dir, &words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut events = wait_for_reader(&pipe, &mut child, &words);
    if disturbed {
        for _ in 0..20 {
            send_all(&child);
            sleep(Duration::from_micros(200));
        }
    }
    events.write_all(b"# none\n").expect("it waits");
    drop(events);
    while disturbed && child.try_wait().expect("ours").is_none() {
        send_all(&child);
        sleep(Duration::from_micros(100));
    }
    let output = child.wait_with_output().expect("it ends");
    fs::remove_file(&pipe).expect("ours");
    output
}

/// Opens the writing end of a pipe when `child` has opened the other end.
fn wait_for_reader(pipe: &Path, child: &mut Child, words: &str) -> fs::File {
    let start = Instant::now();
    loop {
        let opened = fs::OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(pipe);
        match opened {
            Ok(file) => return file,
            Err(error) if error.raw_os_error() == Some(nix::libc::ENXIO) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}"),
        }
        assert!(
            child.try_wait().expect("ours").is_none(),
            "{words}: it ended early"
        );
        assert!(start.elapsed() < Duration::from_secs(60), "it does not read");
        sleep(Duration::from_millis(1));
    }
}

fn send_all(child: &Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("small"));
    for signal in SIGNALS {
        // The child may be a zombie, but its pid is not reused before it is waited for.
        kill(pid, signal).expect("it exists");
    }
}

/// Standard output and standard error without the progress lines of SIGUSR1 and the duration.
fn stable_output(output: &Output) -> [String; 2] {
    let is_stable = |line: &&str| {
        !(line.starts_with("    (") && line.ends_with("/100%)") || line.starts_with("Run completed in "))
    };
    [&output.stdout, &output.stderr].map(|bytes| {
        let text = String::from_utf8(bytes.clone()).expect("text");
        text.split('\n').filter(is_stable).collect::<Vec<_>>().join("\n")
    })
}

#[test]
fn signals_do_not_change_the_result_of_a_command() {
    for words in RUNS {
        let (calm, disturbed) = (images(), images());
        let expected = run(calm.path(), words, false);
        let output = run(disturbed.path(), words, true);
        assert_eq!(output.status, expected.status, "{words}: {output:?}");
        assert!(expected.status.success(), "{words}: {expected:?}");
        assert_eq!(stable_output(&output), stable_output(&expected), "{words}");
        for entry in fs::read_dir(calm.path()).expect("readable") {
            let name = entry.expect("readable").file_name();
            let [one, other] =
                [&calm, &disturbed].map(|dir| fs::read(dir.path().join(&name)).expect("readable"));
            // A snapshot stores the time at which it was taken.
            let is_same = match name == "kept.qcow2" {
                true => one.len() == other.len(),
                false => one == other,
            };
            assert!(is_same, "{words}: {} differs", name.display());
        }
    }
}

#[test]
fn every_command_is_tried() {
    for entry in commands::ALL {
        let name = entry.command.name;
        assert!(
            RUNS.iter().any(|words| words.split(' ').next() == Some(name)),
            "{name}"
        );
    }
}

#[test]
fn sigusr1_prints_the_progress() {
    let dir = images();
    let child = program(dir.path(), "convert -r 8M -O raw disk.qcow2 new")
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    // The program has blocked the signal and waits for it a moment after its start.
    sleep(Duration::from_millis(500));
    for _ in 0..5 {
        kill(
            Pid::from_raw(i32::try_from(child.id()).expect("small")),
            Signal::SIGUSR1,
        )
        .expect("it exists");
        sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stderr).expect("text");
    assert!(text.contains("/100%)\n"), "{text:?}");
}
