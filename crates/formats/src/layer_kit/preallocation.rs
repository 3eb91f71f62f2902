//! Preallocation modes in formats that leave them to the file, or do not support them.

use diskimage_core::options::Options;
use diskimage_core::{Error, Preallocation, Result};

/// Refuses a resize with a preallocation mode, which the format does not support.
pub(crate) fn require_off(mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Off => Ok(()),
        _ => Err(unsupported(mode)),
    }
}

/// The error for an unsupported mode.
pub(crate) fn unsupported(mode: Preallocation) -> Error {
    Error::unsupported(format!("Unsupported preallocation mode '{}'", mode.name()))
}

/// Refuses modes that a file does not have. As in qemu-img, an accepted mode has no effect: the file is empty when it
/// is created.
pub(crate) fn check(options: &Options) -> Result<()> {
    let name = options.text("preallocation").unwrap_or("off");
    match Preallocation::from_name(name) {
        Some(Preallocation::Metadata) => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        Some(_) => Ok(()),
        None => Err(Error::invalid(format!("invalid parameter value: {name}"))),
    }
}
