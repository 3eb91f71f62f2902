//! What bypassing the page cache (`O_DIRECT`) asks of requests: the kernel accepts only whole blocks and aligned memory.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, StatxFlags};

use crate::file::FileKind;

/// The alignment that requests need, and the bounce buffers.
#[derive(Debug)]
pub(crate) struct DirectIo {
    block: u32,
    memory: usize,
    /// Held while a partly written block is read, modified and written: two writers of one block would overwrite each
    /// other's bytes.
    partial: Mutex<()>,
    spare: Mutex<Vec<BounceBuffer>>,
}

impl DirectIo {
    /// Asks the kernel for the alignment that `file` needs.
    pub(crate) fn of(file: &fs::File, kind: FileKind) -> Self {
        let reported = match kind {
            FileKind::Block => rustix::fs::ioctl_blksszget(file).ok().map(|size| (size, size)),
            _ => rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
                .ok()
                .map(|stat| (stat.stx_dio_offset_align, stat.stx_dio_mem_align)),
        };
        // Kernels before 6.1 do not tell; no known file system needs more than a page.
        let (block, memory) = reported
            .filter(|(block, memory)| is_plausible(*block) && is_plausible(*memory))
            .unwrap_or((PAGE, PAGE));
        Self {
            block,
            memory: memory.max(PAGE) as usize,
            partial: Mutex::new(()),
            spare: Mutex::default(),
        }
    }

    /// The block size.
    pub(crate) fn alignment(&self) -> u32 {
        self.block
    }

    /// Whether an offset or length is a whole number of blocks.
    pub(crate) fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(u64::from(self.block))
    }

    /// Whether a request needs no bounce buffer.
    pub(crate) fn is_aligned_request(&self, buf: &[u8], offset: u64) -> bool {
        self.is_aligned(offset)
            && self.is_aligned(buf.len() as u64)
            && (buf.as_ptr().addr()).is_multiple_of(self.memory)
    }

    /// `len` rounded up to whole blocks.
    pub(crate) fn round_up(&self, len: usize) -> usize {
        len.next_multiple_of(self.block as usize)
    }

    /// Keeps other writers of partly written blocks off.
    pub(crate) fn lock_partial(&self) -> MutexGuard<'_, ()> {
        self.partial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` bytes of `bounce` at an aligned address.
    pub(crate) fn blocks<'a>(&self, bounce: &'a mut BounceBuffer, len: usize) -> &'a mut [u8] {
        bounce.blocks(self.memory, len)
    }

    /// Takes a bounce buffer.
    pub(crate) fn acquire_buffer(&self) -> BounceBuffer {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_default()
    }

    /// Keeps a bounce buffer for the next request.
    pub(crate) fn release_buffer(&self, bounce: BounceBuffer) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE {
            spare.push(bounce);
        }
    }
}

/// The size of a bounce buffer, a multiple of every block size.
pub(crate) const MAX_BOUNCE: usize = 1 << 20;
/// How many free buffers are kept.
const MAX_SPARE: usize = 8;
const PAGE: u32 = 4096;

/// Block sizes are powers of two; the kernel reports 0 for a file that does not support direct I/O.
fn is_plausible(size: u32) -> bool {
    size.is_power_of_two() && size <= 64 << 10
}

/// Memory with space to start at an aligned address.
#[derive(Debug, Default)]
pub(crate) struct BounceBuffer(Vec<u8>);

impl BounceBuffer {
    fn blocks(&mut self, alignment: usize, len: usize) -> &mut [u8] {
        if self.0.len() < len + alignment {
            self.0 = vec![0; len + alignment];
        }
        let address = self.0.as_ptr().addr();
        let start = address.next_multiple_of(alignment) - address;
        &mut self.0[start..start + len]
    }
}
