//! Compares counted references with stored refcounts, block by block.

use diskimage_core::errno;
use diskimage_core::{ByteRange, Repair, Result, saturating_index};

use super::Check;
use super::stored::{self, BlockEntry};
use crate::layer_kit::offset::{ClusterIndex, ClusterRange};
use crate::qcow2::hex::hex;
use crate::qcow2::refcount::block;
use crate::qcow2::refcount::counts::page_runs;

/// How a difference between the two counts of a cluster is handled.
#[derive(Clone, Copy, Debug)]
struct Compare {
    repair: Repair,
    /// The final stored refcounts replace the counted ones, for the check of the COPIED flags.
    keep: bool,
    /// The storage of freed clusters is discarded. Not in an image with other damage, where a leaked cluster may hold
    /// the only copy of guest data.
    discard: bool,
}

impl Check<'_> {
    /// Compares all counts and repairs as far as `repair` allows. With `keep`, the final stored refcounts replace the
    /// counted ones.
    pub(super) fn compare(&mut self, repair: Repair, keep: bool) -> Result<()> {
        let how = Compare {
            repair,
            keep,
            discard: self.report.corruptions == 0,
        };
        let first = ClusterIndex::new(0);
        let blocks_before = |end| self.geometry.block_indices(ClusterRange::new(first, end)).end;
        // Further blocks have neither a reference nor a stored refcount.
        let blocks = (self.stored.table.len() as u64).max(blocks_before(self.counts.end()));
        let mut highest = first;
        for index in 0..blocks.min(blocks_before(self.end)) {
            let counted = self.geometry.counted_clusters(index);
            let clusters = ClusterRange::new(counted.start, counted.end.min(self.end));
            match self.stored.block_entry(index) {
                BlockEntry::Unaligned(offset) => {
                    let what = format!(
                        "Refblock offset {offset:#x} unaligned (reftable index: {})",
                        hex(index)
                    );
                    self.mark_corrupt(&what)?;
                    self.report.check_errors += clusters.len();
                    for cluster in clusters {
                        if self.reported > super::MAX_NOTES {
                            break;
                        }
                        let reason = diskimage_core::Error::from_errno(errno::EIO);
                        let cluster = cluster.get();
                        self.report_line(format!("Can't get refcount for cluster {cluster}: {reason}"));
                    }
                    if keep {
                        self.unreadable.push(clusters);
                    }
                }
                BlockEntry::None => {
                    self.compare_block(clusters, None, how, &mut highest)?;
                }
                BlockEntry::At(offset) => {
                    let Some(mut bytes) = self.stored.take_block(self.file, index)? else {
                        continue;
                    };
                    let changed = self.compare_block(clusters, Some(&mut bytes), how, &mut highest);
                    if let Ok(true) = changed {
                        self.file.write_at(&bytes, offset.get())?;
                    }
                    self.stored.return_block(bytes);
                    changed?;
                }
            }
        }
        self.report.image_end_offset = highest.plus(1).offset(self.geometry.cluster_bits).get();
        Ok(())
    }

    /// Compares the counts of one block. Returns whether its bytes were changed.
    fn compare_block(
        &mut self,
        clusters: ClusterRange,
        mut bytes: Option<&mut Vec<u8>>,
        how: Compare,
        highest: &mut ClusterIndex,
    ) -> Result<bool> {
        let (geometry, order) = (self.geometry, self.geometry.refcount_order);
        let mut changed = false;
        let mut freed = ByteRange::new(0, 0);
        for part in page_runs(clusters) {
            let nothing_stored = bytes.as_ref().is_none_or(|bytes| {
                is_part_zero(bytes, geometry.index_in_block(part.start), part.len(), order)
            });
            if nothing_stored && self.counts.is_page_zero(part.start) {
                continue;
            }
            if let Some(bytes) = &bytes
                && let Some(last) = self.last_if_equal(bytes, part)
            {
                *highest = (*highest).max(last);
                continue;
            }
            for cluster in part {
                let counted = self.counts.of(cluster);
                let index = geometry.index_in_block(cluster);
                let stored = match &bytes {
                    Some(bytes) => stored::read(bytes, index, order)?,
                    None => 0,
                };
                let mut now = stored;
                if counted != stored {
                    let fix = self.report_difference(cluster, stored, counted, how.repair);
                    if let (true, Some(bytes)) = (fix, bytes.as_mut()) {
                        stored::write(bytes, index, order, counted)?;
                        now = counted;
                        changed = true;
                        if how.discard && now == 0 {
                            freed = self.extend_freed(freed, cluster)?;
                        }
                    }
                    if how.keep && now != counted {
                        self.counts.set(cluster, now)?;
                    }
                }
                if now > 0 || counted > 0 {
                    *highest = cluster.max(*highest);
                }
            }
        }
        if !freed.is_empty() {
            self.file.discard(freed)?;
        }
        Ok(changed)
    }

    /// The last cluster of `part` with a count, if the counted and the stored counts of all are equal and any is above zero.
    /// `None` also if they would have to be compared one by one. `bytes` is the block.
    fn last_if_equal(&self, bytes: &[u8], part: ClusterRange) -> Option<ClusterIndex> {
        let order = self.geometry.refcount_order;
        let slot = block::Slot::new(self.geometry.index_in_block(part.start), order);
        let counts = self.counts.bytes(part)?;
        let stored = bytes.get(usize::try_from(slot.byte).ok()?..)?;
        if !block::equal(stored, order, counts) {
            return None;
        }
        let last = counts.iter().rposition(|count| *count > 0)?;
        Some(part.start.plus(last as u64))
    }

    /// Adds `cluster` to the range `freed`. If the cluster does not follow the range, the range is discarded first.
    fn extend_freed(&self, freed: ByteRange, cluster: ClusterIndex) -> Result<ByteRange> {
        let range = ClusterRange::at(cluster, 1).bytes(self.geometry.cluster_bits);
        let range = range.intersect(ByteRange::new(0, self.file_len));
        if freed.end() == range.start() && !freed.is_empty() {
            return Ok(ByteRange::new(freed.start(), range.end()));
        }
        if !freed.is_empty() {
            self.file.discard(freed)?;
        }
        Ok(range)
    }

    /// Reports a difference. Returns whether the stored refcount is to be repaired.
    fn report_difference(
        &mut self,
        cluster: ClusterIndex,
        stored: u64,
        counted: u64,
        repair: Repair,
    ) -> bool {
        let fix = if stored == 0 {
            // The cluster counts as free, so it may have been allocated again, even for a refcount structure.
            self.rebuild = true;
            false
        } else if stored > counted {
            repair != Repair::No
        } else {
            repair == Repair::All
        };
        let verb = match (fix, stored < counted) {
            (true, _) => "Repairing",
            (false, true) => "ERROR",
            (false, false) => "Leaked",
        };
        match (fix, stored < counted) {
            (true, true) => self.report.corruptions_fixed += 1,
            (true, false) => self.report.leaks_fixed += 1,
            (false, true) => self.report.corruptions += 1,
            (false, false) => self.report.leaks += 1,
        }
        self.report_line(format!(
            "{verb} cluster {} refcount={stored} reference={counted}",
            cluster.get()
        ));
        fix
    }

    /// The stored refcount of a cluster after [`Check::compare`] with `keep`; `None` if it cannot be read.
    #[inline]
    pub(super) fn refcount(&mut self, cluster: ClusterIndex) -> Result<Option<u64>> {
        if cluster < self.end {
            if self.unreadable.iter().any(|range| range.contains(cluster)) {
                return Ok(None);
            }
            return Ok(Some(self.counts.of(cluster)));
        }
        self.stored.count(self.file, cluster)
    }
}

/// Whether `count` entries of a block from `index` on are zero. They start and end at byte boundaries.
fn is_part_zero(bytes: &[u8], index: u64, count: u64, order: u32) -> bool {
    // An index beyond the block saturates; `get` then finds no bytes.
    let byte = |entry: u64| saturating_index((entry << order) / 8);
    bytes
        .get(byte(index)..byte(index + count + 7).min(bytes.len()))
        .is_some_and(diskimage_core::is_zero)
}
