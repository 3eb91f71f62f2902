//! The room that the metadata of a new image needs in its file.

use diskimage_core::{Device, Error, Preallocation, Result};

/// Makes `file` hold `len` bytes of a new image: a file gets this length, a device must have it.
///
/// # Errors
/// A device that is too short, and failures to grow the file.
pub(crate) fn make_room(file: &dyn Device, len: u64) -> Result<()> {
    if file.is_zero_when_new() {
        return file.resize(len, Preallocation::Off);
    }
    require_room(file, len)
}

/// Refuses a device, whose length is fixed, if it is shorter than `len`.
///
/// # Errors
/// A device that is too short.
pub(crate) fn require_room(device: &dyn Device, len: u64) -> Result<()> {
    if len > device.len() {
        return Err(Error::unsupported(device.limits().fixed_len_message));
    }
    Ok(())
}
