//! Requests that bypass the page cache (`O_DIRECT`): the kernel accepts only whole blocks and aligned memory.
//!
//! ```text
//!   request        |-- head --|------ whole blocks ------|- tail -|
//!   on the disk  [ block     ][ block ][ block ][ block ][ block     ]
//! ```
//! Other requests go through aligned bounce buffers. A partly written block is read, modified and written under a lock.
//! A file whose end is not on a block boundary is truncated to its length afterwards.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use diskimage_core::{Result, align_down, align_up, to_index};

use super::{File, FileKind};
use crate::direct::{DirectIo, MAX_BOUNCE};

impl File {
    /// Reads until `buf` is full or the file ends. Returns the number of bytes read.
    pub(super) fn read_direct(&self, direct: &DirectIo, buf: &mut [u8], offset: u64) -> Result<usize> {
        if direct.is_aligned_request(buf, offset) {
            return self.read_until_end(buf, offset);
        }
        let mut bounce = direct.acquire_buffer();
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let start = align_down(at, u64::from(direct.alignment()));
            let skip = to_index(at - start)?;
            let want = (buf.len() - done).min(MAX_BOUNCE - skip);
            let block = direct.blocks(&mut bounce, direct.round_up(skip + want));
            let len = self.read_until_end(block, start)?.saturating_sub(skip).min(want);
            buf[done..done + len].copy_from_slice(&block[skip..skip + len]);
            done += len;
            if len < want {
                break;
            }
        }
        direct.release_buffer(bounce);
        Ok(done)
    }

    /// Writes all of `buf`.
    pub(super) fn write_direct(&self, direct: &DirectIo, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if direct.is_aligned_request(buf, offset) {
            let _growing = self.growth.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_out(buf, offset);
        }
        if direct.is_aligned(offset) && direct.is_aligned(end) {
            let _growing = self.growth.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_bounced(direct, buf, offset);
        }
        let _partial = direct.lock_partial();
        let whole_end = align_up(end, u64::from(direct.alignment()));
        if whole_end <= self.known_len.load(Ordering::Acquire) {
            let _growing = self.growth.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_bounced(direct, buf, offset);
        }
        let _alone = self.growth.write().unwrap_or_else(PoisonError::into_inner);
        let before = self.refresh_len()?;
        let outcome = self.write_bounced(direct, buf, offset);
        if self.kind == FileKind::Regular && whole_end > before.max(end) {
            // The last block was written whole: cut the file to the end of the bytes.
            self.file.set_len(before.max(end))?;
        }
        outcome
    }

    fn write_bounced(&self, direct: &DirectIo, buf: &[u8], offset: u64) -> Result<()> {
        let mut bounce = direct.acquire_buffer();
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let start = align_down(at, u64::from(direct.alignment()));
            let skip = to_index(at - start)?;
            let len = (buf.len() - done).min(MAX_BOUNCE - skip);
            let whole = direct.round_up(skip + len);
            let blocks = direct.blocks(&mut bounce, whole);
            let unit = direct.alignment() as usize;
            if skip != 0 {
                read_block(self, &mut blocks[..unit], start)?;
            }
            if skip + len != whole && (skip == 0 || whole > unit) {
                let last = whole - unit;
                read_block(self, &mut blocks[last..], start + last as u64)?;
            }
            blocks[skip..skip + len].copy_from_slice(&buf[done..done + len]);
            self.write_out(blocks, start)?;
            done += len;
        }
        direct.release_buffer(bounce);
        Ok(())
    }
}

/// Reads a block, with zeroes for bytes beyond the end of the file.
fn read_block(file: &File, block: &mut [u8], offset: u64) -> Result<()> {
    let len = file.read_until_end(block, offset)?;
    block[len..].fill(0);
    Ok(())
}
