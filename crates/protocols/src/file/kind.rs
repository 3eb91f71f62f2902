//! The types of files that have random access.

use std::fs;
use std::os::unix::fs::FileTypeExt;

use diskimage_core::name;

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A plain file.
    Regular,
    /// A block device.
    Block,
    /// A character device.
    Character,
}

impl FileKind {
    /// `None` for pipes, sockets and others without random access.
    pub(crate) fn of(metadata: &fs::Metadata) -> Option<Self> {
        let file_type = metadata.file_type();
        if file_type.is_file() {
            Some(Self::Regular)
        } else if file_type.is_block_device() {
            Some(Self::Block)
        } else if file_type.is_char_device() {
            Some(Self::Character)
        } else {
            None
        }
    }

    /// The type of the file at `path`; `None` for others and if there is none.
    pub fn of_path(path: &str) -> Option<Self> {
        Self::of(&name::to_path(path).metadata().ok()?)
    }

    pub(crate) fn is_device(self) -> bool {
        self != Self::Regular
    }
}
