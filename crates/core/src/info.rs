//! What an image says of itself.

use crate::Backing;

/// What is known about one opened image from its own tables.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// The unit of allocation in bytes, where the format has one.
    pub cluster_size: Option<u64>,
    /// Whether the guest's data is encrypted.
    pub encrypted: bool,
    /// Whether compressed clusters are the rule.
    pub compressed: bool,
    /// Whether the image was not closed cleanly.
    pub dirty: bool,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// The image below, as the image names it; filled in for whole images.
    pub backing: Option<Backing>,
    /// The format's own facts in the order in which they are printed; `None` if the format has none.
    pub specific: Option<Vec<Detail>>,
}

/// A fact of a format: its name in JSON (`lazy-refcounts`; text output prints it with spaces) and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detail {
    /// The name.
    pub name: &'static str,
    /// The value.
    pub value: DetailValue,
}

/// The value of a [`Detail`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetailValue {
    /// A yes or no.
    Flag(bool),
    /// A number.
    Number(u64),
    /// Text, which may have come out of an image.
    Text(String),
    /// Facts below a name.
    Group(Vec<Detail>),
    /// A list of values.
    List(Vec<DetailValue>),
}

impl Detail {
    /// A yes or no.
    pub fn flag(name: &'static str, value: bool) -> Self {
        Self {
            name,
            value: DetailValue::Flag(value),
        }
    }

    /// A number.
    pub fn number(name: &'static str, value: u64) -> Self {
        Self {
            name,
            value: DetailValue::Number(value),
        }
    }

    /// Text.
    pub fn text(name: &'static str, value: impl Into<String>) -> Self {
        Self {
            name,
            value: DetailValue::Text(value.into()),
        }
    }
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its identifier, a number in most images.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// When it was taken, seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// How many instructions it had run, if recorded.
    pub icount: Option<u64>,
    /// The disk's size when it was taken.
    pub disk_size: u64,
}
