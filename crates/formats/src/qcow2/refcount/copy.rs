//! Copies the refcount structures to free clusters: the copy is changed while those in use stay unchanged.

use diskimage_core::{Error, ErrorKind, Event, Result};

use super::known_references::KnownReferences;
use super::{Refcounts, TABLE_OFFSET_MASK};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};
use crate::layer_kit::metadata_guard::Kind;
use crate::layer_kit::offset::ClusterRange;
use crate::qcow2::header::limit;

impl Refcounts {
    /// Copies the table and all blocks. Only the copy counts its own clusters; the structures in use do not change. The
    /// metadata cache must have no dirty pages.
    ///
    /// # Errors
    /// Damage, a structure that would be too large, failed reads and writes.
    pub(in crate::qcow2) fn copied(&mut self, tables: &mut MetadataCache) -> Result<Self> {
        let bits = self.geometry.cluster_bits;
        let mut blocks = self.block_indices(tables)?;
        let layout = self.find_layout(tables, &mut blocks)?;
        let end = self.references.end();
        let mut new = Self {
            geometry: self.geometry,
            table_offset: layout.table.start.offset(bits),
            table_clusters: layout.table.len(),
            first_free: self.first_free,
            byte_offset: None,
            references: KnownReferences::new(end),
        };
        let table = new.table();
        tables.insert_zeroed(table)?;
        for (cluster, index) in layout.blocks.into_iter().zip(&blocks) {
            let block = new.block_at(cluster);
            tables.device().event(Event::REFBLOCK_ALLOC);
            tables.insert_zeroed(block)?;
            if let Some(old) = self.block_in_entry(tables, *index)? {
                copy_table(tables, old, block)?;
            }
            tables.set_number(table, index * 8, block.offset)?;
        }
        // If the copy is abandoned, the references are counted again.
        std::mem::swap(&mut new.references, &mut self.references);
        new.increment(tables, ClusterRange::new(layout.blocks.start, layout.table.end))?;
        tables.guard_range(Kind::RefcountBlock, layout.blocks.bytes(bits))?;
        tables.guard_range(Kind::RefcountTable, table.range())?;
        Ok(new)
    }

    /// The indexes of table entries that have a block.
    fn block_indices(&self, tables: &mut MetadataCache) -> Result<Vec<u64>> {
        let mut indices = Vec::new();
        for index in 0..self.table().len / 8 {
            if tables.number(self.table(), index * 8)? & TABLE_OFFSET_MASK != 0 {
                indices.push(index);
            }
        }
        Ok(indices)
    }

    /// Finds a run of free clusters for the blocks in `indices` and the table. Blocks that are needed to count the run
    /// itself are added to `indices`.
    fn find_layout(&self, tables: &mut MetadataCache, indices: &mut Vec<u64>) -> Result<CopyLayout> {
        let bits = self.geometry.cluster_bits;
        let old = indices.len();
        let mut room = old as u64 + self.table_clusters;
        loop {
            let free = self.find_free(tables, self.first_free, room)?;
            indices.truncate(old);
            for index in self.geometry.block_indices(free) {
                if indices[..old].binary_search(&index).is_err() {
                    indices.push(index);
                }
            }
            let entries = indices.iter().max().map_or(1, |last| last + 1);
            let table_clusters = (entries * 8).div_ceil(1 << bits).max(self.table_clusters);
            if table_clusters << bits > limit::REFCOUNT_TABLE_BYTES {
                return Err(Error::new(ErrorKind::NoSpace, "File too large"));
            }
            let blocks = indices.len() as u64;
            if blocks + table_clusters <= room {
                let blocks = ClusterRange::at(free.start, blocks);
                return Ok(CopyLayout {
                    blocks,
                    table: ClusterRange::at(blocks.end, table_clusters),
                });
            }
            room = blocks + table_clusters;
        }
    }
}

/// The clusters of the copy: first the blocks, then the table.
#[derive(Clone, Copy, Debug)]
struct CopyLayout {
    blocks: ClusterRange,
    table: ClusterRange,
}

/// Copies the table `old` to `new`, which has the same length.
pub(in crate::qcow2) fn copy_table(tables: &mut MetadataCache, old: Table, new: Table) -> Result<()> {
    let mut at = 0;
    while at < old.len {
        let part = tables.bytes(old, at)?.to_vec();
        tables.bytes_mut(new, at)?.copy_from_slice(&part);
        at += part.len() as u64;
    }
    Ok(())
}
