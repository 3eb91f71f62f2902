//! Probing: guesses the format of an image from its first bytes.

use diskimage_core::{Device, Format, LOOSE, Probe, Result, to_index};
use diskimage_formats::FORMATS;

/// The number of bytes from the start that probing reads.
pub(crate) const HEAD: usize = 2048;

/// The format whose header the first bytes of `device` look like; raw if they look like none.
///
/// # Errors
/// The first bytes cannot be read.
pub fn probe(device: &dyn Device, name: &str) -> Result<&'static dyn Format> {
    Ok(guess(&head(device)?, name))
}

/// Whether `format`, the guess for `device`, is one that `qemu-img` does not make: to it the file is raw.
///
/// # Errors
/// The first bytes cannot be read.
pub(crate) fn is_loose(format: &dyn Format, device: &dyn Device, name: &str) -> Result<bool> {
    let head = head(device)?;
    Ok(format.probe(&Probe { head: &head, name }) == LOOSE)
}

/// The first [`HEAD`] bytes, or all if the device is shorter.
pub(crate) fn head(device: &dyn Device) -> Result<Vec<u8>> {
    let len = to_index(device.len())?.min(HEAD);
    let mut head = vec![0; len];
    if len > 0 {
        device.read_at(&mut head, 0)?;
    }
    Ok(head)
}

/// The format with the highest score for `head`; the first in [`FORMATS`] of those with the same score.
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
