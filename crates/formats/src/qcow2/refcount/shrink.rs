//! Frees refcount blocks whose refcounts are all zero.

use std::collections::HashSet;

use diskimage_core::{Error, Result, is_zero};

use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};
use crate::layer_kit::offset::{ClusterIndex, HostOffset};

/// A block that was removed from the refcount table.
struct Dropped {
    index: u64,
    /// The table's entry for the block.
    entry: u64,
    table: Table,
}

impl Refcounts {
    /// Frees blocks that count no cluster, or only blocks that are freed as well, including themselves.
    ///
    /// # Errors
    /// Damage, failed reads and writes.
    pub(in crate::qcow2) fn drop_empty_blocks(&mut self, tables: &mut MetadataCache) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut dropped = Vec::new();
        // The blocks may be reused once their removal from the table is durable.
        let durable =
            self.unlink_empty_blocks(tables, &mut dropped)
                .and_then(|()| match dropped.is_empty() {
                    true => Ok(()),
                    false => tables.write_back().and_then(|()| tables.sync()),
                });
        if let Err(error) = durable {
            // The stored table may still refer to the blocks: they stay in use.
            for block in dropped {
                tables.set_number(self.table(), block.index * 8, block.entry)?;
            }
            return Err(error);
        }
        for block in &dropped {
            let cluster = HostOffset::new(block.table.offset).cluster(bits);
            tables.forget(block.table);
            // If the block that counts this one was freed as well, no refcount is left to decrement.
            if self.block(tables, cluster)?.is_some() {
                self.release(tables, block.table.range())?;
            } else {
                self.references.remove(cluster);
                self.note_free(tables, cluster);
            }
        }
        match dropped.is_empty() {
            true => Ok(()),
            false => tables.write_back(),
        }
    }

    /// The end of the last cluster before `end` that has a refcount above zero, or a reference: in a damaged image a
    /// cluster with a refcount of zero may be in use. Clusters without a block are not visited.
    pub(in crate::qcow2) fn used_end(
        &self,
        tables: &mut MetadataCache,
        end: ClusterIndex,
    ) -> Result<ClusterIndex> {
        let referred = self.references.used_end(end);
        for index in (0..self.table().len / 8).rev() {
            let counted = self.geometry.counted_clusters(index);
            if counted.start >= end || self.block_in_entry(tables, index)?.is_none() {
                continue;
            }
            if counted.end <= referred {
                break;
            }
            let mut at = counted.end.min(end);
            while at > counted.start.max(referred)
                && let Some(last) = at.before()
            {
                if self.count(tables, last)? > 0 {
                    return Ok(at);
                }
                at = last;
            }
        }
        Ok(referred)
    }

    /// Removes empty blocks from the refcount table, from the last to the first.
    fn unlink_empty_blocks(&self, tables: &mut MetadataCache, dropped: &mut Vec<Dropped>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut clusters = HashSet::new();
        for index in (0..self.table().len / 8).rev() {
            let Some(table) = self.block_in_entry(tables, index)? else {
                continue;
            };
            let own = HostOffset::new(table.offset).cluster(bits);
            let is_dropped = |cluster| cluster == own || clusters.contains(&cluster);
            let first = self.geometry.counted_clusters(index).start;
            if self.counts_only(tables, table, first, is_dropped)? {
                let entry = tables.number(self.table(), index * 8)?;
                tables.set_number(self.table(), index * 8, 0)?;
                clusters.insert(own);
                dropped.push(Dropped { index, entry, table });
            }
        }
        Ok(())
    }

    /// Whether the block `table`, whose first refcount is that of cluster `first`, counts only clusters for which
    /// `is_dropped` is true.
    fn counts_only(
        &self,
        tables: &mut MetadataCache,
        table: Table,
        first: ClusterIndex,
        is_dropped: impl Fn(ClusterIndex) -> bool,
    ) -> Result<bool> {
        let order = self.geometry.refcount_order;
        let short = || Error::corrupt("Refcount block too short");
        let mut at = 0;
        while at < table.len {
            let bytes = tables.bytes(table, at)?;
            let end = at + bytes.len() as u64;
            if !is_zero(bytes) {
                for index in (at * 8) >> order..(end * 8) >> order {
                    let slot = block::Slot::new(index, order);
                    let skip = usize::try_from(slot.byte - at).map_err(|_| short())?;
                    let count = bytes
                        .get(skip..)
                        .and_then(|bytes| block::read(bytes, slot, order));
                    if count.ok_or_else(short)? > 0 && !is_dropped(first.plus(index)) {
                        return Ok(false);
                    }
                }
            }
            at = end;
        }
        Ok(true)
    }
}
