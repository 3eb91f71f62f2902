//! Internal snapshots: the snapshot table, and the disk of a snapshot as a read-only layer.
//!
//! ```text
//!   0 l1_table_offset   8 l1_size   12 id_len   14 name_len   16 date_sec   20 date_nsec
//!  24 vm_clock_nsec    32 vm_state_size        36 extra_data_size
//!  40 extra data: vm_state_size (64 bits), disk_size, icount; then id, name, padding to 8
//! ```

mod change;
mod in_place;

use std::sync::Arc;

use diskimage_core::{Error, ErrorKind, Result, SnapshotInfo, errno, name, to_index};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Qcow2;
use super::header::limit;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};

/// The fixed part of an entry of the snapshot table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSnapshot {
    /// The host offset of the snapshot's L1 table.
    pub(super) l1_table_offset: U64,
    /// The number of entries of that table.
    pub(super) l1_size: U32,
    /// The length of the ID in bytes.
    pub(super) id_len: U16,
    /// The length of the name in bytes.
    pub(super) name_len: U16,
    /// When the snapshot was created, in seconds since 1970.
    pub(super) date_sec: U32,
    /// The nanoseconds of that time.
    pub(super) date_nsec: U32,
    /// How long the VM had run, in nanoseconds.
    pub(super) vm_clock_nsec: U64,
    /// Bytes of VM state, if the extra data has no 64-bit size.
    pub(super) vm_state_size: U32,
    /// The length of the extra data in bytes.
    pub(super) extra_data_size: U32,
}

const _: () = assert!(size_of::<RawSnapshot>() as u64 == limit::SNAPSHOT_ENTRY);

/// qemu-img's limit for the bytes of extra data.
pub(super) const MAX_EXTRA: u64 = 1024;
/// The extra data that version 3 requires: VM state size and disk size, 64 bits each.
pub(super) const V3_EXTRA: u64 = 16;
/// The extra data of entries that this program writes: the same and the instruction count.
pub(super) const KNOWN_EXTRA: usize = 24;
/// The value for an unknown instruction count.
const NO_ICOUNT: u64 = u64::MAX;
/// qemu-img's limit for the bytes of the whole table.
pub(super) const MAX_TABLE: u64 = 64 << 20;

/// A snapshot of the snapshot table.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) info: SnapshotInfo,
    pub(super) l1_table_offset: u64,
    pub(super) l1_size: u32,
    /// The offset and the length of the table entry, without padding.
    pub(super) entry: (u64, u64),
    /// The length of the extra data in bytes.
    extra_len: u64,
}

/// The location of an image's snapshot table.
#[derive(Clone, Copy, Debug)]
pub(super) struct SnapshotTable {
    pub(super) offset: u64,
    /// The number of entries.
    pub(super) count: u32,
}

impl Qcow2 {
    /// Reads all snapshots of the image, in the order of the table.
    ///
    /// # Errors
    /// Entries that reach past the end of the file or exceed qemu-img's limits.
    pub(super) fn read_snapshots(&self) -> Result<Vec<Snapshot>> {
        let table = self.lock().snapshots;
        self.read_snapshots_of(table)
    }

    /// The snapshots up to the first entry that cannot be read, and why that cannot be read.
    pub(super) fn readable_snapshots(&self) -> (Vec<Snapshot>, Option<Error>) {
        let table = self.lock().snapshots;
        let mut found = Vec::new();
        let outcome = self.add_snapshots_of(table, &mut found);
        (found, outcome.err())
    }

    pub(super) fn read_snapshots_of(&self, table: SnapshotTable) -> Result<Vec<Snapshot>> {
        let mut found = Vec::new();
        self.add_snapshots_of(table, &mut found).map(|()| found)
    }

    fn add_snapshots_of(&self, table: SnapshotTable, found: &mut Vec<Snapshot>) -> Result<()> {
        let mut at = table.offset;
        let _memory = self
            .budget
            .reserve(u64::from(table.count) * size_of::<Snapshot>() as u64)?;
        for _ in 0..table.count {
            at = at.next_multiple_of(8);
            let snapshot = self.read_snapshot(at)?;
            at += snapshot.entry.1;
            if at - table.offset > MAX_TABLE {
                return Err(Error::new(ErrorKind::Limit, "Snapshot table is too big"));
            }
            found.push(snapshot);
        }
        Ok(())
    }

    fn read_snapshot(&self, at: u64) -> Result<Snapshot> {
        let mut fixed = [0; size_of::<RawSnapshot>()];
        self.file.read_whole(&mut fixed, at).map_err(unreadable)?;
        let raw =
            RawSnapshot::read_from_bytes(&fixed).map_err(|_| Error::corrupt("Could not read snapshots"))?;
        let extra_len = u64::from(raw.extra_data_size.get());
        if extra_len > MAX_EXTRA {
            return Err(Error::new(
                ErrorKind::Limit,
                "Too much extra metadata in snapshot table entry",
            ));
        }
        let names_len = u64::from(raw.id_len.get()) + u64::from(raw.name_len.get());
        let mut rest = vec![0; to_index(extra_len + names_len)?];
        let start = at + limit::SNAPSHOT_ENTRY;
        self.file.read_whole(&mut rest, start).map_err(unreadable)?;
        let (extra, names) = rest.split_at(to_index(extra_len)?);
        let (id, name) = names.split_at(usize::from(raw.id_len.get()).min(names.len()));
        let number = |i: usize| {
            extra
                .get(i * 8..)
                .and_then(|bytes| bytes.first_chunk())
                .map(|bytes| u64::from_be_bytes(*bytes))
        };
        let info = SnapshotInfo {
            id: text(id, SHOWN_ID),
            name: text(name, SHOWN_NAME),
            vm_state_size: number(0).unwrap_or_else(|| u64::from(raw.vm_state_size.get())),
            date_sec: raw.date_sec.get(),
            date_nsec: raw.date_nsec.get(),
            vm_clock_nsec: raw.vm_clock_nsec.get(),
            icount: number(2).filter(|icount| *icount != NO_ICOUNT),
            disk_size: number(1).unwrap_or(self.header.size),
        };
        Ok(Snapshot {
            info,
            l1_table_offset: raw.l1_table_offset.get(),
            l1_size: raw.l1_size.get(),
            entry: (at, limit::SNAPSHOT_ENTRY + rest.len() as u64),
            extra_len,
        })
    }

    /// The L1 table of a snapshot.
    ///
    /// # Errors
    /// An invalid offset or size.
    pub(super) fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Table> {
        let geometry = self.header.geometry;
        let len = u64::from(snapshot.l1_size) * 8;
        if len > limit::L1_BYTES {
            return Err(Error::new(ErrorKind::Limit, "Snapshot L1 table too large"));
        }
        let offset = snapshot.l1_table_offset;
        if !offset.is_multiple_of(geometry.cluster_size()) || offset >= limit::HOST_OFFSET {
            return Err(Error::corrupt("Snapshot L1 table offset invalid"));
        }
        if u64::from(snapshot.l1_size) < geometry.l1_entries(snapshot.info.disk_size) {
            return Err(Error::corrupt("Snapshot L1 table is too small"));
        }
        let class = WriteOrder::L1;
        Ok(Table { class, offset, len })
    }

    /// [`Qcow2::snapshot_l1`] for operations whose error is only an errno: the reason is reported in a line before, as
    /// in qemu-img.
    pub(super) fn snapshot_l1_or_errno(&self, snapshot: &Snapshot) -> Result<Table> {
        self.snapshot_l1(snapshot).map_err(|error| {
            let errno = if error.kind() == ErrorKind::Limit {
                errno::EFBIG
            } else {
                errno::EINVAL
            };
            error.report_then(errno)
        })
    }

    /// Opens the disk of the snapshot with this ID and this name; `None` matches any.
    ///
    /// # Errors
    /// No such snapshot, or an invalid L1 table.
    pub(super) fn open_snapshot(&self, id: Option<&str>, name: Option<&str>) -> Result<Arc<Self>> {
        let fits = |snapshot: &Snapshot| {
            id.is_none_or(|id| snapshot.info.id == id) && name.is_none_or(|name| snapshot.info.name == name)
        };
        let snapshots = self.read_snapshots()?;
        let snapshot = snapshots.into_iter().find(fits);
        let snapshot = snapshot.ok_or_else(|| Error::new(ErrorKind::NotFound, "Can't find snapshot"))?;
        let l1 = self.snapshot_l1(&snapshot)?;
        let image = Self::assemble(self.parts(self.header.clone()), false, false);
        let mut state = image.lock();
        state.size = snapshot.info.disk_size;
        state.l1 = l1;
        state.snapshots = SnapshotTable { offset: 0, count: 0 };
        drop(state);
        Ok(Arc::new(image))
    }
}

/// Completes the extra data of an entry that is written again: known data and data of other programs stay, missing
/// fields get their defaults. `disk_size` is the size of the active disk.
pub(super) fn completed(raw: &RawSnapshot, mut extra: Vec<u8>, disk_size: u64) -> Vec<u8> {
    if extra.len() < KNOWN_EXTRA {
        // An incomplete number is dropped.
        let whole = extra.len() / 8;
        extra.truncate(whole * 8);
        let defaults = [u64::from(raw.vm_state_size.get()), disk_size, NO_ICOUNT];
        for value in &defaults[whole..] {
            extra.extend_from_slice(&value.to_be_bytes());
        }
    }
    extra
}

/// The bytes of an ID and of a name that are shown: more are cut off, as in qemu-img.
const SHOWN_ID: usize = 127;
pub(super) const SHOWN_NAME: usize = 255;

/// An ID or a name, which ends at the first NUL, or after `most` bytes.
fn text(bytes: &[u8], most: usize) -> String {
    let bytes = bytes.get(..most).unwrap_or(bytes);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    name::from_bytes(&bytes[..end]).into_owned()
}

fn unreadable(error: Error) -> Error {
    error.context("Could not read snapshots")
}
