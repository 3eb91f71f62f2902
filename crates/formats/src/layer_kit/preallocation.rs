//! Preallocation in formats that leave it to the file below, or do not have it.

use diskimage_core::options::Options;
use diskimage_core::{Error, Preallocation, Result};

/// Refuses changes of size with a preallocation that the format does not have.
pub(crate) fn require_off(mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Off => Ok(()),
        _ => Err(unsupported(mode)),
    }
}

/// The error of a mode that is not there.
pub(crate) fn unsupported(mode: Preallocation) -> Error {
    Error::unsupported(format!("Unsupported preallocation mode '{}'", mode.name()))
}

/// Refuses what the file below cannot do. As in the original that is all: the file is empty when it is made.
pub(crate) fn check(options: &Options) -> Result<()> {
    let name = options.text("preallocation").unwrap_or("off");
    match Preallocation::from_name(name) {
        Some(Preallocation::Metadata) => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        Some(_) => Ok(()),
        None => Err(Error::invalid(format!("invalid parameter value: {name}"))),
    }
}
