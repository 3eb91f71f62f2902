//! Writing: a cluster is allocated when it is written for the first time, and released when it is zeroed.

use std::ops::Range;
use std::sync::{Arc, MutexGuard};

use diskimage_core::{ByteRange, Error, Layer, Result, WritePlan, WriteRun, ZeroMode};

use super::bat::NO_CLUSTER;
use super::{ParallelsLayer, State};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator, publish_each};
use crate::layer_kit::clear::clear;
use crate::layer_kit::range_claims::{Access, RangeClaims};
use crate::layer_kit::reserved::Pieces;
use crate::layer_kit::slot_bitmap::SlotBitmap;

impl ParallelsLayer {
    /// Plans a write of `range`, and allocates its clusters that have no storage.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        self.require_writable()?;
        let plan = AllocatingPlan::new(self, range.align_out(self.cluster), |state, plan| {
            state.mark_in_use(&*self.file)?;
            self.draft(state, plan, range)
        })?;
        Ok(Box::new(plan))
    }

    /// Adds the runs of `range` to `plan`. What `range` does not cover of a new cluster becomes a hole, unless options ask
    /// for preallocated storage.
    fn draft(&self, state: &mut State, plan: &mut AllocatingPlan<'_, Self>, range: ByteRange) -> Result<()> {
        let mut end = 0;
        for index in self.clusters(range) {
            let whole = ByteRange::at(index * self.cluster, self.cluster);
            let (guest, offset) = match self.offset_to_change(state, index)? {
                Some(offset) => (whole.intersect(range), offset),
                None => {
                    let offset = self.allocate_slot(state, index)?;
                    plan.add_change(whole, (index, offset));
                    end = end.max(offset + self.cluster);
                    if state.growth.is_some() {
                        (whole, offset)
                    } else {
                        clear(&*self.file, ByteRange::at(offset, self.cluster))?;
                        (whole.intersect(range), offset)
                    }
                }
            };
            plan.add_run(WriteRun {
                guest,
                device: Arc::clone(&self.file),
                offset: offset + guest.start() % self.cluster,
            });
        }
        self.grow(state, end);
        Ok(())
    }

    /// The offset of cluster `index`, which may be written to.
    ///
    /// # Errors
    /// The cluster lies before the data area, or overlaps another one.
    fn offset_to_change(&self, state: &mut State, index: u64) -> Result<Option<u64>> {
        let Some(offset) = state.offset(index)? else {
            return Ok(None);
        };
        if offset < state.first_slot {
            return Err(Error::corrupt(format!(
                "Cluster {index} lies before the data area"
            )));
        }
        self.require_unshared(state, offset)?;
        Ok(Some(offset))
    }

    /// Refuses a cluster that overlaps another one. Only clusters outside of slots can: duplicate offsets were repaired
    /// when the image was opened.
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
                        if offset >= state.first_slot {
                            found.add(offset)?;
                        }
                    }
                }
                found.sort()
            }
        };
        state.stored.insert(known).require_unshared(offset)
    }

    /// Grows the file to `end` and beyond, as the options for preallocation demand. If that fails, there is no more
    /// preallocation.
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

    /// Makes `range` read as zero: releases its clusters, or has the file zero the bytes if the range is a part of one.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let whole = range
            .align_out(self.cluster)
            .intersect(ByteRange::new(0, self.len()));
        if range == whole {
            return self.release(range);
        }
        self.require_writable()?;
        let (_claim, mut state) = self
            .claims
            .claim(range.align_out(self.cluster), Access::Shared, || self.lock());
        let Some(offset) = self.offset_to_change(&mut state, range.start() / self.cluster)? else {
            return Ok(());
        };
        state.mark_in_use(&*self.file)?;
        drop(state);
        let bytes = ByteRange::at(offset + range.start() % self.cluster, range.len());
        // Bytes beyond the end of the file read as zero.
        let bytes = bytes.intersect(ByteRange::new(0, self.file.len()));
        if bytes.is_empty() {
            return Ok(());
        }
        self.file.write_zeroes(bytes, mode)
    }

    /// Releases the clusters of `range`. The range consists of whole clusters, except at the end of the disk.
    pub(super) fn release(&self, range: ByteRange) -> Result<()> {
        self.require_writable()?;
        // A slot must not be allocated to another cluster while a write to it is in flight.
        let cover = range.align_out(self.cluster);
        let (_claim, mut state) = self.claims.claim(cover, Access::Exclusive, || self.lock());
        for index in self.clusters(range) {
            if let Some(offset) = state.offset(index)? {
                state.mark_in_use(&*self.file)?;
                state.table.set(index, NO_CLUSTER)?;
                state.released.push(offset);
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

    /// The clusters that `range` touches.
    fn clusters(&self, range: ByteRange) -> Range<u64> {
        range.units(self.cluster)
    }

    /// Allocates a slot for cluster `index` of the disk: its offset.
    pub(super) fn allocate_slot(&self, state: &mut State, index: u64) -> Result<u64> {
        if index >= u64::from(state.header.entries) {
            return Err(Error::corrupt(format!(
                "The table has no entry for cluster {index}"
            )));
        }
        let (first, unit) = (state.first_slot, state.header.unit);
        let slots = self.slots(state)?;
        let slot = slots.take_first()?;
        let offset = first + u64::from(slot) * self.cluster;
        if u32::try_from(offset / unit).is_err() {
            slots.free(slot);
            return Err(Error::corrupt("The image has no place for another cluster"));
        }
        Ok(offset)
    }

    /// Which slots are in use; loads the bitmap when it is first needed.
    fn slots<'a>(&self, state: &'a mut State) -> Result<&'a mut SlotBitmap> {
        let known = match state.slots.take() {
            Some(known) => known,
            None => {
                // A cluster that lies across two slots uses both.
                let mut slots = SlotBitmap::new(state.header.entries.saturating_mul(2), &self.budget)?;
                let mut taken = |range: Range<u64>| {
                    for slot in range {
                        u32::try_from(slot).into_iter().for_each(|slot| slots.take(slot));
                    }
                };
                let (first, cluster) = (state.first_slot, self.cluster);
                for offset in &state.released {
                    taken(slots_at(*offset, first, cluster));
                }
                let mut next = 0;
                while let Some(batch) = state.batch(&mut next)? {
                    for (_, offset) in batch {
                        taken(slots_at(offset, first, cluster));
                    }
                }
                slots
            }
        };
        Ok(state.slots.insert(known))
    }

    /// Sets the entry of cluster `index` to `offset`. The table is written back after the cluster is durable.
    pub(super) fn set_offset(&self, state: &mut State, index: u64, offset: u64) -> Result<()> {
        let entry = u32::try_from(offset / state.header.unit)
            .map_err(|_| Error::corrupt("The image has no place for another cluster"))?;
        state.table.set(index, entry.to_le_bytes())
    }
}

/// The slots that a cluster at `offset` overlaps: one, or two if the offset is not that of a slot. Bytes before the
/// first slot do not count.
pub(super) fn slots_at(offset: u64, first_slot: u64, cluster: u64) -> Range<u64> {
    let behind = |offset: u64| offset.saturating_sub(first_slot);
    behind(offset) / cluster..behind(offset.saturating_add(cluster)).div_ceil(cluster)
}

impl Allocator for ParallelsLayer {
    type State = State;
    /// A cluster of the disk, and the offset allocated for it.
    type Change = (u64, u64);
    const ACCESS: Access = Access::Shared;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<Self::Change>) -> Result<()> {
        publish_each(changes, |(index, offset)| self.set_offset(state, index, offset))
    }

    fn write_back_if_needed(&self, state: &mut State) -> Result<()> {
        if state.table.too_many_dirty() {
            state.publish(&*self.file)?;
        }
        Ok(())
    }

    fn free(&self, state: &mut State, changes: Vec<Self::Change>) {
        let first = state.first_slot;
        for (_, offset) in changes {
            if let (Some(slots), Ok(slot)) =
                (&mut state.slots, u32::try_from((offset - first) / self.cluster))
            {
                slots.free(slot);
            }
        }
    }
}
