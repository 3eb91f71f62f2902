//! Refcount blocks that count nothing any more.

use std::collections::HashSet;

use diskimage_core::{Error, Result, is_zero};

use super::{Refcounts, block};
use crate::tables::{Table, Tables};

impl Refcounts {
    /// Gives up blocks that count nothing but blocks that are given up, themselves among these.
    ///
    /// # Errors
    /// Damage, and failures to read or write.
    pub(in super::super) fn drop_empty_blocks(&mut self, tables: &mut Tables) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let per_block = self.entries_per_block();
        let mut dropped = HashSet::new();
        let mut counted = Vec::new();
        for index in (0..self.table().len / 8).rev() {
            let Some(table) = self.block(tables, index * per_block)? else {
                continue;
            };
            let own = table.offset >> bits;
            let is_dropped = |cluster| cluster == own || dropped.contains(&cluster);
            if self.counts_only(tables, table, index * per_block, is_dropped)? {
                tables.set_number(self.table(), index * 8, 0)?;
                tables.forget(table);
                dropped.insert(own);
                counted.push((own, own / per_block));
            }
        }
        if dropped.is_empty() {
            return Ok(());
        }
        // Nothing refers to them any more once that is durable.
        tables.write_back()?;
        tables.sync()?;
        for (cluster, index) in counted {
            // Where the block that counts it is gone as well, nothing is left to count down.
            if self.block(tables, index * per_block)?.is_some() {
                self.release(tables, cluster << bits, 1)?;
            } else {
                self.uses.remove(cluster);
                self.note_free(tables, cluster);
            }
        }
        tables.write_back()
    }

    /// Whether the block `table`, which counts clusters from `first` on, counts none but those that `is_dropped` picks.
    fn counts_only(
        &self,
        tables: &mut Tables,
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
                    let place = block::Place::new(index, order);
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
