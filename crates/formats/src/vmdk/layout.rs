//! The new tables of a sparse extent that grows.
//!
//! An extent that needs more grain tables gets new directories at the end of its file, which refer to the old tables
//! and to new ones. In a stream, each directory and each run of tables has a marker in front.
//!
//! ```text
//!   before   |header|directories, tables|grains|
//!   after    |header|            tables|grains|redundant directory|its new tables|directory|its new tables|
//! ```
//!
//! The header, which is one sector, refers to the new directories once they are durable.

use diskimage_core::{ByteRange, Error, Result, ZeroMode, errno};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U64;

use super::extent::{Extent, Storage, add_zeroes};
use super::header::{self, Geometry, Metadata, SECTOR};
use super::tables::Grain;
use super::{State, VmdkLayer};
use crate::layer_kit::clear::zero_existing;

/// The layout of a sparse extent once it has grown.
pub(super) struct Layout {
    geometry: Geometry,
    old_tables: u64,
    new_tables: u64,
    /// Bytes of a grain table.
    table_len: u64,
    /// Of each directory, the old host offset and the new one.
    directories: Vec<(u64, NewDirectory)>,
    /// The end of the file's contents once it has grown; `None` if the present tables suffice.
    end: Option<u64>,
}

/// The host offsets of a new directory and of the first of its new tables.
struct NewDirectory {
    at: u64,
    tables: u64,
}

/// Bytes of an entry of a directory.
const ENTRY: u64 = 4;

impl Layout {
    /// The layout of an extent that grows to `len` bytes, in a file whose contents end at `file_end`.
    pub(super) fn of(old: &Geometry, file_end: u64, len: u64) -> Result<Self> {
        let mut geometry = Geometry {
            capacity: len,
            ..*old
        };
        geometry.require_directory()?;
        let coverage = old.grain.saturating_mul(old.entries);
        let (old_tables, new_tables) = (old.capacity.div_ceil(coverage), len.div_ceil(coverage));
        let mut layout = Self {
            geometry,
            old_tables,
            new_tables,
            table_len: old.table_len(),
            directories: Vec::new(),
            end: None,
        };
        if new_tables == old_tables {
            return Ok(layout);
        }
        let mut end = file_end.next_multiple_of(SECTOR);
        let (directory_len, tables_len) = (layout.directory_len(), layout.tables_len());
        let marker = if old.compressed { SECTOR } else { 0 };
        let mut allocate = |old: u64| {
            let at = end + marker;
            let tables = at + directory_len + marker;
            end = tables + tables_len;
            layout.directories.push((old, NewDirectory { at, tables }));
            at
        };
        geometry.redundant = old.redundant.map(&mut allocate);
        geometry.directory = allocate(old.directory);
        if u32::try_from(end / SECTOR).is_err() {
            return Err(Error::from_errno(errno::EFBIG));
        }
        layout.geometry = geometry;
        layout.end = Some(end);
        Ok(layout)
    }

    fn directory_len(&self) -> u64 {
        (self.new_tables * ENTRY).next_multiple_of(SECTOR)
    }

    /// Bytes of the tables that are new in each directory.
    fn tables_len(&self) -> u64 {
        (self.new_tables - self.old_tables) * self.table_len
    }
}

impl VmdkLayer {
    /// Makes extent `index` `len` bytes long, and returns its new storage.
    pub(super) fn grow_sparse(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        old: &Geometry,
        len: u64,
    ) -> Result<Storage> {
        let extent = extents.get(index).ok_or_else(|| Error::from_errno(errno::EIO))?;
        self.clear_rest(state, extents, index, old)?;
        state.tables.write_back(extents)?;
        let layout = Layout::of(old, state.end(index, extent)?, len)?;
        if let Some(end) = layout.end {
            add_zeroes(&*extent.device, state.end(index, extent)?, end)?;
            for (old_at, new) in &layout.directories {
                layout.write_directory(state, extents, index, *old_at, new)?;
            }
            state.tables.write_back(extents)?;
            if let Some(free) = state.free.get_mut(index) {
                *free = end.next_multiple_of(extent.unit());
            }
        }
        // The directories have new offsets.
        state.occupied.remove(&index);
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
        Ok(Storage::Sparse(geometry))
    }

    /// Zeroes the rest of a partial last grain, which becomes part of the disk.
    fn clear_rest(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
    ) -> Result<()> {
        let used = geometry.capacity % geometry.grain;
        if used == 0 {
            return Ok(());
        }
        let last = geometry.capacity / geometry.grain;
        let only = ByteRange::at(last, 1);
        let (Grain::At(offset), _) = state.tables.scan(extents, index, geometry, only)? else {
            return Ok(());
        };
        if geometry.compressed {
            return self.encode_again(state, last, offset, used);
        }
        let extent = extents.get(index).ok_or_else(|| Error::from_errno(errno::EIO))?;
        let whole = ByteRange::at(offset, geometry.grain);
        self.require_grains(state, extents, index, geometry, whole)?;
        zero_existing(&*extent.device, whole.skip(used), ZeroMode::KeepAllocated)
    }
}

impl Layout {
    /// Writes the entries of a new directory: the offsets of the old tables, then those of the new tables behind it.
    fn write_directory(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        old: u64,
        new: &NewDirectory,
    ) -> Result<()> {
        let tables = &mut state.tables;
        if self.geometry.compressed {
            let extent = extents.get(index).ok_or_else(|| Error::from_errno(errno::EIO))?;
            for (at, what, len) in [
                (new.at, Metadata::GrainDirectory, self.directory_len()),
                (new.tables, Metadata::GrainTable, self.tables_len()),
            ] {
                extent.device.write_at(&what.marker(len), at - SECTOR)?;
            }
        }
        let entry_at = |directory: u64, nth: u64| directory + nth * ENTRY;
        for nth in 0..self.old_tables {
            let entry = tables.entry(extents, index, entry_at(old, nth))?;
            if entry != 0 {
                tables.write(extents, index, entry_at(new.at, nth), entry)?;
            }
        }
        for nth in self.old_tables..self.new_tables {
            let sector = (new.tables + (nth - self.old_tables) * self.table_len) / SECTOR;
            let entry = u32::try_from(sector).map_err(|_| Error::from_errno(errno::EFBIG))?;
            tables.write(extents, index, entry_at(new.at, nth), entry)?;
        }
        Ok(())
    }
}
