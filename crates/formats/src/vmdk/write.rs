//! Allocation of grains, and writes of zeroes.
//!
//! Flat extents have storage for the whole disk. An unallocated grain of a sparse extent is allocated at the end of the
//! file: the caller writes it, and `commit` enters it in the tables.

use std::ops::Range;
use std::sync::{Arc, MutexGuard};

use diskimage_core::{ByteRange, Error, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::header::{Form, Geometry, SECTOR};
use super::tables::Grain;
use super::{Extent, State, Storage, VmdkLayer, extent};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator};
use crate::layer_kit::range_claims::{Access, RangeClaims};

/// Allocates storage for `range` of an image that is not compressed.
pub(super) fn plan(image: &VmdkLayer, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
    let cover = cover(&image.extents(), range)?;
    let plan = AllocatingPlan::new(image, cover, |state, plan| {
        // Only now that the range is claimed: the disk may have grown while this request waited.
        let extents = image.extents();
        for part in extent::split(&extents, range) {
            let (index, extent, part) = part?;
            extent.require_writable()?;
            match extent.storage {
                Storage::Flat { offset } => plan.add_run(WriteRun {
                    guest: part,
                    device: Arc::clone(&extent.device),
                    offset: offset + extent.within(part.start()),
                }),
                Storage::Sparse(geometry) => {
                    let sparse = Sparse {
                        image,
                        extents: &extents,
                        index,
                        geometry,
                    };
                    sparse.draft(state, plan, part)?;
                }
                Storage::Zero | Storage::NoAccess => return Err(Error::from_errno(errno::EINVAL)),
            }
        }
        image.mark_changed(state)
    })?;
    Ok(Box::new(plan))
}

/// Grains for which storage was allocated.
pub(super) struct NewGrains {
    extent: usize,
    first: u64,
    count: u64,
    offset: u64,
    /// The end of their storage.
    end: u64,
}

impl NewGrains {
    /// The grain with this number in the first extent, whose encoded form is stored in `storage`.
    pub(super) fn encoded(grain: u64, storage: ByteRange) -> Self {
        Self {
            extent: 0,
            first: grain,
            count: 1,
            offset: storage.start(),
            end: storage.end(),
        }
    }
}

/// A sparse extent that a write touches.
struct Sparse<'a> {
    image: &'a VmdkLayer,
    extents: &'a [Extent],
    index: usize,
    geometry: Geometry,
}

impl Sparse<'_> {
    /// Finds or allocates storage for `range`, which lies in the extent.
    fn draft(
        &self,
        state: &mut State,
        plan: &mut AllocatingPlan<'_, VmdkLayer>,
        range: ByteRange,
    ) -> Result<()> {
        let (extents, index, geometry) = (self.extents, self.index, &self.geometry);
        let extent = &extents[index];
        let mut grains = VmdkLayer::grains(extent, geometry, range);
        while !grains.is_empty() {
            let (found, count) = state.tables.scan(extents, index, geometry, grains)?;
            let first = extent.start + grains.start() * geometry.grain;
            let whole = ByteRange::at(first, count * geometry.grain);
            let (guest, offset) = match found {
                Grain::At(offset) => {
                    extent.device.require(offset, 1)?;
                    let stored = ByteRange::at(offset, whole.len());
                    self.image
                        .require_grains(state, extents, index, geometry, stored)?;
                    let guest = whole.intersect(range);
                    (guest, offset.saturating_add(guest.start() - first))
                }
                Grain::Unallocated | Grain::Zero => {
                    let offset = self.allocate(state, grains.start()..grains.start() + count)?;
                    let new = NewGrains {
                        extent: index,
                        first: grains.start(),
                        count,
                        offset,
                        end: offset.saturating_add(whole.len()),
                    };
                    plan.add_change(whole, new);
                    (whole, offset)
                }
            };
            plan.add_run(WriteRun {
                guest,
                device: Arc::clone(&extent.device),
                offset,
            });
            grains = grains.skip(count);
        }
        Ok(())
    }

    /// Allocates contiguous storage for grains, and returns its host offset.
    fn allocate(&self, state: &mut State, grains: Range<u64>) -> Result<u64> {
        let (image, extents, index, geometry) = (self.image, self.extents, self.index, &self.geometry);
        for table in grains.start / geometry.entries..=(grains.end - 1) / geometry.entries {
            image.require_table(state, extents, index, geometry, table * geometry.entries)?;
        }
        image.require_whole(state, extents, index, geometry)?;
        let no_room = || Error::from_errno(errno::EFBIG);
        let offset = *state.free.get(index).ok_or_else(no_room)?;
        let end = (grains.end - grains.start)
            .checked_mul(geometry.grain)
            .and_then(|len| offset.checked_add(len))
            .filter(|end| u32::try_from(end / SECTOR).is_ok())
            .ok_or_else(no_room)?;
        image.require_grains(state, extents, index, geometry, ByteRange::new(offset, end))?;
        if let Some(free) = state.free.get_mut(index) {
            *free = end;
        }
        Ok(offset)
    }
}

/// `range`, in guest offsets, rounded out to whole grains.
fn cover(extents: &[Extent], range: ByteRange) -> Result<ByteRange> {
    let round = |guest: u64, up: bool| -> Result<u64> {
        let (_, extent) = extent::at(extents, guest)?;
        let Some(geometry) = extent.geometry() else {
            return Ok(if up { guest + 1 } else { guest });
        };
        let grain = extent.within(guest) / geometry.grain;
        Ok(extent.start + (grain + u64::from(up)) * geometry.grain)
    };
    Ok(ByteRange::new(
        round(range.start(), false)?,
        round(range.end() - 1, true)?,
    ))
}

impl Allocator for VmdkLayer {
    type State = State;
    type Change = NewGrains;
    const ACCESS: Access = Access::Exclusive;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<NewGrains>) -> Result<()> {
        let extents = self.extents();
        // All changes are taken first: after a failure tables may refer to any of the grains, so none may be freed.
        for grains in std::mem::take(changes) {
            let geometry = extents.get(grains.extent).and_then(Extent::geometry);
            let geometry = geometry.ok_or_else(|| Error::from_errno(errno::EIO))?;
            for nth in 0..grains.count {
                let sector = (grains.offset + nth * geometry.grain) / SECTOR;
                let entry = u32::try_from(sector).map_err(|_| Error::from_errno(errno::EFBIG))?;
                state
                    .tables
                    .set(&extents, grains.extent, &geometry, grains.first + nth, entry)?;
            }
        }
        Ok(())
    }

    /// Frees grains at the end of the file. Grains with others behind them leak.
    fn free(&self, state: &mut State, changes: Vec<NewGrains>) {
        for grains in changes.iter().rev() {
            if let Some(free) = state.free.get_mut(grains.extent)
                && grains.end == *free
            {
                *free = grains.offset;
            }
        }
    }
}

impl VmdkLayer {
    /// Zeroes `range` without writing data, if the tables or the extents' devices can express it.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if self.compressed {
            return self.zero_grains_encoded(range);
        }
        let extents = self.extents();
        for part in extent::split(&extents, range) {
            let (_, extent, part) = part?;
            if !is_zero_already(extent) {
                extent.require_writable()?;
            }
            if let Some(geometry) = extent.geometry()
                && !is_zeroable(extent, &geometry, part)
            {
                return Err(Error::unsupported("No zeroes without writing them"));
            }
        }
        let cover = cover(&extents, range)?;
        let (_claim, mut state) = self.claims.claim(cover, Access::Exclusive, || self.lock());
        // The disk may have grown while this request waited for the claim.
        let extents = self.extents();
        for part in extent::split(&extents, range) {
            let (index, extent, part) = part?;
            if let Some(geometry) = extent.geometry() {
                let grains = Self::grains(extent, &geometry, part);
                for table in grains.units(geometry.entries) {
                    let first = table * geometry.entries;
                    self.require_table(&mut state, &extents, index, &geometry, first)?;
                }
            }
        }
        self.mark_changed(&mut state)?;
        for part in extent::split(&extents, range) {
            let (index, extent, part) = part?;
            match extent.storage {
                Storage::Flat { offset } => {
                    let host = ByteRange::at(offset + extent.within(part.start()), part.len());
                    extent.device.write_zeroes(host, mode)?;
                }
                Storage::Sparse(geometry) => {
                    let grains = Self::grains(extent, &geometry, part);
                    for grain in grains.start()..grains.end() {
                        state.tables.set(&extents, index, &geometry, grain, ZEROED)?;
                    }
                }
                Storage::Zero | Storage::NoAccess => {}
            }
        }
        Ok(())
    }
}

/// Whether zeroes need not be written: a disk that is written as a whole has them where it has no storage.
fn is_zero_already(extent: &Extent) -> bool {
    matches!(extent.storage, Storage::Zero)
}

/// The entry of a grain that reads as zero.
const ZEROED: u32 = 1;

/// Whether zeroed-grain entries can represent `range`, which lies in `extent`.
fn is_zeroable(extent: &Extent, geometry: &Geometry, range: ByteRange) -> bool {
    let whole = |at: u64| at.is_multiple_of(geometry.grain);
    geometry.form == (Form::Hosted { zeroed_grain: true })
        && whole(extent.within(range.start()))
        && (whole(extent.within(range.end())) || range.end() == extent.end())
}
