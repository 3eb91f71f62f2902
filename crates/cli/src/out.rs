//! Standard output and standard error. No other module writes to them.
//!
//! A broken pipe (`qemu-img ... | head`) is neither a failure of the operation nor a panic. Any other failed write to
//! standard output, to a full disk for instance, makes the exit status 1.
//!
//! As by stdio of C, output to a pipe or file is buffered: it is written when the buffer is full, when progress is
//! shown, and at the end. If both outputs go to one file, errors therefore precede output that was printed shortly
//! before them, as scripts expect of `qemu-img`.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use diskimage::{Note, name};

use crate::printable::printable_line;
use crate::words::{Prefix, Stop};

/// Standard output and standard error, and the name that the program was called by.
#[derive(Debug)]
pub struct Console {
    path: String,
    /// The buffer of standard output; `None` if standard output is a terminal, which is not buffered.
    pending: Option<Mutex<Vec<u8>>>,
    /// The first failed write to standard output.
    failure: Mutex<Option<io::Error>>,
}

/// The size of the buffer, which is that of stdio.
const BUFFER: usize = 4096;

impl Console {
    /// The console of a program that was called as `path`, the first word of its command line.
    pub fn new(path: &OsStr) -> Self {
        Self {
            path: name::from_os(path),
            pending: (!io::stdout().is_terminal()).then(Mutex::default),
            failure: Mutex::new(None),
        }
    }

    /// The prefix of messages: the last component of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// Writes a line with words of images or users to standard output.
    pub fn line(&self, line: &str) {
        self.print(&printable_line(line));
        self.print("\n");
    }

    /// Writes a text of this program to standard output as it is: the bytes of names that are not UTF-8, too. Words of
    /// images are in it only if they cannot do harm, as in JSON.
    pub fn print(&self, text: &str) {
        let bytes = name::to_bytes(text);
        let Some(pending) = &self.pending else {
            return self.write_out(&bytes);
        };
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.extend_from_slice(&bytes);
        if pending.len() >= BUFFER {
            self.write_out(&std::mem::take(&mut *pending));
        }
    }

    /// Writes the buffer.
    pub fn flush(&self) {
        if let Some(pending) = &self.pending {
            let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
            self.write_out(&std::mem::take(&mut *pending));
        }
    }

    fn write_out(&self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        let result = stdout.write_all(bytes).and_then(|()| stdout.flush());
        if let Err(error) = result {
            self.remember(error);
        }
    }

    /// Writes a line to standard error.
    pub fn error_line(&self, line: &str) {
        let line = printable_line(line) + "\n";
        // A failed write to standard error cannot be reported anywhere.
        let _ = io::stderr().lock().write_all(&name::to_bytes(&line));
    }

    /// Prints an error: `qemu-img: message`.
    pub fn error(&self, message: &str) {
        self.error_line(&format!("{}: {message}", self.name()));
    }

    /// Prints a warning: `qemu-img: warning: message`.
    pub fn warning(&self, message: &str) {
        self.error(&format!("warning: {message}"));
    }

    /// Prints a note of the library.
    pub fn note(&self, note: &Note) {
        match note {
            Note::Line(line) => self.error_line(line),
            Note::Error(message) => self.error(message),
            Note::Warning(message) => self.warning(message),
            Note::Several(notes) => notes.iter().for_each(|note| self.note(note)),
        }
    }

    /// Prints an error of the library: the note before it, its messages joined by `": "`, then its hints on lines of
    /// their own.
    pub fn failure(&self, error: &diskimage::Error) {
        if let Some(notice) = error.preceding_note() {
            self.note(notice);
        }
        self.error(&error.chain());
        error.hint_lines().iter().for_each(|hint| self.error_line(hint));
    }

    /// Prints the reason why `command` was not run or has failed, and returns the exit status. Without a name of a
    /// command the reason is in the options before it.
    pub fn stop(&self, stop: Stop, command: &str, help: impl FnOnce() -> String) -> u8 {
        let invocation = match command {
            "" => self.path.clone(),
            command => format!("{} {command}", self.path),
        };
        match stop {
            Stop::Help => {
                self.print(&help());
                0
            }
            Stop::Text(text) => {
                self.print(&text);
                0
            }
            Stop::Wrong(wrong) => {
                if let Some(notice) = &wrong.notice {
                    self.note(notice);
                }
                for message in &wrong.messages {
                    match wrong.prefix {
                        Prefix::Program => self.error(message),
                        Prefix::Invocation => self.error_line(&format!("{invocation}: {message}")),
                    }
                }
                wrong.hints.iter().for_each(|hint| self.error_line(hint));
                if wrong.try_help {
                    self.error_line(&format!("Try '{invocation} --help' for more info"));
                }
                wrong.status
            }
        }
    }

    /// Writes the buffer. Returns the exit status: `status`, or 1 if standard output could not be written.
    pub fn finish(self, status: u8) -> u8 {
        self.flush();
        let failure = self.failure.lock().ok().and_then(|mut failure| failure.take());
        match failure {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let error = diskimage::Error::from(error);
                self.error(&format!("Could not write to standard output: {error}"));
                status.max(1)
            }
            _ => status,
        }
    }

    fn remember(&self, error: io::Error) {
        if let Ok(mut failure) = self.failure.lock() {
            failure.get_or_insert(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_is_the_last_component_of_the_path() {
        assert_eq!(Console::new(OsStr::new("./bin/foo")).name(), "foo");
        assert_eq!(Console::new(OsStr::new("")).name(), "");
    }
}
