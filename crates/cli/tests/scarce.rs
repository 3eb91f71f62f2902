//! Commands that cannot have the threads or the memory that they would use: they use fewer, and at last fail in one line.
//! Limits are set by `prlimit` and `setpriv` of util-linux.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output};

const QEMU_IMG: &str = env!("CARGO_BIN_EXE_qemu-img");

/// A user without processes, whose threads are counted: limits of threads do not hold for root.
const USER: &str = "54321";

/// Commands on the files that [`prepare`] makes, in order. Each is run in a new copy.
const COMMANDS: &[&str] = &[
    "convert -f raw -O qcow2 a.raw out",
    "convert -c -f raw -O qcow2 a.raw out",
    "convert -W -m 16 -f raw -O raw a.raw out",
    "convert -f qcow2 -O vmdk -o subformat=streamOptimized top.qcow2 out",
    "convert -p -f qcow2 -O vdi top.qcow2 out",
    "compare -f raw -F qcow2 a.raw a.qcow2",
    "compare -s -f raw -F qcow2 a.raw a.qcow2",
    "rebase -f qcow2 -F qcow2 -b other.qcow2 top.qcow2",
    "rebase -c -f qcow2 -b  top.qcow2",
    "commit -f qcow2 top.qcow2",
    "bench -f raw -c 200 -d 64 a.raw",
    "bench -f qcow2 -w -c 200 -d 64 --flush-interval=100 a.qcow2",
    "bench -f raw -i io_uring -c 200 -d 64 a.raw",
    "dd -f raw -O qcow2 bs=1M if=a.raw of=out",
    "check -f qcow2 a.qcow2",
    "check -r all -f qcow2 a.qcow2",
    "map -f qcow2 top.qcow2",
    "measure -f qcow2 -O qcow2 top.qcow2",
    "info --backing-chain top.qcow2",
    "snapshot -c s a.qcow2",
    "resize -f qcow2 --preallocation=metadata a.qcow2 64M",
    "amend -f qcow2 -o compat=0.10 a.qcow2",
    "bitmap --add -f qcow2 a.qcow2 b",
    "create -f vhdx out 4G",
];

fn run(dir: &Path, limits: &[&str], words: &[&str]) -> Output {
    let mut all: Vec<&str> = limits.to_vec();
    all.push(QEMU_IMG);
    all.extend(words);
    Command::new(all[0])
        .args(&all[1..])
        .current_dir(dir)
        .output()
        .expect("util-linux is installed")
}

/// Makes the inputs: 6 MiB of data that does not repeat, and chains over it.
fn prepare(dir: &Path) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let data: Vec<u8> = (0..6 << 17)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes()
        })
        .collect();
    fs::write(dir.join("a.raw"), data).expect("written");
    for words in [
        "convert -f raw -O qcow2 a.raw a.qcow2",
        "create -q -f qcow2 other.qcow2 6M",
        "create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2 6M",
    ] {
        let words: Vec<_> = words.split(' ').collect();
        assert!(run(dir, &["env"], &words).status.success(), "{words:?}");
    }
}

/// A copy of the inputs that every user may change.
fn copy_of(inputs: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("changed");
    for entry in fs::read_dir(inputs).expect("readable") {
        let from = entry.expect("readable").path();
        let to = dir.path().join(from.file_name().expect("has a name"));
        fs::copy(&from, &to).expect("copied");
        fs::set_permissions(&to, fs::Permissions::from_mode(0o666)).expect("changed");
    }
    dir
}

/// Checks that a command succeeded, or failed in one line.
fn judge(output: &Output, what: &str) -> bool {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), None, "{what}: {errors}");
    let code = output.status.code().expect("it has ended by itself");
    assert!(!errors.contains("panicked"), "{what}: {errors}");
    if code == 0 {
        return true;
    }
    // `compare` has 2 for a failure, `check` as well.
    assert!(code == 1 || code == 2, "{what}: exit status {code}: {errors}");
    let lines = errors.lines().filter(|line| !line.is_empty()).count();
    assert!(errors.contains("qemu-img: ") && lines <= 2, "{what}: {errors}");
    false
}

#[test]
fn without_threads_every_command_does_its_work_alone() {
    let inputs = tempfile::tempdir().expect("a directory");
    prepare(inputs.path());
    let is_root = Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|id| id.stdout == b"0\n");
    let required = std::env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1");
    assert!(
        is_root || !required,
        "only root can become a user without processes"
    );
    if !is_root {
        return;
    }
    for threads in ["--nproc=1", "--nproc=2", "--nproc=3"] {
        for words in COMMANDS {
            let dir = copy_of(inputs.path());
            let become_user = ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"];
            let limits = [&become_user[..], &["prlimit", threads]].concat();
            let split: Vec<_> = words.split(' ').collect();
            let output = run(dir.path(), &limits, &split);
            assert!(judge(&output, words), "{threads} {words}: {output:?}");
        }
    }
}

#[test]
fn without_memory_every_command_ends_in_one_line() {
    let inputs = tempfile::tempdir().expect("a directory");
    prepare(inputs.path());
    let limit = |bytes: u64| format!("--as={bytes}");
    let starts = |bytes| {
        let output = run(inputs.path(), &["prlimit", &limit(bytes)], &["--version"]);
        output.status.success()
    };
    // The least address space in which the program starts.
    let (mut low, mut high) = (1 << 20, 1 << 32);
    assert!(starts(high));
    while high - low > 64 << 10 {
        let middle = low.midpoint(high);
        if starts(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    for words in COMMANDS {
        let mut succeeded = false;
        for more in [64, 256, 1024, 2500, 6000, 14_000, 30_000, 80_000, 300_000_u64] {
            let dir = copy_of(inputs.path());
            let split: Vec<_> = words.split(' ').collect();
            let output = run(dir.path(), &["prlimit", &limit(high + (more << 10))], &split);
            succeeded = judge(&output, &format!("{words} with {more} KiB more"));
        }
        assert!(succeeded, "{words} with 300 MB more");
    }
}
