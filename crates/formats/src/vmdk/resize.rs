//! Growing, which the original cannot.
//!
//! The last extent grows. A flat one gets a longer file. A sparse one that needs more grain tables gets new directories
//! at the end of its file, which lead to the old tables and to new ones:
//!
//! ```text
//!   before   |header|directories, tables|grains|
//!   after    |header|            tables|grains|redundant directory, its new tables|directory, its new tables|
//! ```
//!
//! The header, one sector, says where they are once they are durable. The descriptor is changed last: of a sparse extent
//! it is the header that counts, and a flat one whose line is still the old one is as long as before.

use std::ops::Range;
use std::sync::PoisonError;

use diskimage_core::{ByteRange, Device, Error, Preallocation, ResizeRequest, Result, ZeroMode, errno};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U64;

use super::create::extent_limit;
use super::descriptor::Descriptor;
use super::extent::{Extent, Place, Shape};
use super::header::{self, Geometry, SECTOR};
use super::tables::Grain;
use super::{MAX_LEN, State, VmdkLayer};
use crate::preallocation;

impl VmdkLayer {
    /// Refuses what cannot be done, before anything has changed.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        let (index, extent) = self.last_extent()?;
        if request.len < extent.end() {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        if !request.len.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if request.len > MAX_LEN {
            return Err(Error::from_errno(errno::EFBIG));
        }
        if self.compressed {
            return Err(Error::unsupported(
                "The tables of a stream stand in front of it and have no room to grow",
            ));
        }
        let kind = self.descriptor.create_type.as_deref().unwrap_or_default();
        let most = extent_limit(kind).map(|limit| extent.start.saturating_add(limit));
        if let Some(most) = most.filter(|most| request.len > *most) {
            return Err(Error::unsupported(format!(
                "The last extent can grow up to {most} bytes of the disk, and no further one is added"
            )));
        }
        match (extent.place(), request.preallocation) {
            (Place::Flat { .. }, Preallocation::Metadata) => {
                Err(preallocation::unsupported(request.preallocation))
            }
            (Place::Flat { .. }, _) => Ok(()),
            (Place::Sparse(geometry), mode) => {
                preallocation::require_off(mode)?;
                let end = self.lock().end(index, extent)?;
                Layout::of(&geometry, end, request.len - extent.start).map(drop)
            }
        }
    }

    /// Makes the disk larger, on an image below that reaches to `below`.
    pub(super) fn grow(&self, request: &ResizeRequest, below: u64) -> Result<()> {
        self.check_size(request)?;
        let (index, extent) = self.last_extent()?;
        let old = extent.end();
        if request.len == old {
            return Ok(());
        }
        if below > old {
            return Err(Error::unsupported(
                "The image below is longer than this one, and would show in what is added",
            ));
        }
        let mut state = self.lock();
        while !state.in_flight.is_empty() {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.mark_changed(&mut state)?;
        let len = request.len - extent.start;
        match extent.place() {
            Place::Flat { offset } => grow_flat(extent, offset, len, request.preallocation)?,
            Place::Sparse(geometry) => self.grow_sparse(&mut state, index, &geometry, len)?,
        }
        drop(state);
        self.change_descriptor(|old| Descriptor::grown(old, len / SECTOR, request.len / SECTOR))?;
        extent.device.flush()?;
        self.file.flush()
    }

    fn last_extent(&self) -> Result<(usize, &Extent)> {
        let last = self.extents.iter().enumerate().next_back();
        last.ok_or_else(|| Error::unsupported("An image without extents cannot grow"))
    }

    fn grow_sparse(&self, state: &mut State, index: usize, old: &Geometry, len: u64) -> Result<()> {
        let extents = &self.extents;
        let extent = extents.get(index).ok_or_else(|| Error::from_errno(errno::EIO))?;
        state.tables.write_back(extents)?;
        self.clear_rest(state, index, old)?;
        let layout = Layout::of(old, state.end(index, extent)?, len)?;
        if let Some(end) = layout.end {
            extent.device.resize(end, Preallocation::Off)?;
            for (old_at, new) in &layout.directories {
                self.write_directory(state, index, *old_at, new, &layout)?;
            }
            state.tables.write_back(extents)?;
            if let Some(free) = state.free.get_mut(index) {
                *free = end.next_multiple_of(old.grain);
            }
        }
        extent.device.flush()?;
        let geometry = layout.geometry;
        let mut header = header::read_at(&*extent.device, 0)?;
        header.capacity = U64::new(geometry.capacity / SECTOR);
        header.gd_offset = U64::new(geometry.directory / SECTOR);
        if let Some(redundant) = geometry.redundant {
            header.rgd_offset = U64::new(redundant / SECTOR);
        }
        extent.device.write_at(header.as_bytes(), 0)?;
        extent.device.flush()?;
        extent.set_shape(Shape {
            len,
            place: Place::Sparse(geometry),
        });
        Ok(())
    }

    /// Writes what a new directory says: where the old tables are, and the new ones behind it.
    fn write_directory(
        &self,
        state: &mut State,
        index: usize,
        old: u64,
        new: &NewDirectory,
        layout: &Layout,
    ) -> Result<()> {
        let entry_at = |directory: u64, nth: u64| directory + nth * ENTRY;
        for nth in 0..layout.old_tables {
            let entry = state.tables.word(&self.extents, index, entry_at(old, nth))?;
            if entry != 0 {
                state
                    .tables
                    .write(&self.extents, index, entry_at(new.at, nth), entry)?;
            }
        }
        for nth in layout.old_tables..layout.new_tables {
            let sector = (new.tables + (nth - layout.old_tables) * layout.table_len) / SECTOR;
            let entry = u32::try_from(sector).map_err(|_| Error::from_errno(errno::EFBIG))?;
            state
                .tables
                .write(&self.extents, index, entry_at(new.at, nth), entry)?;
        }
        Ok(())
    }

    /// Makes the rest of the last grain zero, which becomes part of the disk.
    fn clear_rest(&self, state: &mut State, index: usize, geometry: &Geometry) -> Result<()> {
        let used = geometry.capacity % geometry.grain;
        if used == 0 {
            return Ok(());
        }
        let last = ByteRange::at(geometry.capacity / geometry.grain, 1);
        let (Grain::At(offset), _) = state.tables.scan(&self.extents, index, geometry, last)? else {
            return Ok(());
        };
        let extent = self
            .extents
            .get(index)
            .ok_or_else(|| Error::from_errno(errno::EIO))?;
        clear(
            &*extent.device,
            offset.saturating_add(used)..offset.saturating_add(geometry.grain),
        )
    }
}

impl State {
    /// Where all that the file of an extent holds ends, or will end once it is written.
    fn end(&self, index: usize, extent: &Extent) -> Result<u64> {
        let free = self
            .free
            .get(index)
            .ok_or_else(|| Error::from_errno(errno::EIO))?;
        Ok(extent.device.len().max(*free))
    }
}

/// Bytes of an entry of a directory.
const ENTRY: u64 = 4;

/// What a sparse extent looks like once it has grown.
struct Layout {
    geometry: Geometry,
    old_tables: u64,
    new_tables: u64,
    /// Bytes of a grain table.
    table_len: u64,
    /// Where each of the directories is, and where it will be.
    directories: Vec<(u64, NewDirectory)>,
    /// Where what the file holds ends then; `None` if the tables suffice.
    end: Option<u64>,
}

/// Where a directory goes, and the first of its new tables.
struct NewDirectory {
    at: u64,
    tables: u64,
}

impl Layout {
    fn of(old: &Geometry, file_end: u64, len: u64) -> Result<Self> {
        let mut geometry = Geometry {
            capacity: len,
            ..*old
        };
        geometry.require_directory()?;
        let coverage = old.grain.saturating_mul(old.entries);
        let (old_tables, new_tables) = (old.capacity.div_ceil(coverage), len.div_ceil(coverage));
        let table_len = (old.entries * ENTRY).next_multiple_of(SECTOR);
        let mut layout = Self {
            geometry,
            old_tables,
            new_tables,
            table_len,
            directories: Vec::new(),
            end: None,
        };
        if new_tables == old_tables {
            return Ok(layout);
        }
        let mut end = file_end.next_multiple_of(SECTOR);
        let mut place = |old: u64| {
            let at = end;
            let tables = at + (new_tables * ENTRY).next_multiple_of(SECTOR);
            end = tables + (new_tables - old_tables) * table_len;
            layout.directories.push((old, NewDirectory { at, tables }));
            at
        };
        geometry.redundant = old.redundant.map(&mut place);
        geometry.directory = place(old.directory);
        if u32::try_from(end / SECTOR).is_err() {
            return Err(Error::from_errno(errno::EFBIG));
        }
        layout.geometry = geometry;
        layout.end = Some(end);
        Ok(layout)
    }
}

fn grow_flat(extent: &Extent, offset: u64, len: u64, mode: Preallocation) -> Result<()> {
    let end = offset
        .checked_add(len)
        .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
    let old_end = offset.saturating_add(extent.len());
    let there = extent.device.len();
    // What the file has behind the disk must not become part of it.
    clear(&*extent.device, old_end..end)?;
    if there < end {
        extent.device.resize(end, mode)?;
    }
    extent.device.flush()?;
    extent.set_shape(Shape {
        len,
        place: Place::Flat { offset },
    });
    Ok(())
}

/// Makes zero what the file has of these bytes.
fn clear(device: &dyn Device, bytes: Range<u64>) -> Result<()> {
    let range = ByteRange::new(bytes.start, bytes.end).intersect(ByteRange::new(0, device.len()));
    if range.is_empty() {
        return Ok(());
    }
    device.write_zeroes(range, ZeroMode::KeepAllocated)
}
