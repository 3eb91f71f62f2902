//! Metadata tables in memory: windows of them, never the whole, written back in the order that survives a crash.
//!
//! Changed windows stay here until [`MetadataCache::write_back`] or until there are too many. They are written class by class,
//! with everything written before made durable in between:
//!
//! ```text
//!   data, refcount blocks → refcount table → L2 tables → L1 table
//! ```
//!
//! so that at any moment whatever can be reached is counted and written. A crash in between leaks clusters at worst.
//!
//! A window is shown to the [`MetadataGuard`], if the image has one, before it is changed for the first time. Once damage
//! was met nothing is written any more.
//!
//! What of a table lies beyond the end of the file was lost: an entry there is an error, and never a zero. Only refcount
//! blocks count nothing there, as to the original; a cluster that is in use is not allocated for that.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, Event, Result};

use crate::layer_kit::metadata_guard::{Clusters, Kind, Kinds, MetadataGuard};

/// What a table is for; the order is the order of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum WriteOrder {
    RefcountBlock,
    RefcountTable,
    L2,
    L1,
}

impl WriteOrder {
    /// What is told to the device before a part of such a table is read.
    fn load_event(self) -> Option<Event> {
        match self {
            Self::RefcountBlock => Some(Event::REFBLOCK_LOAD),
            Self::RefcountTable => Some(Event::REFTABLE_LOAD),
            Self::L2 => Some(Event::L2_LOAD),
            Self::L1 => None,
        }
    }

    /// What is told to the device before a part of such a table is written.
    pub(crate) fn update_event(self) -> Event {
        match self {
            Self::RefcountBlock => Event::REFBLOCK_UPDATE,
            Self::RefcountTable => Event::REFTABLE_UPDATE,
            Self::L2 => Event::L2_UPDATE,
            Self::L1 => Event::L1_UPDATE,
        }
    }

    /// The kinds of metadata that such a table is.
    pub(crate) fn kinds(self) -> Kinds {
        match self {
            Self::RefcountBlock => Kinds::of(&[Kind::RefcountBlock]),
            Self::RefcountTable => Kinds::of(&[Kind::RefcountTable]),
            Self::L2 => Kinds::of(&[Kind::ActiveL2, Kind::InactiveL2]),
            Self::L1 => Kinds::of(&[Kind::ActiveL1, Kind::InactiveL1]),
        }
    }
}

const CLASSES: [WriteOrder; 4] = [
    WriteOrder::RefcountBlock,
    WriteOrder::RefcountTable,
    WriteOrder::L2,
    WriteOrder::L1,
];

/// Where a table lies and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) class: WriteOrder,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// The windows of tables that are in memory.
#[derive(Debug)]
pub(crate) struct MetadataCache {
    device: Arc<dyn Device>,
    /// Guest data lives here; it must be durable before tables refer to it.
    data: Arc<dyn Device>,
    windows: HashMap<u64, Page>,
    /// Offsets in the order of the second-chance scan.
    clock: VecDeque<u64>,
    bytes: usize,
    /// How many bytes of windows are kept.
    capacity: usize,
    dirty: [usize; CLASSES.len()],
    /// Refuses writes to places that hold something else.
    guard: Option<MetadataGuard>,
}

#[derive(Debug)]
struct Page {
    class: WriteOrder,
    /// As many as the file has of those that there should be.
    bytes: Box<[u8]>,
    /// How many there should be.
    len: u64,
    dirty: bool,
    used: bool,
}

/// Bytes of a window. A whole L2 table at the usual cluster size.
const WINDOW: u64 = 64 << 10;
/// Bytes of all windows; enough for the L2 tables of 48 GiB at the usual cluster size.
const CAPACITY: usize = 6 << 20;
/// Neighbouring windows are written in one request up to this size.
const MAX_WRITE: usize = 1 << 20;

impl MetadataCache {
    pub(crate) fn new(device: Arc<dyn Device>, data: Arc<dyn Device>) -> Self {
        Self {
            device,
            data,
            windows: HashMap::new(),
            clock: VecDeque::new(),
            bytes: 0,
            capacity: CAPACITY,
            dirty: [0; CLASSES.len()],
            guard: None,
        }
    }

    /// Has `guard` decide from now on what may be written where.
    pub(crate) fn set_guard(&mut self, guard: MetadataGuard) {
        self.guard = Some(guard);
    }

    /// Refuses a write to `range`, which is meant for metadata of the kinds `own`, where it would land on other metadata.
    ///
    /// # Errors
    /// Such metadata, and damage that was met before.
    pub(crate) fn admit(&self, range: ByteRange, own: Kinds) -> Result<()> {
        self.guard
            .as_ref()
            .map_or(Ok(()), |guard| guard.admit(range, own))
    }

    /// Whether a write to `range` that is meant for `own` would be refused.
    pub(crate) fn is_guarded(&self, range: ByteRange, own: Kinds) -> bool {
        self.guard
            .as_ref()
            .is_some_and(|guard| guard.overlap(range, own).is_some())
    }

    /// Notes that `range` holds metadata of `kind` from now on.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(crate) fn guard_range(&mut self, kind: Kind, range: ByteRange) -> Result<()> {
        self.guard.as_mut().map_or(Ok(()), |guard| guard.add(kind, range))
    }

    /// Notes which clusters of metadata have more users than one, as `is_shared` has it.
    pub(crate) fn mark_shared(&mut self, is_shared: impl Fn(u64) -> bool) {
        if let Some(guard) = &mut self.guard {
            guard.mark_shared(is_shared);
        }
    }

    /// What is guarded now.
    pub(crate) fn guarded(&self) -> Option<Clusters> {
        self.guard.as_ref().map(MetadataGuard::clusters)
    }

    /// Guards what was guarded before.
    pub(crate) fn restore_guarded(&mut self, guarded: Option<Clusters>) {
        if let (Some(guard), Some(clusters)) = (&mut self.guard, guarded) {
            guard.restore(clusters);
        }
    }

    /// The error of a request that met damage: `what` is wrong.
    pub(crate) fn damaged(&self, what: &str) -> Error {
        match &self.guard {
            Some(guard) => guard.report().met(what),
            None => Error::corrupt(what),
        }
    }

    /// Keeps only so many bytes of windows.
    #[cfg(test)]
    pub(crate) fn limit_memory(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    /// The bytes of `table` from `at` to the end of the window that holds it.
    pub(crate) fn bytes(&mut self, table: Table, at: u64) -> Result<&[u8]> {
        let skip = index(at % WINDOW);
        let window = self.window(table, at)?;
        Ok(window.bytes.get(skip..).unwrap_or(&[]))
    }

    /// As [`MetadataCache::bytes`], to be changed.
    pub(crate) fn bytes_mut(&mut self, table: Table, at: u64) -> Result<&mut [u8]> {
        let skip = index(at % WINDOW);
        let offset = table.offset + at - at % WINDOW;
        if !self.window(table, at)?.dirty {
            let len = (table.len - (at - at % WINDOW)).min(WINDOW);
            self.admit(ByteRange::at(offset, len), table.class.kinds())?;
            self.dirty[table.class as usize] += 1;
        }
        let window = self
            .windows
            .get_mut(&offset)
            .ok_or_else(|| out_of_table(table, at))?;
        window.dirty = true;
        window
            .bytes
            .get_mut(skip..)
            .ok_or_else(|| out_of_table(table, at))
    }

    /// The big-endian number at byte `at` of `table`.
    pub(crate) fn number(&mut self, table: Table, at: u64) -> Result<u64> {
        let bytes = self.bytes(table, at)?;
        match bytes.first_chunk() {
            Some(bytes) => Ok(u64::from_be_bytes(*bytes)),
            None => Err(self.missing(table, at)),
        }
    }

    /// Changes the big-endian number at byte `at` of `table`.
    pub(crate) fn set_number(&mut self, table: Table, at: u64, value: u64) -> Result<()> {
        let bytes = self.bytes_mut(table, at)?;
        let Some(number) = bytes.first_chunk_mut() else {
            return Err(self.missing(table, at));
        };
        *number = value.to_be_bytes();
        Ok(())
    }

    /// Starts `table` as zeroes without reading what lies there.
    pub(crate) fn fresh(&mut self, table: Table) -> Result<()> {
        self.admit(ByteRange::at(table.offset, table.len), table.class.kinds())?;
        let mut at = 0;
        while at < table.len {
            let len = (table.len - at).min(WINDOW);
            self.forget_at(table.offset + at);
            self.insert(
                table.offset + at,
                table.class,
                vec![0; index(len)].into(),
                len,
                true,
            )?;
            at += WINDOW;
        }
        Ok(())
    }

    /// Drops what is remembered of the clusters of `range`, which are free from now on.
    pub(crate) fn forget_freed(&mut self, range: ByteRange) {
        self.forget(Table {
            class: WriteOrder::L2,
            offset: range.start(),
            len: range.len(),
        });
        if let Some(guard) = &mut self.guard {
            guard.remove(range);
        }
    }

    /// Drops what is remembered of `table`, changes included: its clusters have been given up.
    pub(crate) fn forget(&mut self, table: Table) {
        for at in (0..table.len).step_by(index(WINDOW)) {
            self.forget_at(table.offset + at);
        }
    }

    /// Writes all changes, in order, each class durable before the next.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        if let Some(guard) = &self.guard {
            guard.report().require_unmarked()?;
        }
        for class in CLASSES {
            if self.dirty[class as usize] == 0 {
                continue;
            }
            // What this class refers to: everything written before it, guest data included.
            if class != WriteOrder::RefcountBlock {
                self.sync()?;
            }
            self.write_class(class)?;
        }
        Ok(())
    }

    /// Writes all changes and forgets everything: tables are about to be changed in the file itself.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.write_back()?;
        self.discard_changes();
        Ok(())
    }

    /// Forgets everything, changes included: the file has what counts.
    pub(crate) fn discard_changes(&mut self) {
        self.windows.clear();
        self.clock.clear();
        self.bytes = 0;
        self.dirty = [0; CLASSES.len()];
    }

    /// Makes durable what has been written.
    pub(crate) fn sync(&self) -> Result<()> {
        if !Arc::ptr_eq(&self.device, &self.data) {
            self.data.flush()?;
        }
        self.device.flush()
    }

    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn window(&mut self, table: Table, at: u64) -> Result<&mut Page> {
        if at >= table.len {
            return Err(out_of_table(table, at));
        }
        let start = at - at % WINDOW;
        let offset = table.offset + start;
        let len = (table.len - start).min(WINDOW);
        let known = self
            .windows
            .get(&offset)
            .is_some_and(|window| window.class == table.class && window.len == len);
        if !known {
            // The same bytes under another name: a damaged image. What was changed is written, what is there is read.
            if self.windows.contains_key(&offset) {
                self.write_back()?;
                self.forget_at(offset);
            }
            let there = match table.class {
                WriteOrder::RefcountBlock => len,
                _ => {
                    self.device.require(offset, 1)?;
                    self.device.len().saturating_sub(offset).min(len)
                }
            };
            let mut bytes = vec![0; index(there)];
            if let Some(event) = table.class.load_event() {
                self.device.event(event);
            }
            self.device.read_padded(&mut bytes, offset)?;
            self.insert(offset, table.class, bytes.into(), len, false)?;
        }
        match self.windows.get_mut(&offset) {
            Some(window) if at - start < window.bytes.len() as u64 => {
                window.used = true;
                Ok(window)
            }
            _ => Err(missing(&*self.device, table, at)),
        }
    }

    /// The error of an entry at byte `at` of `table` that the file does not have.
    fn missing(&self, table: Table, at: u64) -> Error {
        missing(&*self.device, table, at)
    }

    fn insert(
        &mut self,
        offset: u64,
        class: WriteOrder,
        bytes: Box<[u8]>,
        len: u64,
        dirty: bool,
    ) -> Result<()> {
        while self.bytes + bytes.len() > self.capacity && !self.windows.is_empty() {
            self.evict()?;
        }
        self.bytes += bytes.len();
        self.dirty[class as usize] += usize::from(dirty);
        self.windows.insert(
            offset,
            Page {
                class,
                bytes,
                len,
                dirty,
                used: true,
            },
        );
        self.clock.push_back(offset);
        Ok(())
    }

    /// Forgets one window that has not been used since the scan last came by.
    fn evict(&mut self) -> Result<()> {
        while let Some(offset) = self.clock.pop_front() {
            match self.windows.get_mut(&offset) {
                None => {}
                Some(window) if window.used => {
                    window.used = false;
                    self.clock.push_back(offset);
                }
                Some(window) => {
                    if window.dirty {
                        self.clock.push_front(offset);
                        self.write_back()?;
                        self.clock.pop_front();
                    }
                    self.remove(offset);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn forget_at(&mut self, offset: u64) {
        if self.windows.contains_key(&offset) {
            self.remove(offset);
            self.clock.retain(|other| *other != offset);
        }
    }

    fn remove(&mut self, offset: u64) {
        if let Some(window) = self.windows.remove(&offset) {
            self.bytes -= window.bytes.len();
            self.dirty[window.class as usize] -= usize::from(window.dirty);
        }
    }

    fn write_class(&mut self, class: WriteOrder) -> Result<()> {
        let changed = self
            .windows
            .iter()
            .filter(|(_, window)| window.dirty && window.class == class);
        let mut offsets: Vec<u64> = changed.map(|(offset, _)| *offset).collect();
        offsets.sort_unstable();
        let mut rest = offsets.as_slice();
        let mut run = Vec::new();
        while let Some(first) = rest.first() {
            run.clear();
            let mut count = 0;
            for offset in rest {
                let window = &self.windows[offset];
                let follows = *offset == first + run.len() as u64;
                if count > 0 && (!follows || run.len() + window.bytes.len() > MAX_WRITE) {
                    break;
                }
                run.extend_from_slice(&window.bytes);
                count += 1;
            }
            self.device.event(class.update_event());
            self.device.write_at(&run, *first)?;
            let (written, later) = rest.split_at(count);
            for offset in written {
                if let Some(window) = self.windows.get_mut(offset) {
                    window.dirty = false;
                    self.dirty[class as usize] -= 1;
                }
            }
            rest = later;
        }
        Ok(())
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The error of an entry at byte `at` of `table` that `device` does not have.
fn missing(device: &dyn Device, table: Table, at: u64) -> Error {
    let offset = table.offset.saturating_add(at);
    let beyond = device.require(offset, device.len().saturating_sub(offset).saturating_add(1));
    beyond.err().unwrap_or_else(|| out_of_table(table, at))
}

fn out_of_table(table: Table, at: u64) -> Error {
    Error::corrupt(format!(
        "Entry at {at:#x} lies outside the table at {:#x}",
        table.offset
    ))
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    fn l2(offset: u64) -> Table {
        Table {
            class: WriteOrder::L2,
            offset,
            len: WINDOW,
        }
    }

    #[test]
    fn changes_are_seen_before_and_after_they_are_written() {
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::default());
        let mut tables = MetadataCache::new(Arc::clone(&device), Arc::clone(&device));
        tables.fresh(l2(0)).expect("memory");
        tables.set_number(l2(0), 8, 42).expect("in the table");
        assert_eq!(tables.number(l2(0), 8).expect("in the table"), 42);
        assert_eq!(device.len(), 0);
        tables.write_back().expect("memory");
        let mut word = [0; 8];
        device.read_at(&mut word, 8).expect("written");
        assert_eq!(u64::from_be_bytes(word), 42);
        assert!(tables.number(l2(0), WINDOW).is_err());
    }

    #[test]
    fn memory_stays_bounded_and_nothing_is_lost() {
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::default());
        let mut tables = MetadataCache::new(Arc::clone(&device), Arc::clone(&device));
        for i in 0..300 {
            tables.fresh(l2(i * WINDOW)).expect("memory");
            tables.set_number(l2(i * WINDOW), 16, i).expect("in the table");
            assert!(tables.bytes <= CAPACITY);
        }
        for i in 0..300 {
            assert_eq!(tables.number(l2(i * WINDOW), 16).expect("in the table"), i);
        }
    }

    #[test]
    fn what_a_file_has_of_a_table_is_used_and_the_rest_is_an_error() {
        let memory = Arc::new(MemoryDevice::new(vec![7; 100]));
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let mut tables = MetadataCache::new(Arc::clone(&device), Arc::clone(&device));
        assert_eq!(tables.number(l2(0), 88).expect("there"), 0x0707_0707_0707_0707);
        for at in [96, 104, WINDOW - 8] {
            let error = tables.number(l2(0), at).expect_err("beyond the end");
            assert!(error.chain().contains("looks cut off"), "{error}");
            assert!(tables.set_number(l2(0), at, 1).is_err());
        }
        assert!(tables.number(l2(WINDOW), 0).is_err());
        tables.set_number(l2(0), 80, 1).expect("there");
        tables.write_back().expect("memory");
        assert_eq!(memory.len(), 100, "what was lost is not made up");
    }
}
