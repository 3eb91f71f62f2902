//! Raw images that were only guessed to be raw.
//!
//! A guest that writes another format's header into the first block of its raw disk would have that disk taken for such
//! an image the next time, with a backing file of the guest's choice. So writes that would change the guess are refused.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{ByteRange, Device, Error, FilterDevice, Note, Result};

use crate::probe::{HEAD, guess, head};

/// A device whose first bytes stay those of a raw image.
#[derive(Debug)]
pub(crate) struct GuessedRaw {
    device: Arc<dyn Device>,
    name: String,
    /// Held from the look at the head to the end of the write, so that two writes cannot make a header together.
    head: Mutex<()>,
}

impl GuessedRaw {
    pub(crate) fn new(device: Arc<dyn Device>, name: &str) -> Self {
        Self {
            device,
            name: name.to_owned(),
            head: Mutex::new(()),
        }
    }

    /// What is printed when such an image is opened for writing.
    pub(crate) fn warning(name: &str) -> Note {
        Note::Line(format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
             restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions."
        ))
    }
}

impl FilterDevice for GuessedRaw {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start < HEAD) else {
            return self.device.write_at(buf, offset);
        };
        let _alone = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = head(&*self.device)?;
        let end = start.saturating_add(buf.len()).min(HEAD);
        bytes.resize(bytes.len().max(end), 0);
        bytes[start..end].copy_from_slice(&buf[..end - start]);
        if guess(&bytes, &self.name).name() == "raw" {
            self.device.write_at(buf, offset)
        } else {
            Err(Error::from_errno(EPERM))
        }
    }

    fn copy_to(&self, range: ByteRange, target: &dyn Device, target_offset: u64) -> Result<bool> {
        // Out of it; copies into it would not be looked at.
        self.device.copy_to(range, target, target_offset)
    }
}

/// `Operation not permitted`, the original's answer.
const EPERM: i32 = 1;
