//! How operations report their progress and their findings.

use std::borrow::Cow;
use std::fmt;

/// The callbacks of a running operation: one for its progress, in units of the operation, and one for notes to print
/// while it runs. Notes are passed on one by one, since a damaged image can have millions of them.
#[derive(Clone, Copy)]
pub struct Progress<'a> {
    report: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    notes: Option<&'a (dyn Fn(&Note) + Sync)>,
}

/// A message beside the result of an operation, which `qemu-img` prints on standard error. Each text is one line: a newline
/// in it is part of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A line without a prefix.
    Line(String),
    /// An error, printed with the program's name in front.
    Error(String),
    /// A warning, printed with the program's name and `warning` in front.
    Warning(String),
    /// Several of them.
    Several(Vec<Note>),
}

impl From<&str> for Note {
    fn from(line: &str) -> Self {
        Self::Line(line.to_owned())
    }
}

impl From<String> for Note {
    fn from(line: String) -> Self {
        Self::Line(line)
    }
}

impl Note {
    /// The text without the prefix; lines are separated by newlines.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Line(text) | Self::Error(text) | Self::Warning(text) => Cow::Borrowed(text),
            Self::Several(notes) => {
                let lines: Vec<_> = notes.iter().map(Self::text).collect();
                Cow::Owned(lines.join("\n"))
            }
        }
    }
}

impl<'a> Progress<'a> {
    /// Reports progress to `report`, which may be called from any thread.
    pub fn new(report: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        Self {
            report: Some(report),
            notes: None,
        }
    }

    /// Ignores progress and notes.
    pub const fn none() -> Self {
        Self {
            report: None,
            notes: None,
        }
    }

    /// Also passes notes to `notes`.
    #[must_use]
    pub fn with_notes(self, notes: &'a (dyn Fn(&Note) + Sync)) -> Self {
        Self {
            notes: Some(notes),
            ..self
        }
    }

    /// Reports that `done` of `total` units are done.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(report) = self.report {
            report(done, total);
        }
    }

    /// Reports a note.
    pub fn note(&self, note: &Note) {
        if let Some(notes) = self.notes {
            notes(note);
        }
    }
}

impl fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress")
            .field("reports", &self.report.is_some())
            .field("notes", &self.notes.is_some())
            .finish()
    }
}
