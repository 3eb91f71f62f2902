//! Everything that one L1 table leads to, in bulk: its L2 tables and what these refer to.
//!
//! ```text
//!   L1 table ──► L2 table ──► clusters        each use counts once in the refcounts
//! ```
//!
//! L2 tables are streamed past the windows of `tables`, one at a time, and the clusters found are counted up or down in
//! sorted batches: each refcount block is touched a few times and not once for every cluster.

use diskimage_core::{ByteRange, Error, Result};

use super::entry::{COPIED, Cluster, L2Entry, OFFSET_MASK};
use super::refcount::Change;
use super::{Qcow2, State};
use crate::tables::{Class, Table};

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

impl Qcow2 {
    /// Checks that everything below `l1` can be counted `change`, before anything is.
    ///
    /// # Errors
    /// Damage, and counts that are at their limit.
    pub(super) fn check_tree(&self, state: &mut State, l1: Table, change: Change) -> Result<()> {
        let mut batch = Batch::default();
        let check = |state: &mut State, batch: &mut Batch| {
            batch.take_sorted().into_iter().try_for_each(|(first, count)| {
                let State {
                    tables, refcounts, ..
                } = &mut *state;
                refcounts.check_run(tables, first, count, change)
            })
        };
        self.visit_tables(state, l1, |state, offset, table| {
            self.collect(offset, table, &mut batch)?;
            if batch.is_full() {
                check(state, &mut batch)?;
            }
            Ok(false)
        })?;
        check(state, &mut batch)
    }

    /// Counts everything below `l1` once more, and says in it and its L2 tables that none of it may be written in place.
    ///
    /// The flags are durable before the counts: a writer that finds one without the other copies needlessly.
    pub(super) fn share_tree(&self, state: &mut State, l1: Table) -> Result<()> {
        self.visit_l1(state, l1, |_, _, entry| Ok(entry & !COPIED))?;
        let mut batch = Batch::default();
        let raise = |state: &mut State, batch: &mut Batch| {
            self.file.flush()?;
            self.count_batch(state, batch, Change::Up)
        };
        self.visit_tables(state, l1, |state, offset, table| {
            self.collect(offset, table, &mut batch)?;
            let changed = self.mark_entries(table, |_| Ok(false))?;
            if batch.is_full() {
                if changed {
                    self.write_table(state, Class::L2, offset, table)?;
                }
                raise(state, &mut batch)?;
                return Ok(false);
            }
            Ok(changed)
        })?;
        raise(state, &mut batch)
    }

    /// Counts everything below `l1`, which nothing refers to any more, and the table itself once less. What is free
    /// then is given back to the file system.
    pub(super) fn release_tree(&self, state: &mut State, l1: Table) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut batch = Batch::default();
        self.visit_tables(state, l1, |state, offset, table| {
            self.collect(offset, table, &mut batch)?;
            if batch.is_full() {
                self.count_batch(state, &mut batch, Change::Down)?;
            }
            Ok(false)
        })?;
        batch.add(l1.offset >> bits, l1.len.div_ceil(1 << bits));
        self.count_batch(state, &mut batch, Change::Down)
    }

    /// Has the COPIED flags of the active tables say which clusters are used once. The counts are durable.
    pub(super) fn refresh_copied(&self, state: &mut State) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let l1 = state.l1;
        state.tables.clear()?;
        state.tables.sync()?;
        let once = |state: &mut State, offset: u64| {
            let State {
                tables, refcounts, ..
            } = &mut *state;
            refcounts.count(tables, offset >> bits).map(|count| count == 1)
        };
        self.visit_tables(state, l1, |state, _, table| {
            self.mark_entries(table, |offset| once(state, offset))
        })?;
        self.file.flush()?;
        self.visit_l1(state, l1, |state, _, entry| {
            Ok(match entry & OFFSET_MASK {
                0 => entry,
                offset if once(state, offset)? => entry | COPIED,
                _ => entry & !COPIED,
            })
        })?;
        // The windows of the tables that were changed in the file.
        state.tables.clear()
    }

    /// Replaces the entries of `l1` by what `change` makes of each index and entry, directly in the file.
    pub(super) fn visit_l1(
        &self,
        state: &mut State,
        l1: Table,
        mut change: impl FnMut(&mut State, u64, u64) -> Result<u64>,
    ) -> Result<()> {
        let mut done = 0;
        while done < l1.len {
            let len = (l1.len - done).min(L1_CHUNK);
            let mut chunk = vec![0; usize::try_from(len).unwrap_or(0)];
            self.file.read_whole(&mut chunk, l1.offset + done)?;
            let mut changed = false;
            for (index, word) in (done / 8..).zip(chunk.as_chunks_mut::<8>().0) {
                let new = change(state, index, u64::from_be_bytes(*word))?.to_be_bytes();
                changed |= new != *word;
                *word = new;
            }
            if changed {
                self.write_table(state, Class::L1, l1.offset + done, &chunk)?;
            }
            done += len;
        }
        Ok(())
    }

    /// Hands the offset and bytes of each L2 table of `l1` to `visit`, and writes those back that it has changed.
    fn visit_tables(
        &self,
        state: &mut State,
        l1: Table,
        mut visit: impl FnMut(&mut State, u64, &mut [u8]) -> Result<bool>,
    ) -> Result<()> {
        let size = self.header.geometry.cluster_size();
        let mut table = vec![0; usize::try_from(size).unwrap_or(0)];
        // Each table is a cluster of its own: a damaged image cannot keep this busy for longer than its length allows.
        let mut left = self.file.len().div_ceil(size);
        self.visit_l1(state, l1, |state, index, entry| {
            let Some(l2) = self.l2_at(entry & OFFSET_MASK, index)? else {
                return Ok(entry);
            };
            left = left
                .checked_sub(1)
                .ok_or_else(|| Error::corrupt("L1 table has more entries than the file has clusters"))?;
            self.file.read_whole(&mut table, l2.offset)?;
            if visit(state, l2.offset, &mut table)? {
                self.write_table(state, Class::L2, l2.offset, &table)?;
            }
            Ok(entry)
        })
    }

    /// Writes a table, or a part of one, past the windows of `tables`.
    fn write_table(&self, state: &State, class: Class, offset: u64, bytes: &[u8]) -> Result<()> {
        let range = ByteRange::at(offset, bytes.len() as u64);
        state.tables.admit(range, class.kinds())?;
        self.file.write_at(bytes, offset)
    }

    /// Adds the L2 table `table` at `offset` and the clusters that it refers to.
    fn collect(&self, offset: u64, table: &[u8], batch: &mut Batch) -> Result<()> {
        let geometry = self.header.geometry;
        let bits = geometry.cluster_bits;
        batch.add(offset >> bits, 1);
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

    /// Counts the clusters of `batch` and makes that durable.
    fn count_batch(&self, state: &mut State, batch: &mut Batch, change: Change) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut freed: Vec<ByteRange> = Vec::new();
        for (first, count) in batch.take_sorted() {
            let State {
                tables, refcounts, ..
            } = &mut *state;
            refcounts.change_run(tables, first, count, change, |cluster| {
                let start = cluster << bits;
                match freed.last_mut() {
                    Some(last) if last.end() == start => {
                        *last = ByteRange::new(last.start(), start + (1 << bits))
                    }
                    _ => freed.push(ByteRange::at(start, 1 << bits)),
                }
            })?;
        }
        state.tables.write_back()?;
        state.tables.sync()?;
        freed.into_iter().try_for_each(|range| self.file.discard(range))
    }
}
