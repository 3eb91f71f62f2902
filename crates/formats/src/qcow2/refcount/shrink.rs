//! Refcount blocks that count nothing any more.

use std::collections::HashSet;

use diskimage_core::{Error, Result, is_zero};

use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};

/// A block that was taken out of the refcount table.
struct Dropped {
    index: u64,
    /// What the table had there.
    entry: u64,
    table: Table,
}

impl Refcounts {
    /// Gives up blocks that count nothing but blocks that are given up, themselves among these.
    ///
    /// # Errors
    /// Damage, and failures to read or write.
    pub(in crate::qcow2) fn drop_empty_blocks(&mut self, tables: &mut MetadataCache) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut dropped = Vec::new();
        // Nothing refers to the blocks any more once that is durable.
        let durable =
            self.unlink_empty_blocks(tables, &mut dropped)
                .and_then(|()| match dropped.is_empty() {
                    true => Ok(()),
                    false => tables.write_back().and_then(|()| tables.sync()),
                });
        if let Err(error) = durable {
            // The file may still lead to them: they stay in use.
            for block in dropped {
                tables.set_number(self.table(), block.index * 8, block.entry)?;
            }
            return Err(error);
        }
        for block in &dropped {
            let cluster = block.table.offset >> bits;
            tables.forget(block.table);
            // Where the block that counts it is gone as well, nothing is left to count down.
            if self.block(tables, cluster)?.is_some() {
                self.release(tables, block.table.offset, 1)?;
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

    /// Takes the blocks that count nothing out of the refcount table, the last ones first.
    fn unlink_empty_blocks(&self, tables: &mut MetadataCache, dropped: &mut Vec<Dropped>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let per_block = self.entries_per_block();
        let mut clusters = HashSet::new();
        for index in (0..self.table().len / 8).rev() {
            let Some(table) = self.block(tables, index * per_block)? else {
                continue;
            };
            let own = table.offset >> bits;
            let is_dropped = |cluster| cluster == own || clusters.contains(&cluster);
            if self.counts_only(tables, table, index * per_block, is_dropped)? {
                let entry = tables.number(self.table(), index * 8)?;
                tables.set_number(self.table(), index * 8, 0)?;
                clusters.insert(own);
                dropped.push(Dropped { index, entry, table });
            }
        }
        Ok(())
    }

    /// Whether the block `table`, which counts clusters from `first` on, counts none but those that `is_dropped` picks.
    fn counts_only(
        &self,
        tables: &mut MetadataCache,
        table: Table,
        first: u64,
        is_dropped: impl Fn(u64) -> bool,
    ) -> Result<bool> {
        let order = self.geometry.refcount_order;
        let short = || Error::corrupt("Refcount block too short");
        let mut at = 0;
        while at < table.len {
            let bytes = tables.bytes(table, at)?;
            let end = at + bytes.len() as u64;
            if !is_zero(bytes) {
                for index in (at * 8) >> order..(end * 8) >> order {
                    let place = block::Slot::new(index, order);
                    let skip = usize::try_from(place.byte - at).map_err(|_| short())?;
                    let count = bytes
                        .get(skip..)
                        .and_then(|bytes| block::read(bytes, place, order));
                    if count.ok_or_else(short)? > 0 && !is_dropped(first + index) {
                        return Ok(false);
                    }
                }
            }
            at = end;
        }
        Ok(true)
    }
}
