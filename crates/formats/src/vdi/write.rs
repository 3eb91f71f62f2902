//! Writing: blocks get their place when they are written for the first time.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, MutexGuard};

use diskimage_core::{Budget, ByteRange, Result, WritePlan, WriteRun, ZeroMode};

use super::check::for_each_place;
use super::header::BLOCK;
use super::{State, VdiLayer};
use crate::first_write::{self, FirstWrites};
use crate::places::Places;
use crate::windows::Windows;

impl VdiLayer {
    /// Sets aside where `range` goes.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        first_write::plan(self, range.units(BLOCK), |state, plan| {
            for block in range.units(BLOCK) {
                let whole = ByteRange::at(block * BLOCK, BLOCK);
                let (guest, place) = match state.place(block)? {
                    Some(place) => (whole.intersect(range), place),
                    None => {
                        let place = self.take_place(state)?;
                        plan.add_block(&mut state.in_flight, block, place);
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
        })
    }

    /// Makes `range` zero: blocks without storage are, the others are left to the file.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let mut state = self.when_settled(range.units(BLOCK));
        let mut stored = Vec::new();
        for block in range.units(BLOCK) {
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

impl FirstWrites for VdiLayer {
    type State = State;
    type Place = u32;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn settled(&self) -> &Condvar {
        &self.settled
    }

    fn in_flight(state: &mut State) -> &mut HashSet<u64> {
        &mut state.in_flight
    }

    fn enter(&self, state: &mut State, block: u64, place: u32) -> Result<()> {
        state.map.set(block, place.to_le_bytes())
    }

    fn relieve(&self, state: &mut State) -> Result<()> {
        if state.map.is_crowded() {
            state.publish(&self.file)?;
        }
        Ok(())
    }

    fn give_back(state: &mut State, place: u32) {
        if let Some(places) = &mut state.places {
            places.free(place);
        }
    }
}
