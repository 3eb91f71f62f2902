//! Looking after the tables.
//!
//! Every cluster has at most one user: the header, a table, or the disk. Entries that lead to where no cluster can be are
//! cleared; two users of a cluster are told of and left alone, as nobody can say whose it is. So is what looks like an
//! entry in a table that is also something else: it may be guest data. Clusters without a user are leaks, which cannot be
//! mended: storage is never given up.

use diskimage_core::{ByteRange, CheckReport, Device, Layer, Repair, Result};

use super::{Entries, Qed};
use crate::layer_kit::cluster_set::ClusterSet;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::two_level_map::{Cluster, EntryCodec, Walk};

/// Looks at all tables; any kind of `repair` mends what can be.
pub(super) fn check(image: &Qed, repair: Repair) -> Result<CheckReport> {
    let entries = image.tree.scheme();
    let check = |mends, shared| Check {
        entries,
        file: &**image.file(),
        disk: ByteRange::new(0, image.len()),
        size: image.geometry.cluster_size,
        mends,
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
        // No entry can lead into the header.
        let there = (walk.end() - entries.first.min(walk.end())) / check.size;
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
    mends: bool,
    used: ClusterSet<'a>,
    /// What has two users, where that was found out before.
    shared: ClusterSet<'a>,
    report: CheckReport,
}

impl Check<'_> {
    fn l1(&mut self, walk: &mut Walk<'_, Entries>) -> Result<()> {
        let l1 = walk.l1();
        self.take(l1)?;
        let mut next = 0;
        while next < l1.len {
            let (words, after) = walk.page(l1, next)?;
            next = after;
            for (at, word) in words {
                match self.entries.l2_table(word, walk.end()) {
                    Ok(Some(offset)) => {
                        let l2 = walk.l2(offset);
                        // A table that others use too has been looked at or is none.
                        if self.take(l2)? {
                            let coverage = (l2.len / 8).saturating_mul(self.size);
                            self.l2(walk, l2, (at / 8).saturating_mul(coverage))?;
                        }
                    }
                    Ok(None) => {}
                    Err(_) => self.invalid(walk, l1, at)?,
                }
            }
        }
        Ok(())
    }

    /// Looks at the table for the disk from byte `guest` on.
    fn l2(&mut self, walk: &mut Walk<'_, Entries>, l2: Table, guest: u64) -> Result<()> {
        let (mut next, mut follows) = (0, None);
        while next < l2.len {
            let (words, after) = walk.page(l2, next)?;
            next = after;
            for (at, word) in words {
                let cluster = self.entries.cluster(word, walk.end());
                if let Ok(Cluster::None | Cluster::Zero) = cluster {
                    continue;
                }
                self.report.allocated_clusters += 1;
                self.report.fragmented_clusters += u64::from(follows.is_some_and(|offset| offset != word));
                follows = Some(word.wrapping_add(self.size));
                match cluster {
                    Ok(_) => {
                        self.count(word / self.size, 1)?;
                        let guest = guest.saturating_add((at / 8).saturating_mul(self.size));
                        // What lies beyond the end of the disk is padding.
                        let needed = ByteRange::at(guest, self.size).intersect(self.disk).len();
                        if self.file.require(word, needed).is_err() {
                            self.report.corruptions += 1;
                        }
                    }
                    Err(_) => self.invalid(walk, l2, at)?,
                }
            }
        }
        Ok(())
    }

    /// Counts the clusters of `table`; whether it is their only user.
    fn take(&mut self, table: Table) -> Result<bool> {
        Ok(self.count(table.offset / self.size, table.len / self.size)? == 0)
    }

    /// Counts a user of `count` clusters; how many of them have another one.
    fn count(&mut self, first: u64, count: u64) -> Result<u64> {
        let twice = self.used.take(first, count)?;
        if twice > 0 {
            self.report.corruptions += twice;
            self.shared.take(first, count)?;
        }
        Ok(twice)
    }

    /// An entry that leads to where nothing can be.
    fn invalid(&mut self, walk: &mut Walk<'_, Entries>, table: Table, at: u64) -> Result<()> {
        let (first, count) = (table.offset / self.size, table.len / self.size);
        let is_table = table.class == WriteOrder::L1 || !self.shared.has_any(first, count);
        if self.mends && is_table {
            walk.clear(table, at)?;
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
        Ok(())
    }
}
