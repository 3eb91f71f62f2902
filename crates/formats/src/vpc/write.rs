//! Writing to dynamic disks: a block is allocated when it is written for the first time.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{Budget, ByteRange, Device, Error, Layer, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::bat::{Blocks, bitmap_offset};
use super::create::fill;
use super::footer::SECTOR;
use super::{State, VpcLayer};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator, publish_each};
use crate::layer_kit::clear::zero_existing;
use crate::layer_kit::range_claims::{Access, Claim, RangeClaims};
use crate::layer_kit::reserved::Pieces;

impl VpcLayer {
    /// Plans a write of `range`, and allocates its blocks that have no storage. New blocks are zeroed here rather than
    /// written as a whole by the caller: blocks in images of other programs can be large.
    pub(super) fn plan(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let cover = range.align_out(self.granularity());
        let plan = AllocatingPlan::new(self, cover, |state, plan| {
            let State { footer, blocks, .. } = state;
            let Some(blocks) = blocks else {
                return Ok(());
            };
            blocks.restore_copy(footer, &*self.file)?;
            let (unit, bitmap) = (blocks.header.block(), blocks.header.bitmap());
            for block in range.units(unit) {
                let whole = ByteRange::at(block * unit, unit);
                let mut guest = whole.intersect(range);
                let host = match blocks.host_to_change(block, &self.budget)? {
                    Some(host) => {
                        let change = blocks.plan_bits(host, whole, guest)?;
                        if change.has_clear_bits {
                            // Requests in flight on this block write sectors that were written before.
                            guest = change.guest;
                            plan.add_change(
                                whole,
                                Change::Sectors {
                                    host,
                                    sectors: change.sectors,
                                },
                            );
                        }
                        host
                    }
                    None => {
                        let offset = blocks.allocate()?;
                        let mut sectors = None;
                        if blocks.is_differencing {
                            // The caller fills the rest of the first and the last sector from the parent.
                            guest = guest.align_out(SECTOR);
                            sectors = Some(sectors_of(whole, guest));
                        }
                        plan.add_change(
                            whole,
                            Change::Block {
                                block,
                                offset,
                                sectors,
                            },
                        );
                        let data = ByteRange::at(offset + bitmap, unit);
                        zero_existing(&*self.file, data, ZeroMode::Unmap)?;
                        offset + bitmap
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

    /// The ranges of the file that store `range`, and a claim on the range.
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

/// The change of the bitmap of a block that has storage by a write.
struct BitmapChange {
    /// Whether some of the sectors were never written: their bits are to be set.
    has_clear_bits: bool,
    /// The sectors of the block that the write touches.
    sectors: ByteRange,
    /// The guest range of the write, extended to whole sectors at an end whose sector was never written: the rest of
    /// such a sector is filled by the caller, as the block may have anything there.
    guest: ByteRange,
}

/// The sectors that `guest` touches, counted from the start of the block that stores `whole`.
fn sectors_of(whole: ByteRange, guest: ByteRange) -> ByteRange {
    let start = (guest.start() - whole.start()) / SECTOR;
    ByteRange::new(start, (guest.end() - whole.start()).div_ceil(SECTOR))
}

impl Blocks {
    /// The changes of the bitmap of the block that stores `whole`, with its data at `host`, for a write of `guest`.
    fn plan_bits(&mut self, host: u64, whole: ByteRange, guest: ByteRange) -> Result<BitmapChange> {
        let bitmap = self.bitmap_of(host);
        let start = whole.start();
        let sectors = sectors_of(whole, guest);
        let mut change = BitmapChange {
            has_clear_bits: !self.bitmaps.all_set(bitmap, sectors)?,
            sectors,
            guest,
        };
        if change.has_clear_bits {
            let mut is_clear = |sector| self.bitmaps.run(bitmap, sector, 1).map(|(is_set, _)| !is_set);
            let first = match is_clear(sectors.start())? {
                true => start + sectors.start() * SECTOR,
                false => guest.start(),
            };
            let end = match is_clear(sectors.end() - 1)? {
                true => start + sectors.end() * SECTOR,
                false => guest.end(),
            };
            change.guest = ByteRange::new(first, end);
        }
        Ok(change)
    }

    /// The byte offset of the data of block `block`, which may be written to.
    ///
    /// # Errors
    /// As [`Blocks::host`], and a block that overlaps another one.
    pub(super) fn host_to_change(&mut self, block: u64, budget: &Budget) -> Result<Option<u64>> {
        let Some(host) = self.host(block)? else {
            return Ok(None);
        };
        let offset = host - self.header.bitmap();
        self.reserved.require_outside("block", self.whole(offset))?;
        self.stored(budget)?.require_unshared(offset)?;
        Ok(Some(host))
    }

    /// The offsets of all blocks in the table; loads them when they are first needed.
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
                    for offset in entries.iter().filter_map(|entry| bitmap_offset(*entry)) {
                        // A block that overlaps the metadata is refused when it is read or written.
                        if self.reserved.find(ByteRange::at(offset, len)).is_none() {
                            found.add(offset)?;
                        }
                    }
                }
                found.sort()
            }
        };
        Ok(self.stored.insert(known))
    }

    /// Allocates a block with its bitmap: the offset of the bitmap.
    fn allocate(&mut self) -> Result<u64> {
        self.reserved.require_apart()?;
        if let Some(offset) = self.free.pop() {
            return Ok(offset);
        }
        let offset = self.end;
        // An entry is a sector number of 32 bits; `u32::MAX` means no block.
        if offset / SECTOR >= u32::MAX.into() {
            return Err(Error::from_errno(errno::EFBIG));
        }
        self.end += self.header.bitmap() + self.header.block();
        self.first = self.first.min(offset);
        self.footer_is_dirty = true;
        Ok(offset)
    }

    /// Makes the bitmap of the block at `offset` with the bits of `sectors`, or all, and sets the table's entry for block
    /// `block` of the disk.
    fn set_block(
        &mut self,
        block: u64,
        offset: u64,
        sectors: Option<ByteRange>,
        file: &dyn Device,
    ) -> Result<()> {
        let bitmap = ByteRange::at(offset, self.header.bitmap());
        match sectors {
            Some(sectors) => {
                self.bitmaps.insert_clear(bitmap)?;
                self.bitmaps.set(bitmap, sectors)?;
            }
            None => fill(file, bitmap, u8::MAX)?,
        }
        // A file that ends inside a block looks truncated. If it does, the block's last sector was not written: zeroing
        // it loses nothing.
        let end = offset + self.header.bitmap() + self.header.block();
        if file.len() < end {
            fill(file, ByteRange::new(end - SECTOR, end), 0)?;
        }
        let sector = u32::try_from(offset / SECTOR).map_err(|_| Error::from_errno(errno::EFBIG))?;
        self.table.set(block, sector.to_be_bytes())
    }
}

/// A change of the tables by a write.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// Block `block` of the disk was allocated at `offset`, and `sectors` of it were written; all count as written if
    /// that is `None`.
    Block {
        block: u64,
        offset: u64,
        sectors: Option<ByteRange>,
    },
    /// `sectors` of the block whose data is at `host` were written, not all of them for the first time.
    Sectors { host: u64, sectors: ByteRange },
}

impl Allocator for VpcLayer {
    type State = State;
    type Change = Change;
    const ACCESS: Access = Access::Shared;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<Self::Change>) -> Result<()> {
        publish_each(changes, |change| match (&mut state.blocks, change) {
            (
                Some(blocks),
                Change::Block {
                    block,
                    offset,
                    sectors,
                },
            ) => blocks.set_block(block, offset, sectors, &*self.file),
            (Some(blocks), Change::Sectors { host, sectors }) => {
                let bitmap = blocks.bitmap_of(host);
                blocks.bitmaps.set(bitmap, sectors)
            }
            (None, _) => Ok(()),
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
            let allocated = changes.into_iter().filter_map(|change| match change {
                Change::Block { offset, .. } => Some(offset),
                Change::Sectors { .. } => None,
            });
            blocks.free.extend(allocated);
        }
    }
}
