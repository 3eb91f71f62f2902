//! Refcounts: how many references each cluster of the file has, and which clusters are free.
//!
//! ```text
//!   refcount table   [block 0][block 1][   0   ]...     8 bytes an entry, 0 = every refcount of the block is 0
//!                        |
//!   refcount block   [1][1][2][0]...                    1 to 64 bits an entry
//! ```

mod allocator;
pub(super) mod block;
mod copy;
pub(super) mod counts;
mod grow;
mod known_references;
pub(super) mod publish;
pub(super) mod recount;
mod run;
mod shrink;
mod width;

use diskimage_core::{ByteRange, Error, Event, Result, is_zero};

use self::known_references::KnownReferences;
pub(super) use self::known_references::References;
pub(super) use self::run::RefcountChange;
use super::header::{Geometry, Header};
use super::hex::hex;
use crate::layer_kit::metadata_cache::{MetadataCache, Table, WriteOrder};
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};

/// The refcount structures of an open image.
#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    table_offset: HostOffset,
    table_clusters: u64,
    /// No cluster before this one is free.
    first_free: ClusterIndex,
    /// The host offset for the next compressed cluster, if the one before left free bytes in its host cluster.
    byte_offset: Option<HostOffset>,
    references: KnownReferences,
}

/// The bits of a refcount table entry that hold an offset.
const TABLE_OFFSET_MASK: u64 = !0x1ff;

impl Refcounts {
    /// The structures of the image with this header, in a file of `file_len` bytes. Nothing is read.
    pub(super) fn new(header: &Header, file_len: u64) -> Self {
        Self {
            geometry: header.geometry,
            table_offset: HostOffset::new(header.refcount_table_offset),
            table_clusters: u64::from(header.refcount_table_clusters),
            first_free: ClusterIndex::new(0),
            byte_offset: None,
            references: KnownReferences::new(
                HostOffset::new(file_len).cluster_end(header.geometry.cluster_bits),
            ),
        }
    }

    /// Sets the counted references to the clusters that the file had when it was opened.
    pub(super) fn set_references(&mut self, references: References) {
        self.references.set(references);
        // Clusters that were skipped may be free.
        self.first_free = ClusterIndex::new(0);
    }

    /// Whether the references have been counted.
    pub(super) fn references_are_counted(&self) -> bool {
        self.references.is_counted()
    }

    /// The number of references to `cluster`, if they were counted and the file had the cluster when it was opened.
    pub(super) fn references_to(&self, cluster: ClusterIndex) -> Option<u64> {
        self.references.of(cluster)
    }

    /// The end of the clusters that the file had when it was opened.
    pub(super) fn end(&self) -> ClusterIndex {
        self.references.end()
    }

    pub(super) fn table(&self) -> Table {
        let len = self.table_clusters << self.geometry.cluster_bits;
        Table {
            class: WriteOrder::RefcountTable,
            offset: self.table_offset.get(),
            len,
        }
    }

    /// The block in `cluster`.
    fn block_at(&self, cluster: ClusterIndex) -> Table {
        Table {
            class: WriteOrder::RefcountBlock,
            offset: cluster.offset(self.geometry.cluster_bits).get(),
            len: self.geometry.cluster_size(),
        }
    }

    /// The place of the refcount of `cluster` in its block.
    fn slot(&self, cluster: ClusterIndex) -> block::Slot {
        block::Slot::new(
            self.geometry.index_in_block(cluster),
            self.geometry.refcount_order,
        )
    }

    /// The block that counts `cluster`, if it exists.
    fn block(&self, tables: &mut MetadataCache, cluster: ClusterIndex) -> Result<Option<Table>> {
        self.block_in_entry(tables, self.geometry.block_index(cluster))
    }

    /// The block in entry `index` of the table, if it exists.
    fn block_in_entry(&self, tables: &mut MetadataCache, index: u64) -> Result<Option<Table>> {
        let at = index.saturating_mul(8);
        if at >= self.table().len {
            return Ok(None);
        }
        let offset = HostOffset::new(tables.number(self.table(), at)? & TABLE_OFFSET_MASK);
        if offset.get() == 0 {
            return Ok(None);
        }
        let cluster = offset.cluster(self.geometry.cluster_bits);
        if !offset.is_multiple_of(self.geometry.cluster_size()) || cluster >= self.geometry.cluster_limit() {
            let index = hex(index);
            return Err(tables.damaged(&format!(
                "Refblock offset {:#x} unaligned (reftable index: {index})",
                offset.get()
            )));
        }
        Ok(Some(self.block_at(cluster)))
    }

    /// The refcount of `cluster`.
    pub(super) fn count(&self, tables: &mut MetadataCache, cluster: ClusterIndex) -> Result<u64> {
        let Some(block) = self.block(tables, cluster)? else {
            return Ok(0);
        };
        let (order, slot) = (self.geometry.refcount_order, self.slot(cluster));
        let bytes = tables.bytes(block, slot.byte)?;
        block::read(bytes, slot, order).ok_or_else(|| Error::corrupt("Refcount block too short"))
    }

    /// Whether any cluster from `first` on has a refcount above zero, or has a block that could hold one.
    pub(super) fn counts_beyond(&self, tables: &mut MetadataCache, first: ClusterIndex) -> Result<bool> {
        if let Some(block) = self.block(tables, first)? {
            let mut at = self.slot(first).byte;
            while at < block.len {
                let bytes = tables.bytes(block, at)?;
                if !is_zero(bytes) {
                    return Ok(true);
                }
                at += bytes.len() as u64;
            }
        }
        let table = self.table();
        let mut at = (self.geometry.block_index(first) + 1).saturating_mul(8);
        while at < table.len {
            let bytes = tables.bytes(table, at)?;
            if !is_zero(bytes) {
                return Ok(true);
            }
            at += bytes.len() as u64;
        }
        Ok(false)
    }

    fn set_count(
        &self,
        tables: &mut MetadataCache,
        block: Table,
        cluster: ClusterIndex,
        count: u64,
    ) -> Result<()> {
        let (order, slot) = (self.geometry.refcount_order, self.slot(cluster));
        let bytes = tables.bytes_mut(block, slot.byte)?;
        block::write(bytes, slot, order, count).ok_or_else(|| Error::corrupt("Refcount block too short"))
    }

    /// Increments the refcount of each of `clusters`. Their blocks exist.
    fn increment(&mut self, tables: &mut MetadataCache, clusters: ClusterRange) -> Result<()> {
        let max = self.geometry.max_refcount();
        let mut rest = clusters;
        while rest.len() > 0 {
            let (done, failed) = self.update_page(tables, rest, |cluster, used| {
                if used < max {
                    return Ok(used + 1);
                }
                Err(Error::corrupt(format!(
                    "Refcount of cluster {:#x} would overflow",
                    cluster.get()
                )))
            })?;
            self.references.add_run(ClusterRange::at(rest.start, done));
            if let Some(failed) = failed {
                return Err(failed.error);
            }
            rest.start = rest.start.plus(done);
        }
        Ok(())
    }

    /// Decrements the refcount of each cluster that `range` touches. In a damaged image, a refcount of zero stays zero,
    /// and a refcount does not fall below the number of known references.
    ///
    /// # Errors
    /// Failed reads and writes.
    pub(super) fn release(&mut self, tables: &mut MetadataCache, range: ByteRange) -> Result<()> {
        tables.device().event(Event::CLUSTER_FREE);
        for cluster in ClusterRange::touched(range, self.geometry.cluster_bits) {
            let count = self.count(tables, cluster)?;
            let block = self.block(tables, cluster)?;
            let left = self.references.remove(cluster).unwrap_or(0);
            let (Some(block), Some(less)) = (block, count.checked_sub(1)) else {
                continue;
            };
            let less = less.max(left.min(count));
            self.set_count(tables, block, cluster, less)?;
            if less == 0 {
                self.note_free(tables, cluster);
            }
        }
        Ok(())
    }

    /// Updates the allocator's state for a cluster that has become free, and drops its pages from the cache.
    fn note_free(&mut self, tables: &mut MetadataCache, cluster: ClusterIndex) {
        let bits = self.geometry.cluster_bits;
        self.first_free = self.first_free.min(cluster);
        if self.byte_offset.is_some_and(|at| at.cluster(bits) == cluster) {
            self.byte_offset = None;
        }
        tables.forget_freed(cluster.offset(bits).range(self.geometry.cluster_size()));
    }
}
