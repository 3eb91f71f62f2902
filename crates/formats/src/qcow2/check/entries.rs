//! Checks the entries of an L2 table and counts the clusters to which they refer.

use std::sync::Arc;

use diskimage_core::{ByteRange, Encoded, Repair, Result, to_index};

use super::Check;
use crate::layer_kit::offset::{ClusterRange, HostOffset};
use crate::qcow2::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO, ascending};
use crate::qcow2::header::feature::Incompatible;
use crate::qcow2::header::limit;
use crate::qcow2::refcount::counts::page_runs;

/// The bits of a standard entry that must be zero.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// A walk over the entries of an L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    /// The host offset of the table.
    pub(super) table: u64,
    /// The number of references to the table for which the walk counts.
    pub(super) times: u64,
    /// The guest range that the table maps, cut to the size of the disk.
    pub(super) disk: ByteRange,
    /// Whether the table belongs to the active disk: its clusters are in the statistics.
    pub(super) active: bool,
    /// Whether errors were reported by an earlier walk.
    pub(super) silent: bool,
}

/// The kind of cluster to which a standard entry refers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// No host cluster.
    None,
    /// A host cluster with data.
    Data,
    /// A preallocated host cluster: it reads as zeroes or is not used yet.
    Preallocated,
}

impl Check<'_> {
    pub(super) fn has_data_file(&self) -> bool {
        self.header.features.incompatible.has(Incompatible::DATA_FILE)
    }

    /// The kind of a standard entry with its subcluster bitmap.
    pub(super) fn kind(&self, standard: u64, bitmap: u64) -> EntryKind {
        let host = standard & OFFSET_MASK != 0 || (self.has_data_file() && standard & COPIED != 0);
        let data = if self.geometry.extended_l2 {
            bitmap & u64::from(u32::MAX) != 0
        } else {
            standard & ZERO == 0
        };
        match (host, data) {
            (false, _) => EntryKind::None,
            (true, true) => EntryKind::Data,
            (true, false) => EntryKind::Preallocated,
        }
    }

    /// Reads the L2 table at `offset` into the shared buffer and returns the buffer; the caller returns it by assigning
    /// `self.buf`. `None` if the table is beyond the end of the file, where it reads as zeroes.
    pub(super) fn take_l2(&mut self, offset: u64) -> Result<Option<Vec<u8>>> {
        // A table in a hole of the file reads as zeroes as well.
        let table = ByteRange::at(offset, self.geometry.cluster_size());
        if offset >= self.file_len || self.hole(table)? == table.len() {
            return Ok(None);
        }
        let mut table = std::mem::take(&mut self.buf);
        table.resize(to_index(self.geometry.cluster_size())?, 0);
        self.file.read_padded(&mut table, offset)?;
        Ok(Some(table))
    }

    /// Counts the clusters to which an L2 table refers.
    pub(super) fn count_l2(&mut self, walk: &Walk) -> Result<()> {
        let table = self.take_l2(walk.table);
        if table.is_err() {
            self.report_line("ERROR: I/O error in check_refcounts_l2");
        }
        let Some(table) = table? else {
            return Ok(());
        };
        let reported = self.reported;
        if walk.silent {
            // Beyond the limit no lines are reported.
            self.reported = super::MAX_NOTES + 1;
        }
        let outcome = self.count_entries(&table, walk);
        if walk.silent {
            self.reported = reported;
        }
        self.buf = table;
        outcome
    }

    fn count_entries(&mut self, table: &[u8], walk: &Walk) -> Result<()> {
        // The host offset at which the next cluster would continue the one before.
        let mut next = 0;
        let (numbers, _) = table.as_chunks::<8>();
        let step = to_index(self.geometry.l2_entry_size() / 8)?;
        // The fast path for nearly all entries of nearly all images: whole clusters of data in this file.
        let plain = !self.geometry.extended_l2 && !self.has_data_file() && walk.times == 1;
        let odd = !(OFFSET_MASK | COPIED) | (self.geometry.cluster_size() - 1);
        let bits = self.geometry.cluster_bits;
        let mut index = 0;
        while let Some(entry) = numbers.get(index * step..(index + 1) * step) {
            let standard = u64::from_be_bytes(entry[0]);
            let bitmap = entry.get(1).map_or(0, |bytes| u64::from_be_bytes(*bytes));
            if standard == 0 && bitmap & u64::from(u32::MAX) == 0 {
                index += 1;
                continue;
            }
            let host = standard & OFFSET_MASK;
            let end = self.file_len.min(limit::HOST_OFFSET);
            let room = end.saturating_sub(host) / self.geometry.cluster_size();
            if plain && standard & odd == 0 && host != 0 && room > 0 {
                let run = ascending(&numbers[index..], self.geometry.cluster_size());
                let clusters = ClusterRange::at(HostOffset::new(host).cluster(bits), room.min(run as u64));
                self.count_run(clusters)?;
                self.add_to_statistics(host, clusters.len(), walk, &mut next);
                index += to_index(clusters.len())?;
            } else {
                self.count_entry(index, [standard, bitmap], walk, &mut next)?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Counts a reference to each of `clusters`, which are inside the file.
    fn count_run(&mut self, clusters: ClusterRange) -> Result<()> {
        for part in page_runs(clusters) {
            if self.counts.add_small_run(part)? {
                continue;
            }
            for cluster in part {
                if self.counts.add(cluster, 1)? > 0 {
                    // The count is at its limit: this reports it.
                    let host = cluster.offset(self.geometry.cluster_bits);
                    self.region(host.get(), self.geometry.cluster_size(), 1)?;
                }
            }
        }
        Ok(())
    }

    /// Adds `count` allocated clusters from the host offset `host` on to the statistics of the active disk.
    fn add_to_statistics(&mut self, host: u64, count: u64, walk: &Walk, next: &mut u64) {
        if walk.active {
            self.report.allocated_clusters += count;
            if *next != 0 && *next != host {
                self.report.fragmented_clusters += 1;
            }
            *next = host + count * self.geometry.cluster_size();
        }
    }

    fn count_entry(
        &mut self,
        index: usize,
        [standard, bitmap]: [u64; 2],
        walk: &Walk,
        next: &mut u64,
    ) -> Result<()> {
        if standard & COMPRESSED != 0 {
            return self.count_compressed(index, [standard, bitmap], walk);
        }
        if standard & RESERVED != 0 {
            self.corruption(format!(
                "ERROR found l2 entry with reserved bits set: {standard:x}"
            ));
        }
        let host = standard & OFFSET_MASK;
        let (allocated, zero) = (bitmap & u64::from(u32::MAX), bitmap >> 32);
        let kind = self.kind(standard, bitmap);
        if kind == EntryKind::None {
            if standard & COPIED != 0 {
                self.corruption("ERROR offset=0: Data cluster lies in the header; L2 entry corrupted.");
            }
            if allocated != 0 {
                self.corruption("ERROR: Unallocated cluster has non-zero subcluster allocation map");
            }
            return Ok(());
        }
        if allocated & zero != 0 {
            self.corruption(format!(
                "ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if !host.is_multiple_of(self.geometry.cluster_size()) {
            let preallocated = kind == EntryKind::Preallocated;
            let noun = if preallocated { "Preallocated" } else { "Data" };
            let fix = preallocated && self.repair == Repair::All && self.may_repair_l2(walk.table)?;
            self.corruption_or_fix(
                fix,
                &format!("offset={host:x}: {noun} cluster is not properly aligned; L2 entry corrupted."),
            );
            if fix {
                // The cluster reads as zeroes or as the backing image, as before; only its preallocation is lost.
                let plain = if self.geometry.extended_l2 { 0 } else { ZERO };
                let at = index as u64 * self.geometry.l2_entry_size();
                return self.file.write_at(&plain.to_be_bytes(), walk.table + at);
            }
        }
        self.add_to_statistics(host, 1, walk, next);
        let needed = self.needed(index, bitmap, walk);
        if self.has_data_file() {
            // A check may have opened the image without its data file.
            let data = Some(&self.image.data).filter(|data| !Arc::ptr_eq(data, &self.image.file));
            let is_short = data.is_some_and(|data| host.saturating_add(needed) > data.len());
            if kind == EntryKind::Data && is_short {
                self.corruption(format!(
                    "ERROR: data cluster offset={host:#x} reaches beyond the end of the data file"
                ));
            }
            return Ok(());
        }
        if kind == EntryKind::Data {
            self.require_whole("data cluster", host, needed);
        }
        self.region(host, self.geometry.cluster_size(), walk.times)
    }

    /// How many bytes of the cluster in entry `index` hold data of the disk. The rest is padding, which may be beyond
    /// the end of the file.
    fn needed(&self, index: usize, bitmap: u64, walk: &Walk) -> u64 {
        let size = self.geometry.cluster_size();
        let start = walk.disk.start().saturating_add(index as u64 * size);
        let inside = ByteRange::at(start, size).intersect(walk.disk).len();
        if !self.geometry.extended_l2 {
            return inside;
        }
        // Up to the last allocated subcluster.
        let count = 32 - (bitmap & u64::from(u32::MAX)).leading_zeros().saturating_sub(32);
        inside.min(u64::from(count) * self.geometry.subcluster_size())
    }

    fn count_compressed(&mut self, index: usize, [standard, bitmap]: [u64; 2], walk: &Walk) -> Result<()> {
        let shift = 62 - (self.geometry.cluster_bits - 8);
        let offset = standard & ((1 << shift) - 1);
        if standard & COPIED != 0 {
            self.corruption(format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        let entry = standard & !COPIED;
        if self.has_data_file() {
            self.corruption(format!(
                "ERROR compressed cluster {index} with data file, entry={entry:#x}"
            ));
            return Ok(());
        }
        if self.geometry.extended_l2 && bitmap != 0 {
            self.corruption(format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            ));
            return Ok(());
        }
        let sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1;
        let stored = sectors * 512 - offset % 512;
        self.region(offset, stored, walk.times)?;
        self.require_stream(index, offset, stored, walk)?;
        if walk.active {
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            // qemu-img counts every compressed cluster as fragmented.
            self.report.fragmented_clusters += 1;
        }
        Ok(())
    }

    /// Reports a compressed cluster that the end of the file cuts off. The missing bytes may be padding: only decoding
    /// shows whether the stream is complete.
    fn require_stream(&mut self, index: usize, offset: u64, stored: u64, walk: &Walk) -> Result<()> {
        let size = self.geometry.cluster_size();
        let end = offset.saturating_add(stored);
        // A cluster that reaches further has been reported already.
        if end <= self.file_len || end >= self.file_len.saturating_add(size) {
            return Ok(());
        }
        let _memory = self.image.budget.reserve(size)?;
        let mut cluster = vec![0; to_index(size)?];
        let encoded = Encoded {
            offset,
            stored,
            cluster: ByteRange::at(walk.disk.start().saturating_add(index as u64 * size), size),
        };
        if self.image.decode_impl(&encoded, &mut cluster).is_err() {
            self.beyond_end("compressed cluster", offset);
        }
        Ok(())
    }
}
