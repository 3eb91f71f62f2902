//! Atomic changes of many tables: one write to the header publishes them.
//!
//! ```text
//!   header ──► L1, refcounts, snapshot table       in use: not written to
//!     ╎
//!     └╌╌╌╌╌╌► L1', refcounts', snapshot table'    in free clusters, which are counted only in refcounts'
//! ```
//!
//! The header's fields that point to these are in its first sector. So a crash leaves the old image, without even a
//! leaked cluster, or the new one. If the work fails, most often on a full disk, nothing in the file has to be undone.
//! The replaced tables are released once the new header is durable.

use diskimage_core::{Error, ErrorKind, Preallocation, Result, errno, saturating_u32, to_index};

use super::Refcounts;
use crate::layer_kit::metadata_cache::Table;
use crate::layer_kit::metadata_guard::Clusters;
use crate::qcow2::header::field;
use crate::qcow2::metadata::Metadata;
use crate::qcow2::snapshot::SnapshotTable;
use crate::qcow2::{ImageState, Qcow2};

/// The structures to which the header points.
#[derive(Debug)]
pub(in crate::qcow2) struct Roots {
    size: u64,
    pub(in crate::qcow2) l1: Table,
    refcounts: Refcounts,
    pub(in crate::qcow2) snapshots: SnapshotTable,
}

/// The state that is restored if the change is abandoned.
struct Before {
    /// The length of the file in bytes.
    len: u64,
    /// Whether the references had been counted.
    counted: bool,
    /// The metadata that no write may land on.
    guarded: Option<Clusters>,
}

impl ImageState {
    /// Replaces the refcounts. Returns the roots from before.
    fn replace_refcounts(&mut self, refcounts: Refcounts) -> Roots {
        Roots {
            size: self.size,
            l1: self.l1,
            refcounts: std::mem::replace(&mut self.metadata.refcounts, refcounts),
            snapshots: self.snapshots,
        }
    }

    fn set_roots(&mut self, roots: Roots) {
        self.size = roots.size;
        self.l1 = roots.l1;
        self.metadata.refcounts = roots.refcounts;
        self.snapshots = roots.snapshots;
    }
}

impl Qcow2 {
    /// Runs `work` on a copy of the refcounts, then makes the header point to the copy and to the tables that `work`
    /// made. `work` writes only to clusters that it allocated or to which nothing refers. Returns the roots that were
    /// replaced; the caller releases the clusters to which only they refer, except those of the refcounts, whose release
    /// is dirty in the metadata cache. Returns `None` without a change if the file has no space for the copies.
    ///
    /// # Errors
    /// The errors of `work`, after which the image is unchanged, and failed reads and writes.
    pub(in crate::qcow2) fn publish_at_once(
        &self,
        state: &mut ImageState,
        work: impl FnOnce(&mut ImageState) -> Result<()>,
    ) -> Result<Option<Roots>> {
        state.metadata.cache.write_back()?;
        let mut before = Before {
            len: self.file.len(),
            counted: state.metadata.refcounts.references_are_counted(),
            guarded: state.metadata.cache.guarded(),
        };
        let Metadata { cache, refcounts } = &mut state.metadata;
        // Nothing refers to the new tables before the header does.
        cache.set_ordered(false);
        let copy = match refcounts.copied(cache) {
            Ok(copy) => copy,
            Err(error) => return self.abandon(state, None, before, error),
        };
        let old = state.replace_refcounts(copy);
        let prepared = work(state).and_then(|()| state.metadata.cache.write_back());
        state.metadata.cache.set_ordered(true);
        let prepared = prepared.and_then(|()| state.metadata.cache.sync());
        if let Err(error) = prepared {
            return self.abandon(state, Some(old), before, error);
        }
        if let Err(error) = self.write_roots(state) {
            // The file may have the new roots despite the error, so it is not cut.
            before.len = self.file.len();
            let _ = self.abandon(state, Some(old), before, Error::read_only());
            return Err(error);
        }
        // From here on readers find the new roots.
        self.file.flush()?;
        state.metadata.release_structure(&old.refcounts)?;
        Ok(Some(old))
    }

    /// Abandons the change and restores the roots that the file has. Returns `None` if `error` means that space is
    /// missing, otherwise the error.
    fn abandon(
        &self,
        state: &mut ImageState,
        old: Option<Roots>,
        before: Before,
        error: Error,
    ) -> Result<Option<Roots>> {
        state.metadata.cache.set_ordered(true);
        state.metadata.cache.discard_changes();
        if let Some(old) = old {
            state.set_roots(old);
        }
        // A failed write may have made the file longer. If it cannot be cut, the clusters stay free.
        let _ = self.file.resize(before.len, Preallocation::Off);
        state.metadata.cache.restore_guarded(before.guarded);
        if before.counted {
            // If counting fails, the references are counted when they are needed.
            let _ = self.ensure_references_counted(state);
        }
        if is_out_of_space(&error) {
            Ok(None)
        } else {
            Err(error)
        }
    }

    /// Writes the header's fields that point to the roots. They are in one sector.
    pub(in crate::qcow2) fn write_roots(&self, state: &ImageState) -> Result<()> {
        let mut fields = [0; FIELDS];
        self.file.read_at(&mut fields, field::SIZE)?;
        let mut put = |at: u64, bytes: &[u8]| -> Result<()> {
            let at = to_index(at - field::SIZE)?;
            fields[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        let (l1, table) = (state.l1, state.metadata.refcounts.table());
        put(field::SIZE, &state.size.to_be_bytes())?;
        put(field::L1_SIZE, &entries_of(l1)?.to_be_bytes())?;
        put(field::L1_SIZE + 4, &l1.offset.to_be_bytes())?;
        put(field::REFCOUNT_TABLE, &table.offset.to_be_bytes())?;
        let clusters = table.len >> self.header.geometry.cluster_bits;
        put(
            field::REFCOUNT_TABLE + 8,
            // The table has at most 8 MiB.
            &saturating_u32(clusters).to_be_bytes(),
        )?;
        put(field::NB_SNAPSHOTS, &state.snapshots.count.to_be_bytes())?;
        put(field::NB_SNAPSHOTS + 4, &state.snapshots.offset.to_be_bytes())?;
        self.file.write_at(&fields, field::SIZE)
    }
}

/// The number of entries of an L1 table, in the width of the header's field.
pub(in crate::qcow2) fn entries_of(l1: Table) -> Result<u32> {
    u32::try_from(l1.len / 8).map_err(|_| Error::corrupt("L1 table too large"))
}

/// Whether an operation failed for lack of space, so that one that allocates less may succeed.
pub(in crate::qcow2) fn is_out_of_space(error: &Error) -> bool {
    error.kind() == ErrorKind::NoSpace || error.errno() == Some(errno::EFBIG)
}

/// The bytes of the header from the disk's size to the end of the snapshot table's offset.
const FIELDS: usize = 48;

const _: () = assert!(field::SIZE + FIELDS as u64 == field::NB_SNAPSHOTS + 12);
