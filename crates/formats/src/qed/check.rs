//! The check and the repair of the tables.
//!
//! Every cluster has at most one user: the header, a table, or the disk. A repair clears entries with invalid offsets.
//! Two users of a cluster are reported and left alone, as it cannot be known which one is right. So are invalid entries
//! in an L2 table whose clusters have another user: they may be guest data. Clusters without a user are leaks, which
//! cannot be repaired: storage is never freed.

use diskimage_core::{ByteRange, CheckReport, Device, Layer, Repair, Result};

use super::Qed;
use super::entry::Entries;
use crate::layer_kit::cluster_set::ClusterSet;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::offset::GuestOffset;
use crate::layer_kit::two_level_map::{Cluster, EntryCodec, Walk};

/// Checks all tables. Any kind of `repair` clears invalid entries, in a second walk that knows which clusters are
/// shared.
pub(super) fn check(image: &Qed, repair: Repair) -> Result<CheckReport> {
    let entries = image.tree.scheme();
    let check = |repairs, shared| Check {
        entries,
        file: &**image.file(),
        disk: ByteRange::new(0, image.len()),
        size: image.geometry.cluster_size,
        repairs,
        used: ClusterSet::new(&image.budget),
        shared,
        report: CheckReport {
            total_clusters: image.len().div_ceil(image.geometry.cluster_size),
            ..CheckReport::default()
        },
    };
    image.tree.walk(|walk| {
        let mut found = check(false, ClusterSet::new(&image.budget));
        found.l1(walk)?;
        let mut check = if repair != Repair::No && image.write {
            let mut check = check(true, found.shared);
            drop(found.used);
            check.l1(walk)?;
            check
        } else {
            found
        };
        // The header's clusters are not counted: no valid entry refers to them.
        let there = walk.end().since(entries.first) / check.size;
        check.report.leaks = there.saturating_sub(check.used.count());
        Ok(check.report)
    })
}

struct Check<'a> {
    entries: &'a Entries,
    file: &'a dyn Device,
    disk: ByteRange,
    /// Bytes of a cluster.
    size: u64,
    repairs: bool,
    used: ClusterSet<'a>,
    /// The clusters with two users, complete only in the second walk.
    shared: ClusterSet<'a>,
    report: CheckReport,
}

impl Check<'_> {
    fn l1(&mut self, walk: &mut Walk<'_, Entries>) -> Result<()> {
        let l1 = walk.l1();
        self.take(l1)?;
        let mut next = 0;
        while next < l1.len {
            let (entries, after) = walk.page(l1, next)?;
            next = after;
            for (at, entry) in entries {
                match self.entries.l2_table(entry, walk.end()) {
                    Ok(Some(offset)) => {
                        let l2 = walk.l2(offset);
                        // A table with another user was checked already, or is not a table.
                        if self.take(l2)? {
                            let coverage = (l2.len / 8).saturating_mul(self.size);
                            let guest = GuestOffset::new((at / 8).saturating_mul(coverage));
                            self.l2(walk, l2, guest)?;
                        }
                    }
                    Ok(None) => {}
                    Err(_) => self.invalid(walk, l1, at)?,
                }
            }
        }
        Ok(())
    }

    /// Checks the L2 table that maps the disk from `guest` on.
    fn l2(&mut self, walk: &mut Walk<'_, Entries>, l2: Table, guest: GuestOffset) -> Result<()> {
        let (mut next, mut follows) = (0, None);
        while next < l2.len {
            let (entries, after) = walk.page(l2, next)?;
            next = after;
            for (at, entry) in entries {
                let cluster = self.entries.cluster(entry, walk.end());
                if let Ok(Cluster::None | Cluster::Zero) = cluster {
                    continue;
                }
                self.report.allocated_clusters += 1;
                self.report.fragmented_clusters += u64::from(follows.is_some_and(|offset| offset != entry));
                follows = Some(entry.wrapping_add(self.size));
                match cluster {
                    Ok(_) => {
                        self.count(entry / self.size, 1)?;
                        let guest = guest.plus((at / 8).saturating_mul(self.size));
                        // The part of the last cluster beyond the end of the disk is padding.
                        let needed = guest.range(self.size).intersect(self.disk).len();
                        if self.file.require(entry, needed).is_err() {
                            self.report.corruptions += 1;
                        }
                    }
                    Err(_) => self.invalid(walk, l2, at)?,
                }
            }
        }
        Ok(())
    }

    /// Counts `table` as a user of its clusters; whether it is the only one so far.
    fn take(&mut self, table: Table) -> Result<bool> {
        Ok(self.count(table.offset / self.size, table.len / self.size)? == 0)
    }

    /// Counts one more user of `count` clusters, and returns how many of them had one already.
    fn count(&mut self, first: u64, count: u64) -> Result<u64> {
        let twice = self.used.take(first, count)?;
        if twice > 0 {
            self.report.corruptions += twice;
            self.shared.take(first, count)?;
        }
        Ok(twice)
    }

    /// Clears or reports an entry with an invalid offset.
    fn invalid(&mut self, walk: &mut Walk<'_, Entries>, table: Table, at: u64) -> Result<()> {
        let (first, count) = (table.offset / self.size, table.len / self.size);
        let is_table = table.class == WriteOrder::L1 || !self.shared.has_any(first, count);
        if self.repairs && is_table {
            walk.clear(table, at)?;
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
        Ok(())
    }
}
