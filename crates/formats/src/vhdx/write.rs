//! Writing: a block is allocated, at the end of the file, when it is written for the first time. Differencing images are
//! only read.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{ByteRange, Error, Preallocation, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::bat::{Payload, present};
use super::header::MIB;
use super::{State, VhdxLayer};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator, publish_each};
use crate::layer_kit::range_claims::{Access, RangeClaims};
use crate::layer_kit::reserved::Pieces;

impl VhdxLayer {
    /// Plans a write of `range`, and allocates its blocks that have no storage.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let size = self.block_size;
        let plan = AllocatingPlan::new(self, range.align_out(size), |state, plan| {
            for block in range.units(size) {
                let whole = ByteRange::at(block * size, size);
                let offset = match self.payload(state, block)?.offset() {
                    Some(offset) => {
                        self.require_payload(state, offset)?;
                        offset
                    }
                    None => {
                        self.require_not_truncated(state)?;
                        let offset = self.allocate(state)?;
                        plan.add_change(whole, (block, offset));
                        offset
                    }
                };
                // Growing the file has zeroed a new block: only `range` is written there, too.
                let guest = whole.intersect(range);
                plan.add_run(WriteRun {
                    guest,
                    device: Arc::clone(&self.file),
                    offset: offset + guest.start() % size,
                });
            }
            state.mark_changed(&*self.file)
        })?;
        Ok(Box::new(plan))
    }

    /// Writes zeroes to `range`: blocks without storage read as zero already, in the others the file zeroes the bytes.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let cover = range.align_out(self.block_size);
        let (_claim, mut state) = self.claims.claim(cover, Access::Shared, || self.lock());
        let mut stored = Vec::new();
        for block in range.units(self.block_size) {
            if let Some(offset) = self.payload(&mut state, block)?.offset() {
                self.require_payload(&mut state, offset)?;
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

    /// Allocates a block of zeroes at the end of the file: its offset.
    pub(super) fn allocate(&self, state: &mut State) -> Result<u64> {
        let offset = state.end.max(self.file.len().next_multiple_of(MIB));
        let end = offset
            .checked_add(self.block_size)
            .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
        self.file.resize(end, Preallocation::Off)?;
        state.end = end;
        Ok(offset)
    }
}

/// The offsets of the blocks in the table.
#[derive(Debug)]
pub(super) struct Stored {
    blocks: Pieces,
    /// The offset of a block that reaches beyond the end of the file, if there is one.
    missing: Option<u64>,
}

impl VhdxLayer {
    /// Refuses a block that overlaps the metadata or another block, or reaches beyond the end of the file.
    pub(super) fn require_payload(&self, state: &mut State, offset: u64) -> Result<()> {
        let block = ByteRange::at(offset, self.block_size);
        state.reserved.require_outside("block", block)?;
        self.stored(state)?.blocks.require_unshared(offset)?;
        self.file.require(offset, self.block_size)
    }

    /// Refuses to grow a truncated file: its missing blocks would look present, or overlap new blocks.
    pub(super) fn require_not_truncated(&self, state: &mut State) -> Result<()> {
        let Some(offset) = self.stored(state)?.missing else {
            return Ok(());
        };
        Err(Error::corrupt(format!(
            "The block at {offset:#x} lies beyond the end of the file, which looks cut off"
        )))
    }

    /// The offsets of all blocks; loads them when they are first needed.
    fn stored<'a>(&self, state: &'a mut State) -> Result<&'a Stored> {
        let known = match state.stored.take() {
            Some(known) => known,
            None => {
                let file_len = self.file.len();
                let mut blocks = Pieces::new("block", self.block_size, &self.budget);
                let mut missing = None;
                for block in 0..state.metadata.disk_size.div_ceil(self.block_size) {
                    let entry = state.bat.entry(self.chunks.entry_of(block))?;
                    // An entry with an invalid state is refused when its block is read or written.
                    let Ok(Payload::At(offset)) = Payload::of(entry, self.is_differencing()) else {
                        continue;
                    };
                    let whole = ByteRange::at(offset, self.block_size);
                    if whole.end() > file_len {
                        missing = Some(offset);
                    } else if state.reserved.find(whole).is_none() {
                        // A block that overlaps the metadata, or is missing, is refused when it is written.
                        blocks.add(offset)?;
                    }
                }
                Stored {
                    blocks: blocks.sort(),
                    missing,
                }
            }
        };
        Ok(state.stored.insert(known))
    }
}

impl Allocator for VhdxLayer {
    type State = State;
    /// A block of the disk, and the offset allocated for it.
    type Change = (u64, u64);
    const ACCESS: Access = Access::Shared;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<Self::Change>) -> Result<()> {
        publish_each(changes, |(block, offset)| {
            state.bat.set(self.chunks.entry_of(block), present(offset))
        })
    }

    fn write_back_if_needed(&self, state: &mut State) -> Result<()> {
        if state.bat.too_many_dirty() {
            state.publish(&*self.file)?;
        }
        Ok(())
    }

    /// Leaks the blocks: they may have been written to, and new blocks have to be zero.
    fn free(&self, _state: &mut State, _changes: Vec<Self::Change>) {}
}
