//! Creates, applies and deletes snapshots.
//!
//! All three change the refcounts of whole trees, set the COPIED flags to match, and replace tables to which the header
//! points. They work on a copy of the refcounts and of the tables whose flags change; one write to the header publishes
//! the copy:
//!
//! ```text
//!   create   [ refcounts up, flags off, L1 copy, new snapshot table ]
//!   apply    [ refcounts up, flags off, new active L1 ]               [ refcounts of the old tree down, flags on ]
//!   delete   new snapshot table                                       [ refcounts down, flags on ]
//! ```
//!
//! The steps in brackets are one atomic change (`publish`), so a crash leaks clusters at worst. With few tables, or
//! without space for the copies, the change is made in place (`in_place`), in an order that keeps the refcount of every
//! reachable cluster high enough at any moment. A crash may then also leave flags off that could be on; later writes
//! then copy clusters needlessly.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{
    ByteRange, Error, ErrorKind, Layer, NewSnapshot, Note, Result, ResultExt, SnapshotInfo, Snapshots, errno,
    name, saturating_u32, to_index,
};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::{KNOWN_EXTRA, MAX_TABLE, RawSnapshot, SHOWN_NAME, Snapshot, SnapshotTable, V3_EXTRA, completed};
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::metadata_guard::Kind;
use crate::qcow2::entry::COPIED;
use crate::qcow2::header::{field, limit};
use crate::qcow2::refcount::RefcountChange;
use crate::qcow2::refcount::publish::{entries_of, is_out_of_space};
use crate::qcow2::refcount::recount::Rewrite;
use crate::qcow2::{ImageState, Qcow2};

impl Snapshots for Qcow2 {
    fn check_support(&self) -> Result<()> {
        if self.has_data_file() {
            return Err(Error::from_errno(errno::ENOTSUP));
        }
        Ok(())
    }

    fn list(&self) -> Result<Vec<SnapshotInfo>> {
        let snapshots = self.read_snapshots()?.into_iter();
        Ok(snapshots.map(|snapshot| snapshot.info).collect())
    }

    fn list_readable(&self) -> (Vec<SnapshotInfo>, Option<Error>) {
        let (snapshots, damage) = self.readable_snapshots();
        (
            snapshots.into_iter().map(|snapshot| snapshot.info).collect(),
            damage,
        )
    }

    fn open(&self, id: Option<&str>, name: Option<&str>) -> Result<Arc<dyn Layer>> {
        Ok(self.open_snapshot(id, name)?)
    }

    fn create(&self, snapshot: &NewSnapshot<'_>) -> Result<()> {
        let mut state = self.quiesce()?;
        if state.snapshots.count >= limit::SNAPSHOTS {
            return Err(Error::from_errno(errno::EFBIG));
        }
        let listed = self.read_snapshots_of(state.snapshots)?;
        // Counting reads the file, so it must come before changes that are only in memory.
        self.count_before_allocating(&mut state, 1)?;
        let l1 = state.l1;
        let published = match self.has_many_tables(&mut state, l1)? {
            true => self.publish_at_once(&mut state, |state| self.create_copied(state, snapshot, &listed))?,
            false => None,
        };
        let Some(old) = published else {
            self.check_tree(&mut state, l1, RefcountChange::Up)?;
            return self.create_in_place(&mut state, snapshot, &listed);
        };
        let l1 = state.l1;
        self.release_replaced(&mut state, old.l1, l1)?;
        self.release_entries(&mut state, old.snapshots, &listed)?;
        state.metadata.flush()
    }

    fn apply(&self, index: usize) -> Result<()> {
        let mut state = self.quiesce()?;
        let listed = self.read_snapshots_of(state.snapshots)?;
        let snapshot = listed.get(index).ok_or_else(no_snapshot)?;
        self.ensure_references_counted(&mut state)?;
        let kept = self.snapshot_l1_or_errno(snapshot)?;
        self.check_tree(&mut state, kept, RefcountChange::Up)?;
        let old = state.l1;
        self.check_tree(&mut state, old, RefcountChange::Down)?;
        let size = snapshot.info.disk_size;
        let published = match self.has_many_tables(&mut state, kept)? {
            true => self.publish_at_once(&mut state, |state| self.apply_copied(state, size, kept))?,
            false => None,
        };
        if published.is_none() {
            return self.apply_in_place(&mut state, size, kept);
        }
        self.release(&mut state, old)?;
        self.release_table(&mut state, old)?;
        state.metadata.flush()
    }

    fn delete(&self, index: usize) -> Result<()> {
        let mut state = self.quiesce()?;
        let mut left = self.read_snapshots_of(state.snapshots)?;
        if index >= left.len() {
            return Err(no_snapshot());
        }
        self.ensure_references_counted(&mut state)?;
        let listed = left.clone();
        let deleted = left.remove(index);
        let kept = self.snapshot_l1(&deleted)?;
        self.check_tree(&mut state, kept, RefcountChange::Down)
            .context(|| "Failed to free the cluster and L1 table")?;
        let old = state.snapshots;
        let unlisted = || "Failed to remove snapshot from snapshot list";
        let table = match self.write_entries(&mut state, &left, None).context(unlisted) {
            Err(error) if is_out_of_space(&error) => {
                return self.delete_in_place(&mut state, index, &listed, kept, error);
            }
            other => other?,
        };
        self.publish_entries(&mut state, table).context(unlisted)?;
        self.release_entries(&mut state, old, &listed)
            .map_err(not_freed)?;
        self.release(&mut state, kept).map_err(not_freed)?;
        self.release_table(&mut state, kept).map_err(not_freed)?;
        state.metadata.flush().context(unlisted)
    }
}

/// The messages of qemu-img for a deleted snapshot whose clusters could not be freed.
fn not_freed(error: Error) -> Error {
    let earlier = error.preceding_note().cloned();
    let error = match error.errno().map(Error::from_errno) {
        Some(reason) => {
            let note = Note::Line(format!("qcow2_free_clusters failed: {reason}"));
            error.notice(match earlier {
                Some(earlier) => Note::Several(vec![earlier, note]),
                None => note,
            })
        }
        None => error,
    };
    error.context("Failed to free the cluster and L1 table")
}

impl Qcow2 {
    /// Waits until no write is in flight, then writes back all tables, flushes, and empties the metadata cache.
    fn quiesce(&self) -> Result<MutexGuard<'_, ImageState>> {
        if !self.may_write() {
            return Err(Error::read_only());
        }
        self.check_support()?;
        let mut state = self.claims.wait_idle(|| self.lock());
        self.write_back(&mut state)?;
        state.metadata.cache.sync()?;
        state.metadata.cache.clear()?;
        Ok(state)
    }

    /// Creates the snapshot `new` in newly allocated clusters. Active tables whose flags change are copied to new
    /// clusters, too.
    fn create_copied(
        &self,
        state: &mut ImageState,
        new: &NewSnapshot<'_>,
        listed: &[Snapshot],
    ) -> Result<()> {
        let l1 = state.l1;
        let active = self.allocate_l1(state, l1.len, Kind::ActiveL1)?;
        self.share_tree(state, l1, Rewrite::To(active), 2)?;
        let copy = self.copy_l1(state, active, active.len)?;
        let entry = self.new_entry(state, new, listed, copy)?;
        state.snapshots = self.write_entries(state, listed, Some(&entry))?;
        state.l1 = active;
        Ok(())
    }

    /// Replaces the disk with that of the snapshot whose L1 table is `kept`, in newly allocated clusters.
    fn apply_copied(&self, state: &mut ImageState, size: u64, kept: Table) -> Result<()> {
        let active = self.allocate_l1(state, kept.len.max(state.l1.len), Kind::ActiveL1)?;
        self.file.write_zero_bytes(active.range())?;
        self.share_tree(state, kept, Rewrite::To(active), 1)?;
        state.l1 = active;
        state.size = size;
        Ok(())
    }

    /// Decrements the refcounts of the tree of the L1 table `removed`, to which nothing refers any more, and sets the
    /// COPIED flags to match.
    fn release(&self, state: &mut ImageState, removed: Table) -> Result<()> {
        let active = state.l1;
        if !self.has_many_tables(state, removed)? && !self.has_many_tables(state, active)? {
            return self.release_in_place(state, &*self.file, removed);
        }
        let published = self.publish_at_once(state, |state| {
            self.release_tree(state, &*self.file, removed)?;
            let active = self.allocate_l1(state, state.l1.len, Kind::ActiveL1)?;
            self.refresh_copied(state, Rewrite::To(active))?;
            state.l1 = active;
            Ok(())
        })?;
        match published {
            Some(old) => {
                let l1 = state.l1;
                self.release_replaced(state, old.l1, l1)
            }
            None => self.release_in_place(state, &*self.file, removed),
        }
    }

    /// Allocates clusters for an L1 table of `len` bytes.
    fn allocate_l1(&self, state: &mut ImageState, len: u64, kind: Kind) -> Result<Table> {
        let offset = match len.div_ceil(self.header.geometry.cluster_size()) {
            0 => 0,
            clusters => state.metadata.allocate(clusters, Some(kind))?.get(),
        };
        let class = WriteOrder::L1;
        Ok(Table { class, offset, len })
    }

    /// Copies the L1 table `from` to newly allocated clusters. The copy has `len` bytes and no COPIED flags.
    pub(super) fn copy_l1(&self, state: &mut ImageState, from: Table, len: u64) -> Result<Table> {
        let table = self.allocate_l1(state, len, Kind::InactiveL1)?;
        state.metadata.cache.insert_zeroed(table)?;
        for at in (0..from.len).step_by(8) {
            let entry = state.metadata.cache.number(from, at)? & !COPIED;
            if entry != 0 {
                state.metadata.cache.set_number(table, at, entry)?;
            }
        }
        Ok(table)
    }

    /// Writes a snapshot table with the entries of `listed` and then `new` to newly allocated clusters, writes back all
    /// tables, and flushes.
    pub(super) fn write_entries(
        &self,
        state: &mut ImageState,
        listed: &[Snapshot],
        new: Option<&[u8]>,
    ) -> Result<SnapshotTable> {
        let bytes = self.encode_entries(state, listed, new)?;
        let len = bytes.len() as u64;
        let offset = match len.div_ceil(self.header.geometry.cluster_size()) {
            0 => 0,
            clusters => {
                let kind = Some(Kind::SnapshotTable);
                state.metadata.allocate(clusters, kind)?.get()
            }
        };
        let written = self
            .file
            .write_at(&bytes, offset)
            .and_then(|()| state.metadata.flush());
        if let Err(error) = written {
            // A cluster that cannot be released leaks, which is harmless.
            let released = state.metadata.release(ByteRange::at(offset, len));
            let _ = released.and_then(|()| state.metadata.cache.write_back());
            return Err(error);
        }
        // A table has at most `MAX_TABLE` bytes, so the count fits.
        let count = saturating_u32(listed.len() + usize::from(new.is_some()));
        Ok(SnapshotTable { offset, count })
    }

    /// Makes the header point to a snapshot table that has been written.
    pub(super) fn publish_entries(&self, state: &mut ImageState, table: SnapshotTable) -> Result<()> {
        let mut location = [0; 12];
        location[..4].copy_from_slice(&table.count.to_be_bytes());
        location[4..].copy_from_slice(&table.offset.to_be_bytes());
        self.file.write_at(&location, field::NB_SNAPSHOTS)?;
        state.snapshots = table;
        self.file.flush()
    }

    /// Releases the clusters of a snapshot table with the entries of `listed`. The refcounts are dirty in the metadata
    /// cache.
    pub(super) fn release_entries(
        &self,
        state: &mut ImageState,
        table: SnapshotTable,
        listed: &[Snapshot],
    ) -> Result<()> {
        let len = entries_len(listed);
        state.metadata.release(ByteRange::at(table.offset, len))
    }

    /// Encodes a table with the entries of `listed`, including unknown extra data, and then `new`.
    pub(super) fn encode_entries(
        &self,
        state: &ImageState,
        listed: &[Snapshot],
        new: Option<&[u8]>,
    ) -> Result<Vec<u8>> {
        let new = new.unwrap_or(&[]);
        // Completing an entry adds at most the known extra data.
        let len = entries_len(listed).next_multiple_of(8) + new.len() as u64;
        let most = len + listed.len() as u64 * KNOWN_EXTRA as u64;
        let _memory = self.budget.reserve(most)?;
        let mut bytes = Vec::new();
        for snapshot in listed {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            self.encode_entry(state, snapshot, &mut bytes)?;
        }
        if !new.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend_from_slice(new);
        }
        if bytes.len() as u64 > MAX_TABLE {
            return Err(Error::from_errno(errno::EFBIG));
        }
        Ok(bytes)
    }

    /// Appends the entry of `snapshot` to `bytes`, with the extra data that version 3 requires.
    fn encode_entry(&self, state: &ImageState, snapshot: &Snapshot, bytes: &mut Vec<u8>) -> Result<()> {
        let (at, len) = snapshot.entry;
        let mut entry = vec![0; to_index(len)?];
        self.file.read_whole(&mut entry, at)?;
        let unreadable = || Error::corrupt("Could not read snapshots");
        let (mut raw, rest) = RawSnapshot::read_from_prefix(&entry).map_err(|_| unreadable())?;
        let (extra, names) = rest
            .split_at_checked(to_index(snapshot.extra_len)?)
            .ok_or_else(unreadable)?;
        let extra = completed(&raw, extra.to_vec(), state.size);
        raw.extra_data_size = U32::new(u32::try_from(extra.len()).map_err(|_| unreadable())?);
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(&extra);
        bytes.extend_from_slice(names);
        Ok(())
    }

    /// Completes the entries of the snapshot table with the extra data that version 3 requires, if any entry lacks it.
    pub(in crate::qcow2) fn complete_snapshots(&self) -> Result<()> {
        let mut state = self.quiesce()?;
        let listed = self.read_snapshots_of(state.snapshots)?;
        if listed.iter().all(|snapshot| snapshot.extra_len >= V3_EXTRA) {
            return Ok(());
        }
        self.count_before_allocating(&mut state, 1)?;
        let old = state.snapshots;
        let table = self.write_entries(&mut state, &listed, None)?;
        self.publish_entries(&mut state, table)?;
        self.release_entries(&mut state, old, &listed)?;
        state.metadata.flush()
    }

    /// Encodes the entry of a new snapshot whose L1 table is `l1`.
    pub(super) fn new_entry(
        &self,
        state: &ImageState,
        new: &NewSnapshot<'_>,
        listed: &[Snapshot],
        l1: Table,
    ) -> Result<Vec<u8>> {
        let id = listed.iter().filter_map(|snapshot| snapshot.info.id.parse().ok());
        let id = (id.max().unwrap_or(0u64) + 1).to_string();
        let name = name::to_bytes(new.name);
        // A longer one could not be found by the name that is shown.
        if name.len() > SHOWN_NAME {
            return Err(Error::invalid("Snapshot name too long"));
        }
        let long = |_| Error::invalid("Snapshot name too long");
        let raw = RawSnapshot {
            l1_table_offset: U64::new(l1.offset),
            l1_size: U32::new(entries_of(l1)?),
            id_len: U16::new(u16::try_from(id.len()).map_err(long)?),
            name_len: U16::new(u16::try_from(name.len()).map_err(long)?),
            date_sec: U32::new(new.date_sec),
            date_nsec: U32::new(new.date_nsec),
            vm_clock_nsec: U64::ZERO,
            vm_state_size: U32::ZERO,
            extra_data_size: U32::new(EXTRA_LEN),
        };
        let mut bytes = raw.as_bytes().to_vec();
        // VM state size, disk size, instruction count: without a VM the first and the last are 0.
        for number in [0, state.size, 0] {
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        bytes.extend_from_slice(id.as_bytes());
        bytes.extend_from_slice(&name);
        Ok(bytes)
    }
}

/// The length of a table with these entries in bytes.
fn entries_len(entries: &[Snapshot]) -> u64 {
    entries
        .iter()
        .fold(0, |end: u64, snapshot| end.next_multiple_of(8) + snapshot.entry.1)
}

/// The length of the extra data of a new entry in bytes: VM state size, disk size, instruction count.
const EXTRA_LEN: u32 = 24;

const _: () = assert!(EXTRA_LEN as usize == KNOWN_EXTRA && limit::SNAPSHOT_ENTRY == 40);

fn no_snapshot() -> Error {
    Error::new(ErrorKind::NotFound, "Can't find snapshot")
}
