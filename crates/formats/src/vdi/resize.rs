//! Growing, which qemu-img does not support for this format.
//!
//! A longer map overwrites the old one if it fits in front of the blocks. If not, the blocks in the first slots move to
//! the end, and the new map is written to those slots:
//!
//! ```text
//!   before   |header|map|   0   |   1   |   2   |
//!   then     |header|map|       |   1   |   2   |   0   |
//!   after    |header|   |  map  |   0   |   1   |   2   |      slots are counted from `data_offset`
//! ```
//!
//! Each step leaves the image readable: a block's entry is changed once its copy is durable, and the new map is in use
//! from the write of the header, a single sector, which holds its offset.

use std::sync::Arc;

use diskimage_core::{Device, Error, Preallocation, ResizeRequest, Result, ZeroMode};

use super::header::{BLOCK, Header, SECTOR, map_bytes};
use super::{NO_BLOCK, State, VdiLayer, slot};
use crate::layer_kit::clear::zero_existing;
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::preallocation;

impl VdiLayer {
    /// Refuses a size that the image cannot grow to, before anything is written.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        let state = self.lock();
        if request.len < state.header.size {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        if !request.len.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        preallocation::require_off(request.preallocation)?;
        grown(&state.header, request.len).map(|_| ())
    }

    /// Makes the disk `len` bytes long.
    pub(super) fn grow(&self, len: u64) -> Result<()> {
        // Slots of writes in flight are not in the map yet: they would be allocated again, or be numbered from the
        // wrong offset.
        let mut state = self.claims.wait_idle(|| self.lock());
        let (header, shift) = grown(&state.header, len)?;
        self.publish_blocks(&mut state)?;
        let room = header.blocks.saturating_add(shift);
        let slots = |state: &mut State| {
            state.slots = None;
            let known = state.slots_in_use(room, self.file.len(), &self.budget);
            known.map(|slots| state.slots = Some(slots))
        };
        slots(&mut state)?;
        state.require_not_truncated()?;
        let outcome = self.grow_into(&mut state, header, shift);
        if outcome.is_err() && state.slots.is_some() {
            // Frees the slots that were allocated before the failure. If that fails, too, the first error is returned.
            let _ = slots(&mut state);
        }
        outcome
    }

    /// Makes the disk as large as in `header`, whose map needs the first `shift` slots.
    fn grow_into(&self, state: &mut State, mut header: Header, shift: u32) -> Result<()> {
        self.zero_padding(state)?;
        self.vacate_slots(state, shift)?;
        let old_blocks = state.header.blocks;
        let map_end = header.map_offset + map_bytes(header.blocks);
        if self.file.len() < map_end {
            self.file.resize(map_end, Preallocation::Off)?;
        }
        let mut map = PagedTable::new(Arc::clone(&self.file), header.map_offset, header.blocks.into());
        if shift > 0 {
            copy_map(&mut state.map, &mut map, old_blocks, shift)?;
        }
        let slots = self.slots(state)?;
        for block in old_blocks..header.blocks {
            let entry = if self.is_static {
                (slots.take_first_from(shift)? - shift).to_le_bytes()
            } else {
                NO_BLOCK
            };
            map.set(block.into(), entry)?;
        }
        header.set_allocated(slots.end().saturating_sub(shift));
        let end = header.host(header.allocated());
        if self.file.len() < end {
            self.file.resize(end, Preallocation::Off)?;
        }
        map.write_back()?;
        self.file.flush()?;
        self.file.write_at(&header.to_bytes()?, 0)?;
        // From here on readers of the file use the new map.
        (state.reserved, state.relied_on) = (header.reserved(), header.relied_on());
        (state.header, state.map, state.slots) = (header, map, None);
        self.file.flush()
    }

    /// Zeroes the part of the last block beyond the old end of the disk, which becomes part of the disk.
    fn zero_padding(&self, state: &mut State) -> Result<()> {
        let size = state.header.size;
        let used = size % BLOCK;
        if used == 0 {
            return Ok(());
        }
        let Some(slot) = self.slot_to_change(state, size / BLOCK)? else {
            return Ok(());
        };
        let rest = state.header.stored(slot).skip(used);
        zero_existing(&*self.file, rest, ZeroMode::KeepAllocated)
    }

    /// Moves the blocks in the first `count` slots to free slots behind them.
    fn vacate_slots(&self, state: &mut State, count: u32) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let mut moved = Vec::new();
        let mut block = 0;
        while block < u64::from(state.header.blocks) {
            for entry in state.map.entries(block)? {
                if let Some(slot) = slot(*entry)
                    && slot < count
                {
                    moved.push((block, slot));
                }
                block += 1;
            }
            if moved.len() > count as usize {
                return Err(Error::corrupt("Blocks of the image share their places"));
            }
        }
        let mut bytes = vec![0; 1 << 20];
        for (block, slot) in moved {
            let target = self.slots(state)?.take_first_from(count)?;
            let file: &dyn Device = &*self.file;
            file.read_padded(&mut bytes, state.header.host(slot))?;
            file.write_at(&bytes, state.header.host(target))?;
            state.map.set(block, target.to_le_bytes())?;
        }
        self.publish_blocks(state)?;
        // The map that no longer refers to these slots must be durable before they are overwritten.
        self.file.flush()
    }
}

/// The header of the same image with a disk of `len` bytes, and how many slots its map needs.
fn grown(old: &Header, len: u64) -> Result<(Header, u32)> {
    let mut header = old.resized(len)?;
    let map_end = |header: &Header| header.map_offset + u64::from(header.blocks) * 4;
    if old.data_offset < map_end(old) {
        return Err(Error::unsupported(
            "The block map does not lie in front of the blocks, so the image cannot grow",
        ));
    }
    let mut shift = 0;
    if map_end(&header) > header.data_offset {
        let moved = map_bytes(header.blocks).div_ceil(BLOCK);
        header.map_offset = old.data_offset;
        header.data_offset = old.data_offset + moved * BLOCK;
        shift = u32::try_from(moved).map_err(|_| Error::invalid("The disk is too large"))?;
    }
    // Refuses offsets that do not fit into the header, before anything is written.
    header.to_bytes()?;
    Ok((header, shift))
}

/// Copies the entries of the first `blocks` blocks from `old` to `new`, where slot `shift` becomes slot 0.
fn copy_map(old: &mut PagedTable, new: &mut PagedTable, blocks: u32, shift: u32) -> Result<()> {
    let mut block = 0;
    while block < u64::from(blocks) {
        for entry in old.entries(block)? {
            let moved = match slot(*entry) {
                Some(slot) => slot.saturating_sub(shift).to_le_bytes(),
                None => *entry,
            };
            new.set(block, moved)?;
            block += 1;
        }
    }
    Ok(())
}
