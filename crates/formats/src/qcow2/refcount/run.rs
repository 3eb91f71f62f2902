//! Changes the refcounts of runs of clusters: one cache access for each page of a refcount block, not one for each
//! cluster.

use diskimage_core::{Error, ErrorKind, Result, errno, to_index};

use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};
use crate::layer_kit::metadata_guard::Kinds;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange};
use crate::qcow2::header::limit;

/// A change of a refcount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum RefcountChange {
    /// One reference more.
    Up,
    /// One reference less.
    Down,
}

/// A refcount that could not be replaced.
pub(super) struct FailedUpdate {
    /// The refcount as it is.
    used: u64,
    pub(super) error: Error,
}

impl Refcounts {
    /// Checks that `clusters` have refcounts above zero and, for [`RefcountChange::Up`], below the maximum.
    ///
    /// # Errors
    /// The first cluster that fails the check.
    pub(in crate::qcow2) fn check_run(
        &self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
        change: RefcountChange,
    ) -> Result<()> {
        let (order, max) = (self.geometry.refcount_order, self.geometry.max_refcount());
        let mut rest = clusters;
        while rest.len() > 0 {
            let (table, start, part) = self.run_in_page(tables, rest)?;
            let bytes = tables.bytes(table, start.byte)?;
            let mut cluster = part.start;
            let mut refused = None;
            block::count_while(bytes, start, order, part.len(), |used| {
                refused = changed(used, change, max, cluster)
                    .err()
                    .map(|error| (used, error));
                cluster = cluster.plus(u64::from(refused.is_none()));
                refused.is_none()
            });
            if cluster < part.end {
                let (used, error) = refused.unwrap_or_else(|| (0, not_counted(cluster)));
                return Err(self.refusal(tables, cluster, used, error));
            }
            rest.start = part.end;
        }
        Ok(())
    }

    /// Changes the refcounts of `clusters`. Calls `freed` with each cluster that becomes free, in order.
    ///
    /// # Errors
    /// As [`Refcounts::check_run`]; the clusters before the failed one are changed.
    pub(in crate::qcow2) fn change_run(
        &mut self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
        change: RefcountChange,
        mut freed: impl FnMut(ClusterIndex),
    ) -> Result<()> {
        let max = self.geometry.max_refcount();
        let mut free = Vec::new();
        let mut rest = clusters;
        while rest.len() > 0 {
            let references = &self.references;
            let (done, failed) = self.update_page(tables, rest, |cluster, used| {
                let mut new = changed(used, change, max, cluster)?;
                if change == RefcountChange::Down {
                    // The refcount does not fall below the number of known references.
                    let left = references.of(cluster).unwrap_or(0).saturating_sub(1);
                    new = new.max(left.min(used));
                }
                if new == 0 {
                    free.push(cluster);
                }
                Ok(new)
            })?;
            let done = ClusterRange::at(rest.start, done);
            match change {
                RefcountChange::Up => self.references.add_run(done),
                RefcountChange::Down => self.references.remove_run(done),
            }
            for cluster in free.drain(..) {
                self.note_free(tables, cluster);
                freed(cluster);
            }
            rest.start = done.end;
            if let Some(failed) = failed {
                return Err(self.refusal(tables, rest.start, failed.used, failed.error));
            }
        }
        Ok(())
    }

    /// Replaces the refcounts of the first of `clusters`, as many as one page holds, by the results of `update` for each
    /// cluster and its refcount. Returns how many were replaced, and why the next one was not if that failed.
    pub(super) fn update_page(
        &self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
        mut update: impl FnMut(ClusterIndex, u64) -> Result<u64>,
    ) -> Result<(u64, Option<FailedUpdate>)> {
        let order = self.geometry.refcount_order;
        let (table, start, part) = self.run_in_page(tables, clusters)?;
        let bytes = tables.bytes_mut(table, start.byte)?;
        let mut cluster = part.start;
        let (done, failed) = block::update_each(bytes, start, order, part.len(), |used| {
            let new = update(cluster, used)?;
            cluster = cluster.plus(1);
            Ok(new)
        });
        if failed.is_none() && done < part.len() {
            return Err(Error::corrupt("Refcount block too short"));
        }
        Ok((done, failed.map(|(used, error)| FailedUpdate { used, error })))
    }

    /// Replaces `counts` with the refcounts of the first of `clusters`, as many as one page holds.
    pub(in crate::qcow2) fn read_run(
        &self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
        counts: &mut Vec<u64>,
    ) -> Result<()> {
        counts.clear();
        if self.block(tables, clusters.start)?.is_none() {
            let block_end = clusters.start.unit_end(self.geometry.refcount_block_entries());
            counts.resize(to_index(clusters.len().min(block_end.since(clusters.start)))?, 0);
            return Ok(());
        }
        let order = self.geometry.refcount_order;
        let (table, start, part) = self.run_in_page(tables, clusters)?;
        let bytes = tables.bytes(table, start.byte)?;
        block::count_while(bytes, start, order, part.len(), |count| {
            counts.push(count);
            true
        });
        counts.resize(to_index(part.len())?, 0);
        Ok(())
    }

    /// The error for a cluster whose refcount `used` cannot be changed because of `error`.
    fn refusal(&self, tables: &MetadataCache, cluster: ClusterIndex, used: u64, error: Error) -> Error {
        let range = ClusterRange::at(cluster, 1).bytes(self.geometry.cluster_bits);
        // If a cluster that is not counted holds metadata, the guard has the better message.
        let admitted = match used {
            0 => tables.admit(range, Kinds::NONE),
            _ => Ok(()),
        };
        admitted.err().unwrap_or(error)
    }

    /// The block and the slot of the first of `clusters`, and those that have their refcounts in the same page.
    fn run_in_page(
        &self,
        tables: &mut MetadataCache,
        clusters: ClusterRange,
    ) -> Result<(Table, block::Slot, ClusterRange)> {
        let table = self
            .block(tables, clusters.start)?
            .ok_or_else(|| self.no_block(clusters.start))?;
        let index = self.geometry.index_in_block(clusters.start);
        let order = self.geometry.refcount_order;
        let slot = block::Slot::new(index, order);
        let bytes = tables.bytes(table, slot.byte)?.len() as u64;
        // The page's bytes start with the first entry of the slot's byte, which may be an earlier one.
        let entries = (bytes * 8) >> order;
        let before = index - ((slot.byte * 8) >> order);
        let len = clusters.len().min(entries.saturating_sub(before)).max(1);
        Ok((table, slot, ClusterRange::at(clusters.start, len)))
    }

    /// The error for a cluster in use without a block. The errno is that of qemu-img, which adds the block and returns
    /// `EAGAIN`, or `EFBIG` if the largest table has no entry for the block.
    fn no_block(&self, cluster: ClusterIndex) -> Error {
        let at = self.geometry.block_index(cluster) * 8;
        Error::from_errno(if at < limit::REFCOUNT_TABLE_BYTES {
            errno::EAGAIN
        } else {
            errno::EFBIG
        })
    }
}

fn changed(used: u64, change: RefcountChange, max: u64, cluster: ClusterIndex) -> Result<u64> {
    match change {
        _ if used == 0 => Err(not_counted(cluster)),
        // qemu-img's message.
        RefcountChange::Up if used >= max => Err(Error::new(ErrorKind::Invalid, "Invalid argument")),
        RefcountChange::Up => Ok(used + 1),
        RefcountChange::Down => Ok(used - 1),
    }
}

fn not_counted(cluster: ClusterIndex) -> Error {
    Error::corrupt(format!("Cluster {:#x} is in use but not counted", cluster.get()))
}
