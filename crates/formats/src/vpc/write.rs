//! Writing to dynamic disks: blocks get their place when they are written for the first time.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Device, Error, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::footer::SECTOR;
use super::{Blocks, State, VpcLayer, fill};

impl VpcLayer {
    /// Sets aside where `range` goes. What else is in new blocks is made zero here, so that the caller need not: blocks of
    /// foreign disks can be large.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let mut state = self.when_settled(range);
        let mut plan = Plan {
            layer: self,
            runs: Vec::new(),
            new: Vec::new(),
        };
        let outcome = match &mut state.blocks {
            Some(blocks) => self.fill_plan(blocks, range, &mut plan),
            None => Ok(()),
        };
        // A plan that is dropped takes the lock.
        drop(state);
        outcome?;
        Ok(Box::new(plan))
    }

    fn fill_plan(&self, blocks: &mut Blocks, range: ByteRange, plan: &mut Plan<'_>) -> Result<()> {
        let (unit, bitmap) = (blocks.header.block(), blocks.header.bitmap());
        for block in touched(range, unit) {
            let guest = ByteRange::at(block * unit, unit).intersect(range);
            let host = match blocks.host_to_change(block)? {
                Some(host) => host,
                None => {
                    let place = blocks.take_place()?;
                    blocks.in_flight.insert(block);
                    plan.new.push((block, place));
                    let there = ByteRange::at(place + bitmap, unit);
                    let there = there.intersect(ByteRange::new(0, self.file.len()));
                    if !there.is_empty() {
                        self.file.write_zeroes(there, ZeroMode::Unmap)?;
                    }
                    place + bitmap
                }
            };
            plan.runs.push(WriteRun {
                guest,
                device: Arc::clone(&self.file),
                offset: host + guest.start() % unit,
            });
        }
        Ok(())
    }

    /// Where `range` is stored in the file.
    pub(super) fn stored(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        let mut state = self.when_settled(range);
        let Some(blocks) = &mut state.blocks else {
            return Ok(vec![range]);
        };
        let unit = blocks.header.block();
        let mut stored = Vec::new();
        for block in touched(range, unit) {
            if let Some(host) = blocks.host_to_change(block)? {
                let guest = ByteRange::at(block * unit, unit).intersect(range);
                stored.push(ByteRange::at(host + guest.start() % unit, guest.len()));
            }
        }
        Ok(stored)
    }

    /// The state once nobody writes a block of `range` for the first time.
    fn when_settled(&self, range: ByteRange) -> MutexGuard<'_, State> {
        let unit = self.granularity.unwrap_or(1);
        let mut state = self.lock();
        while state.blocks.as_ref().is_some_and(|blocks| {
            let in_flight = &blocks.in_flight;
            !in_flight.is_empty() && touched(range, unit).any(|block| in_flight.contains(&block))
        }) {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

impl Blocks {
    /// Where block `block` of the disk is stored, if nothing of it lies in the tables of a damaged image.
    pub(super) fn host_to_change(&mut self, block: u64) -> Result<Option<u64>> {
        let Some(host) = self.host(block)? else {
            return Ok(None);
        };
        let place = host - self.header.bitmap();
        let whole = ByteRange::new(place, host + self.header.block());
        let tables = [
            ByteRange::at(0, SECTOR),
            ByteRange::at(self.header_offset, size_of_val(&self.header) as u64),
            ByteRange::new(self.header.table_offset(), self.header.table_end()),
        ];
        if tables.into_iter().any(|table| table.overlaps(whole)) {
            return Err(Error::corrupt(format!(
                "The block at {place:#x} lies in the tables of the image"
            )));
        }
        Ok(Some(host))
    }

    /// A place for another block.
    fn take_place(&mut self) -> Result<u64> {
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
    fn commit(&mut self, block: u64, place: u64, file: &dyn Device) -> Result<()> {
        fill(file, ByteRange::at(place, self.header.bitmap()), u8::MAX)?;
        let sector = u32::try_from(place / SECTOR).map_err(|_| Error::from_errno(errno::EFBIG))?;
        self.table.set(block, sector.to_be_bytes())
    }
}

/// The blocks of `unit` bytes that `range` touches.
fn touched(range: ByteRange, unit: u64) -> Range<u64> {
    range.start() / unit..range.end().div_ceil(unit)
}

/// Storage set aside for one write.
struct Plan<'a> {
    layer: &'a VpcLayer,
    runs: Vec<WriteRun>,
    /// Blocks that have none yet, and the places taken for them.
    new: Vec<(u64, u64)>,
}

impl WritePlan for Plan<'_> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let layer = self.layer;
        let mut state = layer.lock();
        let State { footer, blocks, .. } = &mut *state;
        let Some(blocks) = blocks else { return Ok(()) };
        let mut outcome = Ok(());
        while let Some((block, place)) = self.new.pop() {
            outcome = blocks.commit(block, place, &*layer.file);
            if outcome.is_err() {
                self.new.push((block, place));
                break;
            }
            blocks.in_flight.remove(&block);
        }
        if outcome.is_ok() && blocks.table.is_crowded() {
            outcome = blocks.publish(footer, &*layer.file);
        }
        layer.settled.notify_all();
        // What is left of the plan takes the lock.
        drop(state);
        outcome
    }
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        if self.new.is_empty() {
            return;
        }
        let mut state = self.layer.lock();
        if let Some(blocks) = &mut state.blocks {
            for (block, place) in self.new.drain(..) {
                blocks.in_flight.remove(&block);
                blocks.free.push(place);
            }
        }
        self.layer.settled.notify_all();
    }
}
