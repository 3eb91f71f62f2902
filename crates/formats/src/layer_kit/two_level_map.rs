//! L1 and L2 tables over clusters that are allocated and never freed: the common part of qed and version 1 of qcow.
//!
//! ```text
//!   L1 table ──► L2 tables ──► clusters                 guest offset → host offset
//!
//!   | header | L1 table | cluster | L2 table | cluster | cluster | ...   allocation is at the end
//! ```
//!
//! Storage is never freed, so there are no refcounts. A crash leaves clusters that no table refers to, never an entry
//! without its cluster: [`MetadataCache`] has the order of writing. An [`EntryCodec`] has the differences of the
//! formats.
//!
//! # Damaged entries
//!
//! An entry that refers to the header or the L1 table is an error for reads and writes. Guest data is not written to a
//! cluster that is an L2 table of some L1 entry. An L2 table is not changed if two L1 entries refer to it, or if most
//! of its entries are invalid: then the L1 entry refers to a guest's cluster. Two L2 entries that refer to the same
//! cluster are only found by a walk over all tables, as in a check.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    Budget, ByteRange, Device, Encoded, EncodedCluster, Error, Event, HoleMeaning, Preallocation, Result,
    Run, RunKind, WritePlan, WriteRun, ZeroMode, errno, to_index,
};

use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator};
use crate::layer_kit::encoded_write::{self, EncodedWrite, Piece};
use crate::layer_kit::metadata_cache::{MetadataCache, Table, WriteOrder};
use crate::layer_kit::offset::{GuestOffset, HostOffset};
use crate::layer_kit::range_claims::{Access, RangeClaims};
use crate::layer_kit::reserved::{Pieces, Reserved};

/// The state of a cluster, decoded from its L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    /// It is unallocated: it reads from the backing image, or as zero.
    None,
    /// It reads as zero.
    Zero,
    /// It is stored at this offset.
    Host(HostOffset),
    /// It is compressed: `stored` bytes at `offset`.
    Encoded { offset: HostOffset, stored: u64 },
}

/// The encoding of a format's table entries.
pub(crate) trait EntryCodec: Debug + Send + Sync {
    /// Whether numbers in tables are big-endian.
    const BIG_ENDIAN: bool;
    /// Whether a new L2 table is allocated before the clusters that it maps, or after them.
    const TABLES_FIRST: bool;

    /// The offset of the L2 table that an L1 entry refers to, `None` if it is unallocated. Storage ends at `end`.
    ///
    /// # Errors
    /// An invalid offset.
    fn l2_table(&self, entry: u64, end: HostOffset) -> Result<Option<HostOffset>>;

    /// Decodes an L2 entry. Storage ends at `end`.
    ///
    /// # Errors
    /// An invalid offset.
    fn cluster(&self, entry: u64, end: HostOffset) -> Result<Cluster>;

    /// Encodes an L2 entry.
    fn encode(&self, cluster: Cluster) -> u64;

    /// The state of a cluster without storage that reads as zero, if the format has one.
    fn zero(&self) -> Option<Cluster>;

    /// The limit of host offsets of compressed clusters: an entry has no bits for larger ones.
    fn encoded_end(&self) -> HostOffset {
        HostOffset::new(0)
    }

    /// `file` as guest data is read and written around `guest`, which is stored at `host`: decrypted, if the image is
    /// encrypted.
    fn view(&self, file: &Arc<dyn Device>, _guest: GuestOffset, _host: HostOffset) -> Arc<dyn Device> {
        Arc::clone(file)
    }

    /// Called before storage is allocated and before entries change; a format can set a flag in its header, which
    /// [`EntryCodec::after_flush`] clears.
    ///
    /// # Errors
    /// Those of the device.
    fn before_first_change(&self) -> Result<()> {
        Ok(())
    }

    /// Called after a flush, when all tables and all guest data are durable.
    ///
    /// # Errors
    /// Those of the device.
    fn after_flush(&self) -> Result<()> {
        Ok(())
    }
}

/// The sizes and offsets of the tables, from the header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) cluster_size: u64,
    pub(crate) l1: Table,
    /// Bytes of an L2 table.
    pub(crate) l2_len: u64,
    /// The end of the allocated storage.
    pub(crate) end: HostOffset,
}

impl Shape {
    /// Guest bytes that one L2 table maps.
    fn coverage(&self) -> u64 {
        (self.l2_len / ENTRY).saturating_mul(self.cluster_size)
    }
}

/// Bytes of an entry in either table.
const ENTRY: u64 = ENTRY_LEN as u64;
/// The same, for slices.
const ENTRY_LEN: usize = 8;

/// The alignment of compressed clusters, in bytes.
const SECTOR: u64 = 512;

/// The tables of an open image.
///
/// `state` is locked while tables are read and written, never during guest I/O. `claims` serializes requests to the
/// same clusters; [`RangeClaims`] says in which order the two are locked.
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
    /// The end of the allocated storage, where the next allocation begins.
    end: HostOffset,
    /// The L2 tables that L1 entries refer to; read before the first write.
    l2_tables: Option<Pieces>,
    /// Offsets of the L2 tables that were validated or created since the image was opened.
    sound: HashSet<u64>,
}

impl<S: EntryCodec> TwoLevelMap<S> {
    /// The tables in `file`, whose header, backing file's name and L1 table are `reserved`.
    pub(crate) fn new(
        file: Arc<dyn Device>,
        shape: Shape,
        scheme: S,
        reserved: Reserved,
        budget: &Budget,
    ) -> Self {
        let tables = MetadataCache::new(Arc::clone(&file), Arc::clone(&file)).with_budget(budget);
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

    /// Maps the run at the start of `range`.
    pub(crate) fn map(&self, range: ByteRange) -> Result<Run> {
        let mut state = self.lock();
        let mut found: Option<(Cluster, GuestOffset)> = None;
        let (start, end) = (GuestOffset::new(range.start()), GuestOffset::new(range.end()));
        let mut at = start;
        while at < end {
            let step = match self.entry(&mut state, at) {
                Ok(step) => step,
                // A damaged entry further on ends the run. It is an error when a run begins with it.
                Err(_) if found.is_some() => break,
                Err(error) => return Err(error),
            };
            match found {
                None => found = Some((step.cluster, at)),
                Some((cluster, begin)) if step.continues(cluster, at.since(begin)) => {}
                Some(_) => break,
            }
            at = match step {
                Step { has_table: false, .. } => self.tableless(&mut state, at)?.min(end),
                // Equal entries without storage are one run; many tables have nothing else.
                Step {
                    cluster: Cluster::None | Cluster::Zero,
                    ..
                } => self.unstored(&mut state, at)?.min(end),
                Step { until, .. } => until.min(end),
            };
        }
        let kind = match found.map_or(Cluster::None, |(cluster, _)| cluster) {
            Cluster::None => RunKind::Unallocated { host: None },
            Cluster::Zero => RunKind::Zero { host: None },
            Cluster::Host(offset) => RunKind::Data {
                device: self.scheme.view(&self.file, start, offset),
                offset: offset.get(),
                holes: HoleMeaning::Ignored,
            },
            Cluster::Encoded { offset, stored } => RunKind::Encoded(Encoded {
                offset: offset.get(),
                stored,
                cluster: range.first(1).align_out(self.shape.cluster_size),
            }),
        };
        Ok(Run {
            len: at.since(start),
            kind,
        })
    }

    /// The state of the cluster at `guest`, and the end of the range for which it holds.
    fn entry(&self, state: &mut State, guest: GuestOffset) -> Result<Step> {
        let size = self.shape.cluster_size;
        let Some(l2) = self.l2(state, guest)? else {
            return Ok(Step {
                cluster: Cluster::None,
                has_table: false,
                until: guest.unit_end(self.shape.coverage()),
            });
        };
        let at = self.l2_at(guest);
        let entry = match state.tables.hole(l2, at)? {
            0..ENTRY => Self::read(&mut state.tables, l2, at)?,
            _ => 0,
        };
        let cluster = match self.scheme.cluster(entry, state.end)? {
            Cluster::Host(offset) => {
                self.reserved.require_outside("cluster", offset.range(size))?;
                Cluster::Host(offset.plus(guest.within(size)))
            }
            other => other,
        };
        Ok(Step {
            cluster,
            has_table: true,
            until: guest.unit_end(size),
        })
    }

    /// The guest offset at which a run of missing L2 tables ends; `guest` lies in its first table's range. The run ends
    /// at the latest with a page of the L1 table. Large empty disks have millions of such entries.
    fn tableless(&self, state: &mut State, guest: GuestOffset) -> Result<GuestOffset> {
        let (l1, at) = (self.shape.l1, self.l1_at(guest));
        let entries = state.tables.bytes(l1, at)?;
        let empty = entries.chunks_exact(8).take_while(|entry| *entry == [0; 8]);
        let count = (empty.count() as u64).max(1);
        let coverage = self.shape.coverage();
        let end = (guest.unit(coverage) + count).saturating_mul(coverage);
        Ok(GuestOffset::new(end))
    }

    /// The end of the run of equal entries of an L2 table from that of `guest` on, a cluster without storage. The run ends
    /// at the latest with a page of the table.
    fn unstored(&self, state: &mut State, guest: GuestOffset) -> Result<GuestOffset> {
        let (size, at) = (self.shape.cluster_size, self.l2_at(guest));
        let count = match self.l2(state, guest)? {
            Some(l2) => match state.tables.hole(l2, at)? / ENTRY {
                0 => state.tables.count_equal(l2, at, ENTRY_LEN)?,
                count => count,
            },
            None => 1,
        };
        Ok(guest.align_down(size).plus(count.max(1).saturating_mul(size)))
    }

    fn l1_at(&self, guest: GuestOffset) -> u64 {
        guest.unit(self.shape.coverage()) * ENTRY
    }

    fn l2_at(&self, guest: GuestOffset) -> u64 {
        guest.within(self.shape.coverage()) / self.shape.cluster_size * ENTRY
    }

    fn l2(&self, state: &mut State, guest: GuestOffset) -> Result<Option<Table>> {
        let entry = Self::read(&mut state.tables, self.shape.l1, self.l1_at(guest))?;
        let Some(offset) = self.scheme.l2_table(entry, state.end)? else {
            return Ok(None);
        };
        let table = offset.range(self.shape.l2_len);
        self.reserved.require_outside("L2 table", table)?;
        Ok(Some(self.l2_table(offset)))
    }

    fn l2_table(&self, offset: HostOffset) -> Table {
        Table {
            class: WriteOrder::L2,
            offset: offset.get(),
            len: self.shape.l2_len,
        }
    }

    /// The L2 table for `guest`, allocated if it is missing.
    fn ensure_l2(&self, state: &mut State, guest: GuestOffset) -> Result<Table> {
        if let Some(table) = self.l2(state, guest)? {
            self.require_sound(state, table)?;
            return Ok(table);
        }
        let table = self.l2_table(self.allocate(state, self.shape.l2_len)?);
        state.tables.insert_zeroed(table)?;
        Self::write(&mut state.tables, self.shape.l1, self.l1_at(guest), table.offset)?;
        self.l2_tables(state)?.insert(table.offset)?;
        state.sound.insert(table.offset);
        Ok(table)
    }

    /// The L2 tables that L1 entries refer to, with those beyond the end of a truncated file: a new cluster at such an
    /// offset would become a table.
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
                    for entry in entries::<S>(bytes).filter(|entry| *entry != 0) {
                        let is_there = self.scheme.l2_table(entry, state.end).is_ok();
                        let is_beyond = HostOffset::new(entry)
                            .checked_plus(len)
                            .is_some_and(|end| end > state.end);
                        if is_there || is_beyond {
                            found.add(entry)?;
                        }
                    }
                }
                found.sort()
            }
        };
        Ok(state.l2_tables.insert(known))
    }

    /// Refuses to change an L2 table that two L1 entries refer to, or that is not a table: where most entries are
    /// invalid, the L1 entry refers to guest data.
    fn require_sound(&self, state: &mut State, table: Table) -> Result<()> {
        if state.sound.contains(&table.offset) {
            return Ok(());
        }
        self.l2_tables(state)?.require_unshared(table.offset)?;
        let (mut valid, mut invalid) = (0_u64, 0_u64);
        let mut at = 0;
        while at < table.len {
            let bytes = state.tables.bytes(table, at)?;
            at += bytes.len() as u64;
            for entry in entries::<S>(bytes).filter(|entry| *entry != 0) {
                if self.is_valid_entry(entry, state.end) {
                    valid += 1;
                } else {
                    invalid += 1;
                }
            }
        }
        if invalid > valid {
            return Err(Error::corrupt(format!(
                "What lies at {:#x} is no L2 table",
                table.offset
            )));
        }
        state.sound.insert(table.offset);
        Ok(())
    }

    /// Whether an L2 entry is valid: its cluster, if it has one, is inside the file and outside of the reserved ranges.
    fn is_valid_entry(&self, entry: u64, end: HostOffset) -> bool {
        let size = self.shape.cluster_size;
        let stored = match self.scheme.cluster(entry, end) {
            Ok(Cluster::Host(offset)) => offset.range(size),
            Ok(Cluster::Encoded { offset, stored }) => offset.range(stored),
            Ok(Cluster::None | Cluster::Zero) => return true,
            Err(_) => return false,
        };
        stored.end() <= end.align_up(size).get() && self.reserved.find(stored).is_none()
    }

    /// Refuses to write guest data to `len` bytes at `offset` if they overlap an L2 table.
    fn require_data(&self, state: &mut State, offset: HostOffset, len: u64) -> Result<()> {
        self.l2_tables(state)?
            .require_outside("cluster", offset.range(len))
    }

    fn set(&self, state: &mut State, guest: GuestOffset, cluster: Cluster) -> Result<()> {
        let l2 = self.ensure_l2(state, guest)?;
        Self::write(
            &mut state.tables,
            l2,
            self.l2_at(guest),
            self.scheme.encode(cluster),
        )
    }

    /// Allocates whole clusters, `len` bytes. The file is extended to their end: entries must not refer to storage
    /// beyond the end of the file.
    fn allocate(&self, state: &mut State, len: u64) -> Result<HostOffset> {
        let offset = self.allocate_at(state, self.shape.cluster_size, len)?;
        if self.file.len() < state.end.get() {
            self.file.resize(state.end.get(), Preallocation::Off)?;
        }
        Ok(offset)
    }

    /// Allocates `len` bytes at a multiple of `unit`.
    fn allocate_at(&self, state: &mut State, unit: u64, len: u64) -> Result<HostOffset> {
        let offset = state.end.get().checked_next_multiple_of(unit);
        let end = offset.and_then(|offset| offset.checked_add(len));
        let (Some(offset), Some(end)) = (offset, end.filter(|end| i64::try_from(*end).is_ok())) else {
            return Err(Error::from_errno(errno::EFBIG));
        };
        let new = ByteRange::new(offset, end);
        self.reserved.require_outside("new cluster", new)?;
        self.l2_tables(state)?.require_outside("new cluster", new)?;
        self.scheme.before_first_change()?;
        state.end = HostOffset::new(end);
        Ok(HostOffset::new(offset))
    }

    /// Allocates storage for `range`.
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
                self.ensure_l2(state, GuestOffset::new(part.start()))?;
            }
            self.draft_clusters(state, plan, part, range)?;
        }
        plan.view_runs(|guest, host| self.scheme.view(&self.file, guest, host));
        Ok(())
    }

    /// The same for the clusters of `cover`. Storage for all unallocated ones is contiguous.
    fn draft_clusters(
        &self,
        state: &mut State,
        plan: &mut AllocatingPlan<'_, Self>,
        cover: ByteRange,
        range: ByteRange,
    ) -> Result<()> {
        let size = self.shape.cluster_size;
        let step = to_index(size)?;
        let starts = || (cover.start()..cover.end()).step_by(step).map(GuestOffset::new);
        let mut present = Vec::new();
        for at in starts() {
            present.push(match self.entry(state, at)?.cluster {
                Cluster::Host(offset) => {
                    self.require_data(state, offset, size)?;
                    Some(offset)
                }
                Cluster::None | Cluster::Zero | Cluster::Encoded { .. } => {
                    // The cluster's entry will change: a damaged table is an error before any data is written.
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
            new.storage = self.allocate(state, missing * size)?.range(missing * size);
        }
        let mut fresh = HostOffset::new(new.storage.start());
        for (at, offset) in starts().zip(present) {
            let cluster = at.range(size);
            let (guest, offset) = match offset {
                Some(offset) => {
                    let part = cluster.intersect(range);
                    (part, offset.plus(GuestOffset::new(part.start()).since(at)))
                }
                None => {
                    let offset = fresh;
                    new.entries.push((at, Cluster::Host(offset)));
                    fresh = offset.plus(size);
                    (cluster, offset)
                }
            };
            plan.add_run(WriteRun {
                guest,
                device: Arc::clone(&self.file),
                offset: offset.get(),
            });
        }
        if missing > 0 {
            plan.add_change(cover, new);
        }
        Ok(())
    }

    /// Allocates storage for the encoded form of clusters.
    ///
    /// # Errors
    /// Those of the device, and an offset that an entry cannot hold.
    pub(crate) fn plan_encoded(&self, clusters: &[EncodedCluster]) -> Result<EncodedWrite<'_, Self>> {
        let size = self.shape.cluster_size;
        let is_one = |cluster: &EncodedCluster| {
            let len = cluster.bytes.len() as u64;
            len > 0 && len < size && cluster.offset.is_multiple_of(size)
        };
        if !clusters.iter().all(is_one) {
            return Err(Error::invalid("Not the compressed form of one cluster"));
        }
        let (first, last) = encoded_write::in_order(clusters)?;
        let cover = ByteRange::new(first, last.saturating_add(size));
        let mut pieces = Vec::with_capacity(clusters.len());
        let plan = AllocatingPlan::new(self, cover, |state, plan| {
            for cluster in clusters {
                let guest = GuestOffset::new(cluster.offset);
                let stored = cluster.bytes.len() as u64;
                if S::TABLES_FIRST {
                    self.ensure_l2(state, guest)?;
                }
                let offset = self.allocate_at(state, SECTOR, stored)?;
                let new = NewClusters {
                    storage: offset.range(stored),
                    entries: vec![(guest, Cluster::Encoded { offset, stored })],
                };
                plan.add_change(guest.range(size), new);
                if offset >= self.scheme.encoded_end() {
                    return Err(Error::from_errno(errno::EFBIG));
                }
                pieces.push(Piece::plain(offset.get(), &cluster.bytes));
            }
            Ok(())
        })?;
        Ok(EncodedWrite {
            plan,
            device: Arc::clone(&self.file),
            pieces,
        })
    }

    /// Makes whole clusters read as zero. Allocated clusters keep their storage, which cannot be freed; zeroes are
    /// written to it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](diskimage_core::ErrorKind::Unsupported) if the format has no state for zero clusters.
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

    /// Zeroes the entries of clusters of one L2 table that have no plain storage, and returns the storage of the
    /// others.
    fn zero_entries(&self, range: ByteRange, zero: Cluster) -> Result<Vec<(Arc<dyn Device>, ByteRange)>> {
        let mut state = self.lock();
        let mut stored: Vec<(Arc<dyn Device>, ByteRange)> = Vec::new();
        let mut at = GuestOffset::new(range.start());
        while at.get() < range.end() {
            match self.entry(&mut state, at)?.cluster {
                Cluster::Host(offset) => {
                    self.require_data(&mut state, offset, self.shape.cluster_size)?;
                    match stored.last_mut() {
                        Some((_, last)) if last.end() == offset.get() => {
                            *last = ByteRange::at(last.start(), last.len() + self.shape.cluster_size);
                        }
                        _ => {
                            let device = self.scheme.view(&self.file, at, offset);
                            stored.push((device, offset.range(self.shape.cluster_size)));
                        }
                    }
                }
                other if other == zero => {}
                _ => {
                    self.scheme.before_first_change()?;
                    self.set(&mut state, at, zero)?;
                }
            }
            at = at.plus(self.shape.cluster_size);
        }
        Ok(stored)
    }

    /// Frees all clusters and L2 tables by truncating the file to `end`, which is behind the L1 table and the other
    /// reserved ranges.
    pub(crate) fn make_empty(&self, end: HostOffset) -> Result<()> {
        let mut state = self.claims.wait_idle(|| self.lock());
        // Dirty pages are written back before they leave the cache.
        state.tables.clear()?;
        let l1 = self.shape.l1;
        self.file.write_zeroes(l1.range(), ZeroMode::KeepAllocated)?;
        // The empty L1 table must be durable before the storage that it referred to is truncated.
        self.file.flush()?;
        self.file.resize(end.get(), Preallocation::Off)?;
        state.end = end;
        state.forget_l2_tables();
        Ok(())
    }

    /// Writes back all dirty tables, and makes them and the guest data durable.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        state.tables.write_back()?;
        self.file.event(Event::FLUSH_TO_DISK);
        state.tables.sync()?;
        self.scheme.after_flush()
    }

    fn read(tables: &mut MetadataCache, table: Table, at: u64) -> Result<u64> {
        tables.number(table, at).map(Self::in_byte_order)
    }

    fn write(tables: &mut MetadataCache, table: Table, at: u64, entry: u64) -> Result<()> {
        tables.set_number(table, at, Self::in_byte_order(entry))
    }

    /// Converts between a big-endian number and an entry in the format's byte order, in both directions.
    fn in_byte_order(number: u64) -> u64 {
        if S::BIG_ENDIAN {
            number
        } else {
            number.swap_bytes()
        }
    }

    /// Walks the tables with the state locked.
    pub(crate) fn walk<T>(&self, walk: impl FnOnce(&mut Walk<'_, S>) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        // A repair may clear an entry that refers to an L2 table.
        state.forget_l2_tables();
        walk(&mut Walk {
            tree: self,
            state: &mut state,
        })
    }
}

impl State {
    /// Forgets which L2 tables there are, because L1 entries change.
    fn forget_l2_tables(&mut self) {
        self.l2_tables = None;
        self.sound.clear();
    }
}

/// Decodes the entries in `bytes` of a table.
fn entries<S: EntryCodec>(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (entries, _) = bytes.as_chunks();
    entries
        .iter()
        .map(|entry| TwoLevelMap::<S>::in_byte_order(u64::from_be_bytes(*entry)))
}

/// Access to the tables entry by entry, for a check.
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
    pub(crate) fn l2(&self, offset: HostOffset) -> Table {
        self.tree.l2_table(offset)
    }

    /// The end of the allocated storage.
    pub(crate) fn end(&self) -> HostOffset {
        self.state.end
    }

    /// The entries of `table` from byte `at` to the end of the page, or of a hole of the file, that are not zero, each with
    /// its byte offset in the table, and the offset of what follows.
    ///
    /// # Errors
    /// Those of the device, and a table beyond the end of the file.
    pub(crate) fn page(&mut self, table: Table, at: u64) -> Result<(Vec<(u64, u64)>, u64)> {
        let hole = self.state.tables.hole(table, at)? / ENTRY;
        if hole > 0 {
            return Ok((Vec::new(), at + hole * ENTRY));
        }
        let bytes = self.state.tables.bytes(table, at)?;
        let entries = (at..).step_by(8).zip(entries::<S>(bytes));
        let used = entries.filter(|(_, entry)| *entry != 0);
        Ok((used.collect(), at + bytes.len() as u64))
    }

    /// Clears the entry at byte `at` of `table`: its table or cluster is unallocated then.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn clear(&mut self, table: Table, at: u64) -> Result<()> {
        TwoLevelMap::<S>::write(&mut self.state.tables, table, at, 0)
    }
}

/// The state of contiguous guest bytes up to `until`.
#[derive(Clone, Copy, Debug)]
struct Step {
    cluster: Cluster,
    /// Whether there is an L2 table for them.
    has_table: bool,
    until: GuestOffset,
}

impl Step {
    /// Whether this extends a run that began with `before`, `len` bytes earlier.
    fn continues(&self, before: Cluster, len: u64) -> bool {
        match (before, self.cluster) {
            (Cluster::Host(at), Cluster::Host(next)) => at.checked_plus(len) == Some(next),
            (Cluster::Encoded { .. }, _) => false,
            (before, next) => before == next,
        }
    }
}

/// Clusters for which storage was allocated.
pub(crate) struct NewClusters {
    /// The storage in the file, which is contiguous.
    storage: ByteRange,
    /// Clusters of the disk, and their new states.
    entries: Vec<(GuestOffset, Cluster)>,
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
        // All changes are taken first: after a failure tables may refer to any of the clusters, so none may be freed.
        for new in std::mem::take(changes) {
            for (guest, cluster) in new.entries {
                self.scheme.before_first_change()?;
                self.set(state, guest, cluster)?;
            }
        }
        Ok(())
    }

    /// Frees the allocations at the end of the file, from the last one on. Clusters before other storage leak.
    fn free(&self, state: &mut State, changes: Vec<NewClusters>) {
        let mut end = state.end.get();
        for storage in changes.into_iter().rev().map(|new| new.storage) {
            if storage.end() != end {
                break;
            }
            end = storage.start();
        }
        if end < state.end.get() {
            // If the file cannot be truncated, the clusters leak, which is harmless.
            let _ = self.file.resize(end, Preallocation::Off);
            state.end = HostOffset::new(end);
        }
    }
}
