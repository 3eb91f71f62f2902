//! Removes zero clusters, which version 2 does not have: they become unallocated, or get storage that holds zeroes.

use diskimage_core::{Result, ZeroMode};

use crate::layer_kit::metadata_cache::Table;
use crate::layer_kit::metadata_guard::Kinds;
use crate::layer_kit::offset::{ClusterRange, GuestOffset, HostOffset};
use crate::qcow2::entry::{Cluster, L2Entry, OFFSET_MASK, Subclusters};
use crate::qcow2::refcount::RefcountChange;
use crate::qcow2::{ImageState, Qcow2};

impl Qcow2 {
    /// Replaces the zero clusters of the disk and of all snapshots.
    pub(super) fn expand_zero_clusters(&self, report: &dyn Fn(u64, u64)) -> Result<()> {
        let snapshots = self.read_snapshots()?;
        let mut trees = vec![self.lock().l1];
        for snapshot in &snapshots {
            trees.push(self.snapshot_l1_or_errno(snapshot)?);
        }
        let mut state = self.lock();
        let all: u64 = trees.iter().map(|l1| l1.len / 8).sum();
        let mut done = 0;
        for l1 in trees {
            for index in 0..l1.len / 8 {
                let entry = state.metadata.cache.number(l1, index * 8)?;
                if let Some(l2) = self.l2_at(entry & OFFSET_MASK, index)? {
                    let guest = GuestOffset::new(index * self.header.geometry.l2_coverage());
                    self.expand_table(&mut state, l2, guest)?;
                }
                done += 1;
                report(done, all);
            }
        }
        self.write_back(&mut state)?;
        state.metadata.cache.sync()
    }

    /// Replaces the zero clusters of one L2 table, whose first cluster is at `guest`.
    fn expand_table(&self, state: &mut ImageState, l2: Table, guest: GuestOffset) -> Result<()> {
        let geometry = self.header.geometry;
        let mut users = None;
        for index in 0..geometry.l2_entries() {
            let old = self.read_entry(&mut state.metadata.cache, l2, index)?;
            if old.sub != Subclusters::ZERO {
                continue;
            }
            let users = match users {
                Some(users) => users,
                None => *users.insert(self.count_at(state, HostOffset::new(l2.offset))?),
            };
            let cluster = guest.plus(index * geometry.cluster_size());
            let new = self.without_zero(state, old, users, cluster)?;
            self.write_entry(&mut state.metadata.cache, l2, index, new)?;
            if new.kind != old.kind
                && let Some(host) = old.host_clusters(geometry)
            {
                // Each tree that shares this table has incremented the refcount of the cluster.
                for _ in 0..users {
                    self.free_later(state, host, Kinds::NONE)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the replacement of a zero entry in a table that `users` trees share. `guest` is the offset of its cluster.
    fn without_zero(
        &self,
        state: &mut ImageState,
        old: L2Entry,
        users: u64,
        guest: GuestOffset,
    ) -> Result<L2Entry> {
        let (bits, size) = (
            self.header.geometry.cluster_bits,
            self.header.geometry.cluster_size(),
        );
        let own = match old.kind {
            // No other table refers to this storage.
            Cluster::Host(offset) if self.count_at(state, offset)? == users => Some(offset),
            _ => None,
        };
        if own.is_none() && self.header.backing.is_none() {
            return Ok(L2Entry::UNALLOCATED);
        }
        let offset = match own {
            Some(offset) => {
                state.metadata.cache.admit(offset.range(size), Kinds::NONE)?;
                self.data_at(guest, offset).write_zero_bytes(offset.range(size))?;
                offset
            }
            None => {
                let offset = self.allocate(state, 1, None)?;
                for _ in 1..users {
                    let cluster = ClusterRange::at(offset.cluster(bits), 1);
                    state.metadata.change_run(cluster, RefcountChange::Up, |_| ())?;
                }
                self.data_at(guest, offset)
                    .write_zeroes(offset.range(size), ZeroMode::KeepAllocated)?;
                offset
            }
        };
        Ok(L2Entry {
            copied: users == 1,
            ..L2Entry::data(offset, Subclusters::ALLOCATED)
        })
    }

    fn count_at(&self, state: &mut ImageState, offset: HostOffset) -> Result<u64> {
        state
            .metadata
            .count(offset.cluster(self.header.geometry.cluster_bits))
    }
}
