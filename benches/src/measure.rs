//! One run of a program: its wall time, processor time and peak memory.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use wait4::Wait4;

use crate::error::{Context, Error, Result};

/// A `qemu-img`, and which of the two sides it is.
#[derive(Debug)]
pub(crate) struct Tool {
    pub(crate) side: &'static str,
    path: PathBuf,
    pub(crate) version: String,
}

/// What one run took; of several in a row, the sum of the times and the highest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) wall: Duration,
    /// User and system time of all threads.
    pub(crate) cpu: Duration,
    /// Peak resident memory in bytes.
    pub(crate) memory: u64,
    /// Bytes that the output file takes on the disk, holes left out; none if there is no output file.
    pub(crate) output: Option<u64>,
}

impl Sample {
    /// This sample followed by another of the same command.
    pub(crate) fn then(self, next: Self) -> Self {
        Self {
            wall: self.wall + next.wall,
            cpu: self.cpu + next.cpu,
            memory: self.memory.max(next.memory),
            output: next.output,
        }
    }
}

impl Tool {
    /// Asks the program at `path` for its version, so that a wrong name is noticed before anything is measured.
    pub(crate) fn new(side: &'static str, path: &Path) -> Result<Self> {
        let output = Command::new(path)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| Error::new(format!("cannot run '{}' ({side}): {error}", path.display())))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .lines()
            .next()
            .filter(|_| output.status.success())
            .ok_or_else(|| {
                Error::new(format!(
                    "'{} --version' ({side}) tells no version",
                    path.display()
                ))
            })?;
        Ok(Self {
            side,
            path: path.to_owned(),
            version: version.to_owned(),
        })
    }

    /// The same program as the other side.
    pub(crate) fn as_side(&self, side: &'static str) -> Self {
        Self {
            side,
            path: self.path.clone(),
            version: self.version.clone(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command whose time does not matter.
    pub(crate) fn run_untimed(&self, arguments: &[OsString]) -> Result<()> {
        let output = self
            .command(arguments)
            .output()
            .with_context(|| self.path.display().to_string())?;
        self.require_done(arguments, output.status, &String::from_utf8_lossy(&output.stderr))
    }

    /// Runs and measures a command; `errors` is a file for what it writes to standard error, as a pipe would have to
    /// be emptied by this process while the clock runs.
    pub(crate) fn run(&self, arguments: &[OsString], output: &Path, errors: &Path) -> Result<Sample> {
        let stderr = fs::File::create(errors).with_context(|| errors.display().to_string())?;
        let mut command = self.command(arguments);
        command.stdout(Stdio::null()).stderr(stderr);

        let start = Instant::now();
        let finished = command
            .spawn()
            .and_then(Wait4::wait4)
            .with_context(|| self.path.display().to_string())?;
        let wall = start.elapsed();

        let message = fs::read_to_string(errors).unwrap_or_default();
        self.require_done(arguments, finished.status, &message)?;
        Ok(Sample {
            wall,
            cpu: finished.rusage.utime + finished.rusage.stime,
            memory: finished.rusage.maxrss,
            output: fs::metadata(output).ok().map(|metadata| metadata.blocks() * 512),
        })
    }

    fn command(&self, arguments: &[OsString]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(arguments).stdin(Stdio::null()).env("LC_ALL", "C");
        command
    }

    /// Whether a command has done its work. The original ends `convert -c -O qcow` with 1, and not a word, when it has:
    /// that the image is whole is for whoever compares it to see.
    fn require_done(&self, arguments: &[OsString], status: ExitStatus, message: &str) -> Result<()> {
        let has = |word: &str| arguments.iter().any(|argument| argument == word);
        let as_usual = status.code() == Some(1) && message.is_empty() && has("-c") && has("qcow");
        if status.success() || as_usual {
            return Ok(());
        }
        Err(self.failure(arguments, message))
    }

    fn failure(&self, arguments: &[OsString], message: &str) -> Error {
        let name = arguments
            .first()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let reason = message.lines().next().unwrap_or("no message");
        Error::new(format!("{} {name}: {reason}", self.side))
    }
}

/// What the peak memory of a process is at least when this program starts it, in bytes.
///
/// A child begins with the peak of the process it was forked from; a program that does next to nothing shows how much
/// that is.
pub(crate) fn memory_floor() -> Result<u64> {
    let finished = Command::new("true")
        .stdin(Stdio::null())
        .spawn()
        .and_then(Wait4::wait4)
        .context("true")?;
    Ok(finished.rusage.maxrss)
}

/// Removes the file if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::new(format!("{}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(wall: u64, memory: u64) -> Sample {
        Sample {
            wall: Duration::from_millis(wall),
            cpu: Duration::from_millis(wall),
            memory,
            output: None,
        }
    }

    #[test]
    fn samples_in_a_row_add_times_and_keep_the_highest_memory() {
        let both = sample(10, 7).then(Sample {
            output: Some(512),
            ..sample(5, 3)
        });
        assert_eq!(
            both,
            Sample {
                output: Some(512),
                ..sample(15, 7)
            }
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Tool::new("ours", Path::new("/nonexistent/qemu-img")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot run '/nonexistent/qemu-img' (ours): "),
            "{error}"
        );
    }

    #[test]
    fn a_failing_command_tells_its_first_line() {
        let directory = tempfile::tempdir().unwrap();
        let tool = Tool {
            side: "ours",
            path: "sh".into(),
            version: String::new(),
        };
        let arguments = ["-c", "echo first >&2; echo second >&2; exit 1"].map(OsString::from);
        let error = tool.run(
            &arguments,
            &directory.path().join("out"),
            &directory.path().join("errors"),
        );
        assert_eq!(error.unwrap_err().to_string(), "ours -c: first");
    }
}
