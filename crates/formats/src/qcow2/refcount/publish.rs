//! Changes that one write to the header makes valid all at once.
//!
//! ```text
//!   header ──► L1, refcounts, snapshot table       in use: nothing of it is written to
//!     ╎
//!     └╌╌╌╌╌╌► L1', refcounts', snapshot table'    in free clusters, which only refcounts' counts
//! ```
//!
//! The fields of the header that lead to these lie in its first sector. So a crash leaves the image as it was, without
//! even a leaked cluster, or as it is afterwards; and where the work fails, a full disk being the usual reason, nothing
//! has to be undone. What was replaced is counted down once the new header is durable.

use diskimage_core::{Error, ErrorKind, Preallocation, Result, errno};

use super::Refcounts;
use crate::layer_kit::metadata_cache::Table;
use crate::layer_kit::metadata_guard::Clusters;
use crate::qcow2::header::field;
use crate::qcow2::metadata::Metadata;
use crate::qcow2::snapshot::{SnapshotTable, index_of};
use crate::qcow2::{ImageState, Qcow2};

/// What the header leads to.
#[derive(Debug)]
pub(in crate::qcow2) struct Roots {
    size: u64,
    pub(in crate::qcow2) l1: Table,
    refcounts: Refcounts,
    pub(in crate::qcow2) snapshots: SnapshotTable,
}

/// What is as it was where nothing comes of it.
struct Before {
    /// Bytes of the file.
    len: u64,
    /// Whether the references to clusters were counted.
    counted: bool,
    /// The metadata that no write may land on.
    guarded: Option<Clusters>,
}

impl ImageState {
    /// Goes on with other refcounts; the roots there were.
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
    /// Has `work` change the image with a copy of the refcounts, then has the header lead to all that. `work` writes to
    /// clusters only that it allocated or that nothing refers to. No changes of tables wait in memory. The roots that
    /// were replaced; the caller counts down what they alone lead to, apart from the refcounts. None if there is no
    /// room for that: the image is as it was.
    ///
    /// # Errors
    /// Those of `work`, after which the image is as it was, and failures to read or write.
    pub(in crate::qcow2) fn publish_at_once(
        &self,
        state: &mut ImageState,
        work: impl FnOnce(&mut ImageState) -> Result<()>,
    ) -> Result<Option<Roots>> {
        let mut before = Before {
            len: self.file.len(),
            counted: state.metadata.refcounts.references_are_counted(),
            guarded: state.metadata.cache.guarded(),
        };
        let Metadata { cache, refcounts } = &mut state.metadata;
        let copy = match refcounts.copied(cache) {
            Ok(copy) => copy,
            Err(error) => return self.abandon(state, None, before, error),
        };
        let old = state.replace_refcounts(copy);
        let prepared = work(state)
            .and_then(|()| state.metadata.cache.write_back())
            .and_then(|()| state.metadata.cache.sync());
        if let Err(error) = prepared {
            return self.abandon(state, Some(old), before, error);
        }
        if let Err(error) = self.write_roots(state) {
            // The file may have them in spite of that, so nothing is cut off.
            before.len = self.file.len();
            let _ = self.abandon(state, Some(old), before, Error::read_only());
            return Err(error);
        }
        // From here on it is the new roots that a reader finds.
        self.file.flush()?;
        state.metadata.release_structure(&old.refcounts)?;
        state.metadata.cache.write_back()?;
        Ok(Some(old))
    }

    /// Goes on with the roots that the file has. What `error` leaves to be done.
    fn abandon(
        &self,
        state: &mut ImageState,
        old: Option<Roots>,
        before: Before,
        error: Error,
    ) -> Result<Option<Roots>> {
        state.metadata.cache.discard_changes();
        if let Some(old) = old {
            state.set_roots(old);
        }
        // A part of a write that failed may have made it longer. What cannot be cut off is not in use.
        let _ = self.file.resize(before.len, Preallocation::Off);
        state.metadata.cache.restore_guarded(before.guarded);
        if before.counted {
            // Where that fails, they are counted when they are needed.
            let _ = self.ensure_references_counted(state);
        }
        if is_out_of_space(&error) {
            Ok(None)
        } else {
            Err(error)
        }
    }

    /// Writes the fields of the header that lead to all else. They lie in one sector.
    pub(in crate::qcow2) fn write_roots(&self, state: &ImageState) -> Result<()> {
        let mut fields = [0; FIELDS];
        self.file.read_at(&mut fields, field::SIZE)?;
        let mut put = |at: u64, bytes: &[u8]| {
            let at = index_of(at - field::SIZE);
            fields[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let (l1, table) = (state.l1, state.metadata.refcounts.table());
        put(field::SIZE, &state.size.to_be_bytes());
        put(field::L1_SIZE, &entries_of(l1)?.to_be_bytes());
        put(field::L1_SIZE + 4, &l1.offset.to_be_bytes());
        put(field::REFCOUNT_TABLE, &table.offset.to_be_bytes());
        let clusters = table.len >> self.header.geometry.cluster_bits;
        put(
            field::REFCOUNT_TABLE + 8,
            &u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes(),
        );
        put(field::NB_SNAPSHOTS, &state.snapshots.count.to_be_bytes());
        put(field::NB_SNAPSHOTS + 4, &state.snapshots.offset.to_be_bytes());
        self.file.write_at(&fields, field::SIZE)
    }
}

/// The entries of an L1 table, as the header has their number.
pub(in crate::qcow2) fn entries_of(l1: Table) -> Result<u32> {
    u32::try_from(l1.len / 8).map_err(|_| Error::corrupt("L1 table too large"))
}

/// Whether an operation failed for want of room, so that one that needs less may work.
pub(in crate::qcow2) fn is_out_of_space(error: &Error) -> bool {
    error.kind() == ErrorKind::NoSpace || error.errno() == Some(errno::EFBIG)
}

/// Bytes of the header from the disk's size to the place of the snapshot table.
const FIELDS: usize = 48;

const _: () = assert!(field::SIZE + FIELDS as u64 == field::NB_SNAPSHOTS + 12);
