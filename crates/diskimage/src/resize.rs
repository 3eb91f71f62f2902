//! Changing the size of a disk.

use diskimage_core::{Device, Error, Image, Preallocation, ResizeRequest, Result};

/// Whether a disk may become smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShrinkPolicy {
    /// A smaller size is an error.
    Refuse,
    /// What is beyond the new end is lost.
    Allow,
}

/// Gives the disk of `image` the size of `len` bytes.
///
/// # Errors
/// A smaller size that `policy` refuses, preallocation of what is no growth, and what the format cannot do.
pub fn resize(image: &Image, len: u64, preallocation: Preallocation, policy: ShrinkPolicy) -> Result<()> {
    let present = image.len();
    if len <= present && preallocation != Preallocation::Off {
        return Err(Error::invalid(
            "Preallocation can only be used for growing images",
        ));
    }
    if len < present && policy == ShrinkPolicy::Refuse {
        return Err(Error::invalid(
            "Use the --shrink option to perform a shrink operation.",
        ));
    }
    image.resize_with(&ResizeRequest { len, preallocation })?;
    image.flush()
}
