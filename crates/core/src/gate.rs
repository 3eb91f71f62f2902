//! The caller's word on which files an image may refer to.

use std::sync::Arc;

use crate::{Device, NodeOptions, Result};

/// Opens the files that an image refers to, or refuses. Nothing else in the library opens a name found in an image.
pub trait Gate: Send + Sync {
    /// Opens what `reference` names.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) if policy forbids it, else why it could not be opened.
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>>;
}

impl dyn Gate + '_ {
    /// Opens the file called `name`, which the image called `from` keeps a guest's data in. A relative name is relative
    /// to the current directory.
    ///
    /// # Errors
    /// As [`Gate::open`].
    pub fn open_data(&self, name: &str, from: &str, permissions: Permissions) -> Result<Arc<dyn Device>> {
        let mut options = NodeOptions::new();
        options.set("filename", name);
        self.open(&Reference {
            options: &options,
            from,
            role: Role::Data,
            permissions,
        })
    }
}

/// A name found inside an image.
#[derive(Clone, Debug)]
pub struct Reference<'a> {
    /// The protocol's options: `driver`, and what that driver needs (`filename` for files). No `driver` means a local
    /// file of whatever kind. Relative names are relative to the current directory.
    pub options: &'a NodeOptions,
    /// The name of the image that says so.
    pub from: &'a str,
    /// What it is for.
    pub role: Role,
    /// What the image will do with it.
    pub permissions: Permissions,
}

/// What a referenced file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A backing file.
    Backing,
    /// A file that holds the guest's data as plain bytes.
    Data,
}

/// What an opener does with a file, and what it lets others do meanwhile. The locks on the file follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Relies on reading the same bytes again.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Changes the length.
    pub resize: bool,
    /// Others may write.
    pub share_write: bool,
    /// Others may change the length.
    pub share_resize: bool,
}

impl Permissions {
    /// To read an image whose tables must not change meanwhile.
    pub const READ: Self = Self {
        read: true,
        write: false,
        resize: false,
        share_write: false,
        share_resize: false,
    };
    /// To read plain bytes that others may write.
    pub const READ_SHARED: Self = Self {
        read: true,
        write: false,
        resize: false,
        share_write: true,
        share_resize: true,
    };
    /// To change an image.
    pub const WRITE: Self = Self {
        read: true,
        write: true,
        resize: true,
        share_write: false,
        share_resize: false,
    };
    /// To read whatever state the image is in, as `-U` asks for.
    pub const FORCE_SHARE: Self = Self {
        read: false,
        write: false,
        resize: false,
        share_write: true,
        share_resize: true,
    };
}
