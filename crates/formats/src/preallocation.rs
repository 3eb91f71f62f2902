//! The option `preallocation` of formats that leave it to the file below.

use diskimage_core::options::Options;
use diskimage_core::{Error, Preallocation, Result};

/// Refuses what the file below cannot do. As in the original that is all: the file is empty when it is made.
pub(crate) fn check(options: &Options) -> Result<()> {
    let name = options.text("preallocation").unwrap_or("off");
    match Preallocation::from_name(name) {
        Some(Preallocation::Metadata) => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        Some(_) => Ok(()),
        None => Err(Error::invalid(format!("invalid parameter value: {name}"))),
    }
}
