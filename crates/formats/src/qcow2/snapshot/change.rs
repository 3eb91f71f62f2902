//! Taking, applying and deleting snapshots.
//!
//! All three count the clusters of a whole tree and replace one reference to it in the header. The order is such that
//! whatever can be reached is counted at any moment:
//!
//! ```text
//!   create   COPIED flags off → counts up → L1 copy, new snapshot table → header
//!   apply    COPIED flags off → counts up → new active L1 → header → counts of the old tree down → flags
//!   delete   new snapshot table → header → counts down → flags
//! ```
//!
//! A crash in between leaks clusters, and may leave a flag off that could be on, which costs a copy and nothing else.

use std::sync::{MutexGuard, PoisonError};

use diskimage_core::{Error, ErrorKind, NewSnapshot, Result, ResultExt, SnapshotInfo, Snapshots, errno};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U16, U32, U64};

use super::super::entry::COPIED;
use super::super::header::{field, limit};
use super::super::refcount::Change;
use super::super::{Qcow2, State};
use super::{MAX_TABLE, RawSnapshot, Snapshot, SnapshotTable, index_of};
use crate::metadata_guard::Kind;
use crate::tables::{Class, Table};

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

    fn create(&self, snapshot: &NewSnapshot<'_>) -> Result<()> {
        let mut state = self.settle()?;
        let there = self.read_snapshots_of(state.snapshots)?;
        if there.len() as u64 >= u64::from(limit::SNAPSHOTS) {
            return Err(Error::from_errno(errno::EFBIG));
        }
        let l1 = state.l1;
        self.check_tree(&mut state, l1, Change::Up)?;
        let outcome = self.create_in(&mut state, snapshot, &there);
        self.mend_flags_after(&mut state, outcome)
    }

    fn apply(&self, index: usize) -> Result<()> {
        let mut state = self.settle()?;
        let there = self.read_snapshots_of(state.snapshots)?;
        let snapshot = there.get(index).ok_or_else(no_snapshot)?;
        self.count_uses(&mut state)?;
        let kept = self.snapshot_l1_or_errno(snapshot)?;
        self.check_tree(&mut state, kept, Change::Up)?;
        let old = state.l1;
        self.check_tree(&mut state, old, Change::Down)?;
        let outcome = self.apply_in(&mut state, snapshot, kept);
        self.mend_flags_after(&mut state, outcome)?;
        self.release_tree(&mut state, old)?;
        self.refresh_copied(&mut state)?;
        self.file.flush()
    }

    fn delete(&self, index: usize) -> Result<()> {
        let mut state = self.settle()?;
        let mut left = self.read_snapshots_of(state.snapshots)?;
        if index >= left.len() {
            return Err(no_snapshot());
        }
        self.count_uses(&mut state)?;
        let old_len = entries_len(&left);
        let gone = left.remove(index);
        let kept = self.snapshot_l1(&gone)?;
        self.check_tree(&mut state, kept, Change::Down)
            .context(|| "Failed to free the cluster and L1 table")?;
        self.replace_table(&mut state, &left, None, old_len)?;
        self.release_tree(&mut state, kept)?;
        self.refresh_copied(&mut state)?;
        self.file.flush()
    }
}

impl Qcow2 {
    /// Waits for writes that are under way, and leaves nothing in memory that is not in the file.
    fn settle(&self) -> Result<MutexGuard<'_, State>> {
        if !self.may_write() {
            return Err(Error::read_only());
        }
        self.check_support()?;
        let mut state = self.lock();
        while !state.in_flight.is_empty() {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.write_back(&mut state)?;
        state.tables.sync()?;
        state.tables.clear()?;
        Ok(state)
    }

    fn create_in(&self, state: &mut State, new: &NewSnapshot<'_>, there: &[Snapshot]) -> Result<()> {
        let l1 = state.l1;
        self.share_tree(state, l1)?;
        let copy = self.copy_l1(state, l1, l1.len)?;
        let id = there.iter().filter_map(|snapshot| snapshot.info.id.parse().ok());
        let id = id.max().unwrap_or(0u64) + 1;
        let entry = entry_bytes(new, id, copy, state.size)?;
        self.replace_table(state, there, Some(&entry), entries_len(there))
    }

    fn apply_in(&self, state: &mut State, snapshot: &Snapshot, kept: Table) -> Result<()> {
        self.share_tree(state, kept)?;
        let table = self.copy_l1(state, kept, kept.len.max(state.l1.len))?;
        state.tables.write_back()?;
        state.tables.sync()?;
        // Size and place of the table lie in one sector of the header.
        let mut fields = [0; HEADER_FIELDS];
        self.file.read_at(&mut fields, field::SIZE)?;
        let at = index_of(field::L1_SIZE - field::SIZE);
        let entries =
            u32::try_from(table.len / 8).map_err(|_| Error::corrupt("Snapshot L1 table too large"))?;
        fields[..8].copy_from_slice(&snapshot.info.disk_size.to_be_bytes());
        fields[at..at + 4].copy_from_slice(&entries.to_be_bytes());
        fields[at + 4..].copy_from_slice(&table.offset.to_be_bytes());
        self.file.write_at(&fields, field::SIZE)?;
        state.l1 = table;
        state.size = snapshot.info.disk_size;
        self.file.flush()
    }

    /// A copy of the L1 table `from` in a new place, `len` bytes long, no entry of which may be written in place.
    fn copy_l1(&self, state: &mut State, from: Table, len: u64) -> Result<Table> {
        let offset = match len.div_ceil(self.header.geometry.cluster_size()) {
            0 => 0,
            clusters => self.allocate(state, clusters, Some(Kind::InactiveL1))?,
        };
        let class = Class::L1;
        let table = Table { class, offset, len };
        state.tables.fresh(table)?;
        for at in (0..from.len).step_by(8) {
            let entry = state.tables.number(from, at)? & !COPIED;
            if entry != 0 {
                state.tables.set_number(table, at, entry)?;
            }
        }
        Ok(table)
    }

    /// Writes a table with the entries of `there` and then `new`, has the header point to it, and gives up the old one,
    /// which is `old_len` bytes long.
    fn replace_table(
        &self,
        state: &mut State,
        there: &[Snapshot],
        new: Option<&[u8]>,
        old_len: u64,
    ) -> Result<()> {
        let bytes = self.encode_table(there, new)?;
        let mut offset = 0;
        if !bytes.is_empty() {
            let clusters = (bytes.len() as u64).div_ceil(self.header.geometry.cluster_size());
            offset = self.allocate(state, clusters, Some(Kind::SnapshotTable))?;
            self.file.write_at(&bytes, offset)?;
        }
        state.tables.write_back()?;
        state.tables.sync()?;
        let count = u32::try_from(there.len() + usize::from(new.is_some())).unwrap_or(u32::MAX);
        let mut location = [0; 12];
        location[..4].copy_from_slice(&count.to_be_bytes());
        location[4..].copy_from_slice(&offset.to_be_bytes());
        self.file.write_at(&location, field::NB_SNAPSHOTS)?;
        let old = std::mem::replace(&mut state.snapshots, SnapshotTable { offset, count });
        self.file.flush()?;
        state.refcounts.release(&mut state.tables, old.offset, old_len)?;
        state.tables.write_back()
    }

    /// The bytes of a table with the entries of `there`, unknown extra data and all, and then `new`.
    fn encode_table(&self, there: &[Snapshot], new: Option<&[u8]>) -> Result<Vec<u8>> {
        let new = new.unwrap_or(&[]);
        let len = entries_len(there).next_multiple_of(8) + new.len() as u64;
        if len > MAX_TABLE {
            return Err(Error::from_errno(errno::EFBIG));
        }
        let _memory = self.budget.take(len)?;
        let mut bytes = Vec::with_capacity(index_of(len));
        for snapshot in there {
            let (at, len) = snapshot.entry;
            let start = bytes.len().next_multiple_of(8);
            bytes.resize(start + index_of(len), 0);
            self.file.read_whole(&mut bytes[start..], at)?;
        }
        if !new.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend_from_slice(new);
        }
        Ok(bytes)
    }

    /// After a failure the flags are made to fit the counts, as far as that is possible.
    fn mend_flags_after(&self, state: &mut State, outcome: Result<()>) -> Result<()> {
        if outcome.is_err() {
            // The failure itself is what is told.
            let _ = self.refresh_copied(state);
        }
        outcome
    }
}

/// Bytes of a table with these entries.
fn entries_len(entries: &[Snapshot]) -> u64 {
    entries
        .iter()
        .fold(0, |end: u64, snapshot| end.next_multiple_of(8) + snapshot.entry.1)
}

/// The entry of a new snapshot, whose L1 table is `l1`.
fn entry_bytes(new: &NewSnapshot<'_>, id: u64, l1: Table, disk_size: u64) -> Result<Vec<u8>> {
    let id = id.to_string();
    let long = |_| Error::invalid("Snapshot name too long");
    let raw = RawSnapshot {
        l1_table_offset: U64::new(l1.offset),
        l1_size: U32::new(u32::try_from(l1.len / 8).map_err(|_| Error::corrupt("L1 table too large"))?),
        id_len: U16::new(u16::try_from(id.len()).map_err(long)?),
        name_len: U16::new(u16::try_from(new.name.len()).map_err(long)?),
        date_sec: U32::new(new.date_sec),
        date_nsec: U32::new(new.date_nsec),
        vm_clock_nsec: U64::ZERO,
        vm_state_size: U32::ZERO,
        extra_data_size: U32::new(EXTRA_LEN),
    };
    let mut bytes = raw.as_bytes().to_vec();
    // No machine, so no state of one and no instructions that it has run.
    for word in [0, disk_size, 0] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(id.as_bytes());
    bytes.extend_from_slice(new.name.as_bytes());
    Ok(bytes)
}

/// Bytes of the header from the disk's size to the place of the L1 table.
const HEADER_FIELDS: usize = 24;

const _: () = assert!(field::SIZE + HEADER_FIELDS as u64 == field::L1_SIZE + 12);

/// Bytes of the extra data that is known: VM state size, disk size, instruction count.
const EXTRA_LEN: u32 = 24;

fn no_snapshot() -> Error {
    Error::new(ErrorKind::NotFound, "Can't find snapshot")
}
