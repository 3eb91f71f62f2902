//! Raw images whose format was probed.
//!
//! A guest could write the header of another format into the first block of its raw disk. The next probe would then
//! open the disk in that format, with a backing file of the guest's choice. So writes that would change the guess are
//! refused:
//!
//! ```text
//!   offset 0                HEAD
//!   [ bytes that are probed ][ everything else ]
//!     write: probe the new bytes      write: passed on
//!     first, refuse unless raw
//! ```

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{ByteRange, Device, Error, FilterDevice, Note, Result};

use crate::probe::{HEAD, guess, head};

/// A device that refuses writes after which its first bytes would not be probed as raw.
#[derive(Debug)]
pub(crate) struct GuessedRaw {
    device: Arc<dyn Device>,
    name: String,
    /// Held from the read of the first bytes to the end of the write, so that two writes cannot make a header together.
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

    /// The warning of `qemu-img` when such an image is opened for writing.
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
        let _guard = self.head.lock().unwrap_or_else(PoisonError::into_inner);
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
        // Copies out of this device only: a copy into it would not be probed, so it does not offer its file for that.
        self.device.copy_to(range, target, target_offset)
    }
}

/// `Operation not permitted`, the error of `qemu-img`.
const EPERM: i32 = 1;
