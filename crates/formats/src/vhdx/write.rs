//! Writing: blocks get their place, at the end of the file, when they are written for the first time.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Device, Error, Preallocation, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::bat::{Payload, entry_of, present};
use super::header::MIB;
use super::{State, VhdxLayer};

impl VhdxLayer {
    /// Sets aside where `range` goes.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let mut state = self.when_settled(range);
        state.mark_changed(&*self.file)?;
        let mut plan = Plan {
            layer: self,
            runs: Vec::new(),
            new: Vec::new(),
        };
        for block in self.blocks(range) {
            let offset = match self.payload(&mut state, block)? {
                Payload::At(offset) => {
                    state.require_payload(&*self.file, offset, self.block_size)?;
                    offset
                }
                Payload::Zero => match self.take_place(&mut state) {
                    Ok(offset) => {
                        state.in_flight.insert(block);
                        plan.new.push((block, offset));
                        offset
                    }
                    Err(error) => {
                        // Giving back what the plan has takes the lock.
                        drop(state);
                        return Err(error);
                    }
                },
            };
            // What the file was made longer by is zero: of a new block, too, only what was asked for is written.
            let guest = ByteRange::at(block * self.block_size, self.block_size).intersect(range);
            let offset = offset + guest.start() % self.block_size;
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
        for block in self.blocks(range) {
            if let Payload::At(offset) = self.payload(&mut state, block)? {
                state.require_payload(&*self.file, offset, self.block_size)?;
                let guest = ByteRange::at(block * self.block_size, self.block_size).intersect(range);
                stored.push(ByteRange::at(
                    offset + guest.start() % self.block_size,
                    guest.len(),
                ));
            }
        }
        if !stored.is_empty() {
            state.mark_changed(&*self.file)?;
        }
        drop(state);
        for bytes in stored {
            self.file.write_zeroes(bytes, mode)?;
        }
        Ok(())
    }

    /// The state once nobody writes a block of `range` for the first time.
    fn when_settled(&self, range: ByteRange) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !state.in_flight.is_empty() && self.blocks(range).any(|block| state.in_flight.contains(&block))
        {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// A place for another block, of zeroes.
    pub(super) fn take_place(&self, state: &mut State) -> Result<u64> {
        let offset = state.end.max(self.file.len().next_multiple_of(MIB));
        let end = offset
            .checked_add(self.block_size)
            .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
        self.file.resize(end, Preallocation::Off)?;
        state.end = end;
        Ok(offset)
    }

    /// The blocks that `range` touches.
    fn blocks(&self, range: ByteRange) -> Range<u64> {
        range.start() / self.block_size..range.end().div_ceil(self.block_size)
    }
}

impl State {
    /// Refuses blocks that lie in the image's own tables, or beyond the end of the file.
    pub(super) fn require_payload(&self, file: &dyn Device, offset: u64, len: u64) -> Result<()> {
        let block = ByteRange::at(offset, len);
        if self.tables().iter().any(|(_, table)| table.overlaps(block)) {
            return Err(Error::corrupt("A block lies in the image's own tables"));
        }
        file.require(offset, len)
    }

    /// What is in the file besides blocks.
    pub(super) fn tables(&self) -> [(&'static str, ByteRange); 4] {
        [
            ("headers", ByteRange::new(0, MIB)),
            ("log", self.header.log),
            ("metadata", self.regions.metadata),
            ("block allocation table", self.regions.bat),
        ]
    }
}

/// Storage set aside for one write.
struct Plan<'a> {
    layer: &'a VhdxLayer,
    runs: Vec<WriteRun>,
    /// Blocks that have none yet, and the places taken for them.
    new: Vec<(u64, u64)>,
}

impl WritePlan for Plan<'_> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let mut state = self.layer.lock();
        while let Some((block, offset)) = self.new.pop() {
            if state.bat.is_crowded() {
                state.publish(&*self.layer.file)?;
            }
            let index = entry_of(block, self.layer.block_size);
            if let Err(error) = state.bat.set(index, present(offset)) {
                self.new.push((block, offset));
                drop(state);
                return Err(error);
            }
            state.in_flight.remove(&block);
        }
        drop(state);
        self.layer.settled.notify_all();
        Ok(())
    }
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        if self.new.is_empty() {
            return;
        }
        let mut state = self.layer.lock();
        // Their places may have been written to: they are leaked rather than handed out as zeroes.
        for (block, _) in self.new.drain(..) {
            state.in_flight.remove(&block);
        }
        drop(state);
        self.layer.settled.notify_all();
    }
}
