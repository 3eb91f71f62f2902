//! The drivers `file`, `host_device` and `host_cdrom`: entries of the protocol table.

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{Device, Error, NodeOptions, Note, OpenContext, Result};

use super::place::place_of_path;
use super::{Directory, File, FileKind};
use crate::aio::Aio;
use crate::cache::CacheMode;
use crate::name::{ProtocolKind, Target};
use crate::protocol::{Protocol, ProtocolRequest};

/// A driver for local files.
#[derive(Debug)]
pub struct LocalFileDriver {
    kind: ProtocolKind,
    prefixes: &'static [&'static str],
}

/// Regular files.
pub(crate) static FILE: LocalFileDriver = LocalFileDriver {
    kind: ProtocolKind::File,
    prefixes: &["file"],
};

/// Block devices, and character devices that behave like one.
pub(crate) static HOST_DEVICE: LocalFileDriver = LocalFileDriver {
    kind: ProtocolKind::HostDevice,
    prefixes: &["host_device"],
};

/// Optical drives.
pub(crate) static HOST_CDROM: LocalFileDriver = LocalFileDriver {
    kind: ProtocolKind::HostCdrom,
    prefixes: &["host_cdrom"],
};

impl LocalFileDriver {
    /// The driver for the file at `path`, which its type decides.
    pub fn serving(path: &str) -> &'static Self {
        match FileKind::of_path(path) {
            Some(kind) if kind.is_device() => &HOST_DEVICE,
            _ => &FILE,
        }
    }

    /// The driver for regular files.
    pub fn regular() -> &'static Self {
        &FILE
    }
}

/// The file of the context's new image that is opened as `path`.
pub fn new_file(path: &str, context: &OpenContext) -> Option<Arc<dyn Device>> {
    let mut files = context.new_files.iter();
    let found = files.find(|(of_file, _)| same_path(of_file, path));
    found.map(|(_, device)| Arc::clone(device))
}

/// Whether two paths stand for the same name in the same directory.
fn same_path(one: &str, other: &str) -> bool {
    one == other || place_of_path(one).is_some_and(|one| place_of_path(other) == Some(one))
}

const OPTIONS: &[OptionDef] = &[
    OptionDef {
        name: "filename",
        kind: OptionKind::Text,
        help: "File name of the image",
        default: None,
        is_listed: true,
    },
    OptionDef {
        name: "locking",
        kind: OptionKind::Text,
        help: "Whether to lock the file (on, off, auto)",
        default: Some("auto"),
        is_listed: true,
    },
    OptionDef {
        name: "aio",
        kind: OptionKind::Text,
        help: "How the kernel is asked (threads, native, io_uring)",
        default: None,
        is_listed: true,
    },
];

impl Protocol for LocalFileDriver {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn prefixes(&self) -> &'static [&'static str] {
        self.prefixes
    }

    fn parse(&self, name: &str) -> Result<NodeOptions> {
        let target = Target::parse(name)?;
        let mut options = NodeOptions::new();
        options.set("filename", target.path);
        Ok(options)
    }

    fn open(&self, request: ProtocolRequest<'_>) -> Result<Arc<dyn Device>> {
        self.open_by(request, File::open)
    }

    fn can_create(&self) -> bool {
        self.kind == ProtocolKind::File
    }
}

impl LocalFileDriver {
    /// Opens the file of the request, which has to be at `path` beneath `directory`. The name in the options is shown, and
    /// opens the files of a new image.
    ///
    /// # Errors
    /// As [`Protocol::open`] and [`Directory::file`].
    pub fn open_beneath(
        &self,
        directory: &Directory,
        path: &str,
        request: ProtocolRequest<'_>,
    ) -> Result<Arc<dyn Device>> {
        self.open_by(request, |target, write, cache| {
            directory.file(path, &target.path, write, cache)
        })
    }

    fn open_by(
        &self,
        request: ProtocolRequest<'_>,
        open: impl FnOnce(&Target, bool, CacheMode) -> Result<File>,
    ) -> Result<Arc<dyn Device>> {
        let ProtocolRequest {
            options,
            write,
            mut cache,
            context,
        } = request;
        let options = options.take_known(OPTIONS)?;
        let locking = match options.text("locking") {
            Some("auto" | "on") | None => true,
            Some("off") => false,
            Some(other) => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
        };
        if let Some(name) = options.text("aio") {
            cache.aio = Aio::from_name(name)
                .ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))?;
        }
        let path = options
            .text("filename")
            .filter(|path| !path.is_empty())
            .ok_or_else(|| {
                Error::invalid(format!("The '{}' block driver requires a file name", self.name()))
            })?;
        if write && let Some(device) = new_file(path, context) {
            return Ok(device);
        }
        let target = Target {
            protocol: Some(self.kind),
            path: path.to_owned(),
        };
        let file = open(&target, write, cache)?;
        if let Some(message) = file.aio_fallback() {
            context.tell(&Note::Error(message.to_owned()));
        }
        Ok(Arc::new(if locking { file } else { file.without_locks() }))
    }
}
