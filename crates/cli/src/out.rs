//! The one place that writes to standard output and standard error.
//!
//! A reader that goes away (`qemu-img ... | head`) is no failure of the operation and never a panic. Any other failure
//! to write what was asked for, a full disk for instance, is remembered and turns the exit status into 1.
//!
//! As in C, what goes to a pipe or file is collected and written when there is much of it, when progress is shown and at the
//! end. So where both outputs go to one place, errors come before what was printed shortly before them, as scripts know it.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use diskimage::{Note, name};

use crate::words::{Command, Prefix, Stop, help};

/// Standard output and error, and the name under which the program was called.
#[derive(Debug)]
pub struct Console {
    path: String,
    /// What is not written yet; `None` where lines are written at once.
    pending: Option<Mutex<Vec<u8>>>,
    failure: Mutex<Option<io::Error>>,
}

/// So much is collected.
const BUFFER: usize = 4096;

impl Console {
    /// For a program called as `path`, the first word of its command line.
    pub fn new(path: &OsStr) -> Self {
        Self {
            path: name::from_os(path),
            pending: (!io::stdout().is_terminal()).then(Mutex::default),
            failure: Mutex::new(None),
        }
    }

    /// The name that stands in front of messages: the last part of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// Writes `text` to standard output as it is: the bytes of names that are not UTF-8, too.
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

    /// Writes what is still collected.
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

    /// Writes `text` to standard error as it is.
    pub fn print_error(&self, text: &str) {
        // There is nowhere left to tell that standard error failed.
        let _ = io::stderr().lock().write_all(&name::to_bytes(text));
    }

    /// Prints an error: `qemu-img: message`.
    pub fn error(&self, message: &str) {
        self.print_error(&format!("{}: {message}\n", self.name()));
    }

    /// Prints a warning: `qemu-img: warning: message`.
    pub fn warning(&self, message: &str) {
        self.error(&format!("warning: {message}"));
    }

    /// Prints what the library has to tell.
    pub fn note(&self, note: &Note) {
        match note {
            Note::Line(line) => self.print_error(&format!("{line}\n")),
            Note::Error(message) => self.error(message),
            Note::Warning(message) => self.warning(message),
        }
    }

    /// Prints an error of the library: what is shown before it, its levels joined by `": "`, then its hint on a line of its own.
    pub fn failure(&self, error: &diskimage::Error) {
        if let Some(notice) = error.preceding_note() {
            self.note(notice);
        }
        self.error(&error.chain());
        if let Some(hint) = error.hint_line() {
            self.print_error(&format!("{hint}\n"));
        }
    }

    /// Prints what kept the words of `command` from becoming its arguments, and answers the exit status. Without a
    /// command the words were those of the program itself.
    pub fn stop(&self, stop: Stop, command: Option<&Command>) -> u8 {
        let words = match command {
            Some(command) => format!("{} {}", self.path, command.name),
            None => self.path.clone(),
        };
        match stop {
            Stop::Help => {
                self.print(&command.map_or_else(help::program, help::command));
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
                        Prefix::Words => self.print_error(&format!("{words}: {message}\n")),
                    }
                }
                if wrong.try_help {
                    self.print_error(&format!("Try '{words} --help' for more info\n"));
                }
                wrong.status
            }
        }
    }

    /// The exit status, once everything is written, of a program that would exit with `status`.
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
    fn messages_carry_the_last_part_of_the_path() {
        assert_eq!(Console::new(OsStr::new("./bin/foo")).name(), "foo");
        assert_eq!(Console::new(OsStr::new("")).name(), "");
    }
}
