//! The caller's policy about the files that an image may refer to.

use std::sync::Arc;

use crate::{Device, Error, ErrorKind, NodeOptions, OpenContext, Result};

/// Opens the files that an image refers to, or refuses to. No other part of the library opens a name found in an image.
pub trait Gate: Send + Sync {
    /// Fails if the image `from` may not have a backing image called `name`, whose options are `node`: a name may contain
    /// options, and stand for drivers that open no file. Asked before [`Gate::open`] is for the files of that node.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) if the policy forbids it.
    fn admit(&self, _from: &str, _name: &str, _node: &NodeOptions) -> Result<()> {
        Ok(())
    }

    /// Opens the file that `reference` names.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) if the policy forbids it, and errors of opening the file.
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>>;

    /// The name under which a file that may be called `name`, relative to the directory of the image `image`, exists:
    /// `name` itself, or one that differs from it in the case of letters. Formats of systems that do not tell case apart
    /// ask for it. `None` if there is no such file, or if the policy is not to tell.
    fn locate(&self, _image: &str, _name: &str) -> Option<String> {
        None
    }
}

/// Opens nothing: an image that refers to another file cannot be used.
#[derive(Clone, Copy, Debug)]
pub struct ClosedGate;

impl ClosedGate {
    fn refuse(from: &str, name: &str) -> Error {
        Error::new(
            ErrorKind::Denied,
            format!("'{from}' refers to '{name}', and references are not allowed"),
        )
    }
}

impl Gate for ClosedGate {
    fn admit(&self, from: &str, name: &str, _: &NodeOptions) -> Result<()> {
        Err(Self::refuse(from, name))
    }

    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Err(Self::refuse(reference.from, &reference.shown()))
    }
}

/// What is known about an image that refers to other files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its format is no guess: the user states it, or an image does whose own format the user states.
    pub format_is_stated: bool,
    /// Its bytes come from a server.
    pub is_remote: bool,
}

impl Origin {
    /// A local file whose format the user states.
    pub const STATED: Self = Self {
        format_is_stated: true,
        is_remote: false,
    };
}

/// A name found inside an image.
#[derive(Clone, Debug)]
pub struct Reference<'a> {
    /// The options of the protocol node: `driver`, and what that driver needs (`filename` for files). Without `driver`
    /// it is a local file of any kind. Relative names are resolved against the current directory.
    /// [`name::to_path`](crate::name::to_path) makes the path of a name, which need not be UTF-8.
    pub options: &'a NodeOptions,
    /// The name of the image that contains the reference.
    pub from: &'a str,
    /// What is known about that image.
    pub origin: Origin,
    /// What the file is for.
    pub role: Role,
    /// What the image will do with the file, and what others may do.
    pub permissions: Permissions,
    /// What the nodes of the graph share that the image belongs to.
    pub context: &'a OpenContext,
}

impl Reference<'_> {
    /// The file as messages show it: its name, or else the options of its node.
    pub fn shown(&self) -> String {
        match self.options.text("filename") {
            Some(name) => name.to_owned(),
            None => self.options.shown(),
        }
    }
}

/// What a referenced file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A backing file.
    Backing,
    /// A data file, which holds guest data as plain bytes.
    Data,
}

/// What an opener does with a file, and what it allows others to do meanwhile. The locks on the file follow from this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Reads, and relies on the contents not changing (`consistent read`).
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
