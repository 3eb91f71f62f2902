//! Plans for writes to disks in blocks that get their place when they are written for the first time.
//!
//! From the moment when a block has a place until its plan is committed or dropped it is in flight: nobody else looks for
//! it or sets another place aside. A commit enters the places into the table; a drop gives back those that are left.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Condvar, MutexGuard, PoisonError};

use diskimage_core::{Result, WritePlan, WriteRun};

/// An image whose blocks get places.
pub(crate) trait AllocateOnWrite: Send + Sync {
    /// What changes while the image is open. Its lock is never held while guest data moves.
    type State;
    /// Where a block is, in the format's own unit.
    type Place: Copy + Send;

    fn lock(&self) -> MutexGuard<'_, Self::State>;

    /// Woken when blocks leave [`AllocateOnWrite::in_flight`].
    fn settled(&self) -> &Condvar;

    /// Blocks that are being written for the first time.
    fn in_flight(state: &mut Self::State) -> &mut HashSet<u64>;

    /// Notes that a block, which has been written, is at a place.
    fn enter(&self, state: &mut Self::State, block: u64, place: Self::Place) -> Result<()>;

    /// Publishes what was entered if that is much.
    fn write_back_if_needed(&self, state: &mut Self::State) -> Result<()>;

    /// A place that was set aside, and that no block has got.
    fn give_back(state: &mut Self::State, place: Self::Place);

    /// The state once none of these blocks is in flight.
    fn wait_until_idle(&self, blocks: Range<u64>) -> MutexGuard<'_, Self::State> {
        let mut state = self.lock();
        while is_any_of(Self::in_flight(&mut state), blocks.clone()) {
            state = self.settled().wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

fn is_any_of(in_flight: &HashSet<u64>, mut blocks: Range<u64>) -> bool {
    !in_flight.is_empty() && blocks.any(|block| in_flight.contains(&block))
}

/// Makes a plan for a write to `blocks`, for which `fill` finds places. If it fails, those that it took are given back.
pub(crate) fn plan<'a, L: AllocateOnWrite>(
    layer: &'a L,
    blocks: Range<u64>,
    fill: impl FnOnce(&mut L::State, &mut Plan<'a, L>) -> Result<()>,
) -> Result<Box<dyn WritePlan + 'a>> {
    // In this order: a plan that is dropped takes the lock, which must not be held any more.
    let mut plan = Plan {
        layer,
        runs: Vec::new(),
        new: Vec::new(),
    };
    let mut state = layer.wait_until_idle(blocks);
    fill(&mut state, &mut plan)?;
    drop(state);
    Ok(Box::new(plan))
}

/// Storage set aside for one write. It takes the lock when it is dropped.
pub(crate) struct Plan<'a, L: AllocateOnWrite> {
    layer: &'a L,
    runs: Vec<WriteRun>,
    /// Blocks that have none yet, and the places taken for them.
    new: Vec<(u64, L::Place)>,
}

impl<L: AllocateOnWrite> Plan<'_, L> {
    /// Puts a block in flight, for which `place` was taken.
    pub(crate) fn add_block(&mut self, in_flight: &mut HashSet<u64>, block: u64, place: L::Place) {
        in_flight.insert(block);
        self.new.push((block, place));
    }

    /// Adds where a part of the write goes.
    pub(crate) fn add_run(&mut self, run: WriteRun) {
        run.push_to(&mut self.runs);
    }
}

impl<L: AllocateOnWrite> WritePlan for Plan<'_, L> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let layer = self.layer;
        let mut state = layer.lock();
        while let Some((block, place)) = self.new.pop() {
            if let Err(error) = layer.enter(&mut state, block, place) {
                self.new.push((block, place));
                // What is left of the plan takes the lock.
                drop(state);
                return Err(error);
            }
            L::in_flight(&mut state).remove(&block);
        }
        layer.settled().notify_all();
        layer.write_back_if_needed(&mut state)
    }
}

impl<L: AllocateOnWrite> Drop for Plan<'_, L> {
    fn drop(&mut self) {
        if self.new.is_empty() {
            return;
        }
        let mut state = self.layer.lock();
        for (block, place) in self.new.drain(..) {
            L::in_flight(&mut state).remove(&block);
            L::give_back(&mut state, place);
        }
        self.layer.settled().notify_all();
    }
}
