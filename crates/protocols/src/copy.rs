//! Copies inside the kernel.

use diskimage_core::{ByteRange, Device, Error, Result, to_index};
use rustix::io::Errno;

use crate::file::{File, FileKind};

impl File {
    /// Copies `range` to `target_offset` of `target` with `copy_file_range`, which shares the blocks on file systems
    /// with reflinks. `Ok(false)` if this is not possible.
    pub(crate) fn copy_range(
        &self,
        range: ByteRange,
        target: &dyn Device,
        target_offset: u64,
    ) -> Result<bool> {
        if self.kind != FileKind::Regular || range.is_empty() {
            return Ok(false);
        }
        let Some(to) = target.as_file() else {
            return Ok(false);
        };
        let (mut from_offset, mut to_offset) = (range.start(), target_offset);
        while from_offset < range.end() {
            let len = to_index((range.end() - from_offset).min(MAX_CHUNK))?;
            let copied = rustix::fs::copy_file_range(
                &self.file,
                Some(&mut from_offset),
                to,
                Some(&mut to_offset),
                len,
            );
            match copied {
                Ok(0) if from_offset == range.start() => return Ok(false),
                Ok(0) => {
                    return Err(Error::corrupt(format!(
                        "'{}' ends in the middle of a copy",
                        self.name
                    )));
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) if from_offset == range.start() => {
                    // Another file system, an old kernel, overlapping ranges: the caller reads and writes instead. If
                    // the disk fails, that returns the error.
                    return Ok(false);
                }
                Err(error) => return Err(std::io::Error::from(error).into()),
            }
        }
        Ok(true)
    }
}

/// The most that one call copies.
const MAX_CHUNK: u64 = 1 << 30;
