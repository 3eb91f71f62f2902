//! Probing: guesses the format of an image from its first bytes, and from its last sector if those say raw.

use diskimage_core::{Device, Error, Format, LOOSE, Probe, Result, align_down, to_index};
use diskimage_formats::FORMATS;

/// The number of bytes from the start that probing reads.
pub(crate) const HEAD: usize = 2048;

/// The length of the last sector, which probing reads too.
pub(crate) const TAIL: u64 = 512;

/// The format whose header the first bytes of `device` look like, or whose footer its last sector looks like; raw if
/// they look like none.
///
/// # Errors
/// The first bytes cannot be read.
pub fn probe(device: &dyn Device, name: &str) -> Result<&'static dyn Format> {
    guess_device(device, name).map(|guess| guess.format)
}

/// A guessed format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guess {
    pub(crate) format: &'static dyn Format,
    /// Whether qemu-img takes the file for raw.
    pub(crate) is_loose: bool,
}

/// The guess for `device`. The last sector is read only if the first bytes look like no format.
///
/// # Errors
/// The first bytes cannot be read.
pub(crate) fn guess_device(device: &dyn Device, name: &str) -> Result<Guess> {
    let (head, len) = (head(device)?, device.len());
    let by_head = guess(&Probe {
        head: &head,
        tail: &[],
        len,
        name,
    });
    if by_head.format.name() != "raw" {
        return Ok(by_head);
    }
    let tail = tail(device);
    Ok(guess(&Probe {
        head: &head,
        tail: &tail,
        len,
        name,
    }))
}

/// The guess for `device` if its bytes allow no other one: those of one format, at the start and at the end.
///
/// # Errors
/// Several formats recognize the bytes, or one does that `qemu-img` takes for raw. The inner error: bytes cannot be read.
pub(crate) fn only_guess(device: &dyn Device, name: &str) -> Result<Result<Guess>> {
    let head = match head(device) {
        Ok(head) => head,
        Err(error) => return Ok(Err(error)),
    };
    let tail = tail(device);
    let probe = Probe {
        head: &head,
        tail: &tail,
        len: device.len(),
        name,
    };
    let others = FORMATS.iter().filter(|format| format.name() != "raw");
    let mut found: Vec<&str> = others
        .filter(|format| format.probe(&probe) > 0)
        .map(|format| format.name())
        .collect();
    let guess = guess(&probe);
    if guess.is_loose {
        found.insert(0, "raw");
    }
    match &found[..] {
        [] | [_] => Ok(Ok(guess)),
        several => Err(Error::invalid(format!(
            "The format of '{name}' is ambiguous, it can be {}: specify it (-f)",
            several.join(" or ")
        ))),
    }
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

/// The last sector; empty if the device is empty or the sector cannot be read, which is no reason not to open the rest.
pub(crate) fn tail(device: &dyn Device) -> Vec<u8> {
    let Some(last) = device.len().checked_sub(1) else {
        return Vec::new();
    };
    let mut tail = vec![0; 512];
    match device.read_padded(&mut tail, align_down(last, TAIL)) {
        Ok(()) => tail,
        Err(_) => Vec::new(),
    }
}

/// The format with the highest score; the first in [`FORMATS`] of those with the same score.
pub(crate) fn guess(probe: &Probe<'_>) -> Guess {
    let mut best = (0, FORMATS[0]);
    for format in FORMATS {
        let score = format.probe(probe);
        if score > best.0 {
            best = (score, *format);
        }
    }
    Guess {
        format: best.1,
        is_loose: best.0 == LOOSE,
    }
}
