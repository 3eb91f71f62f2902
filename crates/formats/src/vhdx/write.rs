//! Writing: blocks get their place, at the end of the file, when they are written for the first time.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, MutexGuard};

use diskimage_core::{ByteRange, Device, Error, Preallocation, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::bat::{Payload, entry_of, present};
use super::header::MIB;
use super::{State, VhdxLayer};
use crate::first_write::{self, FirstWrites};

impl VhdxLayer {
    /// Sets aside where `range` goes.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let size = self.block_size;
        first_write::plan(self, range.units(size), |state, plan| {
            state.mark_changed(&*self.file)?;
            for block in range.units(size) {
                let offset = match self.payload(state, block)? {
                    Payload::At(offset) => {
                        state.require_payload(&*self.file, offset, size)?;
                        offset
                    }
                    Payload::Zero => {
                        let offset = self.take_place(state)?;
                        plan.add_block(&mut state.in_flight, block, offset);
                        offset
                    }
                };
                // What the file was made longer by is zero: of a new block, too, only what was asked for is written.
                let guest = ByteRange::at(block * size, size).intersect(range);
                plan.add_run(WriteRun {
                    guest,
                    device: Arc::clone(&self.file),
                    offset: offset + guest.start() % size,
                });
            }
            Ok(())
        })
    }

    /// Makes `range` zero: blocks without storage are, the others are left to the file.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let mut state = self.when_settled(range.units(self.block_size));
        let mut stored = Vec::new();
        for block in range.units(self.block_size) {
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

impl FirstWrites for VhdxLayer {
    type State = State;
    type Place = u64;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn settled(&self) -> &Condvar {
        &self.settled
    }

    fn in_flight(state: &mut State) -> &mut HashSet<u64> {
        &mut state.in_flight
    }

    fn enter(&self, state: &mut State, block: u64, offset: u64) -> Result<()> {
        state.bat.set(entry_of(block, self.block_size), present(offset))
    }

    fn relieve(&self, state: &mut State) -> Result<()> {
        if state.bat.is_crowded() {
            state.publish(&*self.file)?;
        }
        Ok(())
    }

    /// It may have been written to: it is leaked rather than handed out as zeroes.
    fn give_back(_state: &mut State, _offset: u64) {}
}
