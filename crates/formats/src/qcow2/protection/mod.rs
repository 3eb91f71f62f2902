//! Keeps writes off metadata and off clusters with other uses, in an image whose tables may be wrong.
//!
//! ```text
//!   destination of a write     condition                               otherwise
//!   allocated clusters         refcount 0, no metadata, no reference   metadata: refused; else another is allocated
//!   tables, in place           no other metadata                       refused
//!   guest data, in place       no metadata, no second reference        metadata: refused; else the cluster is copied
//! ```
//!
//! A refused write marks the image as corrupt (see [`corruption`]). The ranges of metadata are read from the header,
//! the L1 tables and the refcount table when the image is opened for writing. References are counted, as in a check,
//! before the first write that needs the counts.

pub(in crate::qcow2) mod corruption;
mod cut_off;
pub(in crate::qcow2) mod overlap_check;

use std::sync::Arc;

use diskimage_core::{ByteRange, ErrorKind, Result, to_index};

use crate::layer_kit::metadata_guard::{DamageReport, Kind, MetadataGuard};
use crate::layer_kit::offset::{ClusterRange, HostOffset};
use crate::qcow2::entry::OFFSET_MASK;
use crate::qcow2::header::Header;
use crate::qcow2::{ImageState, Qcow2};

/// Up to this many bytes of L2 tables, references are counted before any write or allocation; it is the size for 512
/// GiB of data at the default cluster size. Counting more takes too long for one small write.
const MAX_SMALL_COUNT: u64 = 64 << 20;
/// In larger images clusters are first allocated behind the end, until they are this fraction of the file.
const MAX_APPENDED: u64 = 64;
/// Bytes of a table that are read at once.
const CHUNK: u64 = 64 << 10;

impl Qcow2 {
    /// Sets the guard of the metadata cache to all metadata of the kinds that `overlap-check` selects.
    ///
    /// # Errors
    /// Failed reads, and an exhausted memory budget.
    pub(super) fn guard_metadata(&self, state: &mut ImageState) -> Result<()> {
        let header = &crate::qcow2::files::read_header(&self.file, true)?;
        let geometry = header.geometry;
        let (bits, report) = (geometry.cluster_bits, Arc::clone(&self.corruption));
        let report: Arc<dyn DamageReport> = report;
        let mut guard = MetadataGuard::new(bits, self.overlap_checks, report, self.budget.clone());
        guard.add(Kind::Header, ByteRange::at(0, geometry.cluster_size()))?;
        let l1 = ByteRange::at(header.l1_table_offset, u64::from(header.l1_size) * 8);
        self.guard_tables(&mut guard, l1, (Kind::ActiveL1, Some(Kind::ActiveL2)))?;
        let len = u64::from(header.refcount_table_clusters) << bits;
        let table = ByteRange::at(header.refcount_table_offset, len);
        self.guard_tables(
            &mut guard,
            table,
            (Kind::RefcountTable, Some(Kind::RefcountBlock)),
        )?;
        self.guard_snapshots(&mut guard, state, header)?;
        // A directory that cannot be where the header says is not read either.
        if let Some(range) = header
            .bitmaps()
            .and_then(|bitmaps| self.directory_range(&bitmaps))
        {
            guard.add(Kind::BitmapDirectory, range)?;
        }
        state.metadata.cache.set_guard(guard);
        Ok(())
    }

    /// Guards a table of offsets, and the tables of one cluster each to which it refers.
    fn guard_tables(
        &self,
        guard: &mut MetadataGuard,
        table: ByteRange,
        (kind, referred): (Kind, Option<Kind>),
    ) -> Result<()> {
        guard.add(kind, table)?;
        let Some(referred) = referred else { return Ok(()) };
        let geometry = self.header.geometry;
        let mut rest = table.intersect(ByteRange::new(0, self.file.len()));
        while !rest.is_empty() {
            let part = rest.first(CHUNK.min(rest.len()));
            let mut bytes = vec![0; to_index(part.len())?];
            self.file.read_at(&mut bytes, part.start())?;
            for entry in bytes.as_chunks().0 {
                let offset = u64::from_be_bytes(*entry) & OFFSET_MASK;
                if offset != 0 && offset.is_multiple_of(geometry.cluster_size()) {
                    guard.add(referred, ByteRange::at(offset, geometry.cluster_size()))?;
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Guards the snapshot table and the tables of the snapshots. Of a snapshot table that cannot be parsed only the
    /// start is guarded; commands that need such a table refuse it.
    fn guard_snapshots(&self, guard: &mut MetadataGuard, state: &ImageState, header: &Header) -> Result<()> {
        if header.nb_snapshots == 0 {
            return Ok(());
        }
        let start = header.snapshots_offset;
        guard.add(Kind::SnapshotTable, ByteRange::at(start, 1))?;
        let snapshots = match self.read_snapshots_of(state.snapshots) {
            Ok(snapshots) => snapshots,
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(_) => return Ok(()),
        };
        for snapshot in &snapshots {
            let (at, len) = snapshot.entry;
            guard.add(Kind::SnapshotTable, ByteRange::at(at, len))?;
            if let Ok(l1) = self.snapshot_l1(snapshot) {
                let wanted = self.overlap_checks.has(Kind::InactiveL2);
                let l2 = wanted.then_some(Kind::InactiveL2);
                self.guard_tables(guard, l1.range(), (Kind::InactiveL1, l2))?;
            }
        }
        Ok(())
    }

    /// Allocates a run of `count` clusters, for metadata of the kind `kind` or for anything else.
    ///
    /// # Errors
    /// A file that cannot grow, and damage.
    pub(super) fn allocate(
        &self,
        state: &mut ImageState,
        count: u64,
        kind: Option<Kind>,
    ) -> Result<HostOffset> {
        self.count_before_allocating(state, count)?;
        state.metadata.allocate(count, kind)
    }

    /// Counts the references before `count` clusters are allocated: in a small image always, in a large one only if the
    /// file has free clusters and enough clusters were allocated behind its end instead.
    pub(super) fn count_before_allocating(&self, state: &mut ImageState, count: u64) -> Result<()> {
        if state.metadata.refcounts.references_are_counted() || self.is_small(state) {
            return self.ensure_references_counted(state);
        }
        if !state.metadata.has_free_before_end()? {
            return Ok(());
        }
        state.appended = state.appended.saturating_add(count);
        if state.appended > state.metadata.refcounts.end().get() / MAX_APPENDED {
            self.ensure_references_counted(state)
        } else {
            Ok(())
        }
    }

    /// Counts the references before a write in place, if the image is small.
    pub(super) fn count_before_write(&self, state: &mut ImageState) -> Result<()> {
        if self.is_small(state) {
            self.ensure_references_counted(state)
        } else {
            Ok(())
        }
    }

    /// Counts the references to all clusters unless they are counted already.
    ///
    /// # Errors
    /// Failed reads and writes. Without enough memory the references stay unknown, which is no error.
    pub(super) fn ensure_references_counted(&self, state: &mut ImageState) -> Result<()> {
        if state.metadata.refcounts.references_are_counted() {
            return Ok(());
        }
        // The count reads the file, so dirty pages must be in it.
        state.metadata.cache.write_back()?;
        let mut references = match self.count_references() {
            Ok(references) => references,
            Err(error) if error.kind() == ErrorKind::Limit => return Ok(()),
            // The error is reported for the request that needs the counts, without the context of the count.
            Err(error) => return Err(error.into_root()),
        };
        // Nothing refers to these ranges any more, but their refcounts are decremented only later.
        let bits = self.header.geometry.cluster_bits;
        for range in &state.freed {
            for cluster in ClusterRange::touched(*range, bits) {
                references.counts.add(cluster, 1)?;
            }
        }
        state
            .metadata
            .cache
            .mark_shared(|cluster| references.counts.of(cluster) > 1);
        state.metadata.refcounts.set_references(references);
        Ok(())
    }

    fn is_small(&self, state: &ImageState) -> bool {
        let entries = state.l1.len / 8;
        let tables = entries.min(self.file.len() >> self.header.geometry.cluster_bits);
        tables.saturating_mul(self.header.geometry.cluster_size()) <= MAX_SMALL_COUNT
    }

    /// Whether the cluster or table at host offset `offset`, whose entry has the COPIED flag, has no second known
    /// reference.
    pub(super) fn is_used_once(&self, state: &ImageState, offset: HostOffset) -> bool {
        state
            .metadata
            .refcounts
            .references_to(offset.cluster(self.header.geometry.cluster_bits))
            .is_none_or(|uses| uses <= 1)
    }
}
