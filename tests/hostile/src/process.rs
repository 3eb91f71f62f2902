//! Runs one command under limits, and measures it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use wait4::Wait4;

/// What a process may take; the kernel keeps it to that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowance {
    /// Bytes of its address space.
    pub(crate) address_space: u64,
    /// Seconds of the processors.
    pub(crate) cpu: u64,
    /// Bytes of the longest file that it writes, its output included.
    pub(crate) file: u64,
    /// How long it may take altogether.
    pub(crate) wall: Duration,
}

/// What a process took and wrote.
#[derive(Debug)]
pub(crate) struct Spent {
    pub(crate) status: ExitStatus,
    pub(crate) is_overdue: bool,
    pub(crate) cpu: Duration,
    pub(crate) wall: Duration,
    /// The largest resident set, in bytes.
    pub(crate) memory: u64,
    /// Bytes of standard output and standard error.
    pub(crate) output: u64,
    pub(crate) stderr: Vec<u8>,
}

impl Spent {
    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.signal()
    }
}

/// Runs `program` in `directory`. If the output is `kept`, its length counts.
///
/// # Errors
/// The process cannot be started or waited for.
pub(crate) fn run(
    program: &Path,
    arguments: &[String],
    directory: &Path,
    allowance: &Allowance,
    kept: bool,
) -> io::Result<Spent> {
    let (stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    // `prlimit` becomes the program, so what is measured is the program.
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--as={}", allowance.address_space))
        .arg(format!("--cpu={}", allowance.cpu))
        .arg(format!("--fsize={}", allowance.file))
        .arg("--core=0")
        .arg(program)
        .args(arguments)
        .current_dir(directory)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(stderr.try_clone()?);
    match kept {
        true => command.stdout(stdout.try_clone()?),
        false => command.stdout(Stdio::null()),
    };
    let start = Instant::now();
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let (ended, end) = mpsc::channel::<()>();
    let wall = allowance.wall;
    let watch = thread::spawn(move || {
        let is_overdue = end.recv_timeout(wall) == Err(mpsc::RecvTimeoutError::Timeout);
        // The child was not waited for yet, so its number is still its own.
        if let (true, Some(pid)) = (is_overdue, pid) {
            kill_process(pid, Signal::KILL).ok();
        }
        is_overdue
    });
    let finished = child.wait4();
    drop(ended);
    let is_overdue = watch.join().unwrap_or(false);
    let finished = finished?;
    let output = length(&stdout)? + length(&stderr)?;
    let mut text = Vec::new();
    stderr.rewind()?;
    stderr.take(MOST_SHOWN).read_to_end(&mut text)?;
    Ok(Spent {
        status: finished.status,
        is_overdue,
        cpu: finished.rusage.utime + finished.rusage.stime,
        wall: start.elapsed(),
        memory: finished.rusage.maxrss,
        output,
        stderr: text,
    })
}

fn length(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.len())
}

/// How much of standard error is read: more than a command may write.
const MOST_SHOWN: u64 = 2 << 20;
