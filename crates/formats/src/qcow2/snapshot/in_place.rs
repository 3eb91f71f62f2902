//! Creates, applies and deletes snapshots without copies of the tables: for trees of few tables, and on a full disk.
//!
//! ```text
//!   create   L1 copy, new snapshot table → COPIED flags off → refcounts up → header
//!   apply    new active L1 → COPIED flags off → refcounts up → header → refcounts of the old tree down → flags on
//!   delete   the entry becomes an empty disk's → refcounts down → flags on → new snapshot table, over the L1 → header
//! ```
//!
//! Allocations come first, so that a full disk is an error before anything has changed. Applying and deleting also work
//! without any allocation: applying then overwrites the active L1 table with one request. A power failure during that
//! request leaves a disk with parts of its old contents and parts of the snapshot; the snapshot is intact and can be
//! applied again.

use diskimage_core::{ByteRange, Device, Error, MemoryDevice, NewSnapshot, Result, saturating_u32, to_index};

use super::{Snapshot, SnapshotTable, V3_EXTRA};
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
        listed: &[Snapshot],
    ) -> Result<()> {
        let (l1, old) = (state.l1, state.snapshots);
        let copy = self.copy_l1(state, l1, l1.len)?;
        let entry = self.new_entry(state, new, listed, copy)?;
        let table = match self.write_entries(state, listed, Some(&entry)) {
            Ok(table) => table,
            Err(error) => {
                state.metadata.release_new_table(copy);
                return Err(error);
            }
        };
        if let Err(error) = self.share_tree(state, l1, Rewrite::InPlace, 2) {
            // The error that is reported is the first one.
            let _ = self.refresh_copied(state, Rewrite::InPlace);
            return Err(error);
        }
        self.publish_entries(state, table)?;
        self.release_entries(state, old, listed)?;
        state.metadata.flush()
    }

    /// Gives the disk `size` bytes and the tables of the snapshot whose L1 table is `kept`. The active L1 table moves
    /// to newly allocated clusters; on a full disk it is overwritten.
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
                self.release_table(state, old)?;
                state.metadata.flush()
            }
            Err(error) if is_out_of_space(&error) && fits => self.write_over_l1(state, size, kept),
            Err(error) => Err(error),
        }
    }

    /// Copies the L1 table `from` to newly allocated clusters and flushes. The copy has `len` bytes.
    fn written_copy(&self, state: &mut ImageState, from: Table, len: u64) -> Result<Table> {
        let table = self.copy_l1(state, from, len)?;
        if let Err(error) = state.metadata.flush() {
            state.metadata.release_new_table(table);
            return Err(error);
        }
        Ok(table)
    }

    fn write_over_l1(&self, state: &mut ImageState, size: u64, kept: Table) -> Result<()> {
        let old = state.l1;
        let len = kept.len.max(old.len);
        let _memory = self.budget.reserve(old.len + len)?;
        let mut before = vec![0; to_index(old.len)?];
        self.file.read_padded(&mut before, old.offset)?;
        self.share_tree(state, kept, Rewrite::InPlace, 2)?;
        let mut active = vec![0; to_index(len)?];
        self.file
            .read_padded(&mut active[..to_index(kept.len)?], kept.offset)?;
        self.write_table(state, WriteOrder::L1, old.offset, &active)?;
        self.file.flush()?;
        state.l1 = Table { len, ..old };
        state.size = size;
        self.write_roots(state)?;
        self.file.flush()?;
        self.release_in_place(state, &MemoryDevice::new(before), Table { offset: 0, ..old })
    }

    /// Decrements the refcounts of the tree of an L1 table to which nothing refers any more, and sets the COPIED flags
    /// to match. The table is read from the range `removed` of `source`.
    pub(super) fn release_in_place(
        &self,
        state: &mut ImageState,
        source: &dyn Device,
        removed: Table,
    ) -> Result<()> {
        self.release_tree(state, source, removed)?;
        self.refresh_copied(state, Rewrite::InPlace)?;
        self.file.flush()
    }

    /// Deletes the snapshot at `index` of `listed`, whose L1 table is `kept`, without any allocation: the new snapshot
    /// table overwrites that L1 table. `error` is the failed allocation; it is returned if this way is not possible
    /// either.
    pub(super) fn delete_in_place(
        &self,
        state: &mut ImageState,
        index: usize,
        listed: &[Snapshot],
        kept: Table,
        error: Error,
    ) -> Result<()> {
        let old = state.snapshots;
        let deleted = &listed[index];
        let left: Vec<Snapshot> = [&listed[..index], &listed[index + 1..]].concat();
        let bytes = self.encode_entries(state, &left, None)?;
        let size = self.header.geometry.cluster_size();
        let (used, room) = (
            (bytes.len() as u64).next_multiple_of(size),
            kept.len.next_multiple_of(size),
        );
        if used > room || deleted.extra_len < V3_EXTRA {
            return Err(error);
        }
        self.empty_entry(deleted)?;
        self.release_in_place(state, &*self.file, kept)?;
        state
            .metadata
            .cache
            .forget_freed(ByteRange::at(kept.offset, room));
        let table = ByteRange::at(kept.offset, used);
        state.metadata.cache.guard_range(Kind::SnapshotTable, table)?;
        self.file.write_at(&bytes, kept.offset)?;
        // The header's count was a 32-bit number, and one entry less is left.
        let count = saturating_u32(left.len());
        let offset = kept.offset;
        self.publish_entries(state, SnapshotTable { offset, count })?;
        state
            .metadata
            .release(ByteRange::new(offset + used, offset + room))?;
        self.release_entries(state, old, listed)?;
        state.metadata.flush()
    }

    /// Makes the entry of a snapshot that of an empty disk, which refers to no clusters.
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

/// The bytes of an entry up to its disk size: they include all references of the entry.
const EMPTIED: usize = 56;
/// The offset and the number of entries of the L1 table.
const L1_TABLE: std::ops::Range<usize> = 0..12;
const VM_STATE_SIZE: std::ops::Range<usize> = 36..40;
/// The VM state size and the disk size in the extra data.
const SIZES: std::ops::Range<usize> = 40..56;
