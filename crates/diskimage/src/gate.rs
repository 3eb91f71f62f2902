//! [`FileGate`], the default gate: it opens the files that images refer to.

use std::sync::Arc;

use diskimage_core::{Device, Error, Gate, NodeOptions, Permissions, Reference, Result, Role};
use diskimage_protocols::{
    CacheMode, LocalFileDriver, Protocol, ProtocolRequest, Target, path_in_any_case, protocol_by_name,
};

/// Opens backing files by any protocol, and data files only by path: the formats define no more for data files.
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
