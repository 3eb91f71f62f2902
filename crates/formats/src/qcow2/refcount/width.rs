//! Changes the width of all refcounts: writes new structures behind all clusters; one write to the header publishes
//! them.
//!
//! ```text
//!   ... all clusters in use | new blocks | new table |     the new clusters are counted in the new structures only
//! ```

use diskimage_core::{ByteRange, Device, Error, Result, ResultExt, saturating_u32, to_index};

use super::recount::WINDOW;
use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::MetadataCache;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};
use crate::qcow2::header::{Geometry, limit};

/// Refcount structures of another width, written but not yet published.
#[derive(Debug)]
pub(in crate::qcow2) struct Widened {
    pub(in crate::qcow2) table_offset: HostOffset,
    pub(in crate::qcow2) table_clusters: u32,
}

impl Refcounts {
    /// Writes all refcounts with the new refcount order `order` to new structures behind the end of `file` and all
    /// clusters in use. `report` is called with the progress.
    ///
    /// # Errors
    /// Refcounts that do not fit the width, structures that would be too large, failed reads and writes.
    pub(in crate::qcow2) fn rewrite(
        &self,
        tables: &mut MetadataCache,
        file: &dyn Device,
        order: u32,
        report: &dyn Fn(u64, u64),
    ) -> Result<Widened> {
        let new = Geometry {
            refcount_order: order,
            ..self.geometry
        };
        let bits = new.cluster_bits;
        let (mut indices, end) = self.used_blocks(tables, new, report)?;
        let start = end.max(HostOffset::new(file.len()).cluster_end(bits));
        // The new blocks also count themselves and the table: repeated until their number no longer changes.
        let old = indices.len();
        let mut clusters = 1;
        loop {
            indices.truncate(old);
            let known = indices.last().map_or(0, |last| last + 1);
            let run = ClusterRange::at(start, clusters);
            let counting = new.block_indices(run);
            indices.extend(counting.start.max(known)..counting.end);
            let entries = indices.last().map_or(1, |last| last + 1);
            let table = (entries * 8).div_ceil(new.cluster_size());
            if table << bits > limit::REFCOUNT_TABLE_BYTES || run.end > new.cluster_limit() {
                return Err(Error::invalid("Refcount table would be too large"));
            }
            let wanted = indices.len() as u64 + table;
            if wanted <= clusters {
                break;
            }
            clusters = wanted;
        }
        let layout = ClusterRange::at(start, clusters);
        self.write_structure(tables, file, new, &indices, layout, report)
    }

    /// The indexes of blocks of the new width with a refcount above zero, and the end of the clusters in use.
    fn used_blocks(
        &self,
        tables: &mut MetadataCache,
        new: Geometry,
        report: &dyn Fn(u64, u64),
    ) -> Result<(Vec<u64>, ClusterIndex)> {
        let (mut indices, mut end) = (Vec::new(), ClusterIndex::new(0));
        let entries = self.table().len / 8;
        for entry in 0..entries {
            report(entry, 2 * entries);
            self.each_count(tables, entry, |cluster, count| {
                if count > new.max_refcount() {
                    return Err(Error::invalid(format!(
                        "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of \
                         {count}",
                        1u64 << new.refcount_order,
                        cluster.offset(new.cluster_bits).get()
                    )));
                }
                if count > 0 {
                    end = cluster.plus(1);
                    let index = new.block_index(cluster);
                    if indices.last() != Some(&index) {
                        indices.push(index);
                    }
                }
                Ok(())
            })?;
        }
        Ok((indices, end))
    }

    /// Writes the new structures to the clusters `layout`: first the blocks, then the table.
    fn write_structure(
        &self,
        tables: &mut MetadataCache,
        file: &dyn Device,
        new: Geometry,
        indices: &[u64],
        layout: ClusterRange,
        report: &dyn Fn(u64, u64),
    ) -> Result<Widened> {
        let size = new.cluster_size();
        let bits = new.cluster_bits;
        let mut bytes = vec![0; to_index(size)?];
        // The progress is in entries of the old table, like that of the first half of the work.
        let entries = self.table().len / 8;
        let mut reported = entries;
        for (block, index) in layout.into_iter().zip(indices) {
            let counted = new.counted_clusters(*index);
            let reached = self.geometry.block_index(counted.start).min(entries);
            (reported..=entries + reached).for_each(|part| report(part, 2 * entries));
            reported = reported.max(entries + reached + 1);
            bytes.fill(0);
            self.each_of(tables, counted, |cluster, count| {
                let count = if layout.contains(cluster) { 1 } else { count };
                let slot = block::Slot::new(new.index_in_block(cluster), new.refcount_order);
                bytes
                    .get_mut(to_index(slot.byte)?..)
                    .and_then(|bytes| block::write(bytes, slot, new.refcount_order, count))
                    .ok_or_else(|| Error::corrupt("Refcount block too short"))
            })?;
            file.write_at(&bytes, block.offset(bits).get())
                .context(|| "Failed to write refblock")?;
        }
        (reported..2 * entries).for_each(|part| report(part, 2 * entries));
        let table_clusters = ClusterRange::new(layout.start.plus(indices.len() as u64), layout.end);
        let mut table = vec![0; to_index(table_clusters.bytes(bits).len())?];
        for (block, index) in layout.into_iter().zip(indices) {
            let entry = table
                .get_mut(to_index(index * 8)?..)
                .and_then(<[u8]>::first_chunk_mut);
            *entry.ok_or_else(|| Error::corrupt("Refcount table too short"))? =
                block.offset(bits).get().to_be_bytes();
        }
        let table_offset = table_clusters.start.offset(bits);
        file.write_at(&table, table_offset.get())
            .context(|| "Failed to write the new reftable")?;
        file.flush()
            .context(|| "Failed to flush the new refcount structures")?;
        Ok(Widened {
            table_offset,
            // The table has at most 8 MiB.
            table_clusters: saturating_u32(table_clusters.len()),
        })
    }

    /// Releases the structures of `old`, to which nothing refers any more.
    ///
    /// # Errors
    /// A failed read or write: the remaining clusters leak.
    pub(in crate::qcow2) fn release_structure(
        &mut self,
        tables: &mut MetadataCache,
        old: &Self,
    ) -> Result<()> {
        let table = old.table();
        for at in (0..table.len).step_by(8) {
            let offset = tables.number(table, at)? & super::TABLE_OFFSET_MASK;
            if offset != 0 {
                self.release(tables, ByteRange::at(offset, self.geometry.cluster_size()))?;
            }
        }
        tables.forget(table);
        self.release(tables, table.range())
    }

    /// Calls `visit` with each cluster and its refcount of the block in entry `entry` of the table.
    fn each_count(
        &self,
        tables: &mut MetadataCache,
        entry: u64,
        visit: impl FnMut(ClusterIndex, u64) -> Result<()>,
    ) -> Result<()> {
        if self.block_in_entry(tables, entry)?.is_none() {
            return Ok(());
        }
        self.each_of(tables, self.geometry.counted_clusters(entry), visit)
    }

    /// Calls `visit` with each of `clusters` and its refcount.
    fn each_of(
        &self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
        mut visit: impl FnMut(ClusterIndex, u64) -> Result<()>,
    ) -> Result<()> {
        let mut counts = Vec::new();
        let mut rest = clusters;
        while rest.len() > 0 {
            let window = ClusterRange::at(rest.start, rest.len().min(WINDOW));
            self.read_run(tables, window, &mut counts)?;
            for (cluster, count) in window.into_iter().zip(&counts) {
                visit(cluster, *count)?;
                rest.start = cluster.plus(1);
            }
        }
        Ok(())
    }
}
