//! The drivers `file`, `host_device` and `host_cdrom`: entries of the protocol table.

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{Device, Error, NodeOptions, Note, Result, name};

use super::place::place_of_path;
use super::{File, FileKind};
use crate::aio::Aio;
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
        match name::to_path(path)
            .metadata()
            .map(|metadata| FileKind::of(&metadata))
        {
            Ok(Some(kind)) if kind.is_device() => &HOST_DEVICE,
            _ => &FILE,
        }
    }
}

/// The file of a new image that is opened as `path`.
fn new_file(path: &str, request: &ProtocolRequest<'_>) -> Option<Arc<dyn Device>> {
    let new_files = request.context.new_files.iter();
    let mut found = new_files.filter(|(of_file, _)| request.write && same_path(of_file, path));
    found.next().map(|(_, device)| Arc::clone(device))
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
        let options = request.options.take_known(OPTIONS)?;
        let locking = match options.text("locking") {
            Some("auto" | "on") | None => true,
            Some("off") => false,
            Some(other) => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
        };
        let mut cache = request.cache;
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
        if let Some(device) = new_file(path, &request) {
            return Ok(device);
        }
        let target = Target {
            protocol: Some(self.kind),
            path: path.to_owned(),
        };
        let file = File::open(&target, request.write, cache)?;
        if let Some(message) = file.aio_fallback() {
            request.context.tell(&Note::Error(message.to_owned()));
        }
        Ok(Arc::new(if locking { file } else { file.without_locks() }))
    }

    fn can_create(&self) -> bool {
        self.kind == ProtocolKind::File
    }
}
