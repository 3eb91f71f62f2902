//! Growing, which the original cannot.
//!
//! If the block allocation table has no room for more blocks, a longer one goes to the end of the file, and the region
//! tables say where it is, one after the other. The disk's size changes last, by way of the log.

use std::sync::Arc;

use diskimage_core::{ByteRange, Error, Preallocation, ResizeRequest, Result, ZeroMode, errno, to_index};

use super::bat::{Bat, ENTRY, Payload, UNIT, absent, entries, entry_of, present};
use super::header::{MIB, Regions};
use super::metadata::MAX_DISK;
use super::{State, VhdxLayer};
use crate::layer_kit::preallocation;

impl VhdxLayer {
    /// Refuses what cannot be done, before anything has changed.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        if request.len < self.lock().metadata.disk_size {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        if !request.len.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if request.len > MAX_DISK {
            return Err(Error::invalid("Image size too large; max of 64TB"));
        }
        preallocation::require_off(request.preallocation)
    }

    /// Makes the disk larger. If all blocks have storage, the new ones get it, too: the image is fixed.
    pub(super) fn grow(&self, request: &ResizeRequest) -> Result<()> {
        self.check_size(request)?;
        let mut state = self.claims.wait_idle(|| self.lock());
        let old = state.metadata.disk_size;
        if request.len == old {
            return Ok(());
        }
        self.require_whole(&mut state)?;
        state.mark_changed(&*self.file)?;
        state.publish(&*self.file)?;
        let (is_fixed, says_zero) = self.kind(&mut state)?;
        self.clear_rest(&mut state)?;
        let needed = entries(request.len, self.block_size) * ENTRY;
        if needed > state.regions.bat.len() {
            self.move_bat(&mut state, needed.next_multiple_of(MIB))?;
        }
        for block in old.div_ceil(self.block_size)..request.len.div_ceil(self.block_size) {
            let entry = if is_fixed {
                present(self.take_place(&mut state)?)
            } else {
                absent(says_zero)
            };
            let index = entry_of(block, self.block_size);
            if state.bat.entry(index)? != entry {
                state.bat.set(index, entry)?;
            }
            if state.bat.too_many_dirty() {
                state.publish(&*self.file)?;
            }
        }
        state.publish(&*self.file)?;
        self.set_size(&mut state, request.len)
    }

    /// Whether all blocks have storage, and whether those that have none say that they are zero.
    fn kind(&self, state: &mut State) -> Result<(bool, bool)> {
        let blocks = state.metadata.disk_size.div_ceil(self.block_size);
        for block in 0..blocks {
            let entry = state.bat.entry(entry_of(block, self.block_size))?;
            if Payload::of(entry)? == Payload::Zero {
                return Ok((false, entry != absent(false)));
            }
        }
        // One block that is full does not make a disk fixed.
        Ok((blocks > 1, true))
    }

    /// Makes the rest of the last block zero, which becomes part of the disk.
    fn clear_rest(&self, state: &mut State) -> Result<()> {
        let size = state.metadata.disk_size;
        let used = size % self.block_size;
        if used == 0 {
            return Ok(());
        }
        let Payload::At(offset) = self.payload(state, size / self.block_size)? else {
            return Ok(());
        };
        self.require_payload(state, offset)?;
        let rest = ByteRange::at(offset, self.block_size).skip(used);
        self.file.write_zeroes(rest, ZeroMode::KeepAllocated)
    }

    /// Puts a table of `len` bytes, which says the same, to the end of the file.
    fn move_bat(&self, state: &mut State, len: u64) -> Result<()> {
        let file = &*self.file;
        let start = state.end.max(file.len().next_multiple_of(MIB));
        let region = ByteRange::at(start, len);
        file.resize(region.end(), Preallocation::Off)?;
        state.end = region.end();
        let mut bytes = vec![0; to_index(MIB)?];
        let mut done = 0;
        while done < state.regions.bat.len() {
            file.read_whole(&mut bytes, state.regions.bat.start() + done)?;
            file.write_at(&bytes, start + done)?;
            done += MIB;
        }
        file.flush()?;
        let regions = Regions {
            bat: region,
            ..state.regions.clone()
        };
        regions.write(file)?;
        state.reserved = regions.reserved(state.header.log);
        state.regions = regions;
        state.bat = Bat::new(Arc::clone(&self.file), region);
        Ok(())
    }

    fn set_size(&self, state: &mut State, len: u64) -> Result<()> {
        let at = state.metadata.size_at;
        let unit = at / UNIT as u64 * UNIT as u64;
        let from = to_index(at - unit)?;
        let mut bytes = Box::new([0; UNIT]);
        self.file.read_whole(&mut bytes[..], unit)?;
        bytes
            .get_mut(from..from + 8)
            .ok_or_else(|| Error::from_errno(errno::EINVAL))?
            .copy_from_slice(&len.to_le_bytes());
        state.write_logged(&*self.file, &[(unit, bytes)])?;
        state.metadata.disk_size = len;
        Ok(())
    }
}
