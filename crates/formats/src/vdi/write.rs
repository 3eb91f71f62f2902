//! Writing: a block is allocated when it is written for the first time.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{Budget, ByteRange, Error, Result, WritePlan, WriteRun, ZeroMode};

use super::check::for_each_slot;
use super::header::BLOCK;
use super::{State, VdiLayer};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator, publish_each};
use crate::layer_kit::clear::{clear, zero_existing};
use crate::layer_kit::range_claims::{Access, RangeClaims};
use crate::layer_kit::slot_bitmap::SlotBitmap;

impl VdiLayer {
    /// Plans a write of `range`, and allocates a slot for each of its blocks that has none. What `range` does not cover of
    /// a new block becomes a hole.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let plan = AllocatingPlan::new(self, range.align_out(BLOCK), |state, plan| {
            for block in range.units(BLOCK) {
                let whole = ByteRange::at(block * BLOCK, BLOCK);
                let slot = match self.slot_to_change(state, block)? {
                    Some(slot) => slot,
                    None => {
                        let slot = self.allocate_slot(state)?;
                        plan.add_change(whole, (block, slot));
                        clear(&*self.file, ByteRange::at(state.header.host(slot), BLOCK))?;
                        slot
                    }
                };
                let guest = whole.intersect(range);
                plan.add_run(WriteRun {
                    guest,
                    device: Arc::clone(&self.file),
                    offset: state.header.host(slot) + guest.start() % BLOCK,
                });
            }
            Ok(())
        })?;
        Ok(Box::new(plan))
    }

    /// Writes zeroes to `range`: blocks without storage read as zero already, in the others the file zeroes the bytes.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let cover = range.align_out(BLOCK);
        let (_claim, mut state) = self.claims.claim(cover, Access::Shared, || self.lock());
        let mut stored = Vec::new();
        for block in range.units(BLOCK) {
            if let Some(slot) = self.slot_to_change(&mut state, block)? {
                let guest = ByteRange::at(block * BLOCK, BLOCK).intersect(range);
                let offset = state.header.host(slot) + guest.start() % BLOCK;
                stored.push(ByteRange::at(offset, guest.len()));
            }
        }
        drop(state);
        for bytes in stored {
            zero_existing(&*self.file, bytes, mode)?;
        }
        Ok(())
    }

    /// The slot of block `block`, which may be written to.
    ///
    /// # Errors
    /// The slot overlaps the header or the map, lies beyond the end of the file, or holds another block, too.
    pub(super) fn slot_to_change(&self, state: &mut State, block: u64) -> Result<Option<u32>> {
        let Some(slot) = state.slot(block)? else {
            return Ok(None);
        };
        let stored = state.header.stored(slot);
        state.reserved.require_outside("block", stored)?;
        self.file.require(stored.start(), 1)?;
        if self.slots(state)?.is_shared(slot) {
            return Err(Error::corrupt(format!(
                "The block at {:#x} has more than one user",
                stored.start()
            )));
        }
        Ok(Some(slot))
    }

    /// Allocates a slot.
    fn allocate_slot(&self, state: &mut State) -> Result<u32> {
        self.slots(state)?;
        state.require_not_truncated()?;
        self.slots(state)?.take_first()
    }

    /// Which slots are in use; loads the bitmap when it is first needed.
    pub(super) fn slots<'a>(&self, state: &'a mut State) -> Result<&'a mut SlotBitmap> {
        let known = match state.slots.take() {
            Some(known) => known,
            None => state.slots_in_use(state.header.blocks, self.file.len(), &self.budget)?,
        };
        Ok(state.slots.insert(known))
    }
}

impl State {
    /// Which of the first `room` slots are in use: those that the map refers to, and those that overlap the header or
    /// the map. Entries with slots beyond `room` are damage and are ignored. Also sets `missing`.
    pub(super) fn slots_in_use(&mut self, room: u32, file_len: u64, budget: &Budget) -> Result<SlotBitmap> {
        self.reserved.require_apart()?;
        let Self { header, map, .. } = self;
        let mut slots = SlotBitmap::new(room, budget)?;
        let mut missing = None;
        for_each_slot(map, header.blocks, |_, slot| {
            slots.claim(slot);
            if slot < room && header.host(slot) >= file_len {
                missing = Some(slot);
            }
        })?;
        for slot in self.reserved.units(header.data_offset, BLOCK) {
            if let Ok(slot) = u32::try_from(slot) {
                slots.take(slot);
            }
        }
        self.missing = missing;
        Ok(slots)
    }

    /// Refuses to grow a truncated file: its missing blocks would look present, and read as zero.
    pub(super) fn require_not_truncated(&self) -> Result<()> {
        let Some(slot) = self.missing else {
            return Ok(());
        };
        Err(Error::corrupt(format!(
            "The block at {:#x} lies beyond the end of the file, which looks cut off",
            self.header.host(slot)
        )))
    }
}

impl Allocator for VdiLayer {
    type State = State;
    /// A block of the disk, and the slot allocated for it.
    type Change = (u64, u32);
    const ACCESS: Access = Access::Shared;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<Self::Change>) -> Result<()> {
        publish_each(changes, |(block, slot)| state.map.set(block, slot.to_le_bytes()))
    }

    fn write_back_if_needed(&self, state: &mut State) -> Result<()> {
        if state.map.too_many_dirty() {
            self.publish_blocks(state)?;
        }
        Ok(())
    }

    fn free(&self, state: &mut State, changes: Vec<Self::Change>) {
        if let Some(slots) = &mut state.slots {
            for (_, slot) in changes {
                slots.free(slot);
            }
        }
    }
}
