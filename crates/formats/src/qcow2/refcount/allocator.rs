//! Finds and allocates free clusters.
//!
//! Clusters are allocated in ascending order, each request as one run. A missing refcount block is allocated directly
//! behind the clusters that need it. qemu-img makes the same layout.

use diskimage_core::{ByteRange, Error, ErrorKind, Event, Result};

use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::MetadataCache;
use crate::layer_kit::metadata_guard::{Kind, Kinds};
use crate::qcow2::header::limit;

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
    ) -> Result<u64> {
        tables.device().event(Event::CLUSTER_ALLOC);
        loop {
            let (start, next) = self.find_free(tables, self.first_free, count)?;
            self.first_free = next;
            if self.ensure_blocks(tables, start, count)? {
                // The new block took a free cluster, so the search starts again at the same cluster.
                self.first_free = start;
                continue;
            }
            let range = ByteRange::at(
                start << self.geometry.cluster_bits,
                count << self.geometry.cluster_bits,
            );
            tables.admit(range, Kinds::NONE)?;
            self.increment(tables, range.start(), range.len())?;
            if let Some(kind) = kind {
                tables.guard_range(kind, range)?;
            }
            return Ok(range.start());
        }
    }

    /// Allocates `len` bytes for a compressed cluster, directly behind the compressed cluster before if its host
    /// cluster has free bytes.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub(in crate::qcow2) fn allocate_bytes(&mut self, tables: &mut MetadataCache, len: u64) -> Result<u64> {
        tables.device().event(Event::CLUSTER_ALLOC_BYTES);
        let size = self.geometry.cluster_size();
        let bits = self.geometry.cluster_bits;
        if let Some(at) = self.byte_offset {
            let used = self.count(tables, at >> bits)?;
            if used == 0 || used >= self.geometry.max_refcount() {
                self.byte_offset = None;
            }
        }
        let room = self.byte_offset.map_or(0, |at| size - at % size);
        let offset = match self.byte_offset {
            Some(at) if room >= len => {
                self.increment(tables, at, len)?;
                at
            }
            before => {
                let fresh = self.allocate(tables, 1, None)?;
                match before {
                    // The new host cluster follows the old one: the compressed cluster may span both.
                    Some(at) if at + room == fresh => {
                        self.increment(tables, at, room)?;
                        at
                    }
                    _ => fresh,
                }
            }
        };
        let end = offset + len;
        self.byte_offset = if end.is_multiple_of(size) { None } else { Some(end) };
        Ok(offset)
    }

    /// The first run of `count` free clusters from `from` on: its first cluster, and the cluster behind it.
    pub(super) fn find_free(&self, tables: &mut MetadataCache, from: u64, count: u64) -> Result<(u64, u64)> {
        let (mut start, mut at) = (from, from);
        let end = limit::HOST_OFFSET >> self.geometry.cluster_bits;
        while at - start < count {
            if at >= end {
                return Err(Error::new(ErrorKind::NoSpace, "File too large"));
            }
            let (free, len) = self.run(tables, at, count)?;
            if free {
                at += len.min(count - (at - start));
            } else {
                at += len;
                start = at;
            }
        }
        Ok((start, at))
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
            self.first_free += len;
        }
        Ok(false)
    }

    /// Whether `cluster` can be allocated, and the length of a run of clusters from there on with the same answer. At
    /// most `most` clusters are examined if it can. Free clusters that hold metadata count as allocatable: the metadata
    /// guard then refuses the allocation.
    fn run(&self, tables: &mut MetadataCache, cluster: u64, most: u64) -> Result<(bool, u64)> {
        let (free, len) = self.uncounted_run(tables, cluster, most)?;
        if !free || cluster >= self.references.known_end() {
            return Ok((free, len));
        }
        let bits = self.geometry.cluster_bits;
        let is_kept = |cluster: u64| {
            self.references.keeps(cluster)
                && !tables.is_guarded(ByteRange::at(cluster << bits, 1 << bits), Kinds::NONE)
        };
        let kept = is_kept(cluster);
        let alike = (cluster + 1..cluster + len.min(most))
            .take_while(|next| is_kept(*next) == kept)
            .count();
        Ok((!kept, 1 + alike as u64))
    }

    /// As [`Refcounts::run`], but only by the refcounts.
    fn uncounted_run(&self, tables: &mut MetadataCache, cluster: u64, most: u64) -> Result<(bool, u64)> {
        let per_block = self.entries_per_block();
        let index = cluster % per_block;
        let Some(table) = self.block(tables, cluster)? else {
            return Ok((true, per_block - index));
        };
        let order = self.geometry.refcount_order;
        let slot = block::Slot::new(index, order);
        let bytes = tables.bytes(table, slot.byte)?;
        let count = |i: u64| {
            let next = block::Slot::new(index + i, order);
            let skip = usize::try_from(next.byte - slot.byte).ok()?;
            block::read(bytes.get(skip..)?, next, order)
        };
        let free = count(0) == Some(0);
        let end = if free {
            most.min(per_block - index)
        } else {
            per_block - index
        };
        let len = (1..end)
            .take_while(|i| count(*i).is_some_and(|n| (n == 0) == free))
            .count();
        Ok((free, 1 + len as u64))
    }
}
