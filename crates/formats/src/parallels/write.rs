//! Writing: clusters get their place when they are written for the first time, and lose it when they are zeroed.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Error, Result, WritePlan, WriteRun};

use super::{NO_CLUSTER, ParallelsLayer, State};
use crate::layer_kit::reserved::Pieces;
use crate::layer_kit::slot_bitmap::SlotBitmap;

impl ParallelsLayer {
    /// Sets aside where `range` goes.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        self.require_writable()?;
        let mut state = self.wait_until_idle(range);
        state.begin(&*self.file)?;
        let mut plan = Plan {
            layer: self,
            runs: Vec::new(),
            new: Vec::new(),
            old: Vec::new(),
        };
        let outcome = self.plan_clusters(&mut state, &mut plan, range);
        // Giving back what the plan has takes the lock.
        drop(state);
        outcome.map(|()| Box::new(plan) as Box<dyn WritePlan + '_>)
    }

    fn plan_clusters(&self, state: &mut State, plan: &mut Plan<'_>, range: ByteRange) -> Result<()> {
        let mut end = 0;
        for index in self.clusters(range) {
            let whole = ByteRange::at(index * self.cluster, self.cluster);
            let (guest, offset) = match state.offset(index)? {
                Some(offset) if offset < state.first_place => {
                    return Err(Error::corrupt(format!(
                        "Cluster {index} lies before the data area"
                    )));
                }
                Some(offset) => {
                    self.require_unshared(state, offset)?;
                    *state.in_place.entry(index).or_default() += 1;
                    plan.old.push(index);
                    (whole.intersect(range), offset)
                }
                None => {
                    let offset = self.take_place(state, index)?;
                    state.in_flight.insert(index);
                    plan.new.push((index, offset));
                    end = end.max(offset + self.cluster);
                    (whole, offset)
                }
            };
            let offset = offset + guest.start() % self.cluster;
            let run = WriteRun {
                guest,
                device: Arc::clone(&self.file),
                offset,
            };
            run.push_to(&mut plan.runs);
        }
        self.grow(state, end);
        Ok(())
    }

    /// Refuses a cluster that another one reaches into. Those that start in the same place were told apart when the image
    /// was opened.
    fn require_unshared(&self, state: &mut State, offset: u64) -> Result<()> {
        if state.is_aligned {
            return Ok(());
        }
        let known = match state.stored.take() {
            Some(known) => known,
            None => {
                let mut found = Pieces::new("cluster", self.cluster, &self.budget);
                let mut next = 0;
                while let Some(batch) = state.batch(&mut next)? {
                    for (_, offset) in batch {
                        if offset >= state.first_place {
                            found.add(offset)?;
                        }
                    }
                }
                found.sort()
            }
        };
        state.stored.insert(known).require_unshared(offset)
    }

    /// Has the file reach to `end` and further, as the user wants it. What cannot be had is done without.
    fn grow(&self, state: &mut State, end: u64) {
        state.data_end = state.data_end.max(end);
        if let Some((mode, more)) = state.growth
            && end > self.file.len()
            && let Some(end) = end.checked_add(more.max(self.cluster))
            && self.file.resize(end, mode).is_err()
        {
            state.growth = None;
        }
    }

    /// Makes `range` zero: the clusters that it covers give up their places. It ends with the disk or at the end of a cluster.
    pub(super) fn give_up(&self, range: ByteRange) -> Result<()> {
        self.require_writable()?;
        let mut state = self.wait_until_idle(range);
        // A place must not go to another cluster while somebody writes to it.
        while !state.in_place.is_empty()
            && self
                .clusters(range)
                .any(|index| state.in_place.contains_key(&index))
        {
            drop(self.settled.wait(state).unwrap_or_else(PoisonError::into_inner));
            state = self.wait_until_idle(range);
        }
        for index in self.clusters(range) {
            if let Some(offset) = state.offset(index)? {
                state.begin(&*self.file)?;
                state.table.set(index, NO_CLUSTER)?;
                state.given_up.push(offset);
            }
        }
        if state.table.too_many_dirty() {
            state.publish(&*self.file)?;
        }
        Ok(())
    }

    fn require_writable(&self) -> Result<()> {
        if self.write {
            Ok(())
        } else {
            Err(Error::read_only())
        }
    }

    /// The state once nobody writes a cluster of `range` for the first time.
    fn wait_until_idle(&self, range: ByteRange) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !state.in_flight.is_empty()
            && self.clusters(range).any(|index| state.in_flight.contains(&index))
        {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// The state once nobody writes anything.
    pub(super) fn when_idle(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !state.in_flight.is_empty() || !state.in_place.is_empty() {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// The clusters that `range` touches.
    fn clusters(&self, range: ByteRange) -> Range<u64> {
        range.units(self.cluster)
    }

    /// A place for cluster `index` of the disk: its offset.
    pub(super) fn take_place(&self, state: &mut State, index: u64) -> Result<u64> {
        if index >= u64::from(state.header.entries) {
            return Err(Error::corrupt(format!(
                "The table has no entry for cluster {index}"
            )));
        }
        let (first, unit) = (state.first_place, state.header.unit);
        let places = self.places(state)?;
        let place = places.take_first()?;
        let offset = first + u64::from(place) * self.cluster;
        if u32::try_from(offset / unit).is_err() {
            places.free(place);
            return Err(Error::corrupt("The image has no place for another cluster"));
        }
        Ok(offset)
    }

    /// Which places are taken.
    fn places<'a>(&self, state: &'a mut State) -> Result<&'a mut SlotBitmap> {
        let known = match state.places.take() {
            Some(known) => known,
            None => {
                // Clusters in between two places take both.
                let mut places = SlotBitmap::new(state.header.entries.saturating_mul(2), &self.budget)?;
                let mut taken = |range: Range<u64>| {
                    for place in range {
                        u32::try_from(place)
                            .into_iter()
                            .for_each(|place| places.take(place));
                    }
                };
                let (first, cluster) = (state.first_place, self.cluster);
                for offset in &state.given_up {
                    taken(places_at(*offset, first, cluster));
                }
                let mut next = 0;
                while let Some(batch) = state.batch(&mut next)? {
                    for (_, offset) in batch {
                        taken(places_at(offset, first, cluster));
                    }
                }
                places
            }
        };
        Ok(state.places.insert(known))
    }

    /// Notes that cluster `index` is at `offset`, which is durable or will be before the table is.
    pub(super) fn set_offset(&self, state: &mut State, index: u64, offset: u64) -> Result<()> {
        let entry = u32::try_from(offset / state.header.unit)
            .map_err(|_| Error::corrupt("The image has no place for another cluster"))?;
        state.table.set(index, entry.to_le_bytes())
    }
}

/// The places that a cluster at `offset` lies in: one, or two if it is not where it should be. What is before the first
/// is none.
pub(super) fn places_at(offset: u64, first_place: u64, cluster: u64) -> Range<u64> {
    let behind = |offset: u64| offset.saturating_sub(first_place);
    behind(offset) / cluster..behind(offset.saturating_add(cluster)).div_ceil(cluster)
}

/// Storage set aside for one write.
struct Plan<'a> {
    layer: &'a ParallelsLayer,
    runs: Vec<WriteRun>,
    /// Clusters that have none yet, and the offsets taken for them.
    new: Vec<(u64, u64)>,
    /// Clusters that are written where they are.
    old: Vec<u64>,
}

impl WritePlan for Plan<'_> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let mut state = self.layer.lock();
        while let Some((index, offset)) = self.new.pop() {
            if let Err(error) = self.layer.set_offset(&mut state, index, offset) {
                self.new.push((index, offset));
                drop(state);
                return Err(error);
            }
            state.in_flight.remove(&index);
        }
        self.leave(&mut state);
        if state.table.too_many_dirty() {
            state.publish(&*self.layer.file)?;
        }
        Ok(())
    }
}

impl Plan<'_> {
    /// Nothing is being written any more where it is.
    fn leave(&mut self, state: &mut State) {
        for index in self.old.drain(..) {
            match state.in_place.get_mut(&index) {
                Some(count) if *count > 1 => *count -= 1,
                _ => {
                    state.in_place.remove(&index);
                }
            }
        }
        self.layer.settled.notify_all();
    }
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        if self.new.is_empty() && self.old.is_empty() {
            return;
        }
        let mut state = self.layer.lock();
        let (first, cluster) = (state.first_place, self.layer.cluster);
        for (index, offset) in self.new.drain(..) {
            state.in_flight.remove(&index);
            if let (Some(places), Ok(place)) = (&mut state.places, u32::try_from((offset - first) / cluster))
            {
                places.free(place);
            }
        }
        self.leave(&mut state);
    }
}
