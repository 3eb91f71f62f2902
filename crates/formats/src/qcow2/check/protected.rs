//! The ranges of the file that an L1 or L2 table must not overlap if its entries are to be repaired.
//!
//! A damaged L1 or L2 offset can point anywhere. The bytes there may look like entries that need repair, but a write
//! would damage the header or another table.

use std::collections::HashMap;

use diskimage_core::{ByteRange, Result};

use super::Check;
use super::stored;
use crate::layer_kit::offset::{ClusterIndex, HostOffset};
use crate::qcow2::refcount::counts::ClusterCounts;

/// The ranges of all metadata except L2 tables and inactive L1 tables.
#[derive(Debug, Default)]
pub(super) struct Protected {
    l1: Option<ByteRange>,
    others: Vec<ByteRange>,
    /// The offsets of the refcount blocks, sorted.
    blocks: Vec<u64>,
    cluster_size: u64,
}

impl Protected {
    /// Whether the L2 table at `offset` overlaps no protected range.
    pub(super) fn may_change_l2(&self, offset: u64) -> bool {
        let table = ByteRange::at(offset, self.cluster_size);
        offset.is_multiple_of(self.cluster_size)
            && !self.l1.is_some_and(|l1| l1.overlaps(table))
            && self.is_apart(table)
    }

    /// Whether the active L1 table overlaps no protected range.
    pub(super) fn may_change_l1(&self) -> bool {
        self.l1.is_some_and(|l1| self.is_apart(l1))
    }

    fn is_apart(&self, table: ByteRange) -> bool {
        let next = self
            .blocks
            .partition_point(|block| block.saturating_add(self.cluster_size) <= table.start());
        let clear = self.blocks.get(next).is_none_or(|block| *block >= table.end());
        clear && !self.others.iter().any(|other| other.overlaps(table))
    }
}

impl Check<'_> {
    /// Whether entries of the L2 table at `offset` may be repaired: its cluster holds no other metadata and no guest
    /// data.
    pub(super) fn may_repair_l2(&mut self, offset: u64) -> Result<bool> {
        if !self.protected.may_change_l2(offset) {
            return Ok(false);
        }
        let cluster = HostOffset::new(offset).cluster(self.geometry.cluster_bits);
        let is_only_l2 = |counts: &ClusterCounts, repeated_l2: &HashMap<ClusterIndex, u64>| {
            counts.of(cluster) <= repeated_l2.get(&cluster).map_or(1, |more| more + 1)
        };
        // Counts that saturate early do not show a second use.
        if self.counted && self.max_count >= u64::from(u8::MAX) {
            return Ok(is_only_l2(&self.counts, &self.repeated_l2));
        }
        if self.references.is_none() {
            self.references = Some(self.image.count_references()?);
        }
        let known = self.references.as_ref();
        Ok(known.is_some_and(|known| is_only_l2(&known.counts, &known.tables)))
    }

    /// The protected ranges according to the header and the refcount table.
    pub(super) fn protected_ranges(&self) -> Protected {
        let offsets = self.stored.table.iter().map(|entry| entry & stored::OFFSET_MASK);
        let mut blocks: Vec<u64> = offsets.filter(|offset| *offset != 0).collect();
        blocks.sort_unstable();
        Protected {
            l1: Some(ByteRange::at(
                self.header.l1_table_offset,
                u64::from(self.header.l1_size) * 8,
            )),
            others: vec![
                ByteRange::at(0, self.geometry.cluster_size()),
                ByteRange::at(self.stored.table_offset, self.stored.table.len() as u64 * 8),
                ByteRange::at(self.header.snapshots_offset, self.snapshots.len),
            ],
            blocks,
            cluster_size: self.geometry.cluster_size(),
        }
    }
}
