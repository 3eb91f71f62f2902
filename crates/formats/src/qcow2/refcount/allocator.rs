//! Finds and allocates free clusters.
//!
//! Clusters are allocated in ascending order, each request as one run. A missing refcount block is allocated directly
//! behind the clusters that need it. qemu-img makes the same layout.

use diskimage_core::{Error, ErrorKind, Event, Result};

use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::MetadataCache;
use crate::layer_kit::metadata_guard::{Kind, Kinds};
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};

impl Refcounts {
    /// Allocates a run of `count` clusters, for metadata of the kind `kind` or for anything else. Returns the host
    /// offset of the first.
    ///
    /// # Errors
    /// A file that cannot grow any more, and damage.
    pub(in crate::qcow2) fn allocate(
        &mut self,
        tables: &mut MetadataCache,
        count: u64,
        kind: Option<Kind>,
    ) -> Result<HostOffset> {
        tables.device().event(Event::CLUSTER_ALLOC);
        loop {
            let clusters = self.find_free(tables, self.first_free, count)?;
            self.first_free = clusters.end;
            if self.ensure_blocks(tables, clusters)? {
                // The new block took a free cluster, so the search starts again at the same cluster.
                self.first_free = clusters.start;
                continue;
            }
            let range = clusters.bytes(self.geometry.cluster_bits);
            tables.admit(range, Kinds::NONE)?;
            self.increment(tables, clusters)?;
            if let Some(kind) = kind {
                tables.guard_range(kind, range)?;
            }
            return Ok(HostOffset::new(range.start()));
        }
    }

    /// Allocates `len` bytes for a compressed cluster, directly behind the compressed cluster before if its host
    /// cluster has free bytes.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub(in crate::qcow2) fn allocate_bytes(
        &mut self,
        tables: &mut MetadataCache,
        len: u64,
    ) -> Result<HostOffset> {
        tables.device().event(Event::CLUSTER_ALLOC_BYTES);
        let size = self.geometry.cluster_size();
        let bits = self.geometry.cluster_bits;
        if let Some(at) = self.byte_offset {
            let used = self.count(tables, at.cluster(bits))?;
            if used == 0 || used >= self.geometry.max_refcount() {
                self.byte_offset = None;
            }
        }
        let room = self.byte_offset.map_or(0, |at| size - at.within(size));
        let offset = match self.byte_offset {
            Some(at) if room >= len => {
                self.increment(tables, ClusterRange::touched(at.range(len), bits))?;
                at
            }
            before => {
                let fresh = self.allocate(tables, 1, None)?;
                match before {
                    // The new host cluster follows the old one: the compressed cluster may span both.
                    Some(at) if at.plus(room) == fresh => {
                        self.increment(tables, ClusterRange::touched(at.range(room), bits))?;
                        at
                    }
                    _ => fresh,
                }
            }
        };
        let end = offset.plus(len);
        self.byte_offset = if end.is_multiple_of(size) { None } else { Some(end) };
        Ok(offset)
    }

    /// The first run of `count` free clusters from `from` on.
    pub(super) fn find_free(
        &self,
        tables: &mut MetadataCache,
        from: ClusterIndex,
        count: u64,
    ) -> Result<ClusterRange> {
        let mut found = ClusterRange::at(from, 0);
        while found.len() < count {
            if found.end >= self.geometry.cluster_limit() {
                return Err(Error::new(ErrorKind::NoSpace, "File too large"));
            }
            let (free, len) = self.run(tables, found.end, count)?;
            if free {
                found.end = found.end.plus(len.min(count - found.len()));
            } else {
                found = ClusterRange::at(found.end.plus(len), 0);
            }
        }
        Ok(found)
    }

    /// Whether any cluster that the file had when it was opened has a refcount of zero.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub(in crate::qcow2) fn has_free_before_end(&mut self, tables: &mut MetadataCache) -> Result<bool> {
        let end = self.end();
        while self.first_free < end {
            let (free, len) = self.uncounted_run(tables, self.first_free, 1)?;
            if free {
                return Ok(true);
            }
            self.first_free = self.first_free.plus(len);
        }
        Ok(false)
    }

    /// Whether `cluster` can be allocated, and the length of a run of clusters from there on with the same answer. At
    /// most `most` clusters are examined if it can. Free clusters that hold metadata count as allocatable: the metadata
    /// guard then refuses the allocation.
    fn run(&self, tables: &mut MetadataCache, cluster: ClusterIndex, most: u64) -> Result<(bool, u64)> {
        let (free, len) = self.uncounted_run(tables, cluster, most)?;
        if !free || cluster >= self.references.known_end() {
            return Ok((free, len));
        }
        let bits = self.geometry.cluster_bits;
        let is_kept = |cluster: ClusterIndex| {
            let range = ClusterRange::at(cluster, 1).bytes(bits);
            self.references.keeps(cluster) && !tables.is_guarded(range, Kinds::NONE)
        };
        let kept = is_kept(cluster);
        let alike = ClusterRange::at(cluster, len.min(most))
            .into_iter()
            .skip(1)
            .take_while(|next| is_kept(*next) == kept)
            .count();
        Ok((!kept, 1 + alike as u64))
    }

    /// As [`Refcounts::run`], but only by the refcounts.
    fn uncounted_run(
        &self,
        tables: &mut MetadataCache,
        cluster: ClusterIndex,
        most: u64,
    ) -> Result<(bool, u64)> {
        let per_block = self.geometry.refcount_block_entries();
        let index = self.geometry.index_in_block(cluster);
        let Some(table) = self.block(tables, cluster)? else {
            return Ok((true, per_block - index));
        };
        let order = self.geometry.refcount_order;
        let slot = block::Slot::new(index, order);
        let bytes = tables.bytes(table, slot.byte)?;
        let free = block::read(bytes, slot, order) == Some(0);
        let end = if free {
            most.min(per_block - index)
        } else {
            per_block - index
        };
        let len = block::count_while(bytes, slot, order, end, |count| (count == 0) == free);
        Ok((free, len.max(1)))
    }
}
