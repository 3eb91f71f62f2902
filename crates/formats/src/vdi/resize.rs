//! Growing, which the original cannot.
//!
//! A longer map goes where the old one is if there is room before the blocks. If not, the first blocks move to the end,
//! and the new map takes their place:
//!
//! ```text
//!   before   |header|map|   0   |   1   |   2   |
//!   then     |header|map|       |   1   |   2   |   0   |
//!   after    |header|   |  map  |   0   |   1   |   2   |      places are counted from where the blocks start
//! ```
//!
//! Each step leaves the image readable: a block's entry is changed once its copy is durable, and the new map counts from
//! the moment when the header, one sector, says where it is.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, Preallocation, ResizeRequest, Result, ZeroMode};

use super::header::{BLOCK, Header, SECTOR, map_bytes};
use super::{NO_BLOCK, State, VdiLayer, place};
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::preallocation;

impl VdiLayer {
    /// Refuses what cannot be done, before anything has changed.
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
        // Places of blocks in flight are in no map, and would be allocated again, or count from somewhere else.
        let mut state = self.claims.wait_idle(|| self.lock());
        let (header, shift) = grown(&state.header, len)?;
        self.publish_blocks(&mut state)?;
        let room = header.blocks.saturating_add(shift);
        let places = |state: &mut State| {
            state.places = None;
            let known = state.taken_places(room, self.file.len(), &self.budget);
            known.map(|places| state.places = Some(places))
        };
        places(&mut state)?;
        state.require_whole()?;
        let outcome = self.grow_into(&mut state, header, shift);
        if outcome.is_err() && state.places.is_some() {
            // Slots that were taken for what has failed; where that cannot be told either, the first error counts.
            let _ = places(&mut state);
        }
        outcome
    }

    /// Makes the disk as large as `header` says, for whose map the blocks at the first `shift` places have to move.
    fn grow_into(&self, state: &mut State, mut header: Header, shift: u32) -> Result<()> {
        self.clear_rest(state)?;
        self.vacate(state, shift)?;
        let old_blocks = state.header.blocks;
        let map_end = header.map_offset + map_bytes(header.blocks);
        if self.file.len() < map_end {
            self.file.resize(map_end, Preallocation::Off)?;
        }
        let mut map = PagedTable::new(Arc::clone(&self.file), header.map_offset, header.blocks.into());
        if shift > 0 {
            copy_map(&mut state.map, &mut map, old_blocks, shift)?;
        }
        let places = self.places(state)?;
        for block in old_blocks..header.blocks {
            let entry = if self.is_static {
                (places.take_first_from(shift)? - shift).to_le_bytes()
            } else {
                NO_BLOCK
            };
            map.set(block.into(), entry)?;
        }
        header.set_allocated(places.end().saturating_sub(shift));
        let end = header.host(header.allocated());
        if self.file.len() < end {
            self.file.resize(end, Preallocation::Off)?;
        }
        map.write_back()?;
        self.file.flush()?;
        self.file.write_at(&header.to_bytes()?, 0)?;
        // From here on it is the new map that a reader finds.
        (state.reserved, state.relied_on) = (header.reserved(), header.relied_on());
        (state.header, state.map, state.places) = (header, map, None);
        self.file.flush()
    }

    /// Makes the rest of the last block zero, which becomes part of the disk.
    fn clear_rest(&self, state: &mut State) -> Result<()> {
        let size = state.header.size;
        let used = size % BLOCK;
        if used == 0 {
            return Ok(());
        }
        let Some(place) = self.place_to_change(state, size / BLOCK)? else {
            return Ok(());
        };
        let rest = state.header.stored(place).skip(used);
        let rest = rest.intersect(ByteRange::new(0, self.file.len()));
        if rest.is_empty() {
            return Ok(());
        }
        self.file.write_zeroes(rest, ZeroMode::KeepAllocated)
    }

    /// Moves the blocks at the first `count` places behind all others.
    fn vacate(&self, state: &mut State, count: u32) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let mut moved = Vec::new();
        let mut block = 0;
        while block < u64::from(state.header.blocks) {
            for entry in state.map.entries(block)? {
                if let Some(place) = place(*entry)
                    && place < count
                {
                    moved.push((block, place));
                }
                block += 1;
            }
            if moved.len() > count as usize {
                return Err(Error::corrupt("Blocks of the image share their places"));
            }
        }
        let mut bytes = vec![0; 1 << 20];
        for (block, place) in moved {
            let target = self.places(state)?.take_first_from(count)?;
            let file: &dyn Device = &*self.file;
            file.read_padded(&mut bytes, state.header.host(place))?;
            file.write_at(&bytes, state.header.host(target))?;
            state.map.set(block, target.to_le_bytes())?;
        }
        self.publish_blocks(state)?;
        // Something else is about to be written where the blocks were.
        self.file.flush()
    }
}

/// The header of the same image with a disk of `len` bytes, and how many blocks have to move for its map.
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
    // What cannot be written is refused before anything has changed.
    header.to_bytes()?;
    Ok((header, shift))
}

/// Writes what `old` says of the first `blocks` blocks into `new`, where places are counted from `shift` on.
fn copy_map(old: &mut PagedTable, new: &mut PagedTable, blocks: u32, shift: u32) -> Result<()> {
    let mut block = 0;
    while block < u64::from(blocks) {
        for entry in old.entries(block)? {
            let moved = match place(*entry) {
                Some(place) => place.saturating_sub(shift).to_le_bytes(),
                None => *entry,
            };
            new.set(block, moved)?;
            block += 1;
        }
    }
    Ok(())
}
