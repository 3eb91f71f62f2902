//! Growing, which qemu-img does not support for this format.
//!
//! A block allocation table that is too short is copied to a longer region at the end of the file, and the region
//! tables get its offset, one after the other. The disk's size changes last, through the log.

use std::sync::Arc;

use diskimage_core::{ByteRange, Error, Preallocation, ResizeRequest, Result, ZeroMode, errno, to_index};

use super::bat::{Bat, ENTRY, Payload, UNIT, absent, present};
use super::header::{MIB, Regions};
use super::metadata::MAX_DISK;
use super::{State, VhdxLayer};
use crate::layer_kit::preallocation;

impl VhdxLayer {
    /// Refuses a size that the image cannot grow to, before anything is written.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        let metadata = self.lock().metadata;
        if request.len < metadata.disk_size {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        let sector = metadata.sector;
        if !request.len.is_multiple_of(sector) {
            return Err(Error::invalid(format!(
                "The new size must be a multiple of {sector}"
            )));
        }
        if request.len > MAX_DISK {
            return Err(Error::invalid("Image size too large; max of 64TB"));
        }
        preallocation::require_off(request.preallocation)
    }

    /// Makes the disk larger. In a fixed image, where all blocks have storage, the new blocks are allocated, too.
    pub(super) fn grow(&self, request: &ResizeRequest) -> Result<()> {
        self.check_size(request)?;
        let mut state = self.claims.wait_idle(|| self.lock());
        let old = state.metadata.disk_size;
        if request.len == old {
            return Ok(());
        }
        self.require_not_truncated(&mut state)?;
        state.mark_changed(&*self.file)?;
        state.publish(&*self.file)?;
        let (is_fixed, says_zero) = self.kind(&mut state)?;
        self.zero_padding(&mut state)?;
        let needed = self.chunks.entries(request.len.div_ceil(self.block_size)) * ENTRY;
        if needed > state.regions.bat.len() {
            self.move_bat(&mut state, needed.next_multiple_of(MIB))?;
        }
        for block in old.div_ceil(self.block_size)..request.len.div_ceil(self.block_size) {
            let entry = if is_fixed {
                present(self.allocate(&mut state)?)
            } else {
                absent(says_zero)
            };
            let index = self.chunks.entry_of(block);
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

    /// Whether the image is fixed: all blocks have storage; and whether blocks without storage are in state zero.
    fn kind(&self, state: &mut State) -> Result<(bool, bool)> {
        let blocks = state.metadata.disk_size.div_ceil(self.block_size);
        for block in 0..blocks {
            let entry = state.bat.entry(self.chunks.entry_of(block))?;
            if Payload::of(entry, self.is_differencing())?.offset().is_none() {
                return Ok((false, entry != absent(false)));
            }
        }
        // A disk of a single block, or none, counts as dynamic.
        Ok((blocks > 1, true))
    }

    /// Zeroes the part of the last block beyond the old end of the disk, which becomes part of the disk.
    fn zero_padding(&self, state: &mut State) -> Result<()> {
        let size = state.metadata.disk_size;
        let used = size % self.block_size;
        if used == 0 {
            return Ok(());
        }
        let Some(offset) = self.payload(state, size / self.block_size)?.offset() else {
            return Ok(());
        };
        self.require_payload(state, offset)?;
        let rest = ByteRange::at(offset, self.block_size).skip(used);
        self.file.write_zeroes(rest, ZeroMode::KeepAllocated)
    }

    /// Moves the table to a region of `len` bytes at the end of the file.
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

    /// Changes the disk's size in the metadata, through the log.
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
