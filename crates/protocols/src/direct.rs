//! Requests that bypass the page cache (`O_DIRECT`): the kernel accepts only whole blocks and aligned memory.
//!
//! ```text
//!   request        |-- head --|------ whole blocks ------|- tail -|
//!   on the disk  [ block     ][ block ][ block ][ block ][ block     ]
//! ```
//! Other requests go through aligned bounce buffers. A partly written block is read, modified and written under a lock.
//! A file whose end is not on a block boundary is truncated to its length afterwards.

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use diskimage_core::{Result, align_down, align_up, to_index};
use rustix::fs::{AtFlags, StatxFlags};

use crate::file::{File, FileKind};

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

    fn is_aligned_request(&self, buf: &[u8], offset: u64) -> bool {
        self.is_aligned(offset)
            && self.is_aligned(buf.len() as u64)
            && (buf.as_ptr().addr()).is_multiple_of(self.memory)
    }

    /// Reads until `buf` is full or the file ends. Returns the number of bytes read.
    pub(crate) fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> Result<usize> {
        if self.is_aligned_request(buf, offset) {
            return file.read_until_end(buf, offset);
        }
        let mut bounce = self.acquire_buffer();
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let start = align_down(at, u64::from(self.block));
            let skip = to_index(at - start)?;
            let want = (buf.len() - done).min(MAX_BOUNCE - skip);
            let block = bounce.blocks(self.memory, self.round_up(skip + want));
            let len = file.read_until_end(block, start)?.saturating_sub(skip).min(want);
            buf[done..done + len].copy_from_slice(&block[skip..skip + len]);
            done += len;
            if len < want {
                break;
            }
        }
        self.release_buffer(bounce);
        Ok(done)
    }

    /// Writes all of `buf`.
    pub(crate) fn write(&self, file: &File, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if self.is_aligned_request(buf, offset) {
            let _growing = file.growth.read().unwrap_or_else(PoisonError::into_inner);
            return file.write_out(buf, offset);
        }
        if self.is_aligned(offset) && self.is_aligned(end) {
            let _growing = file.growth.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_bounced(file, buf, offset);
        }
        let _partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let whole_end = align_up(end, u64::from(self.block));
        if whole_end <= file.known_len.load(Ordering::Acquire) {
            let _growing = file.growth.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_bounced(file, buf, offset);
        }
        let _alone = file.growth.write().unwrap_or_else(PoisonError::into_inner);
        let before = file.refresh_len()?;
        let outcome = self.write_bounced(file, buf, offset);
        if file.kind == FileKind::Regular && whole_end > before.max(end) {
            // The last block was written whole: cut the file to the end of the bytes.
            file.file.set_len(before.max(end))?;
        }
        outcome
    }

    fn write_bounced(&self, file: &File, buf: &[u8], offset: u64) -> Result<()> {
        let mut bounce = self.acquire_buffer();
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let start = align_down(at, u64::from(self.block));
            let skip = to_index(at - start)?;
            let len = (buf.len() - done).min(MAX_BOUNCE - skip);
            let whole = self.round_up(skip + len);
            let blocks = bounce.blocks(self.memory, whole);
            let unit = self.block as usize;
            if skip != 0 {
                read_block(file, &mut blocks[..unit], start)?;
            }
            if skip + len != whole && (skip == 0 || whole > unit) {
                let last = whole - unit;
                read_block(file, &mut blocks[last..], start + last as u64)?;
            }
            blocks[skip..skip + len].copy_from_slice(&buf[done..done + len]);
            file.write_out(blocks, start)?;
            done += len;
        }
        self.release_buffer(bounce);
        Ok(())
    }

    fn round_up(&self, len: usize) -> usize {
        len.next_multiple_of(self.block as usize)
    }

    fn acquire_buffer(&self) -> BounceBuffer {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_default()
    }

    fn release_buffer(&self, bounce: BounceBuffer) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE {
            spare.push(bounce);
        }
    }
}

/// The size of a bounce buffer, a multiple of every block size.
const MAX_BOUNCE: usize = 1 << 20;
/// How many free buffers are kept.
const MAX_SPARE: usize = 8;
const PAGE: u32 = 4096;

/// Block sizes are powers of two; the kernel reports 0 for a file that does not support direct I/O.
fn is_plausible(size: u32) -> bool {
    size.is_power_of_two() && size <= 64 << 10
}

/// Reads a block, with zeroes for bytes beyond the end of the file.
fn read_block(file: &File, block: &mut [u8], offset: u64) -> Result<()> {
    let len = file.read_until_end(block, offset)?;
    block[len..].fill(0);
    Ok(())
}

/// Memory with space to start at an aligned address.
#[derive(Debug, Default)]
struct BounceBuffer(Vec<u8>);

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
