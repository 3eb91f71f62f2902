//! The refcounts once more, in free clusters: to be changed while the ones in use stay as they are.

use diskimage_core::{ByteRange, Error, ErrorKind, Event, Result};

use super::uses::KnownReferences;
use super::{Refcounts, TABLE_OFFSET_MASK};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};
use crate::layer_kit::metadata_guard::Kind;
use crate::qcow2::header::limit;

impl Refcounts {
    /// A copy of the table and of all blocks. Only the copy counts the clusters that it lies in; what is in use does
    /// not change. No changes of tables wait in memory.
    ///
    /// # Errors
    /// Damage, a structure that would be too large, and failures to read or write.
    pub(in crate::qcow2) fn copied(&mut self, tables: &mut MetadataCache) -> Result<Self> {
        let bits = self.geometry.cluster_bits;
        let mut blocks = self.block_indices(tables)?;
        let place = self.find_place(tables, &mut blocks)?;
        let end = self.references.end();
        let mut new = Self {
            geometry: self.geometry,
            table_offset: place.table << bits,
            table_clusters: place.table_clusters,
            first_free: self.first_free,
            byte_offset: None,
            references: KnownReferences::new(end),
        };
        let table = new.table();
        tables.insert_zeroed(table)?;
        for (cluster, index) in (place.blocks..).zip(&blocks) {
            let block = new.block_at(cluster << bits);
            tables.device().event(Event::REFBLOCK_ALLOC);
            tables.insert_zeroed(block)?;
            if let Some(old) = self.block(tables, index * self.entries_per_block())? {
                copy_table(tables, old, block)?;
            }
            tables.set_number(table, index * 8, block.offset)?;
        }
        // Where the copy comes to nothing, the references are counted again.
        std::mem::swap(&mut new.references, &mut self.references);
        let (start, end) = (place.blocks << bits, table.offset + table.len);
        new.increment(tables, start, end - start)?;
        tables.guard_range(Kind::RefcountBlock, ByteRange::new(start, table.offset))?;
        tables.guard_range(Kind::RefcountTable, ByteRange::new(table.offset, end))?;
        Ok(new)
    }

    /// The entries of the table that lead to a block.
    fn block_indices(&self, tables: &mut MetadataCache) -> Result<Vec<u64>> {
        let mut indices = Vec::new();
        for index in 0..self.table().len / 8 {
            if tables.number(self.table(), index * 8)? & TABLE_OFFSET_MASK != 0 {
                indices.push(index);
            }
        }
        Ok(indices)
    }

    /// Free clusters in one piece for the blocks in `indices` and the table, and for the blocks that it takes to count
    /// these clusters, which are added.
    fn find_place(&self, tables: &mut MetadataCache, indices: &mut Vec<u64>) -> Result<CopyLayout> {
        let bits = self.geometry.cluster_bits;
        let per_block = self.entries_per_block();
        let there = indices.len();
        let mut room = there as u64 + self.table_clusters;
        loop {
            let (start, _) = self.find_free(tables, self.first_free, room)?;
            indices.truncate(there);
            for index in start / per_block..(start + room).div_ceil(per_block) {
                if indices[..there].binary_search(&index).is_err() {
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
                return Ok(CopyLayout {
                    blocks: start,
                    table: start + blocks,
                    table_clusters,
                });
            }
            room = blocks + table_clusters;
        }
    }
}

/// Where the copy goes: blocks first. In clusters.
#[derive(Clone, Copy, Debug)]
struct CopyLayout {
    blocks: u64,
    table: u64,
    table_clusters: u64,
}

/// Has `new` hold the bytes of `old`, which is as long.
pub(in crate::qcow2) fn copy_table(tables: &mut MetadataCache, old: Table, new: Table) -> Result<()> {
    let mut at = 0;
    while at < old.len {
        let piece = tables.bytes(old, at)?.to_vec();
        tables.bytes_mut(new, at)?.copy_from_slice(&piece);
        at += piece.len() as u64;
    }
    Ok(())
}
