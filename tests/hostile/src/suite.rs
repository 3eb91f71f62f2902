//! Runs all commands on all images, and reports.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};

use crate::commands::{COMMANDS, OUT};
use crate::files::Files;
use crate::images::Image;
use crate::{limits, process, say};

/// What is run.
#[derive(Debug)]
pub(crate) struct Suite {
    pub(crate) program: PathBuf,
    pub(crate) images: Vec<&'static Image>,
    /// The word that chose the images.
    pub(crate) only: Option<String>,
    pub(crate) jobs: Option<usize>,
    /// Where the images are made and stay.
    pub(crate) keep: Option<PathBuf>,
}

/// The commands that took most.
#[derive(Debug, Default)]
struct Most {
    memory: (u64, String),
    cpu: (Duration, String),
    output: (u64, String),
}

impl Most {
    fn note(&mut self, spent: &process::Spent, what: &str, counts_output: bool) {
        if spent.memory > self.memory.0 {
            self.memory = (spent.memory, what.to_owned());
        }
        if spent.cpu > self.cpu.0 {
            self.cpu = (spent.cpu, what.to_owned());
        }
        if counts_output && spent.output > self.output.0 {
            self.output = (spent.output, what.to_owned());
        }
    }
}

/// Runs the suite; the result is whether all images hold.
///
/// # Errors
/// The images cannot be made, or a command cannot be started.
pub(crate) fn run(suite: &Suite) -> Result<bool, String> {
    let temporary = tempfile::tempdir().map_err(|error| error.to_string())?;
    let directory = suite.keep.as_deref().unwrap_or(temporary.path());
    let start = Instant::now();
    make(directory, suite.only.as_deref())?;
    let made = start.elapsed();
    let (next, held) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (most, first_error) = (Mutex::new(Most::default()), Mutex::new(None));
    let jobs = suite
        .jobs
        .unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(image) = suite.images.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match attack(&suite.program, image, &directory.join(image.name), &most) {
                        Ok(faults) if faults.is_empty() => {
                            held.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(faults) => say(&format!("{}\n  ({})\n", faults.join("\n"), image.attack)),
                        Err(error) => {
                            let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                            first.get_or_insert(format!("{}: {error}", image.name));
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let (held, all) = (held.into_inner(), suite.images.len());
    let most = most.into_inner().unwrap_or_else(PoisonError::into_inner);
    say(&format!(
        "hostile: {held} of {all} hold; largest RSS {:.1} MiB ({}), CPU {:.2} s ({}), output {:.1} KiB ({}); made in \
         {:.0} s, run in {:.0} s\n",
        mib(most.memory.0),
        most.memory.1,
        most.cpu.0.as_secs_f64(),
        most.cpu.1,
        mib(most.output.0 << 10),
        most.output.1,
        made.as_secs_f64(),
        (start.elapsed() - made).as_secs_f64(),
    ));
    Ok(held == all)
}

#[expect(clippy::cast_precision_loss, reason = "a number to show")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Makes the images in a process of its own, which may take memory.
fn make(directory: &Path, only: Option<&str>) -> Result<(), String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut program = Program::new(this);
    if let Some(word) = only {
        program.args(["--only", word]);
    }
    let status = program.arg("--make").arg(directory).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("the images could not be made: {status}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Runs all commands on one image, and returns what is wrong.
fn attack(program: &Path, image: &Image, directory: &Path, most: &Mutex<Most>) -> io::Result<Vec<String>> {
    let file = directory.join(Files::IMAGE);
    let before = Seen::of(&file)?;
    let contents = hash(&file)?;
    let stored = fs::metadata(&file)?.blocks() * 512;
    let mut faults = Vec::new();
    for command in COMMANDS {
        let words = command.words(image);
        let spent = process::run(program, &words, directory, &command.allowance(), command.short)?;
        let what = format!("{}, {}", image.name, command.name);
        most.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .note(&spent, &what, command.short);
        let mut found = limits::judge(command, &spent, stored);
        if Seen::of(&file)? != before {
            found.push("the image was changed".to_owned());
        }
        if !found.is_empty() {
            let line = String::from_utf8_lossy(&spent.stderr);
            let line = line.lines().next().unwrap_or_default().escape_debug().to_string();
            let line: String = line.chars().take(160).collect();
            faults.push(format!("{what}: {}: {line}", found.join(", ")));
        }
        fs::remove_file(directory.join(OUT)).ok();
    }
    if hash(&file)? != contents {
        faults.push(format!("{}: the contents of the image have changed", image.name));
    }
    Ok(faults)
}

/// What the file system says of a file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    len: u64,
    modified: [(i64, i64); 2],
}

impl Seen {
    fn of(file: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(file)?;
        Ok(Self {
            len: metadata.len(),
            modified: [
                (metadata.mtime(), metadata.mtime_nsec()),
                (metadata.ctime(), metadata.ctime_nsec()),
            ],
        })
    }
}

/// A hash of what is written in a file.
fn hash(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    let mut hasher = DefaultHasher::new();
    let mut buf = vec![0; 64 << 10];
    let mut at = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        let end = seek(&file, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let want = usize::try_from((end - at).min(buf.len() as u64)).unwrap_or(buf.len());
            let got = file.read_at(&mut buf[..want], at)?;
            if got == 0 {
                break;
            }
            hasher.write_u64(at);
            hasher.write(&buf[..got]);
            at += got as u64;
        }
    }
    Ok(hasher.finish())
}
