//! Writing: blocks get their place when they are written for the first time.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use diskimage_core::{Budget, ByteRange, Result, WritePlan, WriteRun, ZeroMode};

use super::check::for_each_place;
use super::header::BLOCK;
use super::{State, VdiLayer};
use crate::places::Places;
use crate::windows::Windows;

impl VdiLayer {
    /// Sets aside where `range` goes.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let mut state = self.when_settled(range);
        let mut plan = Plan {
            layer: self,
            runs: Vec::new(),
            new: Vec::new(),
        };
        for block in blocks(range) {
            let whole = ByteRange::at(block * BLOCK, BLOCK);
            let (guest, place) = match state.place(block)? {
                Some(place) => (whole.intersect(range), place),
                None => match self.take_place(&mut state) {
                    Ok(place) => {
                        state.in_flight.insert(block);
                        plan.new.push((block, place));
                        (whole, place)
                    }
                    Err(error) => {
                        // Giving back what the plan has takes the lock.
                        drop(state);
                        return Err(error);
                    }
                },
            };
            let offset = state.header.host(place) + guest.start() % BLOCK;
            let run = WriteRun {
                guest,
                device: Arc::clone(&self.file),
                offset,
            };
            run.push_to(&mut plan.runs);
        }
        drop(state);
        Ok(Box::new(plan))
    }

    /// Makes `range` zero: blocks without storage are, the others are left to the file.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let mut state = self.when_settled(range);
        let mut stored = Vec::new();
        for block in blocks(range) {
            if let Some(place) = state.place(block)? {
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

    /// The state once nobody writes a block of `range` for the first time.
    fn when_settled(&self, range: ByteRange) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !state.in_flight.is_empty() && blocks(range).any(|block| state.in_flight.contains(&block)) {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// A place for another block.
    fn take_place(&self, state: &mut State) -> Result<u32> {
        self.places(state)?.take_first()
    }

    /// Which places are taken.
    pub(super) fn places<'a>(&self, state: &'a mut State) -> Result<&'a mut Places> {
        let State {
            map, places, header, ..
        } = state;
        let known = match places.take() {
            Some(known) => known,
            None => taken_places(map, header.blocks, header.blocks, &self.budget)?,
        };
        Ok(places.insert(known))
    }
}

/// What the map of `blocks` entries says of the first `room` places. What leads further out is damage that takes none.
pub(super) fn taken_places(map: &mut Windows, blocks: u32, room: u32, budget: &Budget) -> Result<Places> {
    let mut places = Places::new(room, budget)?;
    for_each_place(map, blocks, |_, place| places.take(place))?;
    Ok(places)
}

/// The blocks that `range` touches.
fn blocks(range: ByteRange) -> Range<u64> {
    range.start() / BLOCK..range.end().div_ceil(BLOCK)
}

/// Storage set aside for one write.
struct Plan<'a> {
    layer: &'a VdiLayer,
    runs: Vec<WriteRun>,
    /// Blocks that have none yet, and the places taken for them.
    new: Vec<(u64, u32)>,
}

impl WritePlan for Plan<'_> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let mut state = self.layer.lock();
        while let Some((block, place)) = self.new.pop() {
            if let Err(error) = state.map.set(block, place.to_le_bytes()) {
                self.new.push((block, place));
                drop(state);
                return Err(error);
            }
            state.in_flight.remove(&block);
        }
        self.layer.settled.notify_all();
        if state.map.is_crowded() {
            state.publish(&self.layer.file)?;
        }
        Ok(())
    }
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        if self.new.is_empty() {
            return;
        }
        let mut state = self.layer.lock();
        for (block, place) in self.new.drain(..) {
            state.in_flight.remove(&block);
            if let Some(places) = &mut state.places {
                places.free(place);
            }
        }
        self.layer.settled.notify_all();
    }
}
