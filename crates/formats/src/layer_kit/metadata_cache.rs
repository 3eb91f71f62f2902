//! Metadata tables anywhere in a file, cached in pages, and written back in the order that survives a crash.
//!
//! Dirty pages stay in memory until [`MetadataCache::write_back`], or until one of them is to be evicted, which writes
//! back all of them. They are written class by class, with a barrier before each class but the first:
//!
//! ```text
//!   data, refcount blocks → refcount table → L2 tables → L1 table
//! ```
//!
//! so that at any moment every cluster that a durable entry refers to has its refcount and its contents. A crash leaks
//! clusters at worst.
//!
//! The [`MetadataGuard`], if the image has one, checks a clean page before it becomes dirty. Once damage was met,
//! nothing is written any more.
//!
//! The part of a table beyond the end of the file is lost: an entry there is an error, and never zero. Only in refcount
//! blocks such an entry is 0, as in qemu-img; this does not make a cluster that is in use free.

use std::sync::Arc;

use diskimage_core::{Budget, ByteRange, Device, Error, Event, Result, to_index};

use crate::layer_kit::metadata_guard::{Clusters, Kind, Kinds, MetadataGuard};
use crate::layer_kit::offset::ClusterIndex;
use crate::layer_kit::page_cache::{Address, MAX_PAGE, Page, PageCache};
use crate::layer_kit::table_scan;

/// The class of a table; the order is the order of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum WriteOrder {
    RefcountBlock,
    RefcountTable,
    L2,
    L1,
}

impl WriteOrder {
    /// The event for the device before a page of such a table is read.
    fn load_event(self) -> Option<Event> {
        match self {
            Self::RefcountBlock => Some(Event::REFBLOCK_LOAD),
            Self::RefcountTable => Some(Event::REFTABLE_LOAD),
            Self::L2 => Some(Event::L2_LOAD),
            Self::L1 => None,
        }
    }

    /// The event for the device before a page of such a table is written.
    pub(crate) fn update_event(self) -> Event {
        match self {
            Self::RefcountBlock => Event::REFBLOCK_UPDATE,
            Self::RefcountTable => Event::REFTABLE_UPDATE,
            Self::L2 => Event::L2_UPDATE,
            Self::L1 => Event::L1_UPDATE,
        }
    }

    /// The kinds of metadata that such a table can be.
    pub(crate) fn kinds(self) -> Kinds {
        match self {
            Self::RefcountBlock => Kinds::of(&[Kind::RefcountBlock]),
            Self::RefcountTable => Kinds::of(&[Kind::RefcountTable]),
            Self::L2 => Kinds::of(&[Kind::ActiveL2, Kind::InactiveL2]),
            Self::L1 => Kinds::of(&[Kind::ActiveL1, Kind::InactiveL1]),
        }
    }
}

/// The class, the host offset and the length of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) class: WriteOrder,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Table {
    /// The bytes of the table.
    pub(crate) fn range(self) -> ByteRange {
        ByteRange::at(self.offset, self.len)
    }
}

/// The cached pages of the tables of a file.
#[derive(Debug)]
pub(crate) struct MetadataCache {
    device: Arc<dyn Device>,
    /// The device that holds guest data, which must be durable before tables refer to it.
    data: Arc<dyn Device>,
    pages: PageCache<WriteOrder>,
    /// Refuses writes that would overwrite metadata of another kind.
    guard: Option<MetadataGuard>,
    /// Whether writes are ordered by barriers.
    ordered: bool,
    /// The memory of all pages but one, if it is limited besides.
    budget: Option<Budget>,
    /// Whether the file is worth asking for its holes, once that is known.
    is_sparse: Option<bool>,
}

/// Bytes of a page: a whole L2 table at the default cluster size.
const PAGE: u64 = MAX_PAGE as u64;
/// Bytes of all pages: enough for the L2 tables of 48 GiB at the default cluster size.
const CAPACITY: usize = 6 << 20;
/// Bytes of pages that take the place of none, however many caches there are: those for two places of the disk, since the
/// workers of a copy are at both ends of a table for a while.
const LEAST: usize = 4 * MAX_PAGE;

impl MetadataCache {
    pub(crate) fn new(device: Arc<dyn Device>, data: Arc<dyn Device>) -> Self {
        Self {
            device,
            data,
            pages: PageCache::new(CAPACITY),
            guard: None,
            ordered: true,
            budget: None,
            is_sparse: None,
        }
    }

    /// The same cache, whose pages take memory of `budget`, and those beyond [`LEAST`] spare memory: a chain may have
    /// hundreds of caches. One page needs none.
    pub(crate) fn with_budget(self, budget: &Budget) -> Self {
        Self {
            budget: Some(budget.clone()),
            ..self
        }
    }

    /// Turns barriers on or off. Without them [`MetadataCache::sync`] does nothing: for tables to which nothing durable
    /// refers yet, the order of writing does not matter. The caller turns them on and syncs before something does.
    pub(crate) fn set_ordered(&mut self, ordered: bool) {
        self.ordered = ordered;
    }

    /// Sets the guard that checks writes from now on.
    pub(crate) fn set_guard(&mut self, guard: MetadataGuard) {
        self.guard = Some(guard);
    }

    /// Refuses a write to `range`, which is meant for metadata of the kinds `own`, if it would overwrite other
    /// metadata.
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

    /// Records that `range` holds metadata of `kind` from now on.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(crate) fn guard_range(&mut self, kind: Kind, range: ByteRange) -> Result<()> {
        self.guard.as_mut().map_or(Ok(()), |guard| guard.add(kind, range))
    }

    /// Marks the clusters of metadata that have more than one user according to `is_shared`.
    pub(crate) fn mark_shared(&mut self, is_shared: impl Fn(ClusterIndex) -> bool) {
        if let Some(guard) = &mut self.guard {
            guard.mark_shared(is_shared);
        }
    }

    /// A copy of the guarded clusters, for [`MetadataCache::restore_guarded`].
    pub(crate) fn guarded(&self) -> Option<Clusters> {
        self.guard.as_ref().map(MetadataGuard::clusters)
    }

    /// Restores the guarded clusters from a copy.
    pub(crate) fn restore_guarded(&mut self, guarded: Option<Clusters>) {
        if let (Some(guard), Some(clusters)) = (&mut self.guard, guarded) {
            guard.restore(clusters);
        }
    }

    /// The error for a request that met the damage `what`, which is also reported.
    pub(crate) fn damaged(&self, what: &str) -> Error {
        match &self.guard {
            Some(guard) => guard.report().met(what),
            None => Error::corrupt(what),
        }
    }

    /// Changes the most bytes of all pages.
    #[cfg(test)]
    pub(crate) fn limit_memory(&mut self, capacity: usize) {
        self.pages.set_capacity(capacity);
    }

    /// The bytes of `table` from `at` to the end of the page that holds it.
    pub(crate) fn bytes(&mut self, table: Table, at: u64) -> Result<&[u8]> {
        let slot = self.page(table, at)?;
        Ok(self.pages.bytes(slot).get(to_index(at % PAGE)?..).unwrap_or(&[]))
    }

    /// How many bytes of `table` from `at` on are a hole of the file: they are zero, and need not be read. 0 while any page
    /// is dirty, as that may be one of these.
    pub(crate) fn hole(&mut self, table: Table, at: u64) -> Result<u64> {
        if self.pages.dirty_count() > 0 || at >= table.len {
            return Ok(0);
        }
        let device = &*self.device;
        let is_sparse = *self
            .is_sparse
            .get_or_insert_with(|| table_scan::is_sparse(device));
        table_scan::hole(device, is_sparse, table.range().skip(at))
    }

    /// How many entries of `size` bytes of `table`, from byte `at` on, are equal to the first: those in the same page.
    pub(crate) fn count_equal(&mut self, table: Table, at: u64, size: usize) -> Result<u64> {
        Ok(table_scan::leading_equal(self.bytes(table, at)?, size) as u64)
    }

    /// The same bytes for changes; the page becomes dirty.
    pub(crate) fn bytes_mut(&mut self, table: Table, at: u64) -> Result<&mut [u8]> {
        let slot = self.page(table, at)?;
        if !self.pages.is_dirty(slot) {
            let page = self.pages.page(slot);
            let range = ByteRange::at(page.address.offset, page.bytes.len() as u64);
            self.admit(range, table.class.kinds())?;
        }
        let valid = self.pages.page(slot).valid;
        let bytes = self.pages.change(slot, 0..valid);
        bytes
            .get_mut(to_index(at % PAGE)?..)
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

    /// Inserts the pages of a new `table`, dirty and filled with zeroes, without reading the file.
    pub(crate) fn insert_zeroed(&mut self, table: Table) -> Result<()> {
        self.admit(table.range(), table.class.kinds())?;
        for at in (0..table.len).step_by(MAX_PAGE) {
            let address = Address::at(table.offset + at);
            self.pages.remove(address);
            let len = to_index(PAGE.min(table.len - at))?;
            let slot = self.insert(Page::new(address, table.class, vec![0; len].into()))?;
            self.pages.change(slot, 0..len);
        }
        Ok(())
    }

    /// Drops the pages and the guarded clusters of `range`, whose clusters are free from now on.
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

    /// Drops the pages of `table`, dirty ones included: its clusters were freed.
    pub(crate) fn forget(&mut self, table: Table) {
        for at in (0..table.len).step_by(MAX_PAGE) {
            self.pages.remove(Address::at(table.offset + at));
        }
    }

    /// Writes back all dirty pages in the order of their classes, each durable before the next.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        if let Some(guard) = &self.guard {
            guard.report().require_unmarked()?;
        }
        let (device, data, ordered) = (&self.device, &self.data, self.ordered);
        self.pages.write_back(
            // Everything that tables of this class refer to was written before, guest data included.
            |class| match class {
                WriteOrder::RefcountBlock => Ok(()),
                _ if !ordered => Ok(()),
                _ => sync(device, data),
            },
            |class, address, bytes| {
                device.event(class.update_event());
                device.write_at(bytes, address.offset)
            },
        )
    }

    /// Writes back all dirty pages and empties the cache: the owner is about to change tables in the file itself.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.write_back()?;
        self.discard_changes();
        Ok(())
    }

    /// Empties the cache, and drops dirty pages: the tables in the file are the right ones.
    pub(crate) fn discard_changes(&mut self) {
        self.pages.clear();
    }

    /// Makes all writes durable, unless barriers are turned off.
    pub(crate) fn sync(&self) -> Result<()> {
        if !self.ordered {
            return Ok(());
        }
        sync(&self.device, &self.data)
    }

    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The slot of the page that holds byte `at` of `table`.
    fn page(&mut self, table: Table, at: u64) -> Result<usize> {
        if at >= table.len {
            return Err(out_of_table(table, at));
        }
        let start = at - at % PAGE;
        let address = Address::at(table.offset + start);
        let len = (table.len - start).min(PAGE);
        let slot = match self.pages.find(address) {
            Some(slot) if self.is_page_of(slot, table.class, len) => slot,
            found => {
                // A cached page at this address belongs to a table of another class or length: the image is damaged.
                // The page is written back and read again.
                if found.is_some() {
                    self.write_back()?;
                    self.pages.remove(address);
                }
                let page = self.load(address, table.class, len)?;
                self.insert(page)?
            }
        };
        if at - start < self.pages.page(slot).valid as u64 {
            Ok(slot)
        } else {
            Err(self.missing(table, at))
        }
    }

    fn is_page_of(&self, slot: usize, class: WriteOrder, len: u64) -> bool {
        let page = self.pages.page(slot);
        page.stage == class && page.bytes.len() as u64 == len
    }

    /// Reads a page of `len` bytes.
    fn load(&self, address: Address, class: WriteOrder, len: u64) -> Result<Page<WriteOrder>> {
        let offset = address.offset;
        let valid = match class {
            WriteOrder::RefcountBlock => len,
            _ => {
                self.device.require(offset, 1)?;
                self.device.len().saturating_sub(offset).min(len)
            }
        };
        let mut page = Page::new(address, class, vec![0; to_index(len)?].into());
        page.valid = to_index(valid)?;
        if let Some(event) = class.load_event() {
            self.device.event(event);
        }
        self.device.read_padded(&mut page.bytes[..page.valid], offset)?;
        Ok(page)
    }

    /// Inserts `page`, once there is room for it.
    fn insert(&mut self, mut page: Page<WriteOrder>) -> Result<usize> {
        while !self.pages.make_room(page.bytes.len()) {
            self.write_back()?;
        }
        while let Some(budget) = &self.budget {
            let len = page.bytes.len();
            page.memory = match self.pages.cached_bytes() + len <= LEAST {
                true => budget.reserve(len as u64).ok(),
                false => budget.reserve_spare(len as u64),
            };
            if page.memory.is_some() {
                break;
            }
            match self.pages.evict() {
                Some(true) => {}
                Some(false) => self.write_back()?,
                None => break,
            }
        }
        Ok(self.pages.insert(page))
    }

    /// The error for an entry at byte `at` of `table` beyond the end of the file.
    fn missing(&self, table: Table, at: u64) -> Error {
        let offset = table.offset.saturating_add(at);
        let device = &self.device;
        let beyond = device.require(offset, device.len().saturating_sub(offset).saturating_add(1));
        beyond.err().unwrap_or_else(|| out_of_table(table, at))
    }
}

/// Makes all writes to `device` durable, and those to `data` before, if that is another device.
fn sync(device: &Arc<dyn Device>, data: &Arc<dyn Device>) -> Result<()> {
    if !Arc::ptr_eq(device, data) {
        data.flush()?;
    }
    device.flush()
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
            len: PAGE,
        }
    }

    #[test]
    fn changes_are_seen_before_and_after_they_are_written() {
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::default());
        let mut tables = MetadataCache::new(Arc::clone(&device), Arc::clone(&device));
        tables.insert_zeroed(l2(0)).expect("memory");
        tables.set_number(l2(0), 8, 42).expect("in the table");
        assert_eq!(tables.number(l2(0), 8).expect("in the table"), 42);
        assert_eq!(device.len(), 0);
        tables.write_back().expect("memory");
        let mut number = [0; 8];
        device.read_at(&mut number, 8).expect("written");
        assert_eq!(u64::from_be_bytes(number), 42);
        assert!(tables.number(l2(0), PAGE).is_err());
    }

    #[test]
    fn memory_stays_bounded_and_nothing_is_lost() {
        let device: Arc<dyn Device> = Arc::new(MemoryDevice::default());
        let mut tables = MetadataCache::new(Arc::clone(&device), Arc::clone(&device));
        for i in 0..300 {
            tables.insert_zeroed(l2(i * PAGE)).expect("memory");
            tables.set_number(l2(i * PAGE), 16, i).expect("in the table");
            assert!(tables.pages.cached_bytes() <= CAPACITY);
        }
        for i in 0..300 {
            assert_eq!(tables.number(l2(i * PAGE), 16).expect("in the table"), i);
        }
    }

    #[test]
    fn what_a_file_has_of_a_table_is_used_and_the_rest_is_an_error() {
        let memory = Arc::new(MemoryDevice::new(vec![7; 100]));
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        let mut tables = MetadataCache::new(Arc::clone(&device), Arc::clone(&device));
        assert_eq!(tables.number(l2(0), 88).expect("there"), 0x0707_0707_0707_0707);
        for at in [96, 104, PAGE - 8] {
            let error = tables.number(l2(0), at).expect_err("beyond the end");
            assert!(error.chain().contains("looks cut off"), "{error}");
            assert!(tables.set_number(l2(0), at, 1).is_err());
        }
        assert!(tables.number(l2(PAGE), 0).is_err());
        tables.set_number(l2(0), 80, 1).expect("there");
        tables.write_back().expect("memory");
        assert_eq!(memory.len(), 100, "what was lost is not made up");
    }
}
