//! Pages of metadata in memory: which are cached, which are dirty, which is evicted next, and in which order dirty
//! pages are written back.
//!
//! ```text
//!   index   address ──► slot                           address: a device and an offset in it
//!   slots   |page|page|page|page|page|                 page: bytes, a dirty bit for each sector, the stage of its table
//!                        ▲ hand                        evicts the first page that was not used since it last came by
//!
//!   write_back   stage 0, by address │ barrier │ stage 1, by address │ barrier │ ...
//! ```
//!
//! The cache does no I/O. Its owner reads pages before it inserts them, and hands [`PageCache::write_back`] a barrier
//! and a write. A page whose write fails stays dirty.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

use diskimage_core::{Reservation, Result, saturating_index, saturating_u32};

/// Cached pages of tables. Pages of a lower stage `S` are written back before those of a higher stage, with a barrier
/// between.
#[derive(Debug)]
pub(crate) struct PageCache<S = ()> {
    slots: Vec<Page<S>>,
    index: HashMap<Address, usize, AddressHash>,
    /// Slots in which pages were found before, by the low bits of their page number. A slot may hold another page by
    /// now.
    recent: [usize; RECENT],
    /// The slot that eviction looks at next.
    hand: usize,
    /// Bytes of all pages.
    bytes: usize,
    /// The most bytes of all pages.
    capacity: usize,
    /// The number of dirty pages.
    dirty: usize,
    /// Whether clean pages are evicted before dirty ones, however recently they were used.
    clean_first: bool,
}

/// The address of a page: the index of one of its owner's devices, and an offset on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Address {
    pub(crate) device: usize,
    pub(crate) offset: u64,
}

impl Address {
    /// An offset on the only device.
    pub(crate) fn at(offset: u64) -> Self {
        Self { device: 0, offset }
    }
}

/// A part of a table, at most [`MAX_PAGE`] bytes.
#[derive(Debug)]
pub(crate) struct Page<S = ()> {
    pub(crate) address: Address,
    pub(crate) stage: S,
    pub(crate) bytes: Box<[u8]>,
    /// The number of valid bytes. The file does not have those behind: they are neither read nor written.
    pub(crate) valid: usize,
    /// One bit for each dirty sector.
    dirty: u128,
    /// Whether it was used since the hand last came by.
    used: bool,
    /// Its part of a budget, if it has one.
    pub(crate) memory: Option<Reservation>,
}

impl<S> Page<S> {
    /// A clean page, all bytes of which are valid.
    pub(crate) fn new(address: Address, stage: S, bytes: Box<[u8]>) -> Self {
        debug_assert!(bytes.len() <= MAX_PAGE);
        Self {
            address,
            stage,
            valid: bytes.len(),
            bytes,
            dirty: 0,
            used: true,
            memory: None,
        }
    }

    /// Whether a sector with bytes of `range` is dirty.
    pub(crate) fn is_dirty_in(&self, range: Range<usize>) -> bool {
        self.dirty & sectors(range) != 0
    }

    /// The runs of dirty sectors.
    fn dirty_runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut left = self.dirty;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let first = left.trailing_zeros();
            let count = (left >> first).trailing_ones();
            left &= u128::MAX.checked_shl(first + count).unwrap_or(0);
            let end = (first + count) as usize * SECTOR;
            Some(first as usize * SECTOR..end.min(self.valid))
        })
    }
}

/// The unit of an atomic write, in bytes.
const SECTOR: usize = 512;
/// Bytes of the largest page: the mask of dirty sectors has 128 bits.
pub(crate) const MAX_PAGE: usize = 128 * SECTOR;
/// The number of pages that are found without the index.
const RECENT: usize = 16;
/// Contiguous dirty sectors are written in one request of up to this many bytes.
const MAX_WRITE: usize = 1 << 20;

impl<S: Copy + Ord> PageCache<S> {
    /// A cache of at most `capacity` bytes. Eviction does not prefer clean pages.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            index: HashMap::default(),
            recent: [0; RECENT],
            hand: 0,
            bytes: 0,
            capacity,
            dirty: 0,
            clean_first: false,
        }
    }

    /// The same, but a dirty page is evicted only if all pages are dirty.
    pub(crate) fn clean_first(mut self) -> Self {
        self.clean_first = true;
        self
    }

    /// Changes the most bytes of all pages.
    #[cfg(test)]
    pub(crate) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    /// Bytes of all pages.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.bytes
    }

    /// The slot of the page at `address`, valid until a page is inserted or removed.
    pub(crate) fn find(&mut self, address: Address) -> Option<usize> {
        // The remainder is below `RECENT`.
        let recent = saturating_index(address.offset / MAX_PAGE as u64 % RECENT as u64);
        let mut slot = self.recent[recent];
        if self.slots.get(slot).is_none_or(|page| page.address != address) {
            slot = *self.index.get(&address)?;
            self.recent[recent] = slot;
        }
        self.slots.get_mut(slot)?.used = true;
        Some(slot)
    }

    /// The page in `slot`.
    pub(crate) fn page(&self, slot: usize) -> &Page<S> {
        &self.slots[slot]
    }

    /// The page in `slot`, to read more of it from the file.
    pub(crate) fn page_mut(&mut self, slot: usize) -> &mut Page<S> {
        &mut self.slots[slot]
    }

    /// The valid bytes of the page in `slot`.
    pub(crate) fn bytes(&self, slot: usize) -> &[u8] {
        let page = &self.slots[slot];
        &page.bytes[..page.valid]
    }

    /// Whether the page in `slot` is dirty.
    pub(crate) fn is_dirty(&self, slot: usize) -> bool {
        self.slots[slot].dirty != 0
    }

    /// The bytes of `range`, which must be valid, of the page in `slot`. Their sectors become dirty.
    pub(crate) fn change(&mut self, slot: usize, range: Range<usize>) -> &mut [u8] {
        let page = &mut self.slots[slot];
        let was_clean = page.dirty == 0;
        page.dirty |= sectors(range.clone());
        self.dirty += usize::from(was_clean && page.dirty != 0);
        &mut page.bytes[range]
    }

    /// The number of dirty pages.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty
    }

    /// Evicts clean pages until there is room for `len` more bytes. `false` if a dirty page is next to be evicted: the
    /// owner writes back and calls this again.
    pub(crate) fn make_room(&mut self, len: usize) -> bool {
        while self.bytes + len > self.capacity {
            match self.evict() {
                Some(true) => {}
                Some(false) => return false,
                None => break,
            }
        }
        true
    }

    /// Evicts the next page, if it is clean: the result is whether it was. `None` if there are no pages.
    pub(crate) fn evict(&mut self) -> Option<bool> {
        if self.slots.is_empty() {
            return None;
        }
        match self.next_to_evict() {
            Some(slot) if self.slots[slot].dirty == 0 => {
                self.remove_slot(slot);
                Some(true)
            }
            _ => Some(false),
        }
    }

    /// Inserts `page`, and replaces one at the same address. Returns its slot, valid until a page is inserted or
    /// removed.
    pub(crate) fn insert(&mut self, page: Page<S>) -> usize {
        self.remove(page.address);
        self.bytes += page.bytes.len();
        self.dirty += usize::from(page.dirty != 0);
        // Right behind the hand, which reaches it last.
        let (slot, last) = (self.hand.min(self.slots.len()), self.slots.len());
        self.slots.push(page);
        self.slots.swap(slot, last);
        for moved in [last, slot] {
            self.index.insert(self.slots[moved].address, moved);
        }
        self.hand = slot + 1;
        slot
    }

    /// Drops the page at `address`, with its changes.
    pub(crate) fn remove(&mut self, address: Address) {
        if let Some(slot) = self.index.get(&address) {
            self.remove_slot(*slot);
        }
    }

    /// Drops all pages, with their changes.
    pub(crate) fn clear(&mut self) {
        self.slots.clear();
        self.index.clear();
        (self.hand, self.bytes, self.dirty) = (0, 0, 0);
    }

    /// The dirty pages, in the order in which they are written.
    pub(crate) fn dirty_pages(&self) -> impl Iterator<Item = &Page<S>> {
        self.dirty_slots().into_iter().map(|slot| &self.slots[slot])
    }

    /// Writes all dirty sectors with `write`, stage by stage. Before the first write of each stage, `barrier` makes
    /// durable what pages of that stage refer to.
    ///
    /// # Errors
    /// Those of `barrier` and `write`. Sectors that were not written stay dirty.
    pub(crate) fn write_back(
        &mut self,
        mut barrier: impl FnMut(S) -> Result<()>,
        mut write: impl FnMut(S, Address, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let dirty = self.dirty_slots();
        let runs = dirty.into_iter().flat_map(|slot| {
            let runs = self.slots[slot].dirty_runs();
            runs.map(move |range| (slot, range))
        });
        let runs: Vec<(usize, Range<usize>)> = runs.collect();
        let mut stage = None;
        let mut joined = Vec::new();
        let mut rest = runs.as_slice();
        while let Some((slot, range)) = rest.first() {
            let first = &self.slots[*slot];
            if stage != Some(first.stage) {
                barrier(first.stage)?;
                stage = Some(first.stage);
            }
            let address = Address {
                offset: first.address.offset + range.start as u64,
                ..first.address
            };
            let (now, later) = rest.split_at(self.count_joined(rest));
            if let [(slot, range)] = now {
                write(first.stage, address, &self.slots[*slot].bytes[range.clone()])?;
            } else {
                joined.clear();
                for (slot, range) in now {
                    joined.extend_from_slice(&self.slots[*slot].bytes[range.clone()]);
                }
                write(first.stage, address, &joined)?;
            }
            for (slot, range) in now {
                let page = &mut self.slots[*slot];
                page.dirty &= !sectors(range.clone());
                self.dirty -= usize::from(page.dirty == 0);
            }
            rest = later;
        }
        Ok(())
    }

    /// Marks all pages clean: their owner has written them.
    pub(crate) fn mark_clean(&mut self) {
        for page in &mut self.slots {
            page.dirty = 0;
        }
        self.dirty = 0;
    }

    /// The number of leading `runs`, at least one, that are contiguous and fit into one request.
    fn count_joined(&self, runs: &[(usize, Range<usize>)]) -> usize {
        let mut end: Option<(S, Address)> = None;
        let mut len = 0;
        let joined = runs.iter().take_while(|(slot, range)| {
            let page = &self.slots[*slot];
            let mut address = page.address;
            address.offset += range.start as u64;
            let fits = end.is_none_or(|end| end == (page.stage, address) && len + range.len() <= MAX_WRITE);
            address.offset += range.len() as u64;
            len += range.len();
            end = Some((page.stage, address));
            fits
        });
        joined.count()
    }

    fn dirty_slots(&self) -> Vec<usize> {
        let dirty = (0..self.slots.len()).filter(|slot| self.slots[*slot].dirty != 0);
        let mut dirty: Vec<usize> = dirty.collect();
        dirty.sort_unstable_by_key(|slot| (self.slots[*slot].stage, self.slots[*slot].address));
        dirty
    }

    /// The slot of the page that is evicted next; `None` if all pages are dirty and clean ones go first.
    fn next_to_evict(&mut self) -> Option<usize> {
        // The first round may only clear `used` of all pages.
        for _ in 0..2 * self.slots.len() {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let page = &mut self.slots[self.hand];
            let was_used = std::mem::take(&mut page.used);
            let may_evict = page.dirty == 0 || !self.clean_first;
            if may_evict && !was_used {
                return Some(self.hand);
            }
            self.hand += 1;
        }
        None
    }

    fn remove_slot(&mut self, slot: usize) {
        let page = self.slots.swap_remove(slot);
        self.index.remove(&page.address);
        if let Some(moved) = self.slots.get(slot) {
            self.index.insert(moved.address, slot);
        }
        self.bytes -= page.bytes.len();
        self.dirty -= usize::from(page.dirty != 0);
    }
}

/// The mask of the sectors of a page that have bytes of `range`.
fn sectors(range: Range<usize>) -> u128 {
    let (first, end) = (range.start / SECTOR, range.end.div_ceil(SECTOR));
    let below = |sector: usize| {
        let sector = saturating_u32(sector);
        u128::MAX.checked_shl(sector).map_or(u128::MAX, |above| !above)
    };
    below(end) & !below(first)
}

/// Hashes addresses with one multiplication and a random seed for each cache: a crafted image cannot have table
/// addresses that collide.
#[derive(Clone, Copy, Debug)]
struct AddressHash(u64);

impl Default for AddressHash {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for AddressHash {
    type Hasher = AddressHasher;

    fn build_hasher(&self) -> AddressHasher {
        AddressHasher(self.0)
    }
}

struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 divided by the golden ratio.
        const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
        let product = u128::from(self.0 ^ number) * u128::from(FACTOR);
        let bytes = product.to_le_bytes();
        let (halves, _) = bytes.as_chunks();
        self.0 = halves
            .iter()
            .fold(0, |mixed, half| mixed ^ u64::from_le_bytes(*half));
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;

    use diskimage_core::Error;
    use proptest::prelude::*;

    use super::*;

    /// Bytes of a page in these tests, and of all pages of a cache.
    const PAGE: usize = 4 * SECTOR;
    const CAPACITY: usize = 5 * PAGE;
    const PAGES: usize = 12;

    #[derive(Clone, Debug)]
    enum Step {
        Read(usize),
        Change(usize, usize, u8),
        WriteBack { fails_after: usize },
        Remove(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..PAGES).prop_map(Step::Read),
            6 => (0..PAGES, 0..PAGE, any::<u8>()).prop_map(|(page, at, byte)| Step::Change(page, at, byte)),
            2 => (0..8_usize).prop_map(|fails_after| Step::WriteBack { fails_after }),
            1 => (0..PAGES).prop_map(Step::Remove),
        ]
    }

    /// Two devices with six pages each, of which every third page is written in the first stage.
    struct Disk {
        stored: RefCell<[Vec<u8>; 2]>,
        writes_left: Cell<usize>,
        durable: Cell<Option<usize>>,
    }

    impl Disk {
        fn address(page: usize) -> Address {
            Address {
                device: page % 2,
                offset: (page / 2 * PAGE) as u64,
            }
        }

        fn stage(page: usize) -> usize {
            usize::from(!page.is_multiple_of(3))
        }

        fn slot(&self, cache: &mut PageCache<usize>, page: usize) -> usize {
            let address = Self::address(page);
            if let Some(slot) = cache.find(address) {
                return slot;
            }
            if !cache.make_room(PAGE) {
                self.writes_left.set(usize::MAX);
                self.write_back(cache).expect("no fault");
                assert!(cache.make_room(PAGE));
            }
            let start = usize::try_from(address.offset).expect("small");
            let bytes = self.stored.borrow()[address.device][start..start + PAGE].into();
            cache.insert(Page::new(address, Self::stage(page), bytes))
        }

        fn write_back(&self, cache: &mut PageCache<usize>) -> Result<()> {
            self.durable.set(None);
            cache.write_back(
                |stage| {
                    assert!(self.durable.get() < Some(stage), "stages are written in order");
                    self.durable.set(Some(stage));
                    Ok(())
                },
                |stage, address, bytes| {
                    assert_eq!(self.durable.get(), Some(stage), "the barrier comes first");
                    let left = self.writes_left.get();
                    self.writes_left.set(left.saturating_sub(1));
                    if left == 0 {
                        return Err(Error::corrupt("the disk fails"));
                    }
                    let start = usize::try_from(address.offset).expect("small");
                    self.stored.borrow_mut()[address.device][start..start + bytes.len()]
                        .copy_from_slice(bytes);
                    Ok(())
                },
            )
        }
    }

    proptest! {
        #[test]
        fn a_cache_reads_what_was_written(steps in prop::collection::vec(step(), 1..200), clean_first: bool) {
            let disk = Disk {
                stored: RefCell::new([vec![0; PAGES / 2 * PAGE], vec![0; PAGES / 2 * PAGE]]),
                writes_left: Cell::new(usize::MAX),
                durable: Cell::new(None),
            };
            let mut cache = PageCache::new(CAPACITY);
            if clean_first {
                cache = cache.clean_first();
            }
            // The expected contents of each page.
            let mut model = vec![vec![0; PAGE]; PAGES];
            for step in steps {
                match step {
                    Step::Read(page) => {
                        let slot = disk.slot(&mut cache, page);
                        prop_assert_eq!(cache.bytes(slot), &model[page][..]);
                    }
                    Step::Change(page, at, byte) => {
                        let slot = disk.slot(&mut cache, page);
                        cache.change(slot, at..at + 1)[0] = byte;
                        model[page][at] = byte;
                    }
                    Step::WriteBack { fails_after } => {
                        disk.writes_left.set(fails_after);
                        let written = disk.write_back(&mut cache);
                        prop_assert_eq!(written.is_ok(), cache.dirty_count() == 0);
                    }
                    Step::Remove(page) => {
                        cache.remove(Disk::address(page));
                        let (Address { device, offset }, stored) = (Disk::address(page), disk.stored.borrow());
                        let start = usize::try_from(offset).expect("small");
                        model[page].copy_from_slice(&stored[device][start..start + PAGE]);
                    }
                }
                prop_assert!(cache.cached_bytes() <= CAPACITY);
                prop_assert_eq!(cache.dirty_count(), cache.dirty_pages().count());
            }
            disk.writes_left.set(usize::MAX);
            disk.write_back(&mut cache).expect("no fault");
            cache.clear();
            for (page, expected) in model.iter().enumerate() {
                let slot = disk.slot(&mut cache, page);
                prop_assert_eq!(cache.bytes(slot), &expected[..]);
            }
        }

        #[test]
        fn only_dirty_sectors_are_written_and_neighbours_in_one_request(
            changed in prop::collection::btree_set(0..3 * MAX_PAGE / SECTOR, 0..100),
        ) {
            let mut cache = PageCache::new(3 * MAX_PAGE);
            for page in [1, 0, 2] {
                let address = Address::at((page * MAX_PAGE) as u64);
                cache.insert(Page::new(address, (), vec![0; MAX_PAGE].into()));
            }
            for sector in &changed {
                let (page, at) = (sector * SECTOR / MAX_PAGE, sector * SECTOR % MAX_PAGE);
                let slot = cache.find(Address::at((page * MAX_PAGE) as u64)).expect("cached");
                cache.change(slot, at + 9..at + 10)[0] = 1;
            }
            let mut written = BTreeMap::new();
            let write = |(), address: Address, bytes: &[u8]| {
                written.insert(usize::try_from(address.offset).expect("small") / SECTOR, bytes.len() / SECTOR);
                Ok(())
            };
            cache.write_back(|()| Ok(()), write).expect("no fault");
            let sectors: Vec<usize> = written.iter().flat_map(|(first, count)| *first..first + count).collect();
            prop_assert_eq!(sectors, changed.iter().copied().collect::<Vec<_>>());
            let runs = changed.iter().filter(|sector| !changed.contains(&(*sector + 1)));
            prop_assert_eq!(written.len(), runs.count());
        }
    }

    #[test]
    fn pages_in_use_stay_and_the_owner_is_told_of_dirty_ones() {
        let page = |nth: u64| Page::new(Address::at(nth), (), vec![0; 1].into());
        let cached = |cache: &PageCache| {
            let mut found: Vec<u64> = cache.slots.iter().map(|page| page.address.offset).collect();
            found.sort_unstable();
            found
        };
        let mut cache = PageCache::new(4);
        for nth in 0..4 {
            assert!(cache.make_room(1));
            cache.insert(page(nth));
        }
        // All pages were used: the first round clears `used`, the second evicts the oldest.
        assert!(cache.make_room(1));
        assert_eq!(cached(&cache), [1, 2, 3]);
        cache.insert(page(4));
        cache.find(Address::at(1)).expect("cached");
        assert!(cache.make_room(1));
        assert_eq!(cached(&cache), [1, 3, 4], "2 was not used since");
        cache.insert(page(5));
        let slot = cache.find(Address::at(3)).expect("cached");
        cache.change(slot, 0..1);
        cache.page_mut(slot).used = false;
        assert!(!cache.make_room(1), "3 is next, and dirty");
        let mut cache = cache.clean_first();
        assert!(cache.make_room(1));
        assert!(cached(&cache).contains(&3));
        cache.mark_clean();
        assert_eq!(cache.dirty_count(), 0);
    }

    #[test]
    fn sectors_of_ranges() {
        assert_eq!(sectors(0..0), 0);
        assert_eq!(sectors(511..513), 0b11);
        assert_eq!(sectors(512..1024), 0b10);
        assert_eq!(sectors(MAX_PAGE - 1..MAX_PAGE), 1 << 127);
        assert_eq!(sectors(0..MAX_PAGE), u128::MAX);
    }
}
