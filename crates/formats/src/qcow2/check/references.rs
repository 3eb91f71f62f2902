//! Counts the references to each cluster: walks all structures from the header on.
//!
//! A damaged image may refer to one table from every entry. An L2 table is walked once for each of its first
//! [`MAX_VISITS`] references; qemu-img walks it for all. Further references are counted in one last silent walk, so
//! that the time is bounded by the length of the file.

use diskimage_core::errno;
use diskimage_core::{ByteRange, Error, Note, Preallocation, Repair, Result, is_zero, to_index};

use super::Check;
use super::entries::Walk;
use super::stored;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};
use crate::qcow2::entry::OFFSET_MASK;

/// The bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// The number of references for each of which an L2 table is walked.
pub(super) const MAX_VISITS: u64 = 4;
/// The number of unaligned L2 tables that are walked.
const MAX_UNALIGNED: u64 = 64;
/// Bytes of an L1 table that are read at once.
const CHUNK: usize = 64 << 10;
/// qemu-img's limit for the entries of an L1 table.
pub(super) const MAX_L1: u64 = (32 << 20) / 8;

/// An L1 table and its disk.
struct L1Walk {
    offset: u64,
    entries: u64,
    /// The size of the table's disk.
    size: u64,
    /// Whether the table is the active one.
    active: bool,
}

impl Check<'_> {
    pub(super) fn count_references(&mut self) -> Result<()> {
        self.counts = super::ClusterCounts::new(self.max_count, self.image.budget.clone());
        self.counted = false;
        self.repeated_l2.clear();
        self.protected = self.protected_ranges();
        self.end = HostOffset::new(self.file_len).cluster_end(self.geometry.cluster_bits);
        self.report.total_clusters = self.header.size.div_ceil(self.geometry.cluster_size());
        self.region(0, self.geometry.cluster_size(), 1)?;
        let mut unaligned = 0;
        let l1 = L1Walk {
            offset: self.header.l1_table_offset,
            entries: u64::from(self.header.l1_size),
            size: self.header.size,
            active: true,
        };
        self.count_l1(&l1, &mut unaligned)?;
        self.count_snapshots(&mut unaligned)?;
        self.count_remaining_l2_references()?;
        if let Some(crypto) = self.header.extensions.crypto {
            self.region(crypto.offset.get(), crypto.length.get(), 1)?;
        }
        self.count_bitmaps()?;
        self.count_refcount_structures()?;
        self.counted = true;
        Ok(())
    }

    /// Counts `times` references to each cluster that `size` bytes from `offset` on touch.
    pub(super) fn region(&mut self, offset: u64, size: u64, times: u64) -> Result<()> {
        if size == 0 {
            return Ok(());
        }
        let cluster_size = self.geometry.cluster_size();
        let end = offset.checked_add(size);
        // The last cluster of a file may be incomplete.
        let Some(end) = end.filter(|end| *end < self.file_len.saturating_add(cluster_size)) else {
            self.note_dangling(offset, size)?;
            self.report.corruptions += times - 1;
            self.corruption(format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset {offset:#x} size {size:#x}"
            ));
            return Ok(());
        };
        let bits = self.geometry.cluster_bits;
        let clusters = ClusterRange::touched(ByteRange::new(offset, end), bits);
        self.end = self.end.max(clusters.end);
        for cluster in clusters {
            let over = self.counts.add(cluster, times)?;
            if over > 0 {
                self.report.corruptions += over - 1;
                self.corruption(format!(
                    "ERROR: overflow cluster offset={:#x}",
                    cluster.offset(bits).get()
                ));
                self.report_line(
                    "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy \
                     if the image cannot be opened for writing",
                );
            }
        }
        Ok(())
    }

    /// Records the clusters of a region beyond the end of the file.
    fn note_dangling(&mut self, offset: u64, size: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let clusters = ClusterRange::touched(ByteRange::at(offset, size), bits);
        for cluster in ClusterRange::new(clusters.start.max(self.end), clusters.end) {
            // A check continues; an image that is opened for writing is refused.
            if self.dangling.len() >= super::MAX_DANGLING {
                break;
            }
            self.dangling.insert(cluster);
        }
        Ok(())
    }

    /// Reports `len` bytes at `offset` if they start inside the file and end beyond it. [`Check::region`] accepts such
    /// bytes as the padding of the last cluster and reports only regions that reach further.
    pub(super) fn require_whole(&mut self, what: &str, offset: u64, len: u64) {
        if offset < self.file_len && offset.saturating_add(len) > self.file_len {
            self.beyond_end(what, offset);
        }
    }

    pub(super) fn beyond_end(&mut self, what: &str, offset: u64) {
        self.corruption(format!(
            "ERROR: {what} offset={offset:#x} reaches beyond the end of the file"
        ));
    }

    fn count_l1(&mut self, l1: &L1Walk, unaligned: &mut u64) -> Result<()> {
        let L1Walk {
            offset,
            entries,
            active,
            ..
        } = *l1;
        self.require_whole("L1 table", offset, entries * 8);
        self.region(offset, entries * 8, 1)?;
        let mut chunk = vec![0; CHUNK];
        let mut done = 0;
        while done < entries {
            if active {
                self.progress.set(done, entries);
            }
            let hole = self.hole(ByteRange::new(offset + done * 8, offset + entries * 8))? / 8;
            if hole > 0 {
                done += hole;
                continue;
            }
            let len = to_index(((entries - done) * 8).min(CHUNK as u64))?;
            let chunk = &mut chunk[..len];
            self.file.read_padded(chunk, offset + done * 8)?;
            let (numbers, _) = chunk.as_chunks::<8>();
            if !is_zero(chunk) {
                for (entry, index) in numbers.iter().zip(done..) {
                    self.count_l1_entry(u64::from_be_bytes(*entry), l1, index, unaligned)?;
                }
            }
            done += numbers.len() as u64;
        }
        Ok(())
    }

    fn count_l1_entry(&mut self, entry: u64, l1: &L1Walk, index: u64, unaligned: &mut u64) -> Result<()> {
        if entry == 0 {
            return Ok(());
        }
        if entry & L1_RESERVED != 0 {
            self.corruption(format!("ERROR found L1 entry with reserved bits set: {entry:x}"));
        }
        let l2 = entry & OFFSET_MASK;
        let cluster = HostOffset::new(l2).cluster(self.geometry.cluster_bits);
        let known = self.counts.of(cluster) > 0;
        self.require_whole("L2 table", l2, self.geometry.cluster_size());
        self.region(l2, self.geometry.cluster_size(), 1)?;
        if !l2.is_multiple_of(self.geometry.cluster_size()) {
            self.corruption(format!(
                "ERROR l2_offset={l2:x}: Table is not cluster aligned; L1 entry corrupted"
            ));
            *unaligned += 1;
            if *unaligned > MAX_UNALIGNED {
                return Ok(());
            }
        } else if known {
            let visits = self.repeated_l2.entry(cluster).or_default();
            *visits += 1;
            if *visits >= MAX_VISITS {
                return Ok(());
            }
        }
        let coverage = self.geometry.l2_coverage();
        let start = index.saturating_mul(coverage);
        self.count_l2(&Walk {
            table: l2,
            times: 1,
            disk: ByteRange::at(start, coverage).intersect(ByteRange::new(0, l1.size)),
            active: l1.active,
            silent: false,
        })
    }

    fn count_snapshots(&mut self, unaligned: &mut u64) -> Result<()> {
        // Tables that do not overlap fit into the file; tables beyond that total overlap.
        let mut unclaimed = self.file_len.saturating_add(MAX_L1 * 8);
        for index in 0..self.snapshots.entries.len() {
            let entry = self.snapshots.entries[index];
            let fault = if !entry.l1_offset.is_multiple_of(self.geometry.cluster_size()) {
                Some(format!(
                    "l1_offset={:#x}: L1 table is not cluster aligned",
                    entry.l1_offset
                ))
            } else if u64::from(entry.l1_size) > MAX_L1 {
                Some(format!("l1_size={:#x}: L1 table is too large", entry.l1_size))
            } else {
                let left = unclaimed.checked_sub(u64::from(entry.l1_size) * 8);
                unclaimed = left.unwrap_or(unclaimed);
                let overlaps = left.is_none();
                overlaps.then(|| format!("l1_offset={:#x}: L1 tables overlap", entry.l1_offset))
            };
            if let Some(fault) = fault {
                let name = self.snapshot_name(&entry)?;
                self.corruption(format!(
                    "ERROR snapshot {name} {fault}; snapshot table entry corrupted"
                ));
                continue;
            }
            let l1 = L1Walk {
                offset: entry.l1_offset,
                entries: u64::from(entry.l1_size),
                size: self.snapshot_size(&entry)?,
                active: false,
            };
            self.count_l1(&l1, unaligned)?;
        }
        self.require_whole("snapshot table", self.header.snapshots_offset, self.snapshots.len);
        self.region(self.header.snapshots_offset, self.snapshots.len, 1)
    }

    /// Counts the references to L2 tables beyond the first [`MAX_VISITS`].
    fn count_remaining_l2_references(&mut self) -> Result<()> {
        let mut tables: Vec<(ClusterIndex, u64)> = self
            .repeated_l2
            .iter()
            .filter(|(_, visits)| **visits >= MAX_VISITS)
            .map(|(cluster, visits)| (*cluster, *visits - (MAX_VISITS - 1)))
            .collect();
        tables.sort_unstable();
        for (cluster, times) in tables {
            self.count_l2(&Walk {
                table: cluster.offset(self.geometry.cluster_bits).get(),
                times,
                // The guest ranges were checked by the earlier walks.
                disk: ByteRange::new(0, 0),
                active: false,
                silent: true,
            })?;
        }
        Ok(())
    }

    fn count_refcount_structures(&mut self) -> Result<()> {
        let len = self.stored.table.len() as u64 * 8;
        self.require_whole("refcount table", self.stored.table_offset, len);
        self.region(self.stored.table_offset, len, 1)?;
        for index in 0..self.stored.table.len() {
            let entry = self.stored.table[index];
            if entry != 0 {
                self.count_block(index, entry)?;
            }
        }
        Ok(())
    }

    fn count_block(&mut self, index: usize, entry: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let offset = entry & stored::OFFSET_MASK;
        if entry != offset {
            self.rebuild = true;
            self.corruption(format!(
                "ERROR refcount table entry {index} has reserved bits set"
            ));
            return Ok(());
        }
        if !offset.is_multiple_of(cluster_size) {
            self.rebuild = true;
            self.corruption(format!(
                "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ));
            return Ok(());
        }
        if offset >= self.file_len.next_multiple_of(cluster_size) {
            let what = format!("refcount block {index} is outside image");
            if self.repair != Repair::All {
                self.corruption(format!("ERROR {what}"));
                return Ok(());
            }
            self.report_line(format!("Repairing {what}"));
            if let Err(error) = self.grow_file_to(offset) {
                self.rebuild = true;
                self.corruption(format!("ERROR could not resize image: {}", error.root()));
                return Ok(());
            }
            self.report.corruptions_fixed += 1;
        }
        let cluster = HostOffset::new(offset).cluster(self.geometry.cluster_bits);
        // A block whose cluster has another use must not be written to. Counts that saturate early do not show that.
        self.rebuild |= self.counts.of(cluster) > 0;
        self.require_whole("refcount block", offset, cluster_size);
        self.region(offset, cluster_size, 1)?;
        let count = self.counts.of(cluster);
        if count > 1 {
            self.corruption(format!("ERROR refcount block {index} refcount={count}"));
        }
        Ok(())
    }

    /// Grows the file so that it contains the cluster at `offset`.
    fn grow_file_to(&mut self, offset: u64) -> Result<()> {
        let end = offset
            .checked_add(self.geometry.cluster_size())
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| Error::from_errno(errno::EINVAL))?;
        self.file.resize(end, Preallocation::Off).inspect_err(|error| {
            self.report_note(&Note::Error(format!("Could not resize file: {}", error.root())));
        })?;
        self.file_len = end;
        self.end = self
            .end
            .max(HostOffset::new(end).cluster_end(self.geometry.cluster_bits));
        Ok(())
    }
}
