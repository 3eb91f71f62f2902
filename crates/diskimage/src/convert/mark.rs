//! The mark of an existing target that is not complete.
//!
//! | target | mark |
//! |---|---|
//! | qcow2 of version 3 | its dirty bit, which `info` shows and the next writer repairs |
//! | one without clusters that is written as a whole: raw, LUKS | the first sectors of the disk, with its partition table, are zero and written last |
//! | others | none: neither the format nor the disk has a place for one |

use diskimage_core::{ByteRange, Device, Image, Result, ZeroMode};

use super::Conversion;
use crate::files::flush;

/// How a target is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// It is not.
    None,
    /// By the format.
    Bit,
    /// By this part of the disk, which is zero and comes last.
    Head(ByteRange),
}

/// The length in bytes of the part of the disk that comes last: partition tables begin in it, and boot sectors.
const HEAD: u64 = 4096;

/// The length in bytes of what is zeroed at once: storage can be given back in large pieces only.
const ZERO: u64 = 1 << 20;

impl Mark {
    /// Marks the target of `conversion`, durably.
    ///
    /// # Errors
    /// The target cannot be written or flushed.
    pub(super) fn set(conversion: &Conversion<'_>) -> Result<Self> {
        let target = conversion.target;
        if !conversion.existing_target || conversion.is_empty() {
            return Ok(Self::None);
        }
        if let Some(unfinished) = target.layer().unfinished() {
            unfinished.mark(true)?;
            return Ok(Self::Bit);
        }
        // What is not copied over a backing image stays as it is.
        if target.layer().granularity() > 1 || conversion.backing_len.is_some() {
            return Ok(Self::None);
        }
        let disk = ByteRange::new(0, conversion.len().min(target.len()));
        if !conversion.target_is_zero {
            target.write_zeroes(disk.first(HEAD), ZeroMode::KeepAllocated)?;
            flush(target)?;
            target.write_zeroes(disk.first(ZERO), ZeroMode::Unmap)?;
        }
        Ok(Self::Head(disk.first(HEAD)))
    }

    /// Removes the mark by the format: everything was copied, and is made durable first, or nothing was written.
    ///
    /// # Errors
    /// The target cannot be written or flushed.
    pub(super) fn clear(self, target: &Image, is_complete: bool) -> Result<()> {
        if self == Self::Bit
            && let Some(unfinished) = target.layer().unfinished()
        {
            if is_complete {
                flush(target)?;
            }
            unfinished.mark(false)?;
        }
        Ok(())
    }
}
