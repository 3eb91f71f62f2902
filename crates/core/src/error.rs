//! The one error type: a chain of levels, each with its message, which are joined when the error is printed.

use std::fmt;
use std::io;

use crate::Note;

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, for control flow only; the message is what users see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A file, snapshot or bitmap does not exist.
    NotFound,
    /// Permissions, or a read-only image or file, forbid it.
    Permission,
    /// Another process holds a conflicting lock on the image.
    Locked,
    /// Invalid arguments of the caller.
    Invalid,
    /// The image is damaged, or the bytes are no image.
    Corrupt,
    /// The file ends before bytes that the tables point to: it looks truncated.
    CutOff,
    /// Valid, but not supported by this program.
    Unsupported,
    /// The caller's [`Gate`](crate::Gate) refused a file.
    Denied,
    /// A number read from an image exceeds a limit or the memory budget.
    Limit,
    /// No space left on the device.
    NoSpace,
    /// Any other failure of the operating system.
    Io,
}

/// An error of this library.
///
/// `Display` prints one level; [`Error::chain`] joins the levels with `": "`, as the command line prints them.
/// No message ends in a full stop; offsets are printed in hex.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Error>,
    /// Lines of advice.
    hint: Vec<String>,
    notice: Option<Note>,
    errno: Option<i32>,
}

impl Error {
    /// An error of `kind` with the message of its only level.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            inner: Box::new(Inner {
                kind,
                message: message.into(),
                source: None,
                hint: Vec::new(),
                notice: None,
                errno: None,
            }),
        }
    }

    /// Invalid arguments of the caller.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// A damaged image.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// The error for a change of an image that was opened read-only.
    pub fn read_only() -> Self {
        Self::new(ErrorKind::Permission, "Image is read-only")
    }

    /// Something valid that this program does not support.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// An error number of the operating system, with the text of `strerror` as its message.
    pub fn from_errno(errno: i32) -> Self {
        Self::from(io::Error::from_raw_os_error(errno))
    }

    /// Adds a level with `message` in front. Kind, error number and hint of the levels behind it stay in force.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        let (kind, errno) = (self.kind(), self.errno());
        Self {
            inner: Box::new(Inner {
                kind,
                message: message.into(),
                source: Some(self),
                hint: Vec::new(),
                notice: None,
                errno,
            }),
        }
    }

    /// Adds advice for the user, printed on a line of its own.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint = vec![hint.into()];
        self
    }

    /// Adds a further line to the advice of this level.
    #[must_use]
    pub fn and_hint(mut self, line: impl Into<String>) -> Self {
        self.inner.hint.push(line.into());
        self
    }

    /// Adds a note that is printed before the error, with the cause that the error itself does not mention.
    #[must_use]
    pub fn notice(mut self, notice: impl Into<Note>) -> Self {
        self.inner.notice = Some(notice.into());
        self
    }

    /// The error number `errno`, before which this error is printed: `qemu-img` prints the one and returns the other.
    #[must_use]
    pub fn report_then(self, errno: i32) -> Self {
        let mut result = Self::from_errno(errno);
        result.inner.kind = self.kind();
        result.inner.notice = Some(Note::Error(self.chain()));
        result
    }

    /// Damage in tables, reported as the error number `errno` though no system call has failed.
    pub fn damage(kind: ErrorKind, errno: i32) -> Self {
        let mut error = Self::from_errno(errno);
        error.inner.kind = kind;
        error
    }

    /// The error number `errno` without the levels of this error, but with its notice.
    #[must_use]
    pub fn only_errno(self, errno: i32) -> Self {
        let mut result = Self::from_errno(errno);
        result.inner.notice = self.preceding_note().cloned();
        result
    }

    /// The note to print before the error, if a level has one.
    pub fn preceding_note(&self) -> Option<&Note> {
        self.levels().find_map(|level| level.inner.notice.as_ref())
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// The error number of the operating system, if the last level of the chain has one.
    pub fn errno(&self) -> Option<i32> {
        self.inner.errno
    }

    /// All levels joined with `": "`.
    pub fn chain(&self) -> String {
        let mut text = self.inner.message.clone();
        let mut next = &self.inner.source;
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.inner.message);
            next = &error.inner.source;
        }
        text
    }

    /// The lines of advice of the first level that has some.
    pub fn hint_lines(&self) -> &[String] {
        let mut hints = self.levels().map(|level| &level.inner.hint);
        hints.find(|hint| !hint.is_empty()).map_or(&[], Vec::as_slice)
    }

    /// The last level of the chain.
    #[must_use]
    pub fn into_root(self) -> Self {
        let mut level = self;
        while let Some(source) = level.inner.source.take() {
            level = source;
        }
        level
    }

    fn levels(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |level| level.inner.source.as_ref())
    }

    /// The message of the last level, which `qemu-img` prints alone where it reports an error number.
    pub fn root(&self) -> &str {
        let mut level = self;
        while let Some(source) = &level.inner.source {
            level = source;
        }
        &level.inner.message
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Permission,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        let mut text = error.to_string();
        // std appends " (os error 2)", which qemu-img does not print.
        if let (Some(at), Some(_)) = (text.rfind(" (os error "), error.raw_os_error()) {
            text.truncate(at);
        }
        let mut result = Self::new(kind, text);
        result.inner.errno = error.raw_os_error();
        result
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind(), self.chain())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_ref().map(|source| source as _)
    }
}

/// Adds context to the error of a result.
pub trait ResultExt<T> {
    /// Adds a level with the message that `message` returns in front of an error.
    ///
    /// # Errors
    /// The error of `self`, one level deeper.
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| error.into().context(message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_errors_print_the_bare_text() {
        assert_eq!(Error::from_errno(2).to_string(), "No such file or directory");
    }

    #[test]
    fn levels_are_joined_and_kind_and_number_survive() {
        let error = Error::from_errno(28).context("Could not write").context("Outer");
        assert_eq!(error.chain(), "Outer: Could not write: No space left on device");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, Some(28)));
        assert_eq!(error.root(), "No space left on device");
    }

    #[test]
    fn an_error_that_is_reported_first_keeps_its_kind() {
        let error = Error::corrupt("Offset invalid")
            .report_then(22)
            .context("Could not read");
        assert_eq!(error.chain(), "Could not read: Invalid argument");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Corrupt, Some(22)));
        assert_eq!(
            error.preceding_note(),
            Some(&Note::Error("Offset invalid".to_owned()))
        );
    }

    #[test]
    fn the_hint_nearest_the_top_is_shown() {
        let error = Error::invalid("a").hint("low").context("b");
        assert_eq!(error.hint_lines(), ["low"]);
        assert_eq!(
            error.hint("high").and_hint("higher").hint_lines(),
            ["high", "higher"]
        );
    }
}
