//! Truncated images: a command either fails, or no guest data was in the part that is missing.
//!
//! Run with `--nocapture` for the table of all forms, cuts and commands.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// A format with the options to create an image.
struct Form {
    name: &'static str,
    format: &'static str,
    /// The options of `convert` that create it.
    make: &'static str,
    /// The file that is truncated.
    file: &'static str,
    /// Whether it can have a backing image.
    backed: bool,
}

const fn form(name: &'static str, format: &'static str, make: &'static str) -> Form {
    let (file, backed) = ("image.img", false);
    Form {
        name,
        format,
        make,
        file,
        backed,
    }
}

const fn backed(name: &'static str, format: &'static str, make: &'static str) -> Form {
    let backed = true;
    Form {
        backed,
        ..form(name, format, make)
    }
}

const fn part(name: &'static str, format: &'static str, make: &'static str, file: &'static str) -> Form {
    Form {
        file,
        ..form(name, format, make)
    }
}

const FORMS: &[Form] = &[
    backed("qcow2", "qcow2", "-O qcow2"),
    form("qcow2, version 2", "qcow2", "-O qcow2 -o compat=0.10"),
    form("qcow2, 4k", "qcow2", "-O qcow2 -o cluster_size=4k"),
    form("qcow2, 2M", "qcow2", "-O qcow2 -o cluster_size=2M"),
    form("qcow2, zlib", "qcow2", "-c -O qcow2"),
    form("qcow2, zstd", "qcow2", "-c -O qcow2 -o compression_type=zstd"),
    form("qcow2, extended_l2", "qcow2", "-O qcow2 -o extended_l2=on"),
    form("qcow2, metadata", "qcow2", "-O qcow2 -o preallocation=metadata"),
    form("qcow2, full", "qcow2", "-O qcow2 -o preallocation=full"),
    part("qcow2, data file", "qcow2", "-O qcow2 -o data_file=data", "data"),
    part(
        "qcow2, raw data file",
        "qcow2",
        "-O qcow2 -o data_file=data,data_file_raw=on",
        "data",
    ),
    backed("qed", "qed", "-O qed"),
    backed("qcow", "qcow", "-O qcow"),
    form("qcow, zlib", "qcow", "-c -O qcow"),
    form("vdi", "vdi", "-O vdi"),
    form("vdi, static", "vdi", "-O vdi -o static=on"),
    backed("vmdk", "vmdk", "-O vmdk"),
    form("vmdk, zeroed_grain", "vmdk", "-O vmdk -o zeroed_grain=on"),
    form(
        "vmdk, streamOptimized",
        "vmdk",
        "-O vmdk -o subformat=streamOptimized",
    ),
    part(
        "vmdk, flat",
        "vmdk",
        "-O vmdk -o subformat=monolithicFlat",
        "image-flat.img",
    ),
    part(
        "vmdk, several files",
        "vmdk",
        "-O vmdk -o subformat=twoGbMaxExtentSparse",
        "image-s001.img",
    ),
    part(
        "vmdk, several flat files",
        "vmdk",
        "-O vmdk -o subformat=twoGbMaxExtentFlat",
        "image-f001.img",
    ),
    form("vpc", "vpc", "-O vpc -o force_size=on"),
    form("vpc, fixed", "vpc", "-O vpc -o force_size=on,subformat=fixed"),
    form("vhdx", "vhdx", "-O vhdx"),
    form("vhdx, 1M", "vhdx", "-O vhdx -o block_size=1M"),
    form("vhdx, fixed", "vhdx", "-O vhdx -o subformat=fixed,block_size=1M"),
    form("parallels", "parallels", "-O parallels"),
    form("parallels, 64k", "parallels", "-O parallels -o cluster_size=64k"),
];

/// The sizes of the disks: one ends inside the clusters of all formats, so that the last one is padded; the other does
/// not.
const SIZE: usize = (5 << 20) + 40 * 1024 + 512;
const EVEN_SIZE: usize = 8 << 20;

/// The name of a cut, and the number of bytes that it removes from a file of this length.
type Cut = (&'static str, fn(usize) -> usize);

const CUTS: &[Cut] = &[
    ("1", |_| 1),
    ("512", |_| 512),
    ("64K", |_| 64 << 10),
    ("1M", |_| 1 << 20),
    ("3M", |_| 3 << 20),
    ("half", |len| len / 2),
];

/// Runs `qemu-img` with words that are separated by one blank each; two blanks make an empty word.
fn run(dir: &Path, words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split(' '))
        .current_dir(dir)
        .output()
        .expect("runs")
}

fn succeed(dir: &Path, words: &str) {
    let output = run(dir, words);
    assert!(output.status.success(), "{words}: {output:?}");
}

/// The guest data: random bytes, which do not compress, with a run of zeroes.
fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    })
    .take(size)
    .collect();
    bytes[1 << 20..1_500_000].fill(0);
    bytes
}

/// The files of a directory by name.
#[derive(Clone, PartialEq, Eq)]
struct Files(BTreeMap<String, Vec<u8>>);

impl Files {
    fn read(dir: &Path) -> Self {
        let entries = fs::read_dir(dir).expect("a directory").map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str());
            (name.expect("text").to_owned(), fs::read(&path).expect("readable"))
        });
        Self(entries.collect())
    }

    /// Replaces the files of `dir` by these.
    fn restore(&self, dir: &Path) {
        for entry in fs::read_dir(dir).expect("a directory") {
            fs::remove_file(entry.expect("an entry").path()).expect("removed");
        }
        for (name, bytes) in &self.0 {
            fs::write(dir.join(name), bytes).expect("written");
        }
    }

    fn cut(&self, name: &str, cut: fn(usize) -> usize) -> Self {
        let mut files = self.clone();
        let file = files.0.get_mut(name).expect("there");
        let len = file.len();
        file.truncate(len.saturating_sub(cut(len)));
        files
    }
}

/// The outcome of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It failed and changed nothing.
    Error,
    /// It succeeded, and no guest data was missing.
    Whole,
    /// It succeeded although guest data was missing, or it failed and lost data.
    Lost,
}

/// Converts image `name` to raw and compares it with `content`.
fn judge(dir: &Path, format: &str, name: &str, content: &[u8]) -> Outcome {
    let output = run(dir, &format!("convert -f {format} -O raw {name} judged"));
    match output.status.code() {
        Some(0) if fs::read(dir.join("judged")).expect("readable") == content => Outcome::Whole,
        Some(1) => Outcome::Error,
        _ => Outcome::Lost,
    }
}

/// Complete images of one form.
struct Case {
    form: &'static Form,
    content: Vec<u8>,
    /// The image, an overlay of it without data (`top`), and one with a few sectors (`change`).
    alone: Files,
    /// The image as an overlay of `base`, and its guest data.
    overlay: Option<(Files, Vec<u8>)>,
}

/// The offsets of the sectors in `change`: one in a cluster where the image has data, one where it has none.
const CHANGES: [usize; 2] = [1_300_480, 2_000_384];

impl Case {
    fn new(form: &'static Form, size: usize, dir: &Path) -> Self {
        let content = noise(1, size);
        let format = form.format;
        fs::write(dir.join("source"), &content).expect("written");
        succeed(dir, &format!("convert -f raw {} source image.img", form.make));
        for overlay in ["top", "change"] {
            let words = format!("create -q -f qcow2 -b image.img -F {format} {overlay}");
            succeed(dir, &words);
        }
        for at in CHANGES {
            let words = format!("bench -q -w --pattern=7 -c 1 -d 1 -s 512 -o {at} -f qcow2 change");
            succeed(dir, &words);
        }
        let alone = Files::read(dir);
        let overlay = form.backed.then(|| Self::overlay(form, dir, &content));
        Self {
            form,
            content,
            alone,
            overlay,
        }
    }

    fn overlay(form: &Form, dir: &Path, content: &[u8]) -> (Files, Vec<u8>) {
        let format = form.format;
        Files(BTreeMap::new()).restore(dir);
        fs::write(dir.join("source"), content).expect("written");
        fs::write(dir.join("base.raw"), vec![9; content.len()]).expect("written");
        let base_format = if format == "vmdk" { "vmdk" } else { "raw" };
        succeed(dir, &format!("convert -f raw -O {base_format} base.raw base"));
        if RENAMED.contains(&format) {
            // From here on the unallocated clusters of the image read as the base.
            succeed(dir, &format!("convert -f raw {} source image.img", form.make));
            succeed(dir, &format!("rebase -u -f {format} -b base -F raw image.img"));
        } else {
            succeed(
                dir,
                &format!("create -q -f {format} -b base -F {base_format} image.img"),
            );
            succeed(dir, &format!("convert -n -f raw -O {format} source image.img"));
        }
        let files = Files::read(dir);
        succeed(dir, &format!("convert -f {format} -O raw image.img judged"));
        let content = fs::read(dir.join("judged")).expect("readable");
        (files, content)
    }

    /// Runs every command on an image that is truncated by `cut`.
    fn try_cut(&self, dir: &Path, cut: fn(usize) -> usize) -> Vec<(&'static str, Outcome)> {
        let (form, content) = (self.form, &self.content);
        let format = form.format;
        let files = self.alone.cut(form.file, cut);
        files.restore(dir);
        let whole = judge(dir, format, "image.img", content);
        let mut outcomes = vec![("convert", whole)];
        let to_target = |words: String| {
            let _ = fs::remove_file(dir.join("target"));
            match run(dir, &words).status.code() {
                Some(0) => match judge(dir, "raw", "target", content) {
                    Outcome::Whole => Outcome::Whole,
                    _ => Outcome::Lost,
                },
                Some(1) => Outcome::Error,
                _ => Outcome::Lost,
            }
        };
        outcomes.push((
            "dense",
            to_target(format!("convert -S 0 -m 1 -f {format} -O raw image.img target")),
        ));
        outcomes.push((
            "dd",
            to_target(format!("dd -f {format} -O raw bs=64k if=image.img of=target")),
        ));
        let compared = run(dir, &format!("compare -f {format} -F raw image.img source"));
        outcomes.push((
            "compare",
            match compared.status.code() {
                Some(0) if whole == Outcome::Whole => Outcome::Whole,
                Some(2..=4) => Outcome::Error,
                _ => Outcome::Lost,
            },
        ));
        for command in ["map", "measure -O qcow2", "check"] {
            let code = run(dir, &format!("{command} -f {format} image.img"))
                .status
                .code();
            outcomes.push((
                command.split(' ').next().unwrap_or(command),
                match code {
                    // `check` must find the truncation; `map` and `measure` only must not crash.
                    Some(0) if command == "check" && whole == Outcome::Error => Outcome::Lost,
                    Some(0) => Outcome::Whole,
                    Some(_) => Outcome::Error,
                    None => Outcome::Lost,
                },
            ));
        }
        let unchanged = || Files::read(dir).0.get(form.file) == files.0.get(form.file);
        if !unchanged() {
            outcomes.push(("changed", Outcome::Lost));
        }
        outcomes.push(("flatten", self.flatten(dir, "qcow2", "top", content)));
        // As in qemu-img, opening a Parallels image for writing repairs it, and reports the clusters that are lost.
        if format != "parallels" {
            files.restore(dir);
            outcomes.push(("into", self.commit_into(dir)));
        }
        if let Some((files, content)) = &self.overlay {
            let files = files.cut(form.file, cut);
            files.restore(dir);
            outcomes.push(("commit", self.commit(dir, content, &files)));
            if RENAMED.contains(&format) {
                files.restore(dir);
                outcomes.push(("detach", self.flatten(dir, format, "image.img", content)));
            }
        }
        outcomes
    }

    /// Rebases image `name` to no backing file, which copies the data of its backing image into it.
    fn flatten(&self, dir: &Path, format: &str, name: &str, content: &[u8]) -> Outcome {
        let output = run(dir, &format!("rebase -f {format} -b  {name}"));
        if output.status.success() {
            return judge(dir, format, name, content);
        }
        let info = run(dir, &format!("info -f {format} --output=json {name}"));
        let refused = !info.status.success();
        let still_backed = String::from_utf8_lossy(&info.stdout).contains("\"backing-filename\"");
        match output.status.code() {
            Some(1) if refused || still_backed => Outcome::Error,
            _ => Outcome::Lost,
        }
    }

    /// Commits the truncated image to its base.
    fn commit(&self, dir: &Path, content: &[u8], before: &Files) -> Outcome {
        let base_format = if self.form.format == "vmdk" { "vmdk" } else { "raw" };
        let output = run(dir, &format!("commit -f {} image.img", self.form.format));
        if output.status.success() {
            return judge(dir, base_format, "base", content);
        }
        let after = Files::read(dir);
        match output.status.code() {
            Some(1) if after.0.get("image.img") == before.0.get("image.img") => Outcome::Error,
            _ => Outcome::Lost,
        }
    }

    /// Commits a few sectors to the truncated image. That may succeed, but must not hide that data is missing.
    fn commit_into(&self, dir: &Path) -> Outcome {
        let mut content = self.content.clone();
        for at in CHANGES {
            content[at..at + 512].fill(7);
        }
        let output = run(dir, "commit -d -f qcow2 change");
        let after = judge(dir, self.form.format, "image.img", &content);
        match (output.status.code(), after) {
            (Some(0 | 1), Outcome::Error) => Outcome::Error,
            (Some(0), outcome) => outcome,
            // No data is missing, and the format refuses the write.
            (Some(1), _) if judge(dir, self.form.format, "image.img", &self.content) == Outcome::Whole => {
                Outcome::Whole
            }
            _ => Outcome::Lost,
        }
    }
}

/// The formats whose backing file name can be changed.
const RENAMED: [&str; 2] = ["qcow2", "qed"];

/// The rows of the table for one form, and the cases that lost data.
fn try_form(form: &'static Form, size: usize, cuts: &[Cut]) -> (String, Vec<String>) {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    let case = Case::new(form, size, dir);
    let (mut rows, mut lost) = (String::new(), Vec::new());
    for (name, cut) in cuts {
        let _ = write!(rows, "{:22} {size:8} {name:5}", form.name);
        for (command, outcome) in case.try_cut(dir, *cut) {
            let _ = write!(rows, "  {command}: {outcome:?}");
            if outcome == Outcome::Lost {
                lost.push(format!("{}, {size} - {name}: {command}", form.name));
            }
        }
        rows.push('\n');
    }
    (rows, lost)
}

/// Tries all forms on two threads.
#[expect(clippy::print_stdout, reason = "prints the table")]
fn try_all(size: usize, cuts: &[Cut]) {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(form) = FORMS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = try_form(form, size, cuts);
                    done.lock().expect("no panic").insert(form.name, outcome);
                }
            });
        }
    });
    let done = done.into_inner().expect("no panic");
    let mut lost = Vec::new();
    for form in FORMS {
        let (rows, of_form) = &done[form.name];
        print!("{rows}");
        lost.extend_from_slice(of_form);
    }
    assert!(
        lost.is_empty(),
        "{} cases lost data:\n{}",
        lost.len(),
        lost.join("\n")
    );
}

#[test]
fn a_missing_end_is_an_error_and_never_zeroes() {
    try_all(SIZE, CUTS);
}

/// At the end of most files of this size there is guest data and no padding, so a small cut removes guest data.
#[test]
fn a_few_missing_bytes_are_an_error() {
    try_all(EVEN_SIZE, &CUTS[..3]);
}

/// The missing part may be data of a snapshot.
#[test]
fn a_snapshot_whose_end_is_missing_is_not_read_as_zeroes() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    let (old, new) = (noise(1, SIZE), noise(2, SIZE));
    fs::write(dir.join("source"), &new).expect("written");
    fs::write(dir.join("old"), &old).expect("written");
    succeed(dir, "convert -f raw -O qcow2 old image.img");
    succeed(dir, "snapshot -c s image.img");
    succeed(dir, "convert -n -f raw -O qcow2 source image.img");
    let files = Files::read(dir);
    for (name, cut) in CUTS {
        files.cut("image.img", *cut).restore(dir);
        let mut missing = false;
        for (words, content) in [("", &new), ("-l s ", &old)] {
            let output = run(dir, &format!("convert {words}-f qcow2 -O raw image.img target"));
            let whole = output.status.success();
            missing |= !whole;
            assert!(
                !whole || fs::read(dir.join("target")).expect("readable") == *content,
                "{name} {words}"
            );
        }
        let before = Files::read(dir);
        let applied = run(dir, "snapshot -a s image.img");
        assert!(
            applied.status.success() || judge(dir, "qcow2", "image.img", &new) != Outcome::Lost,
            "{name}"
        );
        if applied.status.success() {
            assert_ne!(judge(dir, "qcow2", "image.img", &old), Outcome::Lost, "{name}");
        }
        before.restore(dir);
        let checked = run(dir, "check -f qcow2 image.img").status.code();
        assert_eq!(checked != Some(0), missing, "{name}: {checked:?}");
    }
}

/// The length of a LUKS volume is that of its file, so a truncated file is a shorter disk, unless it ends inside a
/// sector.
#[test]
fn a_truncated_luks_volume_is_shorter() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    let content = noise(1, SIZE);
    fs::write(dir.join("source"), &content).expect("written");
    let secret = "--object secret,id=s,data=abc";
    let make = format!("convert {secret} -f raw -O luks -o key-secret=s,iter-time=10 source image.img");
    succeed(dir, &make);
    let files = Files::read(dir);
    for (name, cut) in CUTS {
        let cut_off = files.cut("image.img", *cut);
        cut_off.restore(dir);
        let whole_sectors = cut_off.0["image.img"].len().is_multiple_of(512);
        let image = "driver=luks,key-secret=s,file.filename=image.img";
        let output = run(
            dir,
            &format!("convert {secret} --image-opts -O raw {image} target"),
        );
        assert_eq!(output.status.success(), whole_sectors, "{name}: {output:?}");
        if whole_sectors {
            let target = fs::read(dir.join("target")).expect("readable");
            assert!(target == content[..target.len()], "{name}");
        }
    }
}
