//! One table of entries of the same length, cached in pages. Its memory is bounded, whatever length the header gives.
//!
//! ```text
//!   table    |--- 64 KiB ---|--- 64 KiB ---|--- 64 KiB ---|-- rest --|
//!   memory                   \____________/                \________/
//! ```
//!
//! Dirty pages stay in memory until [`PagedTable::write_back`]; the data that their entries refer to has to be durable
//! before. The owner writes back when it is flushed, or sooner if there are [`PagedTable::too_many_dirty`]. If all
//! pages are dirty and one has to be evicted, the device is flushed and all pages are written back. An owner that
//! writes pages itself, to a log for example, takes [`PagedTable::dirty_units`] and then marks the pages clean.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, Result, to_index};

use crate::layer_kit::page_cache::{Address, MAX_PAGE, Page, PageCache};
use crate::layer_kit::table_scan;

/// The cached pages of one table of entries of `N` bytes, a divisor of 64 KiB. The owner decodes entries.
#[derive(Debug)]
pub(crate) struct PagedTable<const N: usize = 4> {
    device: Arc<dyn Device>,
    /// Host offset of the table.
    start: u64,
    /// Bytes of the table.
    len: u64,
    /// Whether entries beyond the end of the file are zero instead of an error.
    zero_beyond_eof: bool,
    /// Whether only the owner writes dirty pages.
    owner_writes_back: bool,
    pages: PageCache,
    /// Whether the file is worth asking for its holes, once that is known.
    is_sparse: Option<bool>,
}

/// One entry as it is stored.
pub(crate) type Entry<const N: usize = 4> = [u8; N];

/// Bytes of a page.
const PAGE: usize = MAX_PAGE;
/// The most cached pages: 1 MiB, which has entries for hundreds of gibibytes.
const MAX_PAGES: usize = 16;

impl<const N: usize> PagedTable<N> {
    /// The table of `entries` entries at offset `start`. Entries beyond the end of the device are errors.
    pub(crate) fn new(device: Arc<dyn Device>, start: u64, entries: u64) -> Self {
        Self {
            device,
            start,
            len: entries.saturating_mul(N as u64).min(u64::MAX - start),
            zero_beyond_eof: false,
            owner_writes_back: false,
            pages: PageCache::new(MAX_PAGES * PAGE).clean_first(),
            is_sparse: None,
        }
    }

    /// The same, but entries beyond the end of the device are zero.
    pub(crate) fn zero_beyond_eof(mut self) -> Self {
        self.zero_beyond_eof = true;
        self
    }

    /// The same, but dirty pages stay in memory until the owner marks them clean.
    pub(crate) fn owner_writes_back(mut self) -> Self {
        self.owner_writes_back = true;
        self
    }

    /// The entries from `index` to the end of the page; at least one.
    pub(crate) fn entries(&mut self, index: u64) -> Result<&[Entry<N>]> {
        let (slot, skip) = self.page(index)?;
        let (entries, _) = self.pages.bytes(slot)[skip..].as_chunks();
        Ok(entries)
    }

    /// How many entries from `index` on are a hole of the file: they are zero, and need not be read. 0 while any page is
    /// dirty, as that may be one of these.
    pub(crate) fn hole(&mut self, index: u64) -> Result<u64> {
        let Some(at) = index.checked_mul(N as u64).filter(|at| *at < self.len) else {
            return Ok(0);
        };
        if self.is_dirty() {
            return Ok(0);
        }
        let device = &*self.device;
        let is_sparse = *self
            .is_sparse
            .get_or_insert_with(|| table_scan::is_sparse(device));
        let rest = ByteRange::new(self.start + at, self.start + self.len);
        Ok(table_scan::hole(device, is_sparse, rest)? / N as u64)
    }

    /// How many entries from `index` on, at least one, are equal to the first: all of a hole of the file, else those of the
    /// same page.
    pub(crate) fn count_equal(&mut self, index: u64) -> Result<u64> {
        match self.hole(index)? {
            0 => Ok(table_scan::leading_equal(self.entries(index)?.as_flattened(), N).max(1) as u64),
            count => Ok(count),
        }
    }

    /// Entry `index`.
    pub(crate) fn entry(&mut self, index: u64) -> Result<Entry<N>> {
        let first = self.entries(index)?.first().copied();
        first.ok_or_else(|| outside(index))
    }

    /// Changes entry `index`.
    pub(crate) fn set(&mut self, index: u64, entry: Entry<N>) -> Result<()> {
        let (slot, skip) = self.page(index)?;
        self.pages.change(slot, skip..skip + N).copy_from_slice(&entry);
        Ok(())
    }

    /// Whether any page is dirty.
    pub(crate) fn is_dirty(&self) -> bool {
        self.pages.dirty_count() > 0
    }

    /// Whether so many pages are dirty that they should be written back.
    pub(crate) fn too_many_dirty(&self) -> bool {
        self.pages.dirty_count() >= MAX_PAGES / 2
    }

    /// The dirty units of `unit` bytes, a multiple of a sector, with their host offsets.
    pub(crate) fn dirty_units(&self, unit: usize) -> impl Iterator<Item = (u64, &[u8])> {
        let units = self.pages.dirty_pages().flat_map(move |page| {
            let units = page.bytes.chunks(unit).enumerate();
            units.map(move |(nth, bytes)| (page, nth * unit, bytes))
        });
        units.filter_map(move |(page, skip, bytes)| {
            let is_dirty = page.is_dirty_in(skip..skip + bytes.len());
            is_dirty.then_some((page.address.offset + skip as u64, bytes))
        })
    }

    /// Writes back the dirty sectors. The caller has made durable what their entries refer to.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        let device = &self.device;
        self.pages.write_back(
            |()| Ok(()),
            |(), address, bytes| device.write_at(bytes, address.offset),
        )
    }

    /// Marks all pages clean: the owner has written them.
    pub(crate) fn mark_clean(&mut self) {
        self.pages.mark_clean();
    }

    /// The slot of the page with entry `index`, and the entry's offset in the page.
    fn page(&mut self, index: u64) -> Result<(usize, usize)> {
        let at = index
            .checked_mul(N as u64)
            .filter(|at| *at < self.len)
            .ok_or_else(|| outside(index))?;
        let skip = to_index(at % PAGE as u64)?;
        let at = at - skip as u64;
        let address = Address::at(self.start + at);
        let slot = match self.pages.find(address) {
            Some(slot) => slot,
            None => {
                self.make_room()?;
                let bytes = self.read(at)?;
                self.pages.insert(Page::new(address, (), bytes))
            }
        };
        if skip + N <= self.pages.page(slot).valid {
            return Ok((slot, skip));
        }
        self.device
            .require(address.offset.saturating_add(skip as u64), N as u64)?;
        Err(outside(index))
    }

    /// Reads the page at byte `at` of the table.
    fn read(&self, at: u64) -> Result<Box<[u8]>> {
        let start = self.start + at;
        let mut valid = self.len - at;
        if !self.zero_beyond_eof {
            self.device.require(start, N as u64)?;
            valid = valid.min(self.device.len() - start);
        }
        let len = to_index(valid.min(PAGE as u64))?;
        let mut bytes = vec![0; len].into_boxed_slice();
        self.device.read_padded(&mut bytes, start)?;
        Ok(bytes)
    }

    fn make_room(&mut self) -> Result<()> {
        // An owner that writes back itself limits the number of dirty pages.
        while !self.pages.make_room(PAGE) && !self.owner_writes_back {
            self.device.flush()?;
            self.write_back()?;
        }
        Ok(())
    }
}

fn outside(index: u64) -> Error {
    Error::corrupt(format!("Entry {index} lies outside the table"))
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
            assert!(table.pages.cached_bytes() <= MAX_PAGES * PAGE);
        }
        for index in (0..ENTRIES).step_by(999) {
            let entry = table.entries(index).expect("an entry")[0];
            assert_eq!(u64::from(u32::from_le_bytes(entry)), index);
        }
        assert!(table.entries(ENTRIES).is_err() && table.set(u64::MAX, [0; 4]).is_err());
    }

    #[test]
    fn only_dirty_sectors_are_written() {
        let memory = Arc::new(MemoryDevice::new(vec![7; 4096]));
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let mut table = PagedTable::<4>::new(device, 0, 1024);
        table.set(300, [1; 4]).expect("an entry");
        memory.write_at(&[8; 4096], 0).expect("memory");
        assert!(table.is_dirty());
        table.write_back().expect("memory");
        assert!(!table.is_dirty());
        let bytes = memory.contents();
        assert_eq!(bytes[1023], 8);
        assert_eq!(bytes[1024], 7);
        assert_eq!(bytes[1200], 1);
        assert_eq!(bytes[1536], 8);
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
    fn entries_beyond_the_end_are_zero_if_asked_for() {
        let mut bytes = vec![0xee; 3];
        bytes.extend((0..40_000_u32).flat_map(u32::to_le_bytes));
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(bytes));
        let mut table = PagedTable::<4>::new(device, 3, u64::MAX).zero_beyond_eof();
        for index in [0, 39_999, 16_383, 16_384, 1, 32_768] {
            let entry = table.entry(index).expect("an entry");
            assert_eq!(u64::from(u32::from_le_bytes(entry)), index);
        }
        assert_eq!(table.entry(40_000).expect("is zero"), [0; 4]);
        assert_eq!(table.entry(u64::from(u32::MAX)).expect("is zero"), [0; 4]);
    }

    #[test]
    fn dirty_units_are_listed_until_they_are_clean() {
        let memory = Arc::new(MemoryDevice::new(vec![0; 3 << 20]));
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let mut table = PagedTable::<8>::new(device, 1 << 20, 2 << 17).owner_writes_back();
        table.set(3, [7; 8]).expect("inside");
        for page in 0..20 {
            table.set(page * 8192 + 513, [9; 8]).expect("inside");
        }
        assert_eq!(memory.contents(), vec![0; 3 << 20], "only its owner writes");
        let dirty: Vec<_> = table.dirty_units(4096).collect();
        assert_eq!(dirty.len(), 21);
        assert_eq!(dirty[0].0, 1 << 20);
        assert_eq!(dirty[1].0, (1 << 20) + 4096);
        assert_eq!(dirty[0].1[24], 7);
        assert_eq!(dirty[1].1[8], 9);
        assert_eq!(dirty[1].1.len(), 4096);
        table.mark_clean();
        assert_eq!(table.dirty_units(4096).count(), 0);
    }
}
