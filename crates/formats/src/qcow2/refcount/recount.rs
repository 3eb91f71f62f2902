//! Changes the refcounts of a whole tree in bulk: of an L1 table, its L2 tables and their clusters.
//!
//! ```text
//!   L1 table ──► L2 table ──► clusters        each reference counts once in the refcounts
//! ```
//!
//! L2 tables are read one at a time without the metadata cache, and the refcounts of their clusters are changed in
//! sorted batches: each refcount block is accessed a few times and not once for every cluster.

use diskimage_core::{ByteRange, Device, Error, Result, saturating_index, to_index};

use super::RefcountChange;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::metadata_guard::Kind;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};
use crate::qcow2::entry::{COPIED, Cluster, L2Entry, OFFSET_MASK, ascending};
use crate::qcow2::header::limit;
use crate::qcow2::metadata::Metadata;
use crate::qcow2::{ImageState, Qcow2};

/// The number of runs of clusters that a batch collects: 4 MiB of memory.
const MAX_RUNS: usize = 1 << 18;
/// Bytes of the L1 table that are read at once.
const L1_CHUNK: u64 = 64 << 10;

/// Runs of clusters whose refcounts are to be changed. A cluster with two references is in two runs.
#[derive(Debug, Default)]
struct Batch {
    runs: Vec<ClusterRange>,
}

impl Batch {
    fn add(&mut self, clusters: ClusterRange) {
        match self.runs.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.runs.push(clusters),
        }
    }

    fn is_full(&self) -> bool {
        self.runs.len() >= MAX_RUNS
    }

    /// Empties the batch and returns its runs in ascending order.
    fn take_sorted(&mut self) -> Vec<ClusterRange> {
        let mut runs = std::mem::take(&mut self.runs);
        runs.sort_unstable_by_key(|run| (run.start, run.end));
        runs
    }
}

/// The refcounts of a few clusters, read together.
#[derive(Debug)]
struct CountWindow {
    first: ClusterIndex,
    counts: Vec<u64>,
}

impl CountWindow {
    /// A window that has no refcounts yet.
    fn new() -> Self {
        Self {
            first: ClusterIndex::new(0),
            counts: Vec::new(),
        }
    }

    /// The refcount of `cluster`, which does not change while the window is in use.
    fn count(&mut self, metadata: &mut Metadata, cluster: ClusterIndex) -> Result<u64> {
        if cluster >= self.first
            && let Some(count) = self.counts.get(saturating_index(cluster.since(self.first)))
        {
            return Ok(*count);
        }
        metadata.read_run(ClusterRange::at(cluster, WINDOW), &mut self.counts)?;
        self.first = cluster;
        self.counts
            .first()
            .copied()
            .ok_or_else(|| Error::corrupt("Refcount block too short"))
    }
}

/// The number of refcounts that are read together.
pub(super) const WINDOW: u64 = 1024;

/// From this many bytes of L2 tables on, they are changed in copies; it is the size for 4 GiB of data at the default
/// cluster size. Fewer tables are changed in place: that is quick and needs no space for copies.
pub(in crate::qcow2) const COPIED_FROM: u64 = 512 << 10;

/// Where tables with changed flags are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Rewrite {
    /// Over the old tables.
    InPlace,
    /// To newly allocated clusters, and the L1 table to this table: the tables in use stay unchanged.
    To(Table),
}

impl Rewrite {
    /// The table to which the L1 table `l1` is written.
    fn l1(self, l1: Table) -> Table {
        match self {
            Self::InPlace => l1,
            Self::To(table) => table,
        }
    }
}

impl Qcow2 {
    /// Checks that the refcounts of the whole tree of `l1` can be changed, before any is changed.
    ///
    /// # Errors
    /// Damage, and refcounts at their maximum.
    pub(in crate::qcow2) fn check_tree(
        &self,
        state: &mut ImageState,
        l1: Table,
        change: RefcountChange,
    ) -> Result<()> {
        let mut batch = Batch::default();
        let check = |state: &mut ImageState, batch: &mut Batch| {
            batch
                .take_sorted()
                .into_iter()
                .try_for_each(|clusters| state.metadata.check_run(clusters, change))
        };
        self.visit_tables(state, &*self.file, l1, l1, |state, entry, table| {
            batch.add(self.cluster_of(entry));
            self.collect(table, &mut batch)?;
            if batch.is_full() {
                check(state, &mut batch)?;
            }
            Ok(entry)
        })?;
        check(state, &mut batch)
    }

    /// Whether `l1` has so many L2 tables that they are changed in copies.
    pub(in crate::qcow2) fn has_many_tables(&self, state: &mut ImageState, l1: Table) -> Result<bool> {
        let mut count = 0u64;
        self.visit_l1(state, &*self.file, l1, l1, |_, _, entry| {
            count += u64::from(entry & OFFSET_MASK != 0);
            Ok(entry)
        })?;
        Ok(count.saturating_mul(self.header.geometry.cluster_size()) >= state.copied_from)
    }

    /// Increments the refcounts of the tree of `l1` and clears the COPIED flags in it, so that none of it is written in
    /// place. `users` trees will refer to L2 tables that move.
    ///
    /// In place, the flags are durable before the refcounts: a crash in between costs needless copies only. In the end
    /// the refcounts are durable.
    pub(in crate::qcow2) fn share_tree(
        &self,
        state: &mut ImageState,
        l1: Table,
        rewrite: Rewrite,
        users: u64,
    ) -> Result<()> {
        if rewrite == Rewrite::InPlace {
            // Cached pages of these tables become out of date.
            state.metadata.cache.clear()?;
            self.visit_l1(state, &*self.file, l1, l1, |_, _, entry| Ok(entry & !COPIED))?;
        }
        let mut batch = Batch::default();
        let raise = |state: &mut ImageState, batch: &mut Batch| {
            state.metadata.cache.sync()?;
            self.change_batch(state, batch, RefcountChange::Up)?;
            state.metadata.flush()
        };
        self.visit_tables(state, &*self.file, l1, rewrite.l1(l1), |state, entry, table| {
            let old = HostOffset::new(entry & OFFSET_MASK);
            let changed = self.mark_entries(table, |_| Ok(false))?;
            let new = self.rewrite_l2(state, rewrite, old, table, changed)?;
            self.collect(table, &mut batch)?;
            let mut entry = entry & !(OFFSET_MASK | COPIED) | new.get();
            match new == old {
                true => batch.add(self.cluster_of(old.get())),
                // The allocation has counted it once.
                false if users == 1 => entry |= COPIED,
                false => (1..users).for_each(|_| batch.add(self.cluster_of(new.get()))),
            }
            if batch.is_full() {
                raise(state, &mut batch)?;
            }
            Ok(entry)
        })?;
        raise(state, &mut batch)
    }

    /// Decrements the refcounts of the tree of an L1 table to which nothing durable refers any more. The table is read
    /// from the range `l1` of `source`. The storage of clusters that become free is discarded. The refcounts are dirty
    /// in the metadata cache.
    pub(in crate::qcow2) fn release_tree(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        l1: Table,
    ) -> Result<()> {
        let mut batch = Batch::default();
        self.visit_tables(state, source, l1, l1, |state, entry, table| {
            batch.add(self.cluster_of(entry));
            self.collect(table, &mut batch)?;
            if batch.is_full() {
                self.release_batch(state, &mut batch)?;
            }
            Ok(entry)
        })?;
        self.release_batch(state, &mut batch)
    }

    /// Decrements the refcounts of the clusters of the table `l1` itself, and discards their storage.
    pub(in crate::qcow2) fn release_table(&self, state: &mut ImageState, l1: Table) -> Result<()> {
        let mut batch = Batch::default();
        batch.add(self.clusters_of(l1.range()));
        self.release_batch(state, &mut batch)
    }

    /// Decrements the refcounts of `old` and of the L2 tables to which `old` refers and `new` does not. Their storage
    /// is kept, as qemu-img does: the next tables are written there.
    pub(in crate::qcow2) fn release_replaced(
        &self,
        state: &mut ImageState,
        old: Table,
        new: Table,
    ) -> Result<()> {
        let mut batch = Batch::default();
        let mut chunk = Vec::new();
        self.visit_l1(state, &*self.file, old, old, |_, index, entry| {
            let (first, at) = (index * 8 - index * 8 % L1_CHUNK, to_index(index * 8 % L1_CHUNK)?);
            if at == 0 {
                chunk = vec![0; to_index(L1_CHUNK.min(new.len.saturating_sub(first)))?];
                self.file.read_padded(&mut chunk, new.offset + first)?;
            }
            let now = chunk.get(at..).and_then(<[u8]>::first_chunk);
            let now = now.map_or(0, |number| u64::from_be_bytes(*number) & OFFSET_MASK);
            if entry & OFFSET_MASK != now && entry & OFFSET_MASK != 0 {
                batch.add(self.cluster_of(entry));
            }
            Ok(entry)
        })?;
        batch.add(self.clusters_of(old.range()));
        self.change_batch(state, &mut batch, RefcountChange::Down)
            .map(|_| ())
    }

    /// Sets the COPIED flags of the active tables for clusters with a refcount of one and clears the others. The
    /// refcounts are durable, or published together with the tables.
    pub(in crate::qcow2) fn refresh_copied(&self, state: &mut ImageState, rewrite: Rewrite) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let l1 = state.l1;
        state.metadata.cache.clear()?;
        state.metadata.cache.sync()?;
        self.visit_tables(state, &*self.file, l1, rewrite.l1(l1), |state, entry, table| {
            let old = HostOffset::new(entry & OFFSET_MASK);
            let mut counts = CountWindow::new();
            let changed = self.mark_entries(table, |offset| {
                Ok(counts.count(&mut state.metadata, offset.cluster(bits))? == 1)
            })?;
            let new = self.rewrite_l2(state, rewrite, old, table, changed)?;
            let flag = if state.metadata.count(new.cluster(bits))? == 1 {
                COPIED
            } else {
                0
            };
            Ok(entry & !(OFFSET_MASK | COPIED) | new.get() | flag)
        })?;
        // Cached pages of these tables are out of date.
        state.metadata.cache.clear()
    }

    /// Writes the L2 table that was read at `offset` if it `changed`. Returns its new offset.
    fn rewrite_l2(
        &self,
        state: &mut ImageState,
        rewrite: Rewrite,
        offset: HostOffset,
        table: &[u8],
        changed: bool,
    ) -> Result<HostOffset> {
        let offset = match rewrite {
            _ if !changed => return Ok(offset),
            Rewrite::InPlace => offset,
            Rewrite::To(_) => {
                let kind = Some(Kind::ActiveL2);
                state.metadata.allocate(1, kind)?
            }
        };
        self.write_table(state, WriteOrder::L2, offset.get(), table)?;
        Ok(offset)
    }

    /// Writes a table, or a part of one, without the metadata cache.
    pub(in crate::qcow2) fn write_table(
        &self,
        state: &ImageState,
        class: WriteOrder,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let range = ByteRange::at(offset, bytes.len() as u64);
        state.metadata.cache.admit(range, class.kinds())?;
        self.file.event(class.update_event());
        self.file.write_at(bytes, offset)
    }

    /// Calls `change` with each index and entry of the L1 table `from`, which is read from `source`, and writes the
    /// results to the table `to`. If both are the same table, only changed chunks are written.
    fn visit_l1(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        from: Table,
        to: Table,
        mut change: impl FnMut(&mut ImageState, u64, u64) -> Result<u64>,
    ) -> Result<()> {
        let mut done = 0;
        while done < from.len {
            let len = (from.len - done).min(L1_CHUNK);
            let mut chunk = vec![0; to_index(len)?];
            source.read_whole(&mut chunk, from.offset + done)?;
            let mut changed = from != to;
            for (index, entry) in (done / 8..).zip(chunk.as_chunks_mut::<8>().0) {
                let new = change(state, index, u64::from_be_bytes(*entry))?.to_be_bytes();
                changed |= new != *entry;
                *entry = new;
            }
            if changed {
                self.write_table(state, WriteOrder::L1, to.offset + done, &chunk)?;
            }
            done += len;
        }
        Ok(())
    }

    /// Calls `visit` with the L1 entry and the bytes of each L2 table of `from`; its result becomes the entry in `to`.
    fn visit_tables(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        from: Table,
        to: Table,
        mut visit: impl FnMut(&mut ImageState, u64, &mut [u8]) -> Result<u64>,
    ) -> Result<()> {
        let size = self.header.geometry.cluster_size();
        let mut table = vec![0; to_index(size)?];
        // Valid L2 tables are distinct clusters, so a larger number is damage. This bounds the time by the file's
        // length.
        let mut left = self.file.len().div_ceil(size);
        self.visit_l1(state, source, from, to, |state, index, entry| {
            let Some(l2) = self.l2_at(entry & OFFSET_MASK, index)? else {
                return Ok(entry);
            };
            left = left
                .checked_sub(1)
                .ok_or_else(|| Error::corrupt("L1 table has more entries than the file has clusters"))?;
            self.file.read_whole(&mut table, l2.offset)?;
            visit(state, entry, &mut table)
        })
    }

    /// Adds the clusters to which the L2 table `table` refers to `batch`.
    fn collect(&self, table: &[u8], batch: &mut Batch) -> Result<()> {
        let geometry = self.header.geometry;
        if self.has_data_file() {
            return Ok(());
        }
        let step = if geometry.extended_l2 { 2 } else { 1 };
        let (mut rest, _) = table.as_chunks::<8>();
        while let Some(numbers) = rest.get(..step) {
            let number = u64::from_be_bytes(numbers[0]);
            let mut done = step;
            if self.is_plain(number) {
                let room = (limit::HOST_OFFSET - (number & OFFSET_MASK)) / geometry.cluster_size();
                let run = room.min(ascending(rest, geometry.cluster_size()) as u64);
                done = to_index(run)?;
                batch.add(ClusterRange::at(self.cluster_of(number).start, run));
            } else if number != 0
                && let Some(host) = self.parse_numbers(numbers)?.host_clusters(geometry)
            {
                batch.add(self.clusters_of(host));
            }
            rest = &rest[done..];
        }
        Ok(())
    }

    /// The cluster that the entry `number` of an L1 or L2 table refers to, as a run.
    fn cluster_of(&self, number: u64) -> ClusterRange {
        let offset = HostOffset::new(number & OFFSET_MASK);
        ClusterRange::at(offset.cluster(self.header.geometry.cluster_bits), 1)
    }

    /// The clusters that the bytes `range` of the file touch.
    fn clusters_of(&self, range: ByteRange) -> ClusterRange {
        ClusterRange::touched(range, self.header.geometry.cluster_bits)
    }

    /// Whether the number is a whole standard entry for a host cluster without any other flag than COPIED, as nearly
    /// all are: it is valid as it is.
    fn is_plain(&self, number: u64) -> bool {
        let geometry = self.header.geometry;
        let others = !(OFFSET_MASK | COPIED) | (geometry.cluster_size() - 1);
        number & others == 0 && number & OFFSET_MASK != 0 && !geometry.extended_l2 && !self.has_data_file()
    }

    fn parse_numbers(&self, numbers: &[[u8; 8]]) -> Result<L2Entry> {
        let number = |i: usize| numbers.get(i).map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let (geometry, version) = (self.header.geometry, self.header.version);
        L2Entry::parse([number(0), number(1)], geometry, version, self.has_data_file())
    }

    /// Sets the COPIED flag of each entry with a host cluster to the result of `copied` for its offset. Returns whether
    /// any flag changed.
    fn mark_entries(
        &self,
        table: &mut [u8],
        mut copied: impl FnMut(HostOffset) -> Result<bool>,
    ) -> Result<bool> {
        let step = if self.header.geometry.extended_l2 { 2 } else { 1 };
        let mut changed = false;
        for numbers in table.as_chunks_mut::<8>().0.chunks_exact_mut(step) {
            let old = u64::from_be_bytes(numbers[0]);
            if old == 0 {
                continue;
            }
            let kind = match self.is_plain(old) {
                true => Cluster::Host(HostOffset::new(old & OFFSET_MASK)),
                false => self.parse_numbers(numbers)?.kind,
            };
            if let Cluster::Host(offset) = kind {
                let new = if copied(offset)? {
                    old | COPIED
                } else {
                    old & !COPIED
                };
                changed |= new != old;
                numbers[0] = new.to_be_bytes();
            }
        }
        Ok(changed)
    }

    /// Decrements the refcounts of the clusters in `batch`, to which nothing durable refers any more, and discards the
    /// storage of those that become free.
    fn release_batch(&self, state: &mut ImageState, batch: &mut Batch) -> Result<()> {
        let freed = self.change_batch(state, batch, RefcountChange::Down)?;
        freed.into_iter().try_for_each(|range| self.file.discard(range))
    }

    /// Changes the refcounts of the clusters in `batch` in the metadata cache. Returns the ranges that became free.
    fn change_batch(
        &self,
        state: &mut ImageState,
        batch: &mut Batch,
        change: RefcountChange,
    ) -> Result<Vec<ByteRange>> {
        let bits = self.header.geometry.cluster_bits;
        let mut freed: Vec<ByteRange> = Vec::new();
        for clusters in batch.take_sorted() {
            state.metadata.change_run(clusters, change, |cluster| {
                let range = ClusterRange::at(cluster, 1).bytes(bits);
                match freed.last_mut() {
                    Some(last) if last.end() == range.start() => {
                        *last = ByteRange::new(last.start(), range.end());
                    }
                    _ => freed.push(range),
                }
            })?;
        }
        Ok(freed)
    }
}
