//! A table of an image, seen through a few windows: never in memory as a whole, whatever the image says of its size.
//!
//! ```text
//!   table    |--- 64 KiB ---|--- 64 KiB ---|--- 64 KiB ---|-- rest --|
//!   memory                   \____________/                \________/
//! ```
//!
//! Changed entries stay in memory until [`Windows::write_back`]. What they refer to has to be durable before. Their owner
//! writes them when it is asked to flush, or sooner if [`Windows::is_crowded`]. Where it does not, a window that has to
//! leave memory makes the device durable first.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use diskimage_core::{Device, Error, Result};

/// The windows of one table of 32-bit entries, whose byte order is its owner's matter.
#[derive(Debug)]
pub(crate) struct Windows {
    device: Arc<dyn Device>,
    /// Where the table starts.
    start: u64,
    /// How many bytes it has.
    len: u64,
    /// By the offset in the table.
    windows: BTreeMap<u64, Window>,
    /// Their offsets, the one that has been in memory longest first.
    order: VecDeque<u64>,
}

#[derive(Debug)]
struct Window {
    bytes: Box<[u8]>,
    /// What has been changed, in whole sectors.
    changed: Option<Range<usize>>,
}

/// One entry as it is stored.
pub(crate) type Entry = [u8; ENTRY];

/// Bytes of an entry.
const ENTRY: usize = 4;
/// Bytes of a window.
const WINDOW: usize = 64 << 10;
/// How many windows are kept: a mebibyte, entries for hundreds of gibibytes.
const KEPT: usize = 16;
/// The unit that a disk writes whole or not at all.
const SECTOR: usize = 512;

impl Windows {
    /// The table of `entries` entries at offset `start`. Entries beyond the end of the device cannot be used.
    pub(crate) fn new(device: Arc<dyn Device>, start: u64, entries: u64) -> Self {
        Self {
            device,
            start,
            len: entries.saturating_mul(ENTRY as u64),
            windows: BTreeMap::new(),
            order: VecDeque::new(),
        }
    }

    /// The entries from entry `index` on that are in the same window; at least one.
    pub(crate) fn entries(&mut self, index: u64) -> Result<&[Entry]> {
        let (window, skip) = self.window(index)?;
        let (entries, _) = window.bytes[skip..].as_chunks();
        Ok(entries)
    }

    /// Changes entry `index`.
    pub(crate) fn set(&mut self, index: u64, entry: Entry) -> Result<()> {
        let (window, skip) = self.window(index)?;
        window.bytes[skip..skip + ENTRY].copy_from_slice(&entry);
        let start = skip - skip % SECTOR;
        let sector = start..(start + SECTOR).min(window.bytes.len());
        window.changed = Some(match window.changed.take() {
            Some(changed) => changed.start.min(sector.start)..changed.end.max(sector.end),
            None => sector,
        });
        Ok(())
    }

    /// Whether something has been changed and not been written yet.
    pub(crate) fn is_changed(&self) -> bool {
        self.windows.values().any(|window| window.changed.is_some())
    }

    /// Whether so much has been changed that it should be written.
    pub(crate) fn is_crowded(&self) -> bool {
        let changed = self.windows.values().filter(|window| window.changed.is_some());
        changed.count() >= KEPT / 2
    }

    /// Writes what was changed. What the entries refer to is durable.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        for (at, window) in &mut self.windows {
            if let Some(changed) = window.changed.clone() {
                let offset = self.start + at + changed.start as u64;
                self.device.write_at(&window.bytes[changed], offset)?;
                window.changed = None;
            }
        }
        Ok(())
    }

    /// The window of entry `index`, and where in it the entry is.
    fn window(&mut self, index: u64) -> Result<(&mut Window, usize)> {
        let at = index
            .checked_mul(ENTRY as u64)
            .filter(|at| *at < self.len)
            .ok_or_else(|| Error::corrupt(format!("Entry {index} lies outside the table")))?;
        let skip = usize::try_from(at % WINDOW as u64).unwrap_or(0);
        let at = at - skip as u64;
        if !self.windows.contains_key(&at) {
            self.make_room()?;
            self.device.require(self.start.saturating_add(at), ENTRY as u64)?;
            let there = self.len.min(self.device.len() - self.start) - at;
            let len = usize::try_from(there).unwrap_or(WINDOW).min(WINDOW);
            let mut bytes = vec![0; len].into_boxed_slice();
            self.device.read_at(&mut bytes, self.start + at)?;
            self.windows.insert(at, Window { bytes, changed: None });
            self.order.push_back(at);
        }
        match self.windows.get_mut(&at) {
            Some(window) if skip + ENTRY <= window.bytes.len() => Ok((window, skip)),
            _ => Err(Error::corrupt(format!(
                "Entry {index} of a table lies beyond the end of the file"
            ))),
        }
    }

    fn make_room(&mut self) -> Result<()> {
        while self.order.len() >= KEPT {
            let unchanged = |at: &u64| self.windows.get(at).is_none_or(|window| window.changed.is_none());
            let leaves = self.order.iter().position(unchanged);
            if leaves.is_none() {
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
        let len = usize::try_from(ENTRIES).expect("small") * ENTRY + 7;
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(vec![0; len]));
        let mut table = Windows::new(device, 7, ENTRIES);
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
        let mut table = Windows::new(device, 0, 1024);
        table.set(300, [1; 4]).expect("an entry");
        memory.write_at(&[8; 4096], 0).expect("memory");
        assert!(table.is_changed());
        table.write_back().expect("memory");
        assert!(!table.is_changed());
        let bytes = memory.contents();
        assert_eq!((bytes[1023], bytes[1024], bytes[1200], bytes[1536]), (8, 7, 1, 8));
    }

    #[test]
    fn entries_beyond_the_end_are_errors() {
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(vec![0; 101]));
        let mut table = Windows::new(device, 0, 1 << 40);
        assert_eq!(table.entries(3).expect("inside").len(), 22);
        for beyond in [25, 26, 1 << 20] {
            assert!(table.entries(beyond).is_err() && table.set(beyond, [0; 4]).is_err());
        }
    }
}
