//! Which bytes of the file a table must not lie on for its entries to be mended.
//!
//! A damaged L1 or L2 offset can lead anywhere. What is found there may look like an entry that wants mending, but to
//! write there would damage the header or another table.

use std::collections::HashMap;

use diskimage_core::{ByteRange, Result};

use super::Check;
use super::stored;
use crate::qcow2::refcount::counts::Counts;

/// The places of all metadata but L2 tables and inactive L1 tables.
#[derive(Debug, Default)]
pub(super) struct Protected {
    l1: Option<ByteRange>,
    others: Vec<ByteRange>,
    /// Offsets of refcount blocks, in order.
    blocks: Vec<u64>,
    cluster_size: u64,
}

impl Protected {
    /// Whether the L2 table at `offset` may be changed.
    pub(super) fn may_change_l2(&self, offset: u64) -> bool {
        let table = ByteRange::at(offset, self.cluster_size);
        offset.is_multiple_of(self.cluster_size)
            && !self.l1.is_some_and(|l1| l1.overlaps(table))
            && self.is_apart(table)
    }

    /// Whether the active L1 table may be changed.
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
    /// Whether entries of the L2 table at `offset` may be mended: nothing else is there, guest data included.
    pub(super) fn may_mend_l2(&mut self, offset: u64) -> Result<bool> {
        if !self.protected.may_change_l2(offset) {
            return Ok(false);
        }
        let cluster = offset >> self.geometry.cluster_bits;
        let alone = |counts: &Counts, again: &HashMap<u64, u64>| {
            counts.of(cluster) <= again.get(&cluster).map_or(1, |more| more + 1)
        };
        // Narrow counts cannot tell.
        if self.counted && self.most >= u64::from(u8::MAX) {
            return Ok(alone(&self.counts, &self.again));
        }
        if self.references.is_none() {
            self.references = Some(self.image.count_references()?);
        }
        let known = self.references.as_ref();
        Ok(known.is_some_and(|known| alone(&known.counts, &known.tables)))
    }

    /// The places as the header and the refcount table have them.
    pub(super) fn protect(&self) -> Protected {
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
