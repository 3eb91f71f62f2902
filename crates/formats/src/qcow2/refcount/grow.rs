//! Adds refcount blocks, and moves the refcount table to a larger one when its entries no longer suffice.

use diskimage_core::{Error, ErrorKind, Event, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::Refcounts;
use super::known_references::KnownReferences;
use crate::layer_kit::metadata_cache::MetadataCache;
use crate::layer_kit::metadata_guard::Kind;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange};
use crate::qcow2::header::{field, limit};

impl Refcounts {
    /// Ensures that blocks exist for `clusters`. Returns true if one was added: the caller must then search for free
    /// clusters again.
    pub(super) fn ensure_blocks(
        &mut self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
    ) -> Result<bool> {
        for index in self.geometry.block_indices(clusters) {
            if self.block_in_entry(tables, index)?.is_none() {
                self.add_block(tables, index)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn add_block(&mut self, tables: &mut MetadataCache, index: u64) -> Result<()> {
        tables.device().event(Event::REFBLOCK_ALLOC);
        let free = self.find_free(tables, self.first_free, 1)?;
        let cluster = free.start;
        if index * 8 >= self.table().len {
            let counted = self.geometry.counted_clusters(index);
            return self.grow_table(tables, counted.start.plus(1).max(cluster));
        }
        if cluster == ClusterIndex::new(0) {
            return Err(tables.damaged("Preventing invalid allocation of refcount block at offset 0"));
        }
        self.first_free = free.end;
        let table = self.block_at(cluster);
        if self.geometry.block_index(cluster) == index {
            tables.insert_zeroed(table)?;
            self.set_count(tables, table, cluster, 1)?;
        } else {
            // Another block counts the new one. If that block is missing, it is added first, and the search starts
            // again.
            if self.ensure_blocks(tables, free)? {
                return Ok(());
            }
            let other = self
                .block(tables, cluster)?
                .ok_or_else(|| Error::corrupt("No refcount block"))?;
            self.set_count(tables, other, cluster, 1)?;
            tables.insert_zeroed(table)?;
        }
        tables.guard_range(Kind::RefcountBlock, table.range())?;
        self.references.add(cluster);
        tables.set_number(self.table(), index * 8, table.offset)
    }

    /// Moves the refcount table to a larger run behind all clusters, together with the blocks that count this run. The
    /// run is not before cluster `behind`.
    fn grow_table(&mut self, tables: &mut MetadataCache, behind: ClusterIndex) -> Result<()> {
        let (bits, size) = (self.geometry.cluster_bits, self.geometry.cluster_size());
        let per_block = self.geometry.refcount_block_entries();
        let start = behind.align_up(per_block);
        // The run includes the blocks that count it: a few rounds until its length no longer changes.
        let (mut blocks, mut clusters) = (1, 1);
        loop {
            let entries = (start.get() + blocks + clusters).div_ceil(per_block);
            // Half as many entries more, so that growth is rare.
            let wanted_clusters = ((entries + entries / 2) * 8)
                .div_ceil(size)
                .max(self.table_clusters + 1);
            let wanted_blocks = (blocks + clusters).div_ceil(per_block);
            if wanted_blocks <= blocks && wanted_clusters <= clusters {
                break;
            }
            (blocks, clusters) = (wanted_blocks.max(blocks), wanted_clusters.max(clusters));
        }
        let first_blocks = ClusterRange::at(start, blocks);
        let end = first_blocks.end.plus(clusters);
        if clusters << bits > limit::REFCOUNT_TABLE_BYTES || end > self.geometry.cluster_limit() {
            return Err(Error::new(ErrorKind::NoSpace, "File too large"));
        }
        let mut grown = Self {
            table_offset: first_blocks.end.offset(bits),
            table_clusters: clusters,
            geometry: self.geometry,
            first_free: self.first_free,
            byte_offset: self.byte_offset,
            references: KnownReferences::new(ClusterIndex::new(0)),
        };
        if let Err(error) = self.publish(tables, &mut grown, first_blocks) {
            // The header points to the old table. Dirty pages of the new one must not overwrite later allocations.
            tables.forget(grown.table());
            for cluster in first_blocks {
                tables.forget(self.block_at(cluster));
            }
            return Err(error);
        }
        // From here on readers find the new table.
        let old = self.table();
        (self.table_offset, self.table_clusters) = (grown.table_offset, grown.table_clusters);
        tables.sync()?;
        tables.forget(old);
        self.release(tables, old.range())?;
        tables.guard_range(Kind::RefcountTable, self.table().range())?;
        tables.guard_range(Kind::RefcountBlock, first_blocks.bytes(bits))
    }

    /// Writes the table of `grown` with all old blocks and the new ones at the clusters `first_blocks`, then makes the
    /// header point to it.
    fn publish(
        &self,
        tables: &mut MetadataCache,
        grown: &mut Self,
        first_blocks: ClusterRange,
    ) -> Result<()> {
        let table = grown.table();
        tables.insert_zeroed(table)?;
        for at in (0..self.table().len).step_by(8) {
            let entry = tables.number(self.table(), at)?;
            if entry != 0 {
                tables.set_number(table, at, entry)?;
            }
        }
        let index = self.geometry.block_index(first_blocks.start);
        for (index, cluster) in (index..).zip(first_blocks) {
            let block = self.block_at(cluster);
            tables.insert_zeroed(block)?;
            tables.set_number(table, index * 8, block.offset)?;
        }
        let end = first_blocks.end.plus(grown.table_clusters);
        grown.increment(tables, ClusterRange::new(first_blocks.start, end))?;
        tables.write_back()?;
        tables.sync()?;
        let mut location = [0; 12];
        location[..8].copy_from_slice(U64::new(table.offset).as_bytes());
        let clusters = u32::try_from(grown.table_clusters)
            .map_err(|_| Error::corrupt("Reference count table too large"))?;
        location[8..].copy_from_slice(U32::new(clusters).as_bytes());
        tables.device().event(Event::REFTABLE_UPDATE);
        tables.device().write_at(&location, field::REFCOUNT_TABLE)
    }
}
