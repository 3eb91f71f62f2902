//! A table of an image, seen through a few windows: never in memory as a whole, whatever the image says of its size.
//!
//! ```text
//!   table    |--- 64 KiB ---|--- 64 KiB ---|--- 64 KiB ---|-- rest --|
//!   memory                   \____________/                \________/
//! ```
//!
//! Changed entries stay in memory until [`PagedTable::write_back`]. What they refer to has to be durable before. Their owner
//! writes them when it is asked to flush, or sooner if [`PagedTable::too_many_dirty`]. Where it does not, a window that has to
//! leave memory makes the device durable first. An owner with a way of its own to write takes [`PagedTable::changed`] instead.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use diskimage_core::{Device, Error, Result};

/// The windows of one table of entries of `N` bytes, a divisor of 64 KiB, whose byte order is its owner's matter.
#[derive(Debug)]
pub(crate) struct PagedTable<const N: usize = 4> {
    device: Arc<dyn Device>,
    /// Where the table starts.
    start: u64,
    /// How many bytes it has.
    len: u64,
    /// Whether what lies beyond the end of the file is zero, and no error.
    padded: bool,
    /// Whether changes only go where their owner writes them.
    kept: bool,
    /// By the offset in the table.
    windows: BTreeMap<u64, Page>,
    /// Their offsets, the one that has been in memory longest first.
    order: VecDeque<u64>,
}

#[derive(Debug)]
struct Page {
    bytes: Box<[u8]>,
    /// A bit for each sector that has been changed.
    changed: u128,
}

/// One entry as it is stored.
pub(crate) type Entry<const N: usize = 4> = [u8; N];

/// Bytes of a window.
const WINDOW: usize = 64 << 10;
/// How many windows are kept: a mebibyte, entries for hundreds of gibibytes.
const KEPT: usize = 16;
/// The unit that a disk writes whole or not at all.
const SECTOR: usize = 512;

const _: () = assert!(WINDOW / SECTOR == 128);

impl<const N: usize> PagedTable<N> {
    /// The table of `entries` entries at offset `start`. Entries beyond the end of the device cannot be used.
    pub(crate) fn new(device: Arc<dyn Device>, start: u64, entries: u64) -> Self {
        Self {
            device,
            start,
            len: entries.saturating_mul(N as u64),
            padded: false,
            kept: false,
            windows: BTreeMap::new(),
            order: VecDeque::new(),
        }
    }

    /// The same, but entries beyond the end of the device are zeroes.
    pub(crate) fn padded(mut self) -> Self {
        self.padded = true;
        self
    }

    /// The same, but changes stay in memory until their owner says that they are written.
    pub(crate) fn kept(mut self) -> Self {
        self.kept = true;
        self
    }

    /// The entries from entry `index` on that are in the same window; at least one.
    pub(crate) fn entries(&mut self, index: u64) -> Result<&[Entry<N>]> {
        let (window, skip) = self.window(index)?;
        let (entries, _) = window.bytes[skip..].as_chunks();
        Ok(entries)
    }

    /// Entry `index`.
    pub(crate) fn entry(&mut self, index: u64) -> Result<Entry<N>> {
        let first = self.entries(index)?.first().copied();
        first.ok_or_else(|| Error::corrupt(format!("Entry {index} lies outside the table")))
    }

    /// Changes entry `index`.
    pub(crate) fn set(&mut self, index: u64, entry: Entry<N>) -> Result<()> {
        let (window, skip) = self.window(index)?;
        window.bytes[skip..skip + N].copy_from_slice(&entry);
        window.changed |= 1 << (skip / SECTOR);
        Ok(())
    }

    /// Whether something has been changed and not been written yet.
    pub(crate) fn is_changed(&self) -> bool {
        self.windows.values().any(|window| window.changed != 0)
    }

    /// Whether so much has been changed that it should be written.
    pub(crate) fn too_many_dirty(&self) -> bool {
        let changed = self.windows.values().filter(|window| window.changed != 0);
        changed.count() >= KEPT / 2
    }

    /// What has been changed, in whole units of `unit` bytes, some sectors, by their offset in the file.
    pub(crate) fn changed(&self, unit: usize) -> impl Iterator<Item = (u64, &[u8])> {
        let units = self.windows.iter().flat_map(move |(at, window)| {
            let units = window.bytes.chunks(unit).enumerate();
            units.map(move |(nth, bytes)| (at, window, nth * unit, bytes))
        });
        units.filter_map(move |(at, window, skip, bytes)| {
            let mut sectors = skip / SECTOR..(skip + unit).div_ceil(SECTOR);
            let is_changed = sectors.any(|sector| window.changed & (1 << sector) != 0);
            is_changed.then_some((self.start + at + skip as u64, bytes))
        })
    }

    /// Writes what was changed. What the entries refer to is durable.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        for (at, window) in &mut self.windows {
            let mut left = window.changed;
            while left != 0 {
                // The first run of changed sectors.
                let first = left.trailing_zeros();
                let count = (left >> first).trailing_ones();
                left &= (u128::MAX << first).checked_shl(count).unwrap_or(0);
                let (first, count) = (first as usize * SECTOR, count as usize * SECTOR);
                let end = (first + count).min(window.bytes.len());
                let offset = self.start + at + first as u64;
                self.device.write_at(&window.bytes[first..end], offset)?;
            }
            window.changed = 0;
        }
        Ok(())
    }

    /// What was changed has been written.
    pub(crate) fn settle(&mut self) {
        for window in self.windows.values_mut() {
            window.changed = 0;
        }
    }

    /// The window of entry `index`, and where in it the entry is.
    fn window(&mut self, index: u64) -> Result<(&mut Page, usize)> {
        let at = index
            .checked_mul(N as u64)
            .filter(|at| *at < self.len)
            .ok_or_else(|| Error::corrupt(format!("Entry {index} lies outside the table")))?;
        let skip = usize::try_from(at % WINDOW as u64).unwrap_or(0);
        let at = at - skip as u64;
        if !self.windows.contains_key(&at) {
            self.make_room()?;
            let bytes = self.read(at)?;
            self.windows.insert(at, Page { bytes, changed: 0 });
            self.order.push_back(at);
        }
        match self.windows.get_mut(&at) {
            Some(window) if skip + N <= window.bytes.len() => Ok((window, skip)),
            _ => {
                let start = self.start.saturating_add(at).saturating_add(skip as u64);
                self.device.require(start, N as u64)?;
                Err(Error::corrupt(format!("Entry {index} lies outside the table")))
            }
        }
    }

    /// The bytes of the window at `at` of the table.
    fn read(&self, at: u64) -> Result<Box<[u8]>> {
        let start = self.start.saturating_add(at);
        let mut there = self.len - at;
        if !self.padded {
            self.device.require(start, N as u64)?;
            there = there.min(self.device.len() - start);
        }
        let len = usize::try_from(there).unwrap_or(WINDOW).min(WINDOW);
        let mut bytes = vec![0; len].into_boxed_slice();
        self.device.read_padded(&mut bytes, start)?;
        Ok(bytes)
    }

    fn make_room(&mut self) -> Result<()> {
        while self.order.len() >= KEPT {
            let unchanged = |at: &u64| self.windows.get(at).is_none_or(|window| window.changed == 0);
            let leaves = self.order.iter().position(unchanged);
            if leaves.is_none() {
                if self.kept {
                    // Their owner sees to it that they are few.
                    return Ok(());
                }
                self.device.flush()?;
                self.write_back()?;
            }
            if let Some(at) = self.order.remove(leaves.unwrap_or(0)) {
                self.windows.remove(&at);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    #[test]
    fn memory_stays_bounded_and_nothing_is_lost() {
        const ENTRIES: u64 = 600_000;
        let len = usize::try_from(ENTRIES).expect("small") * 4 + 7;
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(vec![0; len]));
        let mut table = PagedTable::<4>::new(device, 7, ENTRIES);
        for index in (0..ENTRIES).step_by(999) {
            let number = u32::try_from(index).expect("small");
            table.set(index, number.to_le_bytes()).expect("an entry");
            assert!(table.windows.len() <= KEPT && table.order.len() == table.windows.len());
        }
        for index in (0..ENTRIES).step_by(999) {
            let entry = table.entries(index).expect("an entry")[0];
            assert_eq!(u64::from(u32::from_le_bytes(entry)), index);
        }
        assert!(table.entries(ENTRIES).is_err() && table.set(u64::MAX, [0; 4]).is_err());
    }

    #[test]
    fn only_sectors_with_changes_are_written() {
        let memory = Arc::new(MemoryDevice::new(vec![7; 4096]));
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let mut table = PagedTable::<4>::new(device, 0, 1024);
        table.set(300, [1; 4]).expect("an entry");
        memory.write_at(&[8; 4096], 0).expect("memory");
        assert!(table.is_changed());
        table.write_back().expect("memory");
        assert!(!table.is_changed());
        let bytes = memory.contents();
        assert_eq!((bytes[1023], bytes[1024], bytes[1200], bytes[1536]), (8, 7, 1, 8));
        memory.write_at(&[9; 4096], 0).expect("memory");
        for index in [0, 127, 128, 900, 1023] {
            table.set(index, [2; 4]).expect("an entry");
        }
        table.write_back().expect("memory");
        let kept: Vec<usize> = (0..8)
            .filter(|sector| memory.contents()[sector * 512 + 100] == 9)
            .collect();
        assert_eq!(kept, [2, 3, 4, 5, 6]);
    }

    #[test]
    fn entries_beyond_the_end_are_errors() {
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(vec![0; 101]));
        let mut table = PagedTable::<4>::new(device, 0, 1 << 40);
        assert_eq!(table.entries(3).expect("inside").len(), 22);
        for beyond in [25, 26, 1 << 20] {
            assert!(table.entries(beyond).is_err() && table.set(beyond, [0; 4]).is_err());
        }
    }

    #[test]
    fn padded_entries_beyond_the_end_are_zero() {
        let mut bytes = vec![0xee; 3];
        bytes.extend((0..40_000_u32).flat_map(u32::to_le_bytes));
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(bytes));
        let mut table = PagedTable::<4>::new(device, 3, u64::MAX).padded();
        for index in [0, 39_999, 16_383, 16_384, 1, 32_768] {
            let entry = table.entry(index).expect("an entry");
            assert_eq!(u64::from(u32::from_le_bytes(entry)), index);
        }
        assert_eq!(table.entry(40_000).expect("is zero"), [0; 4]);
        assert_eq!(table.entry(u64::from(u32::MAX)).expect("is zero"), [0; 4]);
    }

    #[test]
    fn changes_are_told_in_units_until_they_are_written() {
        let memory = Arc::new(MemoryDevice::new(vec![0; 3 << 20]));
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let mut table = PagedTable::<8>::new(device, 1 << 20, 2 << 17).kept();
        table.set(3, [7; 8]).expect("inside");
        for window in 0..20 {
            table.set(window * 8192 + 513, [9; 8]).expect("inside");
        }
        assert_eq!(memory.contents(), vec![0; 3 << 20], "only its owner writes");
        let changed: Vec<_> = table.changed(4096).collect();
        assert_eq!(
            (changed.len(), changed[0].0, changed[1].0),
            (21, 1 << 20, (1 << 20) + 4096)
        );
        assert_eq!(
            (changed[0].1[24], changed[1].1[8], changed[1].1.len()),
            (7, 9, 4096)
        );
        table.settle();
        assert_eq!(table.changed(4096).count(), 0);
    }
}
