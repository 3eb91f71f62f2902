//! Writing to dynamic disks: blocks get their place when they are written for the first time.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{Budget, ByteRange, Device, Error, Layer, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::footer::SECTOR;
use super::{Blocks, State, VpcLayer, fill, place};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator, publish_each};
use crate::layer_kit::range_claims::{Access, Claim, RangeClaims};
use crate::layer_kit::reserved::Pieces;

impl VpcLayer {
    /// Sets aside where `range` goes. What else is in new blocks is made zero here, so that the caller need not: blocks of
    /// foreign disks can be large.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let cover = range.align_out(self.granularity());
        let plan = AllocatingPlan::new(self, cover, |state, plan| {
            let Some(blocks) = &mut state.blocks else {
                return Ok(());
            };
            let (unit, bitmap) = (blocks.header.block(), blocks.header.bitmap());
            for block in range.units(unit) {
                let whole = ByteRange::at(block * unit, unit);
                let guest = whole.intersect(range);
                let host = match blocks.host_to_change(block, &self.budget)? {
                    Some(host) => host,
                    None => {
                        let place = blocks.take_place()?;
                        plan.add_change(whole, (block, place));
                        let there = ByteRange::at(place + bitmap, unit);
                        let there = there.intersect(ByteRange::new(0, self.file.len()));
                        if !there.is_empty() {
                            self.file.write_zeroes(there, ZeroMode::Unmap)?;
                        }
                        place + bitmap
                    }
                };
                plan.add_run(WriteRun {
                    guest,
                    device: Arc::clone(&self.file),
                    offset: host + guest.start() % unit,
                });
            }
            Ok(())
        })?;
        Ok(Box::new(plan))
    }

    /// Where `range` is stored in the file, and a claim on it.
    pub(super) fn stored(&self, range: ByteRange) -> Result<(Claim<'_>, Vec<ByteRange>)> {
        let cover = range.align_out(self.granularity());
        let (claim, mut state) = self.claims.claim(cover, Access::Shared, || self.lock());
        let State { blocks, reserved, .. } = &mut *state;
        let Some(blocks) = blocks else {
            reserved.require_outside("range", range)?;
            return Ok((claim, vec![range]));
        };
        let unit = blocks.header.block();
        let mut stored = Vec::new();
        for block in range.units(unit) {
            if let Some(host) = blocks.host_to_change(block, &self.budget)? {
                let guest = ByteRange::at(block * unit, unit).intersect(range);
                stored.push(ByteRange::at(host + guest.start() % unit, guest.len()));
            }
        }
        Ok((claim, stored))
    }
}

impl Blocks {
    /// Where block `block` of the disk is stored, if nothing else is there.
    pub(super) fn host_to_change(&mut self, block: u64, budget: &Budget) -> Result<Option<u64>> {
        let Some(host) = self.host(block)? else {
            return Ok(None);
        };
        let place = host - self.header.bitmap();
        self.reserved.require_outside("block", self.whole(place))?;
        self.stored(budget)?.require_unshared(place)?;
        Ok(Some(host))
    }

    /// Where the blocks are that the table leads to.
    fn stored(&mut self, budget: &Budget) -> Result<&Pieces> {
        let known = match self.stored.take() {
            Some(known) => known,
            None => {
                let len = self.header.bitmap() + self.header.block();
                let mut found = Pieces::new("block", len, budget);
                let mut block = 0;
                while block < u64::from(self.header.entries()) {
                    let entries = self.table.entries(block)?;
                    block += entries.len() as u64;
                    for place in entries.iter().filter_map(|entry| place(*entry)) {
                        // One that lies in tables is never used.
                        if self.reserved.find(ByteRange::at(place, len)).is_none() {
                            found.add(place)?;
                        }
                    }
                }
                found.sort()
            }
        };
        Ok(self.stored.insert(known))
    }

    /// A place for another block.
    fn take_place(&mut self) -> Result<u64> {
        self.reserved.require_apart()?;
        if let Some(place) = self.free.pop() {
            return Ok(place);
        }
        let place = self.end;
        // The table has 32 bits for the sector, one of which means that there is no block.
        if place / SECTOR >= u32::MAX.into() {
            return Err(Error::from_errno(errno::EFBIG));
        }
        self.end += self.header.bitmap() + self.header.block();
        self.first = self.first.min(place);
        self.moved = true;
        Ok(place)
    }

    /// Makes the block at `place` one of the disk's.
    fn enter(&mut self, block: u64, place: u64, file: &dyn Device) -> Result<()> {
        fill(file, ByteRange::at(place, self.header.bitmap()), u8::MAX)?;
        // What a file does not reach to looks cut off. Its last sector was not written, or the file would reach to it.
        let end = place + self.header.bitmap() + self.header.block();
        if file.len() < end {
            fill(file, ByteRange::new(end - SECTOR, end), 0)?;
        }
        let sector = u32::try_from(place / SECTOR).map_err(|_| Error::from_errno(errno::EFBIG))?;
        self.table.set(block, sector.to_be_bytes())
    }
}

impl Allocator for VpcLayer {
    type State = State;
    /// A block of the disk, and where the place allocated for it starts.
    type Change = (u64, u64);
    const ACCESS: Access = Access::Shared;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<Self::Change>) -> Result<()> {
        publish_each(changes, |(block, place)| match &mut state.blocks {
            Some(blocks) => blocks.enter(block, place, &*self.file),
            None => Ok(()),
        })
    }

    fn write_back_if_needed(&self, state: &mut State) -> Result<()> {
        match &mut state.blocks {
            Some(blocks) if blocks.table.too_many_dirty() => blocks.publish(&state.footer, &*self.file),
            _ => Ok(()),
        }
    }

    fn free(&self, state: &mut State, changes: Vec<Self::Change>) {
        if let Some(blocks) = &mut state.blocks {
            blocks.free.extend(changes.into_iter().map(|(_, place)| place));
        }
    }
}
