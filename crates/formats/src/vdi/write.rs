//! Writing: blocks get their place when they are written for the first time.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{Budget, ByteRange, Error, Result, WritePlan, WriteRun, ZeroMode};

use super::check::for_each_place;
use super::header::BLOCK;
use super::{State, VdiLayer};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator, publish_each};
use crate::layer_kit::range_claims::{Access, RangeClaims};
use crate::layer_kit::slot_bitmap::SlotBitmap;

impl VdiLayer {
    /// Sets aside where `range` goes.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let plan = AllocatingPlan::new(self, range.align_out(BLOCK), |state, plan| {
            for block in range.units(BLOCK) {
                let whole = ByteRange::at(block * BLOCK, BLOCK);
                let (guest, place) = match self.place_to_change(state, block)? {
                    Some(place) => (whole.intersect(range), place),
                    None => {
                        let place = self.take_place(state)?;
                        plan.add_change(whole, (block, place));
                        (whole, place)
                    }
                };
                plan.add_run(WriteRun {
                    guest,
                    device: Arc::clone(&self.file),
                    offset: state.header.host(place) + guest.start() % BLOCK,
                });
            }
            Ok(())
        })?;
        Ok(Box::new(plan))
    }

    /// Makes `range` zero: blocks without storage are, the others are left to the file.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let cover = range.align_out(BLOCK);
        let (_claim, mut state) = self.claims.claim(cover, Access::Shared, || self.lock());
        let mut stored = Vec::new();
        for block in range.units(BLOCK) {
            if let Some(place) = self.place_to_change(&mut state, block)? {
                let guest = ByteRange::at(block * BLOCK, BLOCK).intersect(range);
                let offset = state.header.host(place) + guest.start() % BLOCK;
                stored.push(ByteRange::at(offset, guest.len()));
            }
        }
        drop(state);
        for bytes in stored {
            // Beyond its end the file is zero.
            let bytes = bytes.intersect(ByteRange::new(0, self.file.len()));
            if !bytes.is_empty() {
                self.file.write_zeroes(bytes, mode)?;
            }
        }
        Ok(())
    }

    /// Where block `block` of the disk is stored, if nothing else is there.
    pub(super) fn place_to_change(&self, state: &mut State, block: u64) -> Result<Option<u32>> {
        let Some(place) = state.place(block)? else {
            return Ok(None);
        };
        let stored = state.header.stored(place);
        state.reserved.require_outside("block", stored)?;
        self.file.require(stored.start(), 1)?;
        if self.places(state)?.is_shared(place) {
            return Err(Error::corrupt(format!(
                "The block at {:#x} has more than one user",
                stored.start()
            )));
        }
        Ok(Some(place))
    }

    /// A place for another block.
    fn take_place(&self, state: &mut State) -> Result<u32> {
        self.places(state)?;
        state.require_whole()?;
        self.places(state)?.take_first()
    }

    /// Which places are taken.
    pub(super) fn places<'a>(&self, state: &'a mut State) -> Result<&'a mut SlotBitmap> {
        let known = match state.places.take() {
            Some(known) => known,
            None => state.taken_places(state.header.blocks, self.file.len(), &self.budget)?,
        };
        Ok(state.places.insert(known))
    }
}

impl State {
    /// What the map says of the first `room` places. What leads further out is damage that takes none. Where the header or
    /// the map is, no block can be.
    pub(super) fn taken_places(&mut self, room: u32, file_len: u64, budget: &Budget) -> Result<SlotBitmap> {
        self.reserved.require_apart()?;
        let Self { header, map, .. } = self;
        let mut places = SlotBitmap::new(room, budget)?;
        let mut missing = None;
        for_each_place(map, header.blocks, |_, place| {
            places.claim(place);
            if place < room && header.host(place) >= file_len {
                missing = Some(place);
            }
        })?;
        for place in self.reserved.units(header.data_offset, BLOCK) {
            if let Ok(place) = u32::try_from(place) {
                places.take(place);
            }
        }
        self.missing = missing;
        Ok(places)
    }

    /// Refuses to make a file longer that was cut off: blocks that are missing would seem to be there.
    pub(super) fn require_whole(&self) -> Result<()> {
        let Some(place) = self.missing else {
            return Ok(());
        };
        Err(Error::corrupt(format!(
            "The block at {:#x} lies beyond the end of the file, which looks cut off",
            self.header.host(place)
        )))
    }
}

impl Allocator for VdiLayer {
    type State = State;
    /// A block of the disk, and the place allocated for it.
    type Change = (u64, u32);
    const ACCESS: Access = Access::Shared;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<Self::Change>) -> Result<()> {
        publish_each(changes, |(block, place)| {
            state.map.set(block, place.to_le_bytes())
        })
    }

    fn write_back_if_needed(&self, state: &mut State) -> Result<()> {
        if state.map.too_many_dirty() {
            self.publish_blocks(state)?;
        }
        Ok(())
    }

    fn free(&self, state: &mut State, changes: Vec<Self::Change>) {
        if let Some(places) = &mut state.places {
            for (_, place) in changes {
                places.free(place);
            }
        }
    }
}
