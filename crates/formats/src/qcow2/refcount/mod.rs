//! Reference counts: how often each cluster of the file is used, and which are free.
//!
//! ```text
//!   refcount table   [block 0][block 1][   0   ]...     8 bytes an entry, 0 = every count there is 0
//!                        |
//!   refcount block   [1][1][2][0]...                    1 to 64 bits an entry
//! ```

mod allocator;
pub(super) mod block;
mod grow;
mod run;
mod width;

use diskimage_core::{Error, Event, Result};

pub(super) use self::run::Change;
use super::header::{Geometry, limit};
use crate::tables::{Class, Table, Tables};

/// The refcount structure of an open image.
#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    table_offset: u64,
    table_clusters: u64,
    /// No cluster before this one is free.
    first_free: u64,
    /// Where the next compressed cluster goes, if the one before left room behind it.
    byte_offset: Option<u64>,
}

/// The entries of the refcount table that hold an offset.
const TABLE_OFFSET_MASK: u64 = !0x1ff;

impl Refcounts {
    pub(super) fn new(geometry: Geometry, table_offset: u64, table_clusters: u64) -> Self {
        Self {
            geometry,
            table_offset,
            table_clusters,
            first_free: 0,
            byte_offset: None,
        }
    }

    fn table(&self) -> Table {
        let len = self.table_clusters << self.geometry.cluster_bits;
        Table {
            class: Class::RefcountTable,
            offset: self.table_offset,
            len,
        }
    }

    fn block_at(&self, offset: u64) -> Table {
        Table {
            class: Class::RefcountBlock,
            offset,
            len: self.geometry.cluster_size(),
        }
    }

    fn entries_per_block(&self) -> u64 {
        self.geometry.refcount_block_entries()
    }

    /// The block that counts `cluster`, if there is one.
    fn block(&self, tables: &mut Tables, cluster: u64) -> Result<Option<Table>> {
        let at = cluster / self.entries_per_block() * 8;
        if at >= self.table().len {
            return Ok(None);
        }
        let offset = tables.number(self.table(), at)? & TABLE_OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        if !offset.is_multiple_of(self.geometry.cluster_size()) || offset >= limit::HOST_OFFSET {
            return Err(Error::corrupt(format!(
                "Refblock offset {offset:#x} unaligned (reftable index: {:#x})",
                at / 8
            )));
        }
        Ok(Some(self.block_at(offset)))
    }

    /// How often `cluster` is used.
    pub(super) fn count(&self, tables: &mut Tables, cluster: u64) -> Result<u64> {
        let Some(block) = self.block(tables, cluster)? else {
            return Ok(0);
        };
        let order = self.geometry.refcount_order;
        let place = block::Place::new(cluster % self.entries_per_block(), order);
        let bytes = tables.bytes(block, place.byte)?;
        block::read(bytes, place, order).ok_or_else(|| Error::corrupt("Refcount block too short"))
    }

    fn set_count(&self, tables: &mut Tables, block: Table, cluster: u64, count: u64) -> Result<()> {
        let order = self.geometry.refcount_order;
        let place = block::Place::new(cluster % self.entries_per_block(), order);
        let bytes = tables.bytes_mut(block, place.byte)?;
        block::write(bytes, place, order, count).ok_or_else(|| Error::corrupt("Refcount block too short"))
    }

    /// Uses each cluster that `len` bytes from `offset` on touch once more. Their blocks exist.
    fn increment(&self, tables: &mut Tables, offset: u64, len: u64) -> Result<()> {
        for cluster in self.clusters(offset, len) {
            let count = self.count(tables, cluster)?;
            if count >= self.geometry.max_refcount() {
                return Err(Error::corrupt(format!(
                    "Refcount of cluster {cluster:#x} would overflow"
                )));
            }
            let block = self
                .block(tables, cluster)?
                .ok_or_else(|| Error::corrupt("No refcount block"))?;
            self.set_count(tables, block, cluster, count + 1)?;
        }
        Ok(())
    }

    /// Uses each cluster that `len` bytes from `offset` on touch once less.
    ///
    /// # Errors
    /// A count that is zero already: the image is damaged.
    pub(super) fn release(&mut self, tables: &mut Tables, offset: u64, len: u64) -> Result<()> {
        tables.device().event(Event::CLUSTER_FREE);
        for cluster in self.clusters(offset, len) {
            let count = self.count(tables, cluster)?;
            let block = self.block(tables, cluster)?;
            let (Some(block), Some(less)) = (block, count.checked_sub(1)) else {
                return Err(run::not_counted(cluster));
            };
            self.set_count(tables, block, cluster, less)?;
            if less == 0 {
                self.first_free = self.first_free.min(cluster);
                let start = cluster << self.geometry.cluster_bits;
                if self
                    .byte_offset
                    .is_some_and(|at| at >> self.geometry.cluster_bits == cluster)
                {
                    self.byte_offset = None;
                }
                tables.forget(Table {
                    class: Class::L2,
                    offset: start,
                    len: self.geometry.cluster_size(),
                });
            }
        }
        Ok(())
    }

    fn clusters(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let bits = self.geometry.cluster_bits;
        (offset >> bits)..(offset + len).div_ceil(1 << bits)
    }
}
