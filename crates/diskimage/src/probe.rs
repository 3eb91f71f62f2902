//! Which format an image is of.

use diskimage_core::{Device, Format, Probe, Result};
use diskimage_formats::FORMATS;

/// How many bytes from the start are looked at.
pub(crate) const HEAD: usize = 2048;

/// The format that the bytes at the start of `device` look like; raw if they look like none.
///
/// # Errors
/// A failure to read them.
pub fn probe(device: &dyn Device, name: &str) -> Result<&'static dyn Format> {
    Ok(guess(&head(device)?, name))
}

/// The first bytes, fewer if there are fewer.
pub(crate) fn head(device: &dyn Device) -> Result<Vec<u8>> {
    let len = usize::try_from(device.len()).unwrap_or(HEAD).min(HEAD);
    let mut head = vec![0; len];
    if len > 0 {
        device.read_at(&mut head, 0)?;
    }
    Ok(head)
}

/// The format that `head` looks like most; of several the one listed first.
pub(crate) fn guess(head: &[u8], name: &str) -> &'static dyn Format {
    let probe = Probe { head, name };
    let mut best = (0, FORMATS[0]);
    for format in FORMATS {
        let score = format.probe(&probe);
        if score > best.0 {
            best = (score, *format);
        }
    }
    best.1
}
