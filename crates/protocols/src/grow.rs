//! Changes of the length of a file.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use diskimage_core::{ByteRange, Error, ErrorKind, Preallocation, Result, ResultExt};
use rustix::fs::FallocateFlags;

use crate::file::{File, FileKind};

impl File {
    /// Changes the length.
    pub(crate) fn set_len(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if self.kind != FileKind::Regular {
            return self.set_device_len(len, preallocation);
        }
        if i64::try_from(len).is_err() {
            return Err(Error::from_errno(libc::EINVAL).context("Could not resize file"));
        }
        let old = {
            let _alone = self.growth.write().unwrap_or_else(PoisonError::into_inner);
            let old = self.refresh_len()?;
            if preallocation != Preallocation::Off && len < old {
                return Err(Error::invalid("Preallocation can't be used for shrinking files"));
            }
            let outcome = self.change_len(old, len, preallocation);
            self.holes.invalidate();
            if outcome.is_err() && preallocation != Preallocation::Off {
                // Undo a partial preallocation.
                let _ = self.file.set_len(old);
            }
            self.refresh_len()?;
            outcome?;
            old
        };
        if preallocation == Preallocation::Full {
            if let Err(error) = self.write_zero_bytes(ByteRange::new(old, len)) {
                let _alone = self.growth.write().unwrap_or_else(PoisonError::into_inner);
                let _ = self.file.set_len(old);
                self.refresh_len()?;
                self.holes.invalidate();
                return Err(error.context("Could not write zeros for preallocation"));
            }
            rustix::io::retry_on_intr(|| rustix::fs::fsync(&self.file))
                .map_err(std::io::Error::from)
                .context(|| "Could not flush file to disk")?;
        } else if old == 0 && len > 0 {
            // Allocates the first block: programs that probe the alignment for O_DIRECT need an allocated block. A
            // failure is ignored.
            let _ = self.write_zero_bytes(ByteRange::new(0, len.min(FIRST_BLOCK)));
        }
        Ok(())
    }

    fn change_len(&self, old: u64, len: u64, preallocation: Preallocation) -> Result<()> {
        match preallocation {
            Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
            Preallocation::Falloc if len > old => self
                .fallocate(FallocateFlags::empty(), ByteRange::new(old, len))
                .map_err(std::io::Error::from)
                .context(|| "Could not preallocate new data"),
            _ => self.file.set_len(len).context(|| "Could not resize file"),
        }
    }

    fn set_device_len(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation != Preallocation::Off {
            return Err(Error::unsupported(format!(
                "Preallocation mode '{}' unsupported for this non-regular file",
                preallocation.name()
            )));
        }
        if len == self.known_len.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Unsupported, "Cannot resize device files"))
        }
    }
}

const FIRST_BLOCK: u64 = 4096;
