//! Everything that one L1 table leads to, in bulk: its L2 tables and what these refer to.
//!
//! ```text
//!   L1 table ──► L2 table ──► clusters        each use counts once in the refcounts
//! ```
//!
//! L2 tables are streamed past the pages of the cache, one at a time, and the clusters found are counted up or down in
//! sorted batches: each refcount block is touched a few times and not once for every cluster.

use diskimage_core::{ByteRange, Device, Error, Result};

use super::RefcountChange;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::metadata_guard::Kind;
use crate::qcow2::entry::{COPIED, Cluster, L2Entry, OFFSET_MASK};
use crate::qcow2::snapshot::index_of;
use crate::qcow2::{ImageState, Qcow2};

/// Runs of clusters that are collected before they are counted; 4 MiB of memory.
const MAX_RUNS: usize = 1 << 18;
/// Bytes of the L1 table that are looked at at once.
const L1_CHUNK: u64 = 64 << 10;

/// Clusters that wait to be counted: first and how many. One that is used twice is there twice.
#[derive(Debug, Default)]
struct Batch {
    runs: Vec<(u64, u64)>,
}

impl Batch {
    fn add(&mut self, first: u64, count: u64) {
        if let Some((start, len)) = self.runs.last_mut()
            && *start + *len == first
        {
            *len += count;
        } else {
            self.runs.push((first, count));
        }
    }

    fn is_full(&self) -> bool {
        self.runs.len() >= MAX_RUNS
    }

    /// The runs in ascending order; the batch is empty afterwards.
    fn take_sorted(&mut self) -> Vec<(u64, u64)> {
        let mut runs = std::mem::take(&mut self.runs);
        runs.sort_unstable();
        runs
    }
}

/// Bytes of L2 tables from which on they change in copies, those of 4 GiB of data at the usual cluster size. Fewer are
/// changed in place in a moment, and no room is taken for copies.
pub(in crate::qcow2) const COPIED_FROM: u64 = 512 << 10;

/// Where tables whose flags change are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Rewrite {
    /// Over what they are.
    InPlace,
    /// To new clusters, and the L1 table to this place: what is in use stays as it is.
    To(Table),
}

impl Rewrite {
    /// Where the L1 table `l1` is written.
    fn l1(self, l1: Table) -> Table {
        match self {
            Self::InPlace => l1,
            Self::To(table) => table,
        }
    }
}

impl Qcow2 {
    /// Checks that everything below `l1` can be counted `change`, before anything is.
    ///
    /// # Errors
    /// Damage, and counts that are at their limit.
    pub(in crate::qcow2) fn check_tree(
        &self,
        state: &mut ImageState,
        l1: Table,
        change: RefcountChange,
    ) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut batch = Batch::default();
        let check = |state: &mut ImageState, batch: &mut Batch| {
            batch
                .take_sorted()
                .into_iter()
                .try_for_each(|(first, count)| state.metadata.check_run(first, count, change))
        };
        self.visit_tables(state, &*self.file, l1, l1, |state, entry, table| {
            batch.add((entry & OFFSET_MASK) >> bits, 1);
            self.collect(table, &mut batch)?;
            if batch.is_full() {
                check(state, &mut batch)?;
            }
            Ok(entry)
        })?;
        check(state, &mut batch)
    }

    /// Whether `l1` leads to so many L2 tables that they change in copies.
    pub(in crate::qcow2) fn has_many_tables(&self, state: &mut ImageState, l1: Table) -> Result<bool> {
        let mut count = 0u64;
        self.visit_l1(state, &*self.file, l1, l1, |_, _, entry| {
            count += u64::from(entry & OFFSET_MASK != 0);
            Ok(entry)
        })?;
        Ok(count.saturating_mul(self.header.geometry.cluster_size()) >= state.copied_from)
    }

    /// Counts everything below `l1` once more, and says in its entries and its L2 tables that none of it may be written
    /// in place. `users` trees refer to L2 tables that move.
    ///
    /// In place, the flags are durable before the counts: a writer that finds one without the other copies needlessly.
    pub(in crate::qcow2) fn share_tree(
        &self,
        state: &mut ImageState,
        l1: Table,
        rewrite: Rewrite,
        users: u64,
    ) -> Result<()> {
        if rewrite == Rewrite::InPlace {
            // Pages of the tables that are about to change in the file.
            state.metadata.cache.clear()?;
            self.visit_l1(state, &*self.file, l1, l1, |_, _, entry| Ok(entry & !COPIED))?;
        }
        let bits = self.header.geometry.cluster_bits;
        let mut batch = Batch::default();
        let raise = |state: &mut ImageState, batch: &mut Batch| {
            self.file.flush()?;
            self.count_batch(state, batch, RefcountChange::Up)
        };
        self.visit_tables(state, &*self.file, l1, rewrite.l1(l1), |state, entry, table| {
            let old = entry & OFFSET_MASK;
            let changed = self.mark_entries(table, |_| Ok(false))?;
            let new = self.rewrite_l2(state, rewrite, old, table, changed)?;
            self.collect(table, &mut batch)?;
            let mut entry = entry & !(OFFSET_MASK | COPIED) | new;
            match new == old {
                true => batch.add(old >> bits, 1),
                // Allocated, so counted once.
                false if users == 1 => entry |= COPIED,
                false => (1..users).for_each(|_| batch.add(new >> bits, 1)),
            }
            if batch.is_full() {
                raise(state, &mut batch)?;
            }
            Ok(entry)
        })?;
        raise(state, &mut batch)
    }

    /// Counts everything below an L1 table, which nothing refers to any more, once less. The table is read from `l1` of
    /// `source`. What is free then is given back to the file system.
    pub(in crate::qcow2) fn release_tree(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        l1: Table,
    ) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut batch = Batch::default();
        self.visit_tables(state, source, l1, l1, |state, entry, table| {
            batch.add((entry & OFFSET_MASK) >> bits, 1);
            self.collect(table, &mut batch)?;
            if batch.is_full() {
                self.count_batch(state, &mut batch, RefcountChange::Down)?;
            }
            Ok(entry)
        })?;
        self.count_batch(state, &mut batch, RefcountChange::Down)
    }

    /// Counts the clusters of the table `l1` itself once less.
    pub(in crate::qcow2) fn release_table(&self, state: &mut ImageState, l1: Table) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut batch = Batch::default();
        batch.add(l1.offset >> bits, l1.len.div_ceil(1 << bits));
        self.count_batch(state, &mut batch, RefcountChange::Down)
    }

    /// Counts the L2 tables of the L1 table `old` that stand no longer in `new`, and `old` itself, once less.
    pub(in crate::qcow2) fn release_replaced(
        &self,
        state: &mut ImageState,
        old: Table,
        new: Table,
    ) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut batch = Batch::default();
        let mut chunk = Vec::new();
        self.visit_l1(state, &*self.file, old, old, |_, index, entry| {
            let (first, at) = (index * 8 - index * 8 % L1_CHUNK, index_of(index * 8 % L1_CHUNK));
            if at == 0 {
                chunk = vec![0; index_of(L1_CHUNK.min(new.len.saturating_sub(first)))];
                self.file.read_padded(&mut chunk, new.offset + first)?;
            }
            let now = chunk.get(at..).and_then(<[u8]>::first_chunk);
            let now = now.map_or(0, |word| u64::from_be_bytes(*word) & OFFSET_MASK);
            if entry & OFFSET_MASK != now && entry & OFFSET_MASK != 0 {
                batch.add((entry & OFFSET_MASK) >> bits, 1);
            }
            Ok(entry)
        })?;
        batch.add(old.offset >> bits, old.len.div_ceil(1 << bits));
        self.count_batch(state, &mut batch, RefcountChange::Down)
    }

    /// Has the COPIED flags of the active tables say which clusters are used once. The counts are durable, or published
    /// together with the tables.
    pub(in crate::qcow2) fn refresh_copied(&self, state: &mut ImageState, rewrite: Rewrite) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let l1 = state.l1;
        state.metadata.cache.clear()?;
        state.metadata.cache.sync()?;
        let once = |state: &mut ImageState, offset: u64| {
            state.metadata.count(offset >> bits).map(|count| count == 1)
        };
        self.visit_tables(state, &*self.file, l1, rewrite.l1(l1), |state, entry, table| {
            let old = entry & OFFSET_MASK;
            let changed = self.mark_entries(table, |offset| once(state, offset))?;
            let new = self.rewrite_l2(state, rewrite, old, table, changed)?;
            let flag = if once(state, new)? { COPIED } else { 0 };
            Ok(entry & !(OFFSET_MASK | COPIED) | new | flag)
        })?;
        // The cached pages of the tables that were changed in the file.
        state.metadata.cache.clear()
    }

    /// Writes the L2 table that was read at `offset` if it `changed`; where it is then.
    fn rewrite_l2(
        &self,
        state: &mut ImageState,
        rewrite: Rewrite,
        offset: u64,
        table: &[u8],
        changed: bool,
    ) -> Result<u64> {
        let place = match rewrite {
            _ if !changed => return Ok(offset),
            Rewrite::InPlace => offset,
            Rewrite::To(_) => {
                let kind = Some(Kind::ActiveL2);
                state.metadata.allocate(1, kind)?
            }
        };
        self.write_table(state, WriteOrder::L2, place, table)?;
        Ok(place)
    }

    /// Writes a table, or a part of one, past the pages of the cache.
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

    /// Writes to the table `to` what `change` makes of each index and entry of the L1 table `from`, which is read from
    /// `source`. Where both are the same, only what has changed is written.
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
            let mut chunk = vec![0; index_of(len)];
            source.read_whole(&mut chunk, from.offset + done)?;
            let mut changed = from != to;
            for (index, word) in (done / 8..).zip(chunk.as_chunks_mut::<8>().0) {
                let new = change(state, index, u64::from_be_bytes(*word))?.to_be_bytes();
                changed |= new != *word;
                *word = new;
            }
            if changed {
                self.write_table(state, WriteOrder::L1, to.offset + done, &chunk)?;
            }
            done += len;
        }
        Ok(())
    }

    /// Hands the L1 entry and the bytes of each L2 table of `from` to `visit`, whose answer becomes the entry in `to`.
    fn visit_tables(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        from: Table,
        to: Table,
        mut visit: impl FnMut(&mut ImageState, u64, &mut [u8]) -> Result<u64>,
    ) -> Result<()> {
        let size = self.header.geometry.cluster_size();
        let mut table = vec![0; index_of(size)];
        // Each table is a cluster of its own: a damaged image cannot keep this busy for longer than its length allows.
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

    /// Adds the clusters that the L2 table `table` refers to.
    fn collect(&self, table: &[u8], batch: &mut Batch) -> Result<()> {
        let geometry = self.header.geometry;
        let bits = geometry.cluster_bits;
        if self.has_data_file() {
            return Ok(());
        }
        self.entries(table, |entry| {
            if let Some((start, len)) = entry.host_clusters(geometry) {
                batch.add(start >> bits, len >> bits);
            }
            Ok(())
        })
    }

    fn entries(&self, table: &[u8], mut visit: impl FnMut(L2Entry) -> Result<()>) -> Result<()> {
        let geometry = self.header.geometry;
        let step = if geometry.extended_l2 { 2 } else { 1 };
        for words in table.as_chunks::<8>().0.chunks_exact(step) {
            if words[0] != [0; 8] {
                visit(self.parse_words(words)?)?;
            }
        }
        Ok(())
    }

    fn parse_words(&self, words: &[[u8; 8]]) -> Result<L2Entry> {
        let word = |i: usize| words.get(i).map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let (geometry, version) = (self.header.geometry, self.header.version);
        L2Entry::parse([word(0), word(1)], geometry, version, self.has_data_file())
    }

    /// Sets or clears the COPIED flag of each entry with a cluster of its own by what `copied` says of its offset.
    /// Whether one has changed.
    fn mark_entries(&self, table: &mut [u8], mut copied: impl FnMut(u64) -> Result<bool>) -> Result<bool> {
        let step = if self.header.geometry.extended_l2 { 2 } else { 1 };
        let mut changed = false;
        for words in table.as_chunks_mut::<8>().0.chunks_exact_mut(step) {
            if words[0] == [0; 8] {
                continue;
            }
            if let Cluster::Host(offset) = self.parse_words(words)?.kind {
                let old = u64::from_be_bytes(words[0]);
                let new = if copied(offset)? {
                    old | COPIED
                } else {
                    old & !COPIED
                };
                changed |= new != old;
                words[0] = new.to_be_bytes();
            }
        }
        Ok(changed)
    }

    /// Counts the clusters of `batch` and makes that durable, then gives back the storage of those that are free.
    fn count_batch(&self, state: &mut ImageState, batch: &mut Batch, change: RefcountChange) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut freed: Vec<ByteRange> = Vec::new();
        for (first, count) in batch.take_sorted() {
            state.metadata.change_run(first, count, change, |cluster| {
                let start = cluster << bits;
                match freed.last_mut() {
                    Some(last) if last.end() == start => {
                        *last = ByteRange::new(last.start(), start + (1 << bits))
                    }
                    _ => freed.push(ByteRange::at(start, 1 << bits)),
                }
            })?;
        }
        state.metadata.cache.write_back()?;
        state.metadata.cache.sync()?;
        freed.into_iter().try_for_each(|range| self.file.discard(range))
    }
}
