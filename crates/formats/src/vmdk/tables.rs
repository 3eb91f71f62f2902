//! Grain directories and grain tables, through a bounded number of windows in memory.
//!
//! ```text
//!   grain directory ──► grain tables ──► grains
//! ```
//!
//! What changes stays in memory until [`GrainTables::write_back`], which makes the grains durable first: a crash leaves what
//! tables said before, and at worst grains that nothing refers to. Only whole sectors are written, since a window may hold
//! a guest's bytes next to a table.

use std::collections::HashMap;

use diskimage_core::{ByteRange, Device, Error, Event, Result, errno, is_zero};

use super::Extent;
use super::header::{Form, Geometry, SECTOR, SECTOR_BYTES};

/// The windows of all extents' tables.
#[derive(Debug, Default)]
pub(super) struct GrainTables {
    windows: HashMap<(usize, u64), Page>,
    uses: u64,
}

#[derive(Debug)]
struct Page {
    bytes: Box<[u8; WINDOW]>,
    /// How many of them were read: no more than the file has. The rest of a table that is cut off was lost.
    there: usize,
    /// A bit for each sector that has changed.
    dirty: u8,
    used: u64,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            bytes: Box::new([0; WINDOW]),
            there: 0,
            dirty: 0,
            used: 0,
        }
    }
}

impl Page {
    /// Reads what has not been read and what `device` has by now; the window starts at `start`.
    fn load(&mut self, device: &dyn Device, start: u64) -> Result<()> {
        let there = device.len().saturating_sub(start);
        let there = usize::try_from(there).unwrap_or(WINDOW).min(WINDOW);
        if let Some(rest) = self.bytes.get_mut(self.there..there) {
            device.read_at(rest, start + self.there as u64)?;
            self.there = there;
        }
        Ok(())
    }
}

/// The length of a window, eight sectors.
const WINDOW: usize = 4096;

/// How many windows there are at most.
const MAX_WINDOWS: usize = 256;

/// What a grain table says of grains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// The image below has it.
    Unallocated,
    /// It reads as zero.
    Zero,
    /// It is at this offset of the file, compressed or as it is.
    At(u64),
}

impl Grain {
    /// Whether `next` goes on after `count` grains like this.
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
    /// What the tables of extent `index` say of the grains `grains.start()..grains.end()`: of the first, and of how many
    /// they say the same. Compressed grains come one by one.
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
            // As far as one window of one grain table goes.
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
            for (entry, nth) in entries.chunks_exact(usize::try_from(size).unwrap_or(8)).zip(0..) {
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

    /// Has the tables of extent `index` say that grain `grain` is at `offset`, or is zero; both copies, if there are two.
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
    /// There is none.
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

    /// Writes what has changed, after making durable what it refers to.
    pub(super) fn write_back(&mut self, extents: &[Extent]) -> Result<()> {
        let mut dirty: Vec<_> = self
            .windows
            .iter()
            .filter(|(_, window)| window.dirty != 0)
            .map(|(key, _)| *key)
            .collect();
        dirty.sort_unstable();
        let mut synced = None;
        for (index, _) in &dirty {
            if synced != Some(*index) {
                device_of(extents, *index)?.flush()?;
                synced = Some(*index);
            }
        }
        for key in dirty {
            let device = device_of(extents, key.0)?;
            let Some(window) = self.windows.get_mut(&key) else {
                continue;
            };
            device.event(Event::L2_UPDATE);
            for (sector, nth) in window.bytes.chunks_exact(SECTOR_BYTES).zip(0_u64..) {
                if window.dirty & (1 << nth) != 0 {
                    device.write_at(sector, key.1 * WINDOW as u64 + nth * SECTOR)?;
                }
            }
            window.dirty = 0;
        }
        Ok(())
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
                // The upper half says that there is one, the lower half which.
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

    /// How many tables from that for `grain` on, which is missing, are missing as far as one look at the directory tells.
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
        let entries = self.bytes(extents, index, offset, size, WINDOW as u64)?;
        Ok(if is_zero(entries) {
            entries.len() as u64 / size
        } else {
            1
        })
    }

    /// Up to `len` bytes from `offset` on, as far as one window goes; at least an entry of `size` bytes.
    fn bytes(&mut self, extents: &[Extent], index: usize, offset: u64, size: u64, len: u64) -> Result<&[u8]> {
        let (window, from) = self.window(extents, index, offset, size)?;
        let end = usize::try_from(len).unwrap_or(WINDOW).min(window.there - from) + from;
        Ok(&window.bytes[from..end])
    }

    /// The entry of four bytes at `offset`.
    pub(super) fn word(&mut self, extents: &[Extent], index: usize, offset: u64) -> Result<u32> {
        let bytes = self.bytes(extents, index, offset, 4, 4)?;
        u32::try_from(number(bytes)).map_err(|_| Error::from_errno(errno::EIO))
    }

    /// Up to `count` entries of four bytes from `offset` on, at least one.
    pub(super) fn words(
        &mut self,
        extents: &[Extent],
        index: usize,
        offset: u64,
        count: u64,
    ) -> Result<impl Iterator<Item = u32>> {
        let bytes = self.bytes(extents, index, offset, 4, count.saturating_mul(4))?;
        let (words, _) = bytes.as_chunks();
        if words.is_empty() {
            return Err(Error::from_errno(errno::EIO));
        }
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)))
    }

    /// Changes the entry of four bytes at `offset`.
    pub(super) fn write(&mut self, extents: &[Extent], index: usize, offset: u64, entry: u32) -> Result<()> {
        let (window, from) = self.window(extents, index, offset, 4)?;
        window.bytes[from..from + 4].copy_from_slice(&entry.to_le_bytes());
        window.dirty |= 1 << (from / SECTOR_BYTES);
        Ok(())
    }

    /// The window with the entry of `size` bytes at `offset`, and where in it that is.
    fn window(
        &mut self,
        extents: &[Extent],
        index: usize,
        offset: u64,
        size: u64,
    ) -> Result<(&mut Page, usize)> {
        let device = device_of(extents, index)?;
        device.require(offset, size)?;
        let number = offset / WINDOW as u64;
        let key = (index, number);
        self.uses += 1;
        if !self.windows.contains_key(&key) {
            self.make_room(extents)?;
            self.windows.insert(key, Page::default());
        }
        let used = self.uses;
        let window = self
            .windows
            .get_mut(&key)
            .ok_or_else(|| Error::from_errno(errno::EIO))?;
        window.used = used;
        let from = usize::try_from(offset % WINDOW as u64).unwrap_or(0);
        if window.there < from.saturating_add(usize::try_from(size).unwrap_or(WINDOW)) {
            device.event(Event::L2_LOAD);
            window.load(device, number * WINDOW as u64)?;
        }
        Ok((window, from))
    }

    /// Gives up the window that was not used for longest.
    fn make_room(&mut self, extents: &[Extent]) -> Result<()> {
        if self.windows.len() < MAX_WINDOWS {
            return Ok(());
        }
        if self.windows.values().all(|window| window.dirty != 0) {
            self.write_back(extents)?;
        }
        let oldest = self
            .windows
            .iter()
            .filter(|(_, window)| window.dirty == 0)
            .min_by_key(|(_, window)| window.used)
            .map(|(key, _)| *key);
        if let Some(key) = oldest {
            self.windows.remove(&key);
        }
        Ok(())
    }
}

/// What the upper half of an entry of such a directory is where there is a table.
const SESPARSE_TABLE: u64 = 0x1000_0000;

/// An entry of 32 or 64 bits.
fn number(entry: &[u8]) -> u64 {
    entry
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// What an entry of a grain table says.
pub(super) fn parse(entry: u64, geometry: &Geometry) -> Result<Grain> {
    match geometry.form {
        Form::Hosted { zeroed_grain: true } if entry == 1 => Ok(Grain::Zero),
        Form::Hosted { .. } | Form::Cowd => Ok(match entry {
            0 => Grain::Unallocated,
            sector => Grain::At(sector * SECTOR),
        }),
        // The highest four bits say what it is, the next twelve are the lowest of the grain's number.
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
