//! Creation options as data.

/// How an option's value is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// `on` or `off`.
    Flag,
    /// A number of bytes with a suffix.
    Size,
    /// A number.
    Number,
    /// Any text.
    Text,
}

/// One creation option.
#[derive(Clone, Copy, Debug)]
pub struct OptionDef {
    /// Its name.
    pub name: &'static str,
    /// How its value is read.
    pub kind: OptionKind,
    /// What it is for.
    pub help: &'static str,
    /// The value if none is given.
    pub default: Option<&'static str>,
}

/// Values for a table of options.
#[derive(Clone, Debug)]
pub struct Options {}

impl Options {
    /// The given value or the default.
    pub fn flag(&self, _name: &str) -> Option<bool> {
        None
    }
    /// The given value or the default.
    pub fn size(&self, _name: &str) -> Option<u64> {
        None
    }
    /// The given value or the default.
    pub fn number(&self, _name: &str) -> Option<u64> {
        None
    }
    /// The given value or the default.
    pub fn text(&self, _name: &str) -> Option<&str> {
        None
    }
    /// Whether a value was given.
    pub fn is_given(&self, _name: &str) -> bool {
        false
    }
}
