//! The error of this program: a message with its subject.

use std::fmt;
use std::io;

/// A message for the user.
#[derive(Debug)]
pub(crate) struct Error(String);

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Adds the subject to an error of the operating system.
pub(crate) trait Context<T> {
    fn context(self, subject: &str) -> Result<T>;
    fn with_context(self, subject: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, subject: &str) -> Result<T> {
        self.map_err(|error| Error(format!("{subject}: {error}")))
    }

    fn with_context(self, subject: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error(format!("{}: {error}", subject())))
    }
}
