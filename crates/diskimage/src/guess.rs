//! Raw images whose format was probed.
//!
//! A guest could write the header of another format into the first block of its raw disk. The next probe would then
//! open the disk in that format, with a backing file of the guest's choice. So writes that would change the guess are
//! refused:
//!
//! ```text
//!   offset 0                HEAD                        TAIL before the end
//!   [ bytes that are probed ][      everything else      ][ last sector ]
//!     write: probe the new bytes      write: passed on      write: as at the start
//!     first, refuse unless raw
//! ```

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{ByteRange, Device, Error, FilterDevice, Note, Probe, Result, align_down, to_index};

use crate::probe::{HEAD, TAIL, guess, head, tail};

/// A device that refuses writes after which its first bytes or its last sector would not be probed as raw.
#[derive(Debug)]
pub(crate) struct GuessedRaw {
    device: Arc<dyn Device>,
    name: String,
    /// Held from the read of the probed bytes to the end of the write, so that two writes cannot make a header together.
    probed: Mutex<()>,
}

impl GuessedRaw {
    pub(crate) fn new(device: Arc<dyn Device>, name: &str) -> Self {
        Self {
            device,
            name: name.to_owned(),
            probed: Mutex::new(()),
        }
    }

    /// The warning of `qemu-img` when such an image is opened for writing.
    pub(crate) fn warning(name: &str) -> Note {
        Note::Several(vec![
            Note::Line(format!(
                "WARNING: Image format was not specified for '{name}' and probing guessed raw."
            )),
            Note::from(
                "         Automatically detecting the format is dangerous for raw images, write operations on block 0 \
                 will be restricted.",
            ),
            Note::from("         Specify the 'raw' format explicitly to remove the restrictions."),
        ])
    }
}

impl FilterDevice for GuessedRaw {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let len = self.device.len();
        let written = ByteRange::at(offset, buf.len() as u64);
        let first = ByteRange::new(0, HEAD as u64);
        let last = ByteRange::new(align_down(len.saturating_sub(1), TAIL), len);
        if !written.overlaps(first) && !written.overlaps(last) {
            return self.device.write_at(buf, offset);
        }
        let _guard = self.probed.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut head, mut tail) = (head(&*self.device)?, tail(&*self.device));
        let end = to_index(written.end().min(first.end()))?;
        head.resize(head.len().max(end), 0);
        overwrite(&mut head, 0, buf, offset)?;
        overwrite(&mut tail, last.start(), buf, offset)?;
        let probe = Probe {
            head: &head,
            tail: &tail,
            len,
            name: &self.name,
        };
        if guess(&probe).format.name() == "raw" {
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

/// Copies the part of `buf`, which is written at `offset`, that lies in `bytes`, which are those at `start`.
fn overwrite(bytes: &mut [u8], start: u64, buf: &[u8], offset: u64) -> Result<()> {
    let there = ByteRange::at(start, bytes.len() as u64);
    let common = there.intersect(ByteRange::at(offset, buf.len() as u64));
    if common.is_empty() {
        return Ok(());
    }
    let (to, from, len) = (
        to_index(common.start() - start)?,
        to_index(common.start() - offset)?,
        to_index(common.len())?,
    );
    if let (Some(to), Some(from)) = (bytes.get_mut(to..to + len), buf.get(from..from + len)) {
        to.copy_from_slice(from);
    }
    Ok(())
}

/// `Operation not permitted`, the error of `qemu-img`.
const EPERM: i32 = 1;
