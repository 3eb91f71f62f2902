//! Commands that make an image and are interrupted, killed or fail: what was there before is still there, and nothing else.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The formats of the new image, each with its options.
const FORMS: &[(&str, &str)] = &[
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "data_file=DIR/new-data"),
    ("qed", ""),
    ("qcow", ""),
    ("vdi", ""),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vhdx", ""),
    ("parallels", ""),
    ("vmdk", ""),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
];

const SIGNALS: [Signal; 5] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGKILL,
];

/// The files that an older image under the same name may consist of.
const OLD: [&str; 5] = ["new.img", "new-data", "new-flat.img", "new-s001.img", "disk.raw"];

/// Starts a conversion that takes several seconds.
fn convert(dir: &Path, form: (&str, &str)) -> Child {
    conversion(dir, form)
        .args(["-r", "1M"])
        .spawn()
        .expect("it starts")
}

fn convert_at_full_speed(dir: &Path, form: (&str, &str)) -> ExitStatus {
    conversion(dir, form).status().expect("it runs")
}

fn conversion(dir: &Path, (format, options): (&str, &str)) -> Command {
    // Tests that run in the background may have to ignore some signals, and so would the program.
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_qemu-img")]);
    command.args(["convert", "-t", "writeback", "-f", "raw", "-O", format]);
    if !options.is_empty() {
        command.args(["-o", &options.replace("DIR", &dir.display().to_string())]);
    }
    command
        .args(["disk.raw", "new.img"])
        .current_dir(dir)
        .stdout(Stdio::null());
    command
}

/// Waits until the process has written 64 KiB into a file that has no name.
fn wait_for_data(child: &mut Child, what: &str) {
    let files = format!("/proc/{}/fd", child.id());
    let begin = Instant::now();
    loop {
        assert!(
            child.try_wait().expect("is known").is_none(),
            "{what}: it has ended"
        );
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{what}: nothing is written"
        );
        let links = fs::read_dir(&files).expect("it runs").filter_map(Result::ok);
        let nameless = links.filter(|link| {
            fs::read_link(link.path()).is_ok_and(|target| target.to_string_lossy().ends_with("(deleted)"))
        });
        let written = nameless.filter_map(|link| fs::metadata(link.path()).ok());
        if written
            .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata))
            .sum::<u64>()
            > 128
        {
            return;
        }
        sleep(Duration::from_millis(2));
    }
}

/// The names in a directory and the contents.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir)
        .expect("lists")
        .map(|entry| entry.expect("lists"));
    let mut files: Vec<_> = entries
        .map(|entry| {
            let name = entry.file_name().into_string().expect("is text");
            (name, fs::read(entry.path()).expect("readable"))
        })
        .collect();
    files.sort();
    files
}

fn inputs(with_old: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    if with_old {
        for name in OLD {
            fs::write(dir.path().join(name), format!("what was in {name}")).expect("written");
        }
    }
    let noise: Vec<u8> = (0..8_u32 << 20)
        .map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    fs::write(dir.path().join("disk.raw"), noise).expect("written");
    dir
}

#[test]
fn a_conversion_that_is_killed_leaves_everything_as_it_was() {
    for (nth, form) in FORMS.iter().enumerate() {
        for with_old in [true, false] {
            let signal = SIGNALS[(2 * nth + usize::from(with_old)) % SIGNALS.len()];
            let what = format!("{form:?}, {signal}");
            let dir = inputs(with_old);
            let before = contents(dir.path());
            let mut child = convert(dir.path(), *form);
            wait_for_data(&mut child, &what);
            let pid = Pid::from_raw(i32::try_from(child.id()).expect("fits"));
            kill(pid, signal).expect("it runs");
            let status = child.wait().expect("it ends");
            assert_eq!(status.signal(), Some(signal as i32), "{what}");
            assert!(contents(dir.path()) == before, "{what}");
        }
    }
}

#[test]
fn a_conversion_that_fails_leaves_everything_as_it_was() {
    for form in FORMS {
        for with_old in [true, false] {
            let dir = inputs(with_old);
            // The last part of the source is missing.
            let source = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
                .args(["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"])
                .current_dir(dir.path())
                .status();
            assert!(source.expect("it runs").success());
            let source = fs::OpenOptions::new()
                .write(true)
                .open(dir.path().join("disk.qcow2"));
            let source = source.expect("opens");
            source.set_len(7 << 20).expect("is cut");
            fs::rename(dir.path().join("disk.qcow2"), dir.path().join("disk.raw")).expect("renamed");
            let before = contents(dir.path());
            let options = form.1.replace("DIR", &dir.path().display().to_string());
            let output = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
                .args([
                    "convert", "-f", "qcow2", "-O", form.0, "-o", &options, "disk.raw", "new.img",
                ])
                .current_dir(dir.path())
                .output()
                .expect("it runs");
            assert_eq!(output.status.code(), Some(1), "{form:?}: {output:?}");
            assert!(contents(dir.path()) == before, "{form:?}");
        }
    }
}

#[test]
fn a_conversion_replaces_all_files_of_an_older_image() {
    for form in FORMS {
        let dir = inputs(true);
        let before: Vec<_> = contents(dir.path()).into_iter().map(|(name, _)| name).collect();
        let status = convert_at_full_speed(dir.path(), *form);
        assert!(status.success(), "{form:?}");
        let after = contents(dir.path());
        let names: Vec<_> = after.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, before, "{form:?}: no name more or less");
        let compared = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
            .args(["compare", "-q", "-f", "raw", "-F", form.0, "disk.raw", "new.img"])
            .current_dir(dir.path())
            .status();
        assert!(compared.expect("it runs").success(), "{form:?}");
    }
}
