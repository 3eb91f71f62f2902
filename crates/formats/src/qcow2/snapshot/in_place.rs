//! Taking, applying and deleting snapshots of few tables, and where there is no room for copies, as on a full disk.
//!
//! ```text
//!   create   L1 copy, new snapshot table → COPIED flags off → counts up → header
//!   apply    new active L1 → COPIED flags off → counts up → header → counts of the old tree down → flags on
//!   delete   the entry gives up its disk → counts down → flags on → new snapshot table, over the L1 → header
//! ```
//!
//! What takes room comes first, so that a full disk is met before anything has changed. Applying and deleting can do
//! without: then the active L1 is written over with one request. A power failure in the middle of that leaves parts of
//! the old disk and parts of the snapshot, and the snapshot itself, which can be applied again.

use diskimage_core::{ByteRange, Device, Error, MemoryDevice, NewSnapshot, Result};

use super::{Snapshot, SnapshotTable, V3_EXTRA, index_of};
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::metadata_guard::Kind;
use crate::qcow2::refcount::publish::is_out_of_space;
use crate::qcow2::refcount::recount::Rewrite;
use crate::qcow2::{ImageState, Qcow2};

impl Qcow2 {
    pub(super) fn create_in_place(
        &self,
        state: &mut ImageState,
        new: &NewSnapshot<'_>,
        there: &[Snapshot],
    ) -> Result<()> {
        let (l1, old) = (state.l1, state.snapshots);
        let copy = self.copy_l1(state, l1, l1.len)?;
        let entry = self.new_entry(state, new, there, copy)?;
        let table = match self.write_entries(state, there, Some(&entry)) {
            Ok(table) => table,
            Err(error) => {
                state.metadata.release_new_table(copy);
                return Err(error);
            }
        };
        if let Err(error) = self.share_tree(state, l1, Rewrite::InPlace, 2) {
            // The failure itself is what is told.
            let _ = self.refresh_copied(state, Rewrite::InPlace);
            return Err(error);
        }
        self.publish_entries(state, table)?;
        self.release_entries(state, old, there)?;
        self.file.flush()
    }

    /// Makes the disk one of `size` bytes with the tables of a snapshot, whose L1 table is `kept`. The active L1 table
    /// gets a new place, or is written over where there is none.
    pub(super) fn apply_in_place(&self, state: &mut ImageState, size: u64, kept: Table) -> Result<()> {
        let old = state.l1;
        let len = kept.len.max(old.len);
        let fits = kept.len <= old.len.next_multiple_of(self.header.geometry.cluster_size());
        match self.written_copy(state, kept, len) {
            Ok(table) => {
                self.share_tree(state, kept, Rewrite::InPlace, 2)?;
                (state.l1, state.size) = (table, size);
                self.write_roots(state)?;
                self.file.flush()?;
                self.release_in_place(state, &*self.file, old)?;
                self.release_table(state, old)
            }
            Err(error) if is_out_of_space(&error) && fits => self.write_over_l1(state, size, kept),
            Err(error) => Err(error),
        }
    }

    /// A copy of the L1 table `from` in a new place, `len` bytes long, durable.
    fn written_copy(&self, state: &mut ImageState, from: Table, len: u64) -> Result<Table> {
        let table = self.copy_l1(state, from, len)?;
        let written = state
            .metadata
            .cache
            .write_back()
            .and_then(|()| state.metadata.cache.sync());
        if let Err(error) = written {
            state.metadata.release_new_table(table);
            return Err(error);
        }
        Ok(table)
    }

    fn write_over_l1(&self, state: &mut ImageState, size: u64, kept: Table) -> Result<()> {
        let old = state.l1;
        let len = kept.len.max(old.len);
        let _memory = self.budget.reserve(old.len + len)?;
        let mut before = vec![0; index_of(old.len)];
        self.file.read_padded(&mut before, old.offset)?;
        self.share_tree(state, kept, Rewrite::InPlace, 2)?;
        let mut active = vec![0; index_of(len)];
        self.file
            .read_padded(&mut active[..index_of(kept.len)], kept.offset)?;
        self.write_table(state, WriteOrder::L1, old.offset, &active)?;
        self.file.flush()?;
        state.l1 = Table { len, ..old };
        state.size = size;
        self.write_roots(state)?;
        self.file.flush()?;
        self.release_in_place(state, &MemoryDevice::new(before), Table { offset: 0, ..old })
    }

    /// Counts everything below an L1 table, which nothing refers to any more, once less, and sets the flags by that.
    /// The table is read from `gone` of `source`.
    pub(super) fn release_in_place(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        gone: Table,
    ) -> Result<()> {
        self.release_tree(state, source, gone)?;
        self.refresh_copied(state, Rewrite::InPlace)?;
        self.file.flush()
    }

    /// Deletes the snapshot at `index` of `there`, whose L1 table is `kept`, without taking clusters: the new snapshot
    /// table goes where that L1 table was. `error` is why it has to be that way.
    pub(super) fn delete_in_place(
        &self,
        state: &mut ImageState,
        index: usize,
        there: &[Snapshot],
        kept: Table,
        error: Error,
    ) -> Result<()> {
        let old = state.snapshots;
        let gone = &there[index];
        let left: Vec<Snapshot> = [&there[..index], &there[index + 1..]].concat();
        let bytes = self.encode_entries(state, &left, None)?;
        let size = self.header.geometry.cluster_size();
        let (used, room) = (
            (bytes.len() as u64).next_multiple_of(size),
            kept.len.next_multiple_of(size),
        );
        if used > room || gone.extra_len < V3_EXTRA {
            return Err(error);
        }
        self.empty_entry(gone)?;
        self.release_in_place(state, &*self.file, kept)?;
        state
            .metadata
            .cache
            .forget_freed(ByteRange::at(kept.offset, room));
        let place = ByteRange::at(kept.offset, used);
        state.metadata.cache.guard_range(Kind::SnapshotTable, place)?;
        self.file.write_at(&bytes, kept.offset)?;
        let count = u32::try_from(left.len()).unwrap_or(u32::MAX);
        let offset = kept.offset;
        self.publish_entries(state, SnapshotTable { offset, count })?;
        state.metadata.release(offset + used, room - used)?;
        self.release_entries(state, old, there)?;
        self.file.flush()
    }

    /// Makes a snapshot one of an empty disk, which refers to no clusters.
    fn empty_entry(&self, snapshot: &Snapshot) -> Result<()> {
        let (at, _) = snapshot.entry;
        let mut entry = [0; EMPTIED];
        self.file.read_at(&mut entry, at)?;
        for field in [L1_TABLE, VM_STATE_SIZE, SIZES] {
            entry[field].fill(0);
        }
        self.file.write_at(&entry, at)?;
        self.file.flush()
    }
}

/// Bytes of an entry that say what it refers to, and how long that is.
const EMPTIED: usize = 56;
/// Place and entries of the L1 table.
const L1_TABLE: std::ops::Range<usize> = 0..12;
const VM_STATE_SIZE: std::ops::Range<usize> = 36..40;
/// Those of the extra data: of the machine's state, and of the disk.
const SIZES: std::ops::Range<usize> = 40..56;
