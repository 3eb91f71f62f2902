//! How operations tell how far they are and what they come across.

use std::fmt;

/// Callbacks of a running operation: how much of how much is done, in a unit of the operation's own, and lines to show
/// while it runs. Lines are handed over one by one, since a damaged image can have millions of them.
#[derive(Clone, Copy)]
pub struct Progress<'a> {
    report: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    notes: Option<&'a (dyn Fn(&Note) + Sync)>,
}

/// What is to be shown beside an answer, on the error stream as the original does. A line has no end; rarely there are
/// several in one note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A line as it is.
    Line(String),
    /// An error: the program's name stands in front.
    Error(String),
    /// A warning: the program's name and the word stand in front.
    Warning(String),
}

impl Note {
    /// What it says.
    pub fn text(&self) -> &str {
        match self {
            Self::Line(text) | Self::Error(text) | Self::Warning(text) => text,
        }
    }
}

impl<'a> Progress<'a> {
    /// Reports to `report`, which may be called from any thread.
    pub fn new(report: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        Self {
            report: Some(report),
            notes: None,
        }
    }

    /// Reports to nobody.
    pub const fn none() -> Self {
        Self {
            report: None,
            notes: None,
        }
    }

    /// Hands lines to `notes`, too.
    #[must_use]
    pub fn with_notes(self, notes: &'a (dyn Fn(&Note) + Sync)) -> Self {
        Self {
            notes: Some(notes),
            ..self
        }
    }

    /// Tells that `done` of `total` is done.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(report) = self.report {
            report(done, total);
        }
    }

    /// Shows a line.
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
