//! What keeps a write off everything that it does not mean, in an image whose tables may be wrong.
//!
//! ```text
//!   where a write goes         what is asked                                             if not
//!   allocated clusters         refcount 0, no metadata there, no reference leads there   metadata: refused; else passed over
//!   tables, in place           nothing else there                                        refused
//!   guest data, in place       no metadata there, no second reference leads there        refused; else copied elsewhere
//! ```
//!
//! A refused write marks the image as corrupt (see [`crate::qcow2::protection::corruption`]). The metadata is known
//! from the header, the L1 and the refcount table when the image is opened to be written. References are counted, as a
//! check counts them, before the first write that relies on them.

pub(in crate::qcow2) mod corruption;
mod cut_off;
pub(in crate::qcow2) mod overlap_check;

use std::sync::Arc;

use diskimage_core::{ByteRange, ErrorKind, Result};

use crate::layer_kit::metadata_guard::{DamageReport, Kind, MetadataGuard};
use crate::qcow2::entry::OFFSET_MASK;
use crate::qcow2::header::Header;
use crate::qcow2::{ImageState, Qcow2};

/// Bytes of L2 tables up to which references are counted only to find clusters that two entries share, and to allocate
/// a few clusters: those of 512 GiB at the usual cluster size. More takes too long for one small write.
const MAX_SMALL_COUNT: u64 = 64 << 20;
/// In larger images clusters are first taken behind the end, up to this part of the file.
const MAX_APPENDED: u64 = 64;
/// Bytes of a table that are read at once.
const CHUNK: u64 = 64 << 10;

impl Qcow2 {
    /// Has all metadata that can be found guarded from now on, as far as the option `overlap-check` asks for it.
    ///
    /// # Errors
    /// Failures to read, and a memory budget that is used up.
    pub(super) fn guard_metadata(&self, state: &mut ImageState) -> Result<()> {
        let header = &crate::qcow2::read_header(&self.file, true)?;
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
        if let Some(bitmaps) = header.bitmaps() {
            let range = ByteRange::at(bitmaps.directory_offset.get(), bitmaps.directory_size.get());
            guard.add(Kind::BitmapDirectory, range)?;
        }
        state.metadata.cache.set_guard(guard);
        Ok(())
    }

    /// Guards a table of offsets, and the tables of one cluster each that it leads to.
    fn guard_tables(
        &self,
        guard: &mut MetadataGuard,
        table: ByteRange,
        (kind, below): (Kind, Option<Kind>),
    ) -> Result<()> {
        guard.add(kind, table)?;
        let Some(below) = below else { return Ok(()) };
        let geometry = self.header.geometry;
        let mut rest = table.intersect(ByteRange::new(0, self.file.len()));
        while !rest.is_empty() {
            let part = rest.first(CHUNK.min(rest.len()));
            let mut bytes = vec![0; usize::try_from(part.len()).unwrap_or(0)];
            self.file.read_at(&mut bytes, part.start())?;
            for word in bytes.as_chunks().0 {
                let offset = u64::from_be_bytes(*word) & OFFSET_MASK;
                if offset != 0 && offset.is_multiple_of(geometry.cluster_size()) {
                    guard.add(below, ByteRange::at(offset, geometry.cluster_size()))?;
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Guards the snapshot table and what it leads to. Of a table that cannot be read, which the commands that need it
    /// refuse, nothing but its place is known.
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
                let below = wanted.then_some(Kind::InactiveL2);
                self.guard_tables(guard, ByteRange::at(l1.offset, l1.len), (Kind::InactiveL1, below))?;
            }
        }
        Ok(())
    }

    /// Allocates `count` clusters in one piece, for metadata of the kind `kind` or for anything else.
    ///
    /// # Errors
    /// A file that cannot grow any more, and damage.
    pub(super) fn allocate(&self, state: &mut ImageState, count: u64, kind: Option<Kind>) -> Result<u64> {
        self.count_before_allocating(state, count)?;
        state.metadata.allocate(count, kind)
    }

    /// Counts the references before `count` clusters are allocated, if that does not take long, or if there are free
    /// ones among those that the file had when it was opened, and enough has been allocated behind them instead.
    pub(super) fn count_before_allocating(&self, state: &mut ImageState, count: u64) -> Result<()> {
        if state.metadata.refcounts.references_are_counted() || self.is_small(state) {
            return self.ensure_references_counted(state);
        }
        if !state.metadata.has_free_before_end()? {
            return Ok(());
        }
        state.appended = state.appended.saturating_add(count);
        if state.appended > state.metadata.refcounts.end() / MAX_APPENDED {
            self.ensure_references_counted(state)
        } else {
            Ok(())
        }
    }

    /// Counts the references before what they lead to is written in place, if that does not take long.
    pub(super) fn count_before_write(&self, state: &mut ImageState) -> Result<()> {
        if self.is_small(state) {
            self.ensure_references_counted(state)
        } else {
            Ok(())
        }
    }

    /// Counts the references to all clusters, before counts are taken down whose clusters could be given away then.
    ///
    /// # Errors
    /// Failures to read or write. Where memory does not suffice nothing is known of the references.
    pub(super) fn ensure_references_counted(&self, state: &mut ImageState) -> Result<()> {
        if state.metadata.refcounts.references_are_counted() {
            return Ok(());
        }
        // What is counted is the file.
        state.metadata.cache.write_back()?;
        let mut references = match self.count_references() {
            Ok(references) => references,
            Err(error) if error.kind() == ErrorKind::Limit => return Ok(()),
            // The request that needs the counts is what fails: the step at which they could not be had tells nothing.
            Err(error) => return Err(error.into_root()),
        };
        // Nothing refers to these any more, but they are counted down later.
        let bits = self.header.geometry.cluster_bits;
        for range in &state.freed {
            for cluster in range.start() >> bits..range.end().div_ceil(1 << bits) {
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

    /// Whether the cluster or table at host offset `offset`, whose entry says that it may be written in place, has no
    /// other user.
    pub(super) fn is_used_once(&self, state: &ImageState, offset: u64) -> bool {
        state
            .metadata
            .refcounts
            .references_to(offset >> self.header.geometry.cluster_bits)
            .is_none_or(|uses| uses <= 1)
    }
}
