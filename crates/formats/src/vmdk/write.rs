//! New places for guest bytes.
//!
//! Flat extents have a place for everything. A grain of a sparse one that is not there yet goes to the end of its file:
//! the caller writes it, and `commit` puts it into the tables.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Error, Result, WritePlan, WriteRun, ZeroMode, errno};

use super::header::{Form, Geometry, SECTOR};
use super::tables::Grain;
use super::{Extent, Place, State, VmdkLayer, extent, stream};

/// Sets aside where the bytes of `range` go.
pub(super) fn plan(image: &VmdkLayer, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
    if image.compressed {
        return stream::plan(image, range);
    }
    let (mut plan, mut state) = Plan::claim(image, range)?;
    let extents = Arc::clone(&plan.extents);
    for piece in extent::pieces(&extents, range) {
        let (index, extent, piece) = piece?;
        match extent.place {
            Place::Flat { offset } => plan.runs.push(WriteRun {
                guest: piece,
                device: Arc::clone(&extent.device),
                offset: offset + extent.within(piece.start()),
            }),
            Place::Sparse(geometry) => plan.draft(&mut state, index, &geometry, piece)?,
        }
    }
    image.mark_changed(&mut state)?;
    drop(state);
    Ok(Box::new(plan))
}

/// A write under way.
struct Plan<'a> {
    image: &'a VmdkLayer,
    extents: Arc<[Extent]>,
    /// All grains that it touches.
    cover: ByteRange,
    runs: Vec<WriteRun>,
    new: Vec<NewGrains>,
}

/// Grains that get a place.
struct NewGrains {
    extent: usize,
    first: u64,
    count: u64,
    offset: u64,
}

impl<'a> Plan<'a> {
    /// Waits until no other plan covers the same grains.
    fn claim(image: &'a VmdkLayer, range: ByteRange) -> Result<(Self, MutexGuard<'a, State>)> {
        let mut state = image.lock();
        let (extents, cover) = loop {
            // The disk may have grown meanwhile.
            let extents = image.extents();
            let cover = cover(&extents, range)?;
            if !state.in_flight.iter().any(|other| other.overlaps(cover)) {
                break (extents, cover);
            }
            state = image.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.in_flight.push(cover);
        let plan = Self {
            image,
            extents,
            cover,
            runs: Vec::new(),
            new: Vec::new(),
        };
        Ok((plan, state))
    }

    /// Finds places for `range`, which lies in `extent`.
    fn draft(
        &mut self,
        state: &mut State,
        index: usize,
        geometry: &Geometry,
        range: ByteRange,
    ) -> Result<()> {
        let extents = Arc::clone(&self.extents);
        let extent = &extents[index];
        let mut grains = VmdkLayer::grains(extent, geometry, range);
        while !grains.is_empty() {
            let (found, count) = state.tables.scan(&extents, index, geometry, grains)?;
            let first = extent.start + grains.start() * geometry.grain;
            let whole = ByteRange::at(first, count * geometry.grain);
            match found {
                Grain::At(offset) => {
                    extent.device.require(offset, 1)?;
                    let stored = ByteRange::at(offset, whole.len());
                    self.image
                        .require_grains(state, &extents, index, geometry, stored)?;
                    let guest = whole.intersect(range);
                    self.runs.push(WriteRun {
                        guest,
                        device: Arc::clone(&extent.device),
                        offset: offset.saturating_add(guest.start() - first),
                    });
                }
                Grain::Unallocated | Grain::Zero => {
                    let offset = self.take(state, index, geometry, grains.start()..grains.start() + count)?;
                    self.runs.push(WriteRun {
                        guest: whole,
                        device: Arc::clone(&extent.device),
                        offset,
                    });
                }
            }
            grains = grains.skip(count);
        }
        Ok(())
    }

    /// Takes places for `count` grains.
    fn take(
        &mut self,
        state: &mut State,
        index: usize,
        geometry: &Geometry,
        grains: Range<u64>,
    ) -> Result<u64> {
        let (first, count) = (grains.start, grains.end - grains.start);
        let (image, extents) = (self.image, Arc::clone(&self.extents));
        for table in first / geometry.entries..=(first + count - 1) / geometry.entries {
            image.require_table(state, &extents, index, geometry, table * geometry.entries)?;
        }
        image.require_whole(state, &extents, index, geometry)?;
        let no_room = || Error::from_errno(errno::EFBIG);
        let offset = *state.free.get(index).ok_or_else(no_room)?;
        let end = count
            .checked_mul(geometry.grain)
            .and_then(|len| offset.checked_add(len))
            .filter(|end| u32::try_from(end / SECTOR).is_ok())
            .ok_or_else(no_room)?;
        image.require_grains(state, &extents, index, geometry, ByteRange::new(offset, end))?;
        if let Some(free) = state.free.get_mut(index) {
            *free = end;
        }
        self.new.push(NewGrains {
            extent: index,
            first,
            count,
            offset,
        });
        Ok(offset)
    }
}

/// The grains that `range` touches, as bytes of the disk.
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

impl WritePlan for Plan<'_> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let new = std::mem::take(&mut self.new);
        if new.is_empty() {
            return Ok(());
        }
        let mut state = self.image.lock();
        for grains in new {
            let geometry = self.extents.get(grains.extent).and_then(Extent::geometry);
            let geometry = geometry.ok_or_else(|| Error::from_errno(errno::EIO))?;
            for nth in 0..grains.count {
                let sector = (grains.offset + nth * geometry.grain) / SECTOR;
                let entry = u32::try_from(sector).map_err(|_| Error::from_errno(errno::EFBIG))?;
                state
                    .tables
                    .set(&self.extents, grains.extent, &geometry, grains.first + nth, entry)?;
            }
        }
        Ok(())
    }
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        let mut state = self.image.lock();
        // What was not written is given back, where nothing came after it.
        for grains in self.new.iter().rev() {
            let geometry = self.extents.get(grains.extent).and_then(Extent::geometry);
            if let (Some(geometry), Some(free)) = (geometry, state.free.get_mut(grains.extent))
                && grains.offset + grains.count * geometry.grain == *free
            {
                *free = grains.offset;
            }
        }
        if let Some(at) = state.in_flight.iter().position(|range| *range == self.cover) {
            state.in_flight.swap_remove(at);
        }
        drop(state);
        self.image.settled.notify_all();
    }
}

impl VmdkLayer {
    /// Makes `range` zero where tables or the storage below have a way.
    pub(super) fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if self.compressed {
            return self.zero_grains_encoded(range);
        }
        let extents = self.extents();
        for piece in extent::pieces(&extents, range) {
            let (_, extent, piece) = piece?;
            if let Some(geometry) = extent.geometry()
                && !is_zeroable(extent, &geometry, piece)
            {
                return Err(Error::unsupported("No zeroes without writing them"));
            }
        }
        let (plan, mut state) = Plan::claim(self, range)?;
        for piece in extent::pieces(&plan.extents, range) {
            let (index, extent, piece) = piece?;
            if let Some(geometry) = extent.geometry() {
                let grains = Self::grains(extent, &geometry, piece);
                for table in grains.units(geometry.entries) {
                    let first = table * geometry.entries;
                    self.require_table(&mut state, &plan.extents, index, &geometry, first)?;
                }
            }
        }
        self.mark_changed(&mut state)?;
        for piece in extent::pieces(&plan.extents, range) {
            let (index, extent, piece) = piece?;
            match extent.place {
                Place::Flat { offset } => {
                    let host = ByteRange::at(offset + extent.within(piece.start()), piece.len());
                    extent.device.write_zeroes(host, mode)?;
                }
                Place::Sparse(geometry) => {
                    let grains = Self::grains(extent, &geometry, piece);
                    for grain in grains.start()..grains.end() {
                        state.tables.set(&plan.extents, index, &geometry, grain, ZEROED)?;
                    }
                }
            }
        }
        drop(state);
        Ok(())
    }
}

/// The entry of a grain that reads as zero.
const ZEROED: u32 = 1;

/// Whether tables can say that `range`, which lies in `extent`, is zero.
fn is_zeroable(extent: &Extent, geometry: &Geometry, range: ByteRange) -> bool {
    let whole = |at: u64| at.is_multiple_of(geometry.grain);
    geometry.form == (Form::Hosted { zeroed_grain: true })
        && whole(extent.within(range.start()))
        && (whole(extent.within(range.end())) || range.end() == extent.end())
}
