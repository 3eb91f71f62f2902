//! The gates: [`FileGate`], the default one, opens the files that images refer to; [`BeneathGate`] is for images from
//! strangers.

mod beneath;
mod new_image;

use std::sync::Arc;

use diskimage_core::{
    Device, Error, ErrorKind, Gate, NETWORK_DRIVERS, NodeOptions, Permissions, Reference, Result, Role,
};
use diskimage_protocols::{
    CacheMode, FileKind, LocalFileDriver, Protocol, ProtocolRequest, Target, path_in_any_case,
    protocol_by_name,
};

pub use beneath::BeneathGate;
pub(crate) use new_image::NewImageGate;

/// Opens backing files by any protocol, and data files only by path: the formats define no more for data files.
///
/// Three things no guess and no server brings about: character devices are never opened; block devices and connections
/// only for an image whose format is stated ([`Origin::format_is_stated`](diskimage_core::Origin)); and an image whose bytes
/// come from a server opens no file of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileGate {
    /// The cache mode of the opened files.
    pub cache: CacheMode,
    /// Whether to share the files with all other users, writers included.
    pub force_share: bool,
    /// Whether to lock data files that are only read against writers.
    pub exclusive: bool,
}

impl Gate for FileGate {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let mut options = reference.options.clone();
        if reference.role == Role::Data {
            // A data file is a path, even if it begins like the name of a protocol.
            let path = options.take_text("filename").unwrap_or_default();
            options.set("filename", Target::plain(&path).path);
        }
        let driver = options.take_text("driver");
        refuse_by_kind(reference, driver.as_deref(), options.text("filename"))?;
        let protocol: &dyn Protocol = match driver.as_deref() {
            Some(name) => {
                protocol_by_name(name).ok_or_else(|| Error::invalid(format!("Unknown driver '{name}'")))?
            }
            None => LocalFileDriver::serving(options.text("filename").unwrap_or_default()),
        };
        let device = protocol.open(ProtocolRequest {
            options: &mut options,
            write: reference.permissions.write,
            cache: self.cache,
            context: reference.context,
        })?;
        require_all_taken(protocol.name(), &options)?;
        device.lock(self.locked_for(reference))?;
        Ok(device)
    }

    fn locate(&self, image: &str, name: &str) -> Option<String> {
        let image = Target::parse(image).ok()?.path;
        let directory = match name.starts_with('/') {
            true => String::new(),
            false => Target::resolve(&image, ""),
        };
        path_in_any_case(&directory, name)
    }
}

impl FileGate {
    fn locked_for(&self, reference: &Reference<'_>) -> Permissions {
        let mut permissions = reference.permissions;
        if self.force_share {
            permissions.share_write = true;
            permissions.share_resize = true;
        } else if self.exclusive && reference.role == Role::Data && !permissions.write {
            permissions.share_write = false;
        }
        permissions
    }
}

/// Refuses what no image, no image of a guessed format, or no image of a server may refer to.
fn refuse_by_kind(reference: &Reference<'_>, driver: Option<&str>, path: Option<&str>) -> Result<()> {
    let (from, origin, options) = (reference.from, reference.origin, reference.options);
    let refused = |what: &str, unless: &str| {
        let name = reference.shown();
        let message = format!("'{from}' refers to {what} '{name}'{unless}");
        Err(Error::new(ErrorKind::Denied, message))
    };
    let if_stated = |what: &str| match origin.format_is_stated {
        true => Ok(()),
        false => {
            let unless = format!(", which is opened only if the format of '{from}' is specified (-f)");
            refused(what, &unless)
        }
    };
    let is_connection = driver.is_some_and(|driver| NETWORK_DRIVERS.contains(&driver));
    let is_local = driver.is_none_or(|driver| LOCAL_DRIVERS.contains(&driver));
    let is_local_socket = is_connection && ["path", "server.path"].iter().any(|name| options.has(name));
    if origin.is_remote && (is_local || is_local_socket) {
        return refused("a file of this machine, but comes from a server:", "");
    }
    if is_connection {
        return if_stated("the server");
    }
    match path.filter(|_| is_local).and_then(FileKind::of_path) {
        Some(FileKind::Character) => refused("a character device, which is never opened:", ""),
        Some(FileKind::Block) => if_stated("the block device"),
        Some(FileKind::Regular) | None => Ok(()),
    }
}

/// The drivers whose bytes are on this machine.
const LOCAL_DRIVERS: &[&str] = &["file", "host_device", "host_cdrom", "vvfat"];

/// Fails if an option of the node was not taken by its driver.
///
/// # Errors
/// The first such option.
pub(crate) fn require_all_taken(driver: &str, node: &NodeOptions) -> Result<()> {
    match node.first_unused() {
        Some(name) => Err(Error::invalid(format!(
            "Block protocol '{driver}' doesn't support the option '{name}'"
        ))),
        None => Ok(()),
    }
}
