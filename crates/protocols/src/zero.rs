//! Zeroing and discarding ranges of files.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use diskimage_core::{ByteRange, Device, Error, Result, ZeroMode};
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, retry_on_intr};

use crate::file::{File, FileKind};
use crate::sys;

impl File {
    /// Makes `range` read as zeroes and extends the file if the range ends beyond it.
    pub(crate) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if i64::try_from(range.end()).is_err() {
            return Err(Error::from_errno(libc::EFBIG));
        }
        let outcome = match self.kind {
            FileKind::Regular => self.zero_file(range, mode),
            FileKind::Block => self.zero_block(range, mode),
            FileKind::Character => self.write_zeroes_unless_fast_only(range, mode),
        };
        self.note_outcome(&outcome, range.end());
        outcome
    }

    /// Discards the contents of `range`: punches a hole, or tells the block device.
    pub(crate) fn discard_range(&self, range: ByteRange) -> Result<()> {
        let outcome = match self.kind {
            FileKind::Regular => {
                let inside = range.intersect(ByteRange::new(0, self.len()));
                if inside.is_empty() {
                    Ok(())
                } else {
                    self.fallocate(PUNCH, inside).map_err(std::io::Error::from)
                }
            }
            FileKind::Block => sys::block_discard(&self.file, range.start(), range.len()),
            FileKind::Character => Ok(()),
        };
        self.holes.invalidate();
        match outcome {
            Err(error) if !is_unsupported(error.raw_os_error()) => Err(error.into()),
            // Without support for discards the range stays as it is.
            _ => Ok(()),
        }
    }

    fn zero_file(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let attempts: &[fn(&Self, ByteRange) -> Attempt] = match mode {
            ZeroMode::Unmap | ZeroMode::FastOnly => &[Self::punch, Self::zero_range],
            ZeroMode::KeepAllocated => &[Self::zero_range, Self::punch_and_allocate],
        };
        for attempt in attempts {
            match attempt(self, range) {
                Ok(()) => return Ok(()),
                Err(errno) if is_unsupported(Some(errno.raw_os_error())) => {}
                Err(errno) => return Err(std::io::Error::from(errno).into()),
            }
        }
        self.write_zeroes_unless_fast_only(range, mode)
    }

    fn punch(&self, range: ByteRange) -> Attempt {
        let inside = range.intersect(ByteRange::new(0, self.len()));
        if !inside.is_empty() {
            self.fallocate(PUNCH, inside)?;
        }
        if range.end() > self.known_len.load(Ordering::Acquire) {
            let _alone = self.growth.write().unwrap_or_else(PoisonError::into_inner);
            if self.refresh_len().map_err(|_| Errno::IO)? < range.end() {
                retry_on_intr(|| rustix::fs::ftruncate(&self.file, range.end()))?;
            }
        }
        Ok(())
    }

    fn zero_range(&self, range: ByteRange) -> Attempt {
        self.fallocate(FallocateFlags::ZERO_RANGE, range)
    }

    fn punch_and_allocate(&self, range: ByteRange) -> Attempt {
        self.punch(range)?;
        self.fallocate(FallocateFlags::empty(), range)
    }

    fn zero_block(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let sector = u64::from(rustix::fs::ioctl_blksszget(&self.file).unwrap_or(512));
        let middle = range.align_in(sector);
        let sides = [
            ByteRange::new(range.start(), middle.start().min(range.end())),
            ByteRange::new(middle.end().max(range.start()), range.end()),
        ];
        if middle.is_empty() {
            return self.write_zeroes_unless_fast_only(range, mode);
        }
        for side in sides.into_iter().filter(|side| !side.is_empty()) {
            self.write_zero_bytes(side)?;
        }
        // PUNCH_HOLE never writes zero bytes; BLKZEROOUT may.
        let outcome = match mode {
            ZeroMode::KeepAllocated => Err(std::io::Error::from(Errno::OPNOTSUPP)),
            ZeroMode::Unmap | ZeroMode::FastOnly => {
                self.fallocate(PUNCH, middle).map_err(std::io::Error::from)
            }
        };
        let outcome = match outcome {
            Err(error) if is_unsupported(error.raw_os_error()) && mode != ZeroMode::FastOnly => {
                sys::block_zero(&self.file, middle.start(), middle.len())
            }
            other => other,
        };
        match outcome {
            Err(error) if is_unsupported(error.raw_os_error()) => {
                self.write_zeroes_unless_fast_only(middle, mode)
            }
            other => Ok(other?),
        }
    }

    fn write_zeroes_unless_fast_only(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if mode == ZeroMode::FastOnly {
            return Err(Error::unsupported("Operation not supported"));
        }
        self.write_zero_bytes(range)
    }

    /// Writes zero bytes over `range`.
    pub(crate) fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        (self as &dyn Device).write_zero_bytes(range)
    }
}

type Attempt = rustix::io::Result<()>;

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Whether `errno` means that the file system or device does not support the operation.
fn is_unsupported(errno: Option<i32>) -> bool {
    matches!(
        errno,
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
    )
}
