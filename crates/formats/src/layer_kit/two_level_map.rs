//! Two levels of tables over clusters that are only ever added: what qed and version 1 of qcow have in common.
//!
//! ```text
//!   L1 table ──► L2 tables ──► clusters                 guest offset → host offset
//!
//!   | header | L1 table | cluster | L2 table | cluster | cluster | ...   new ones go to the end
//! ```
//!
//! Nothing is ever given up, so nothing is counted: a crash leaves behind clusters that no table refers to, never the
//! other way round. [`MetadataCache`] has the order of writing, a [`EntryCodec`] has what the formats differ in.
//!
//! # Damaged entries
//!
//! An entry that leads to the header or the L1 table is an error wherever it is met. Nothing is written to a cluster that
//! an L1 entry says is an L2 table, nor to a table that two L1 entries lead to, nor to one whose contents are none: then
//! an L1 entry leads to a guest's cluster. Two L2 entries that lead to the same cluster can only be told by walking all
//! tables, as a check does.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    Budget, ByteRange, Device, Encoded, Error, Event, HoleMeaning, Preallocation, Result, Run, RunKind,
    WritePlan, WriteRun, ZeroMode, align_up, errno, to_index,
};

use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator};
use crate::layer_kit::metadata_cache::{MetadataCache, Table, WriteOrder};
use crate::layer_kit::range_claims::{Access, RangeClaims};
use crate::layer_kit::reserved::{Pieces, Reserved};

/// What an L2 entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    /// The image below has it, or nobody.
    None,
    /// It reads as zero.
    Zero,
    /// Its bytes are at this offset.
    Host(u64),
    /// `stored` bytes at `offset` encode it.
    Encoded { offset: u64, stored: u64 },
}

/// What a format's tables look like.
pub(crate) trait EntryCodec: Debug + Send + Sync {
    /// Whether numbers in tables are big-endian.
    const BIG_ENDIAN: bool;
    /// Whether a new L2 table goes before the clusters that it is made for, or behind them.
    const TABLES_FIRST: bool;

    /// The L2 table that an L1 entry leads to, if there is one. What can be referred to lies below `end`.
    ///
    /// # Errors
    /// Entries that lead to where no table can be.
    fn l2_table(&self, word: u64, end: u64) -> Result<Option<u64>>;

    /// What an L2 entry says.
    ///
    /// # Errors
    /// Entries that lead to where no cluster can be.
    fn cluster(&self, word: u64, end: u64) -> Result<Cluster>;

    /// The L2 entry that says so.
    fn word(&self, cluster: Cluster) -> u64;

    /// What the entry of a cluster without storage says for it to read as zero, if there is a way.
    fn zero(&self) -> Option<Cluster>;

    /// What encoded clusters have to lie before for an entry to tell where.
    fn encoded_end(&self) -> u64 {
        0
    }

    /// `file` as the guest sees it around the byte that is at `guest` of the disk and at `host` of the file.
    fn view(&self, file: &Arc<dyn Device>, _guest: u64, _host: u64) -> Arc<dyn Device> {
        Arc::clone(file)
    }

    /// Told before anything is added to the file; a flag can be set that [`EntryCodec::settled`] clears.
    ///
    /// # Errors
    /// What the operating system says.
    fn before_first_change(&self) -> Result<()> {
        Ok(())
    }

    /// Told when everything has been made durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn settled(&self) -> Result<()> {
        Ok(())
    }
}

/// The sizes that follow from a header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) cluster_size: u64,
    pub(crate) l1: Table,
    /// Bytes of an L2 table.
    pub(crate) l2_len: u64,
    /// Where what is allocated ends.
    pub(crate) end: u64,
}

impl Shape {
    /// Bytes of the disk that one L2 table is for.
    fn coverage(&self) -> u64 {
        (self.l2_len / ENTRY).saturating_mul(self.cluster_size)
    }
}

/// Bytes of an entry in either table.
const ENTRY: u64 = 8;

/// What encoded clusters begin at a multiple of.
const SECTOR: u64 = 512;

/// The tables of an open image.
///
/// `state` is held while tables are read and written, never while guest data moves. Meanwhile `claims` keeps requests apart;
/// see there for the order of the two locks.
#[derive(Debug)]
pub(crate) struct TwoLevelMap<S> {
    file: Arc<dyn Device>,
    shape: Shape,
    scheme: S,
    /// The header, the backing file's name and the L1 table.
    reserved: Reserved,
    budget: Budget,
    state: Mutex<State>,
    /// Clusters that requests in flight are about to change.
    claims: RangeClaims,
}

/// What changes while an image is open.
#[derive(Debug)]
pub(crate) struct State {
    tables: MetadataCache,
    /// Behind all that is in use.
    end: u64,
    /// The L2 tables that L1 entries lead to; known from the first write on.
    l2_tables: Option<Pieces>,
    /// Those of them that were found to be tables, or made, since the image was opened.
    sound: HashSet<u64>,
}

impl<S: EntryCodec> TwoLevelMap<S> {
    /// The tables in `file`, where `reserved` is taken by other structures and the L1 table.
    pub(crate) fn new(
        file: Arc<dyn Device>,
        shape: Shape,
        scheme: S,
        reserved: Reserved,
        budget: &Budget,
    ) -> Self {
        let tables = MetadataCache::new(Arc::clone(&file), Arc::clone(&file));
        Self {
            file,
            scheme,
            reserved,
            budget: budget.clone(),
            state: Mutex::new(State {
                tables,
                end: shape.end,
                l2_tables: None,
                sound: HashSet::new(),
            }),
            shape,
            claims: RangeClaims::default(),
        }
    }

    pub(crate) fn scheme(&self) -> &S {
        &self.scheme
    }

    pub(crate) fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bytes at the start of `range` live.
    pub(crate) fn map(&self, range: ByteRange) -> Result<Run> {
        let mut state = self.lock();
        let mut found: Option<(Cluster, u64)> = None;
        let mut at = range.start();
        while at < range.end() {
            let step = match self.entry(&mut state, at) {
                Ok(step) => step,
                // What is wrong with a later entry is told when it is asked for.
                Err(_) if found.is_some() => break,
                Err(error) => return Err(error),
            };
            match found {
                None => found = Some((step.cluster, at)),
                Some((cluster, start)) if step.continues(cluster, at - start) => {}
                Some(_) => break,
            }
            at = if step.has_table {
                step.until.min(range.end())
            } else {
                self.tableless(&mut state, at)?.min(range.end())
            };
        }
        let kind = match found.map_or(Cluster::None, |(cluster, _)| cluster) {
            Cluster::None => RunKind::Unallocated { host: None },
            Cluster::Zero => RunKind::Zero { host: None },
            Cluster::Host(offset) => RunKind::Data {
                device: self.scheme.view(&self.file, range.start(), offset),
                offset,
                holes: HoleMeaning::Ignored,
            },
            Cluster::Encoded { offset, stored } => RunKind::Encoded(Encoded {
                offset,
                stored,
                cluster: range.first(1).align_out(self.shape.cluster_size),
            }),
        };
        Ok(Run {
            len: at - range.start(),
            kind,
        })
    }

    /// What the tables say of the byte at `guest`, and up to where.
    fn entry(&self, state: &mut State, guest: u64) -> Result<Step> {
        let size = self.shape.cluster_size;
        let Some(l2) = self.l2(state, guest)? else {
            let coverage = self.shape.coverage();
            return Ok(Step {
                cluster: Cluster::None,
                has_table: false,
                until: (guest / coverage + 1).saturating_mul(coverage),
            });
        };
        let word = Self::read(&mut state.tables, l2, self.l2_at(guest))?;
        let cluster = match self.scheme.cluster(word, state.end)? {
            Cluster::Host(offset) => {
                self.reserved
                    .require_outside("cluster", ByteRange::at(offset, size))?;
                Cluster::Host(offset + guest % size)
            }
            other => other,
        };
        Ok(Step {
            cluster,
            has_table: true,
            until: (guest / size + 1).saturating_mul(size),
        })
    }

    /// How far the part of the disk around `guest`, where there is no L2 table, goes on without one. Large disks of nothing
    /// have millions of such entries.
    fn tableless(&self, state: &mut State, guest: u64) -> Result<u64> {
        let (l1, at) = (self.shape.l1, self.l1_at(guest));
        let entries = state.tables.bytes(l1, at)?;
        let empty = entries.chunks_exact(8).take_while(|entry| *entry == [0; 8]);
        let count = (empty.count() as u64).max(1);
        let coverage = self.shape.coverage();
        Ok((guest / coverage + count).saturating_mul(coverage))
    }

    fn l1_at(&self, guest: u64) -> u64 {
        guest / self.shape.coverage() * ENTRY
    }

    fn l2_at(&self, guest: u64) -> u64 {
        guest % self.shape.coverage() / self.shape.cluster_size * ENTRY
    }

    fn l2(&self, state: &mut State, guest: u64) -> Result<Option<Table>> {
        let word = Self::read(&mut state.tables, self.shape.l1, self.l1_at(guest))?;
        let Some(offset) = self.scheme.l2_table(word, state.end)? else {
            return Ok(None);
        };
        let table = ByteRange::at(offset, self.shape.l2_len);
        self.reserved.require_outside("L2 table", table)?;
        Ok(Some(self.l2_table(offset)))
    }

    fn l2_table(&self, offset: u64) -> Table {
        Table {
            class: WriteOrder::L2,
            offset,
            len: self.shape.l2_len,
        }
    }

    /// The L2 table for `guest`, made if there is none.
    fn ensure_l2(&self, state: &mut State, guest: u64) -> Result<Table> {
        if let Some(table) = self.l2(state, guest)? {
            self.require_sound(state, table)?;
            return Ok(table);
        }
        let table = self.l2_table(self.take(state, self.shape.l2_len)?);
        state.tables.insert_zeroed(table)?;
        Self::write(&mut state.tables, self.shape.l1, self.l1_at(guest), table.offset)?;
        self.l2_tables(state)?.insert(table.offset)?;
        state.sound.insert(table.offset);
        Ok(table)
    }

    /// The L2 tables that L1 entries lead to. Those beyond the end of a file that was cut off count: no new cluster is to
    /// be taken for one.
    fn l2_tables<'a>(&self, state: &'a mut State) -> Result<&'a mut Pieces> {
        let known = match state.l2_tables.take() {
            Some(known) => known,
            None => {
                let (l1, len) = (self.shape.l1, self.shape.l2_len);
                let mut found = Pieces::new("L2 table", len, &self.budget);
                let mut at = 0;
                while at < l1.len {
                    let bytes = state.tables.bytes(l1, at)?;
                    at += bytes.len() as u64;
                    for word in words::<S>(bytes).filter(|word| *word != 0) {
                        let is_there = self.scheme.l2_table(word, state.end).is_ok();
                        let is_beyond = word.checked_add(len).is_some_and(|end| end > state.end);
                        if is_there || is_beyond {
                            found.add(word)?;
                        }
                    }
                }
                found.sort()
            }
        };
        Ok(state.l2_tables.insert(known))
    }

    /// Refuses to change an L2 table that two L1 entries lead to, or that is none: where most entries make no sense, an L1
    /// entry leads to guest data.
    fn require_sound(&self, state: &mut State, table: Table) -> Result<()> {
        if state.sound.contains(&table.offset) {
            return Ok(());
        }
        self.l2_tables(state)?.require_unshared(table.offset)?;
        let (mut sense, mut nonsense) = (0_u64, 0_u64);
        let mut at = 0;
        while at < table.len {
            let bytes = state.tables.bytes(table, at)?;
            at += bytes.len() as u64;
            for word in words::<S>(bytes).filter(|word| *word != 0) {
                if self.makes_sense(word, state.end) {
                    sense += 1;
                } else {
                    nonsense += 1;
                }
            }
        }
        if nonsense > sense {
            return Err(Error::corrupt(format!(
                "What lies at {:#x} is no L2 table",
                table.offset
            )));
        }
        state.sound.insert(table.offset);
        Ok(())
    }

    /// Whether an L2 entry leads to where a cluster can be.
    fn makes_sense(&self, word: u64, end: u64) -> bool {
        let size = self.shape.cluster_size;
        let place = match self.scheme.cluster(word, end) {
            Ok(Cluster::Host(offset)) => ByteRange::at(offset, size),
            Ok(Cluster::Encoded { offset, stored }) => ByteRange::at(offset, stored),
            Ok(Cluster::None | Cluster::Zero) => return true,
            Err(_) => return false,
        };
        place.end() <= align_up(end, size) && self.reserved.find(place).is_none()
    }

    /// Refuses to change what the guest has at `offset`, `len` bytes, if an L2 table is there.
    fn require_data(&self, state: &mut State, offset: u64, len: u64) -> Result<()> {
        self.l2_tables(state)?
            .require_outside("cluster", ByteRange::at(offset, len))
    }

    fn set(&self, state: &mut State, guest: u64, cluster: Cluster) -> Result<()> {
        let l2 = self.ensure_l2(state, guest)?;
        Self::write(
            &mut state.tables,
            l2,
            self.l2_at(guest),
            self.scheme.word(cluster),
        )
    }

    /// Whole clusters of storage, `len` bytes. The file reaches to its end from then on: what is referred to has to be
    /// there.
    fn take(&self, state: &mut State, len: u64) -> Result<u64> {
        let offset = self.take_at(state, self.shape.cluster_size, len)?;
        if self.file.len() < state.end {
            self.file.resize(state.end, Preallocation::Off)?;
        }
        Ok(offset)
    }

    /// Storage for `len` bytes at a multiple of `unit`.
    fn take_at(&self, state: &mut State, unit: u64, len: u64) -> Result<u64> {
        let offset = state.end.checked_next_multiple_of(unit);
        let end = offset.and_then(|offset| offset.checked_add(len));
        let (Some(offset), Some(end)) = (offset, end.filter(|end| i64::try_from(*end).is_ok())) else {
            return Err(Error::from_errno(errno::EFBIG));
        };
        let new = ByteRange::new(offset, end);
        self.reserved.require_outside("new cluster", new)?;
        self.l2_tables(state)?.require_outside("new cluster", new)?;
        self.scheme.before_first_change()?;
        state.end = end;
        Ok(offset)
    }

    /// Sets aside where the bytes of `range` go.
    pub(crate) fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        let cover = range.align_out(self.shape.cluster_size);
        let plan = AllocatingPlan::new(self, cover, |state, plan| self.draft(state, plan, range))?;
        Ok(Box::new(plan))
    }

    /// Finds or allocates storage for the clusters that `range` touches.
    fn draft(&self, state: &mut State, plan: &mut AllocatingPlan<'_, Self>, range: ByteRange) -> Result<()> {
        let coverage = if S::TABLES_FIRST {
            self.shape.coverage()
        } else {
            u64::MAX
        };
        let mut rest = range.align_out(self.shape.cluster_size);
        while !rest.is_empty() {
            let part = rest.first((rest.start() / coverage + 1).saturating_mul(coverage) - rest.start());
            rest = rest.skip(part.len());
            if S::TABLES_FIRST {
                self.ensure_l2(state, part.start())?;
            }
            self.draft_clusters(state, plan, part, range)?;
        }
        plan.view_runs(|guest, host| self.scheme.view(&self.file, guest, host));
        Ok(())
    }

    /// The same for the clusters of `cover`. Those without storage get it in one piece.
    fn draft_clusters(
        &self,
        state: &mut State,
        plan: &mut AllocatingPlan<'_, Self>,
        cover: ByteRange,
        range: ByteRange,
    ) -> Result<()> {
        let size = self.shape.cluster_size;
        let step = to_index(size)?;
        let starts = || (cover.start()..cover.end()).step_by(step);
        let mut present = Vec::new();
        for at in starts() {
            present.push(match self.entry(state, at)?.cluster {
                Cluster::Host(offset) => {
                    self.require_data(state, offset, size)?;
                    Some(offset)
                }
                Cluster::None | Cluster::Zero | Cluster::Encoded { .. } => {
                    // Its entry will change: what cannot is told before anything is written.
                    if let Some(table) = self.l2(state, at)? {
                        self.require_sound(state, table)?;
                    }
                    None
                }
            });
        }
        let missing = present.iter().filter(|offset| offset.is_none()).count() as u64;
        let mut new = NewClusters::default();
        if missing > 0 {
            new.storage = ByteRange::at(self.take(state, missing * size)?, missing * size);
        }
        let mut fresh = new.storage.start();
        for (at, offset) in starts().zip(present) {
            let cluster = ByteRange::at(at, size);
            let (guest, offset) = match offset {
                Some(offset) => {
                    let part = cluster.intersect(range);
                    (part, offset + (part.start() - at))
                }
                None => {
                    new.entries.push((at, Cluster::Host(fresh)));
                    fresh += size;
                    (cluster, fresh - size)
                }
            };
            plan.add_run(WriteRun {
                guest,
                device: Arc::clone(&self.file),
                offset,
            });
        }
        if missing > 0 {
            plan.add_change(cover, new);
        }
        Ok(())
    }

    /// Stores the encoded form of the cluster at `guest`.
    ///
    /// # Errors
    /// What the operating system says, and a file that is too long.
    pub(crate) fn write_encoded(&self, guest: u64, bytes: &[u8]) -> Result<()> {
        let stored = bytes.len() as u64;
        let size = self.shape.cluster_size;
        if stored == 0 || stored >= size || !guest.is_multiple_of(size) {
            return Err(Error::invalid("Not the compressed form of one cluster"));
        }
        let cover = ByteRange::at(guest, size);
        let mut offset = 0;
        let plan = AllocatingPlan::new(self, cover, |state, plan| {
            if S::TABLES_FIRST {
                self.ensure_l2(state, guest)?;
            }
            offset = self.take_at(state, SECTOR, stored)?;
            let new = NewClusters {
                storage: ByteRange::at(offset, stored),
                entries: vec![(guest, Cluster::Encoded { offset, stored })],
            };
            plan.add_change(cover, new);
            Ok(())
        })?;
        if offset >= self.scheme.encoded_end() {
            return Err(Error::from_errno(errno::EFBIG));
        }
        self.file.event(Event::WRITE_COMPRESSED);
        self.file.write_at(bytes, offset)?;
        Box::new(plan).commit()
    }

    /// Makes whole clusters read as zero. Those that have storage keep it: there is no way to give it up.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](diskimage_core::ErrorKind::Unsupported) if entries cannot say so.
    pub(crate) fn zero_clusters(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let zero = self
            .scheme
            .zero()
            .ok_or_else(|| Error::unsupported("Clusters without storage show what is below"))?;
        let cover = range.align_out(self.shape.cluster_size);
        let (_claim, state) = self.claims.claim(cover, Access::Exclusive, || self.lock());
        drop(state);
        let mut rest = cover;
        while !rest.is_empty() {
            let coverage = self.shape.coverage();
            let part = rest.first((rest.start() / coverage + 1).saturating_mul(coverage) - rest.start());
            rest = rest.skip(part.len());
            for (device, stored) in self.zero_entries(part, zero)? {
                device.write_zeroes(stored, mode)?;
            }
        }
        Ok(())
    }

    /// Makes clusters of one L2 table zero that have no storage of their own, and tells the storage of the others.
    fn zero_entries(&self, range: ByteRange, zero: Cluster) -> Result<Vec<(Arc<dyn Device>, ByteRange)>> {
        let mut state = self.lock();
        let mut stored: Vec<(Arc<dyn Device>, ByteRange)> = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            match self.entry(&mut state, at)?.cluster {
                Cluster::Host(offset) => {
                    self.require_data(&mut state, offset, self.shape.cluster_size)?;
                    match stored.last_mut() {
                        Some((_, last)) if last.end() == offset => {
                            *last = ByteRange::at(last.start(), last.len() + self.shape.cluster_size);
                        }
                        _ => {
                            let device = self.scheme.view(&self.file, at, offset);
                            stored.push((device, ByteRange::at(offset, self.shape.cluster_size)));
                        }
                    }
                }
                other if other == zero => {}
                _ => {
                    self.scheme.before_first_change()?;
                    self.set(&mut state, at, zero)?;
                }
            }
            at += self.shape.cluster_size;
        }
        Ok(stored)
    }

    /// Gives up all clusters: the file ends at `end`, behind the L1 table and whatever else is not theirs.
    pub(crate) fn make_empty(&self, end: u64) -> Result<()> {
        let mut state = self.claims.wait_idle(|| self.lock());
        // What is forgotten is written first, so that it is not written later.
        state.tables.clear()?;
        let l1 = self.shape.l1;
        self.file
            .write_zeroes(ByteRange::at(l1.offset, l1.len), ZeroMode::KeepAllocated)?;
        // Nothing may refer to what is no longer there.
        self.file.flush()?;
        self.file.resize(end, Preallocation::Off)?;
        state.end = end;
        state.forget_l2_tables();
        Ok(())
    }

    /// Writes all changes and makes them durable.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        state.tables.write_back()?;
        self.file.event(Event::FLUSH_TO_DISK);
        state.tables.sync()?;
        self.scheme.settled()
    }

    fn read(tables: &mut MetadataCache, table: Table, at: u64) -> Result<u64> {
        tables.number(table, at).map(Self::word)
    }

    fn write(tables: &mut MetadataCache, table: Table, at: u64, word: u64) -> Result<()> {
        tables.set_number(table, at, Self::word(word))
    }

    /// A big-endian number as the format means it, and the other way round.
    fn word(number: u64) -> u64 {
        if S::BIG_ENDIAN {
            number
        } else {
            number.swap_bytes()
        }
    }

    /// Walks the tables with nobody else about.
    pub(crate) fn walk<T>(&self, walk: impl FnOnce(&mut Walk<'_, S>) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        // What is mended may be an entry that leads to a table.
        state.forget_l2_tables();
        walk(&mut Walk {
            tree: self,
            state: &mut state,
        })
    }
}

impl State {
    /// L1 entries are about to change, or have changed.
    fn forget_l2_tables(&mut self) {
        self.l2_tables = None;
        self.sound.clear();
    }
}

/// The entries in `bytes` of a table.
fn words<S: EntryCodec>(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (entries, _) = bytes.as_chunks();
    entries
        .iter()
        .map(|entry| TwoLevelMap::<S>::word(u64::from_be_bytes(*entry)))
}

/// The tables, entry by entry.
pub(crate) struct Walk<'a, S> {
    tree: &'a TwoLevelMap<S>,
    state: &'a mut State,
}

impl<S: EntryCodec> Walk<'_, S> {
    /// The L1 table.
    pub(crate) fn l1(&self) -> Table {
        self.tree.shape.l1
    }

    /// The L2 table at `offset`.
    pub(crate) fn l2(&self, offset: u64) -> Table {
        self.tree.l2_table(offset)
    }

    /// Where what is allocated ends.
    pub(crate) fn end(&self) -> u64 {
        self.state.end
    }

    /// The entries that are not zero in the page of `table` that byte `at` is in, as pairs of byte and entry, and where
    /// the next page starts.
    ///
    /// # Errors
    /// What the operating system says.
    pub(crate) fn page(&mut self, table: Table, at: u64) -> Result<(Vec<(u64, u64)>, u64)> {
        let bytes = self.state.tables.bytes(table, at)?;
        let words = (at..).step_by(8).zip(words::<S>(bytes));
        let used = words.filter(|(_, word)| *word != 0);
        Ok((used.collect(), at + bytes.len() as u64))
    }

    /// Makes the entry at byte `at` of `table` say that there is nothing.
    ///
    /// # Errors
    /// What the operating system says.
    pub(crate) fn clear(&mut self, table: Table, at: u64) -> Result<()> {
        TwoLevelMap::<S>::write(&mut self.state.tables, table, at, 0)
    }
}

/// What the tables say of some bytes that follow each other, and up to where.
#[derive(Clone, Copy, Debug)]
struct Step {
    cluster: Cluster,
    /// Whether an L2 table says so.
    has_table: bool,
    until: u64,
}

impl Step {
    /// Whether it goes on with `before`, which started `len` bytes earlier.
    fn continues(&self, before: Cluster, len: u64) -> bool {
        match (before, self.cluster) {
            (Cluster::Host(at), Cluster::Host(next)) => at.checked_add(len) == Some(next),
            (Cluster::Encoded { .. }, _) => false,
            (before, next) => before == next,
        }
    }
}

/// Clusters for which storage was allocated.
pub(crate) struct NewClusters {
    /// The storage, in one piece.
    storage: ByteRange,
    /// Guest clusters, and what their entries are to say.
    entries: Vec<(u64, Cluster)>,
}

impl Default for NewClusters {
    fn default() -> Self {
        Self {
            storage: ByteRange::new(0, 0),
            entries: Vec::new(),
        }
    }
}

impl<S: EntryCodec> Allocator for TwoLevelMap<S> {
    type State = State;
    type Change = NewClusters;
    const ACCESS: Access = Access::Exclusive;

    fn lock(&self) -> MutexGuard<'_, State> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut State, changes: &mut Vec<NewClusters>) -> Result<()> {
        // After a failure, tables may lead to any of them.
        for new in std::mem::take(changes) {
            for (guest, cluster) in new.entries {
                self.scheme.before_first_change()?;
                self.set(state, guest, cluster)?;
            }
        }
        Ok(())
    }

    /// Frees what was allocated last, if nothing was allocated behind it: the rest leaks.
    fn free(&self, state: &mut State, mut changes: Vec<NewClusters>) {
        let last = changes.pop().unwrap_or_default().storage;
        if !last.is_empty() && last.end() == state.end {
            // A file that stays longer has leaks, which harm nothing.
            let _ = self.file.resize(last.start(), Preallocation::Off);
            state.end = last.start();
        }
    }
}
