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

/// A `qemu-img` executable, and the side that it is.
#[derive(Debug)]
pub(crate) struct Tool {
    pub(crate) side: &'static str,
    path: PathBuf,
    pub(crate) version: String,
}

/// The measurements of one run. Those of several runs are the sum of the times and the highest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) wall: Duration,
    /// User and system time of all threads.
    pub(crate) cpu: Duration,
    /// Peak resident memory in bytes.
    pub(crate) memory: u64,
    /// The allocated bytes of the output file, without holes; `None` without an output file.
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
    /// Runs the program at `path` with `--version`, so that a wrong name is noticed before the first measurement.
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

    /// Runs a command without measuring it.
    pub(crate) fn run_untimed(&self, arguments: &[OsString]) -> Result<()> {
        let output = self
            .command(arguments)
            .output()
            .with_context(|| self.path.display().to_string())?;
        self.require_success(arguments, output.status, &String::from_utf8_lossy(&output.stderr))
    }

    /// Runs and measures a command. Its standard error goes to the file `errors`: a pipe would have to be read by this
    /// process while the clock runs.
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
        self.require_success(arguments, finished.status, &message)?;
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

    /// Requires that a command has succeeded. The stock `convert -c -O qcow` exits with 1 and without a message
    /// although it has succeeded; the comparison of the images finds out whether the image is complete.
    fn require_success(&self, arguments: &[OsString], status: ExitStatus, message: &str) -> Result<()> {
        let has = |word: &str| arguments.iter().any(|argument| argument == word);
        let is_known_quirk = status.code() == Some(1) && message.is_empty() && has("-c") && has("qcow");
        if status.success() || is_known_quirk {
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

/// The least peak memory in bytes of a process that this program starts.
///
/// A child process inherits the peak memory of its parent. The peak of `true`, which needs almost no memory, is that
/// value.
pub(crate) fn memory_floor() -> Result<u64> {
    let finished = Command::new("true")
        .stdin(Stdio::null())
        .spawn()
        .and_then(Wait4::wait4)
        .context("true")?;
    Ok(finished.rusage.maxrss)
}

/// Removes a file if it exists.
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
    fn a_failing_command_reports_its_first_line() {
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
