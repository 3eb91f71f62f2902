//! Facts about an image, for `info`.

use crate::Backing;

/// Facts about one opened image from its own tables.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// The unit of allocation in bytes, where the format has one.
    pub cluster_size: Option<u64>,
    /// Whether the guest's data is encrypted.
    pub encrypted: bool,
    /// Whether all data clusters are compressed.
    pub compressed: bool,
    /// Whether the image was not closed cleanly.
    pub dirty: bool,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// The backing image as named in the image; only set for an image with its chain.
    pub backing: Option<Backing>,
    /// The files that the image names besides its backing image.
    pub other_files: Vec<NamedFile>,
    /// Format-specific facts in the order in which they are printed; `None` if the format has none.
    pub specific: Option<Vec<Detail>>,
}

/// A file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// What it is for.
    pub role: FileRole,
    /// Its name.
    pub name: String,
}

/// What a file is for that an image names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// The backing image.
    Backing,
    /// The backing image as differencing disks name it, which may be in several ways.
    Parent,
    /// All guest data, as plain bytes.
    DataFile,
    /// A part of the disk.
    Extent,
}

impl FileRole {
    /// The role as `info` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Backing => "backing",
            Self::Parent => "parent",
            Self::DataFile => "data-file",
            Self::Extent => "extent",
        }
    }
}

impl NamedFile {
    /// The file `name`, which is for `role`.
    pub fn new(role: FileRole, name: impl Into<String>) -> Self {
        Self {
            role,
            name: name.into(),
        }
    }
}

/// A format-specific fact: its name in JSON (`lazy-refcounts`; text output prints spaces for dashes) and its value.
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
    /// A boolean.
    Flag(bool),
    /// A number.
    Number(u64),
    /// Text, which may come from an image.
    Text(String),
    /// Facts under a common name.
    Group(Vec<Detail>),
    /// A list of values.
    List(Vec<DetailValue>),
}

impl Detail {
    /// A boolean.
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
    /// Bytes of saved VM state.
    pub vm_state_size: u64,
    /// When it was taken, seconds since 1970.
    pub date_sec: u32,
    /// The nanoseconds of that time.
    pub date_nsec: u32,
    /// How long the VM had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// How many instructions the VM had executed, if recorded.
    pub icount: Option<u64>,
    /// The disk's size when it was taken.
    pub disk_size: u64,
}
