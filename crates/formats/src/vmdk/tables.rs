//! Grain directories and grain tables of all extents, cached in pages.
//!
//! ```text
//!   grain directory ──► grain tables ──► grains
//! ```
//!
//! Dirty pages stay in memory until [`GrainTables::write_back`], which makes the grains durable first: a crash leaves
//! the old entries, and at worst grains that nothing refers to. Only dirty sectors are written, since a page may hold
//! guest data next to a table.

use diskimage_core::{ByteRange, Device, Error, Event, Result, errno, is_zero, to_index};

use super::Extent;
use super::header::{Form, Geometry, SECTOR};
use crate::layer_kit::page_cache::{Address, Page, PageCache};

/// The cached pages of the tables of all extents.
#[derive(Debug)]
pub(super) struct GrainTables(PageCache);

/// Bytes of a page, eight sectors.
const PAGE: usize = 4096;

/// Bytes of all pages.
const CAPACITY: usize = 256 * PAGE;

impl Default for GrainTables {
    fn default() -> Self {
        Self(PageCache::new(CAPACITY).clean_first())
    }
}

/// The state of a grain, as its entry in the grain table gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// It reads from the backing image.
    Unallocated,
    /// It reads as zero.
    Zero,
    /// It is stored at this host offset, compressed or plain.
    At(u64),
}

impl Grain {
    /// Whether `next` extends a run of `count` grains that begins with this one.
    fn continues(self, next: Self, count: u64, grain: u64) -> bool {
        match (self, next) {
            (Self::At(first), Self::At(offset)) => {
                first.checked_add(count.saturating_mul(grain)) == Some(offset)
            }
            (first, next) => first == next,
        }
    }
}

impl GrainTables {
    /// The state of the first grain of `grains`, a range of grain numbers of extent `index`, and the number of grains
    /// in the run that begins there. A run of compressed grains has one grain.
    pub(super) fn scan(
        &mut self,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        grains: ByteRange,
    ) -> Result<(Grain, u64)> {
        let mut found: Option<Grain> = None;
        let mut at = grains.start();
        while at < grains.end() {
            // Each round reads up to the end of a page or of a grain table.
            let table_end = (at / geometry.entries + 1).saturating_mul(geometry.entries);
            let end = table_end.min(grains.end());
            let Some(table) = self.table(extents, index, geometry, geometry.directory, at)? else {
                match found {
                    Some(found) if found != Grain::Unallocated => return Ok((found, at - grains.start())),
                    _ => found = Some(Grain::Unallocated),
                }
                let missing = self.missing_tables(extents, index, geometry, at)?;
                at = table_end
                    .saturating_add((missing - 1).saturating_mul(geometry.entries))
                    .min(grains.end());
                continue;
            };
            let size = geometry.entry_size();
            let offset = table.saturating_add(at % geometry.entries * size);
            let entries = self.bytes(extents, index, offset, size, (end - at) * size)?;
            let count = entries.len() as u64 / size;
            if found.is_none_or(|found| found == Grain::Unallocated) && is_zero(entries) {
                found = Some(Grain::Unallocated);
                at += count;
                continue;
            }
            for (entry, nth) in entries.chunks_exact(to_index(size)?).zip(0..) {
                let grain = parse(number(entry), geometry)?;
                match found {
                    None => found = Some(grain),
                    Some(found) => {
                        let before = at + nth - grains.start();
                        let single = geometry.compressed && matches!(found, Grain::At(_));
                        if single || !found.continues(grain, before, geometry.grain) {
                            return Ok((found, before));
                        }
                    }
                }
            }
            at += count;
        }
        Ok((found.unwrap_or(Grain::Unallocated), grains.len()))
    }

    /// Sets the entry of grain `grain` of extent `index`; in both copies of the table, if there are two.
    pub(super) fn set(
        &mut self,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        grain: u64,
        entry: u32,
    ) -> Result<()> {
        for directory in geometry.directories() {
            let table = self.require_table(extents, index, geometry, directory, grain)?;
            let offset = table.saturating_add(grain % geometry.entries * 4);
            self.write(extents, index, offset, entry)?;
        }
        Ok(())
    }

    /// The offset of the grain table for `grain`.
    ///
    /// # Errors
    /// The table is not allocated.
    pub(super) fn require_table(
        &mut self,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        directory: u64,
        grain: u64,
    ) -> Result<u64> {
        let table = self.table(extents, index, geometry, directory, grain)?;
        table.ok_or_else(|| Error::from_errno(errno::EINVAL))
    }

    /// Writes back all dirty pages, once the grains that they refer to are durable.
    pub(super) fn write_back(&mut self, extents: &[Extent]) -> Result<()> {
        let mut dirty: Vec<usize> = self.0.dirty_pages().map(|page| page.address.device).collect();
        dirty.dedup();
        for index in dirty {
            device_of(extents, index)?.flush()?;
        }
        self.0.write_back(
            |()| Ok(()),
            |(), address, bytes| {
                let device = device_of(extents, address.device)?;
                device.event(Event::L2_UPDATE);
                device.write_at(bytes, address.offset)
            },
        )
    }

    /// The offset of the grain table for `grain`, if there is one.
    fn table(
        &mut self,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        directory: u64,
        grain: u64,
    ) -> Result<Option<u64>> {
        let size = geometry.entry_size();
        let extent = extents.get(index).ok_or_else(|| Error::from_errno(errno::EIO))?;
        extent.relied_on.require_apart()?;
        let offset = directory.saturating_add((grain / geometry.entries).saturating_mul(size));
        let entry = number(self.bytes(extents, index, offset, size, size)?);
        match geometry.form {
            Form::SeSparse { .. } if entry == 0 => Ok(None),
            Form::SeSparse { tables, .. } => {
                // The upper half marks the table as allocated, the lower half is its number.
                if entry >> 32 != SESPARSE_TABLE {
                    return Err(Error::from_errno(errno::EIO));
                }
                let number = entry & u64::from(u32::MAX);
                Ok(tables.checked_add(number * geometry.entries * size))
            }
            _ if entry == 0 => Ok(None),
            _ => {
                let table = ByteRange::at(entry * SECTOR, geometry.table_len());
                extent.relied_on.require_outside("grain table", table)?;
                Ok(Some(table.start()))
            }
        }
    }

    /// A lower bound for the run of unallocated tables that begins with the table for `grain`, from one page of the
    /// directory.
    fn missing_tables(
        &mut self,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        grain: u64,
    ) -> Result<u64> {
        let size = geometry.entry_size();
        let offset = geometry
            .directory
            .saturating_add((grain / geometry.entries).saturating_mul(size));
        let entries = self.bytes(extents, index, offset, size, PAGE as u64)?;
        Ok(if is_zero(entries) {
            entries.len() as u64 / size
        } else {
            1
        })
    }

    /// Up to `len` bytes from `offset` on, which end with the page; at least an entry of `size` bytes.
    fn bytes(&mut self, extents: &[Extent], index: usize, offset: u64, size: u64, len: u64) -> Result<&[u8]> {
        let (slot, from) = self.page(extents, index, offset, size)?;
        let bytes = &self.0.bytes(slot)[from..];
        let len = to_index(len)?.min(bytes.len());
        Ok(&bytes[..len])
    }

    /// The entry of four bytes at `offset`.
    pub(super) fn entry(&mut self, extents: &[Extent], index: usize, offset: u64) -> Result<u32> {
        let bytes = self.bytes(extents, index, offset, 4, 4)?;
        u32::try_from(number(bytes)).map_err(|_| Error::from_errno(errno::EIO))
    }

    /// Up to `count` entries of four bytes from `offset` on, at least one.
    pub(super) fn entries(
        &mut self,
        extents: &[Extent],
        index: usize,
        offset: u64,
        count: u64,
    ) -> Result<impl Iterator<Item = u32>> {
        let bytes = self.bytes(extents, index, offset, 4, count.saturating_mul(4))?;
        let (entries, _) = bytes.as_chunks();
        if entries.is_empty() {
            return Err(Error::from_errno(errno::EIO));
        }
        Ok(entries.iter().map(|entry| u32::from_le_bytes(*entry)))
    }

    /// Changes the entry of four bytes at `offset`.
    pub(super) fn write(&mut self, extents: &[Extent], index: usize, offset: u64, entry: u32) -> Result<()> {
        let (slot, from) = self.page(extents, index, offset, 4)?;
        let bytes = self.0.change(slot, from..from + 4);
        bytes.copy_from_slice(&entry.to_le_bytes());
        Ok(())
    }

    /// The slot of the page with the entry of `size` bytes at `offset`, and the entry's index in the page.
    fn page(&mut self, extents: &[Extent], index: usize, offset: u64, size: u64) -> Result<(usize, usize)> {
        let device = device_of(extents, index)?;
        device.require(offset, size)?;
        let from = to_index(offset % PAGE as u64)?;
        let address = Address {
            device: index,
            offset: offset - from as u64,
        };
        let slot = match self.0.find(address) {
            Some(slot) => slot,
            None => {
                while !self.0.make_room(PAGE) {
                    self.write_back(extents)?;
                }
                let mut page = Page::new(address, (), vec![0; PAGE].into());
                page.valid = 0;
                self.0.insert(page)
            }
        };
        let page = self.0.page_mut(slot);
        if page.valid < from.saturating_add(to_index(size)?) {
            device.event(Event::L2_LOAD);
            load_rest(page, device)?;
        }
        Ok((slot, from))
    }
}

/// Reads the bytes of `page` that are not valid yet and that `device` has by now.
fn load_rest(page: &mut Page, device: &dyn Device) -> Result<()> {
    let start = page.address.offset;
    let valid = device.len().saturating_sub(start);
    let valid = to_index(valid)?.min(PAGE);
    if let Some(rest) = page.bytes.get_mut(page.valid..valid) {
        device.read_at(rest, start + page.valid as u64)?;
        page.valid = valid;
    }
    Ok(())
}

/// The upper half of a directory entry of an seSparse extent whose table is allocated.
const SESPARSE_TABLE: u64 = 0x1000_0000;

/// An entry of 32 or 64 bits.
fn number(entry: &[u8]) -> u64 {
    entry
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Decodes an entry of a grain table.
pub(super) fn parse(entry: u64, geometry: &Geometry) -> Result<Grain> {
    match geometry.form {
        Form::Hosted { zeroed_grain: true } if entry == 1 => Ok(Grain::Zero),
        Form::Hosted { .. } | Form::Cowd => Ok(match entry {
            0 => Grain::Unallocated,
            sector => Grain::At(sector * SECTOR),
        }),
        // Bits 60..64 are the type, bits 48..60 the low 12 bits of the grain's number, bits 0..48 its high bits.
        Form::SeSparse { grains, .. } => match entry >> 60 {
            0 if entry == 0 => Ok(Grain::Unallocated),
            1 | 2 => Ok(Grain::Zero),
            3 => {
                let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                number
                    .checked_mul(geometry.grain)
                    .and_then(|offset| grains.checked_add(offset))
                    .map(Grain::At)
                    .ok_or_else(|| Error::from_errno(errno::EIO))
            }
            _ => Err(Error::from_errno(errno::EIO)),
        },
    }
}

pub(super) fn device_of(extents: &[Extent], index: usize) -> Result<&dyn Device> {
    let extent = extents.get(index).ok_or_else(|| Error::from_errno(errno::EIO))?;
    Ok(&*extent.device)
}
