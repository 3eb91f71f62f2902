//! The clusters of a file that hold metadata, so that no write overwrites metadata of another kind.
//!
//! ```text
//!   cluster   0        1                2                3          4          5
//!           | header | refcount table | refcount block | L1 table | L2 table | guest data ...
//!   kinds     Header   RefcountTable    RefcountBlock    ActiveL1   ActiveL2   none
//! ```
//!
//! In a sound image, a cluster has one kind at most. In a damaged one, the L1 table's cluster may have refcount 0, or
//! other entries may refer to it as a refcount block or guest data. Every range is checked before it is written, with
//! the kinds that the write is meant for; metadata of any other kind there refuses the write.
//!
//! This is for images whose metadata is allocated and freed in clusters while they are open, as in qcow2. Formats whose
//! structures do not move have [`reserved`](super::reserved): a few ranges with names, and pieces of one length.

use std::collections::BTreeMap;
use std::sync::Arc;

use diskimage_core::{Budget, ByteRange, Error, Reservation, Result};

use super::offset::{ClusterIndex, ClusterRange};

/// The kind of metadata in a cluster. Of several kinds, the first in this order is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Header,
    ActiveL1,
    ActiveL2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    InactiveL1,
    InactiveL2,
    BitmapDirectory,
    /// The cluster of a table that should have one reference, and has more in this image.
    Shared,
}

impl Kind {
    pub(crate) const ALL: [Self; 10] = [
        Self::Header,
        Self::ActiveL1,
        Self::ActiveL2,
        Self::RefcountTable,
        Self::RefcountBlock,
        Self::SnapshotTable,
        Self::InactiveL1,
        Self::InactiveL2,
        Self::BitmapDirectory,
        Self::Shared,
    ];

    /// The name in qemu-img's messages.
    fn name(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::ActiveL1 => "active L1 table",
            Self::ActiveL2 => "active L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::InactiveL1 => "inactive L1 table",
            Self::InactiveL2 => "inactive L2 table",
            Self::BitmapDirectory => "bitmap directory",
            Self::Shared => "something else that refers to it",
        }
    }
}

/// A set of kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds(u16);

impl Kinds {
    pub(crate) const NONE: Self = Self(0);

    /// The set of `kinds`.
    pub(crate) const fn of(kinds: &[Kind]) -> Self {
        let (mut set, mut i) = (0, 0);
        while i < kinds.len() {
            set |= 1 << kinds[i] as u16;
            i += 1;
        }
        Self(set)
    }

    pub(crate) fn set(&mut self, kind: Kind, on: bool) {
        let bit = Self::of(&[kind]).0;
        self.0 = if on { self.0 | bit } else { self.0 & !bit };
    }

    pub(crate) fn has(self, kind: Kind) -> bool {
        self.0 & Self::of(&[kind]).0 != 0
    }
}

/// Where damage is reported that is met while an image is being written.
pub(crate) trait DamageReport: std::fmt::Debug + Send + Sync {
    /// Reports the damage `what` and marks the image as corrupt. Returns the error for the request that met it.
    fn met(&self, what: &str) -> Error;

    /// Refuses further writes to an image that was marked as corrupt.
    ///
    /// # Errors
    /// The image is marked.
    fn require_unmarked(&self) -> Result<()>;
}

/// The metadata of one open image.
#[derive(Debug)]
pub(crate) struct MetadataGuard {
    cluster_bits: u32,
    clusters: BTreeMap<ClusterIndex, Kinds>,
    /// The kinds that refuse a write.
    refusing: Kinds,
    report: Arc<dyn DamageReport>,
    budget: Budget,
    taken: Vec<Reservation>,
    /// The number of clusters for which memory is reserved and not yet used.
    room: u64,
}

/// Bytes of memory for a cluster in the map, and the number of clusters for which memory is reserved at a time.
const CLUSTER_COST: u64 = 24;
const BATCH: u64 = 4096;

impl MetadataGuard {
    pub(crate) fn new(
        cluster_bits: u32,
        refusing: Kinds,
        report: Arc<dyn DamageReport>,
        budget: Budget,
    ) -> Self {
        Self {
            cluster_bits,
            clusters: BTreeMap::new(),
            refusing,
            report,
            budget,
            taken: Vec::new(),
            room: 0,
        }
    }

    /// Records that `range` holds metadata of `kind`.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(crate) fn add(&mut self, kind: Kind, range: ByteRange) -> Result<()> {
        for cluster in self.clusters_of(range) {
            if let Some(kinds) = self.clusters.get_mut(&cluster) {
                kinds.set(kind, true);
                continue;
            }
            if self.room == 0 {
                self.taken.push(self.budget.reserve(BATCH * CLUSTER_COST)?);
                self.room = BATCH;
            }
            self.room -= 1;
            self.clusters.insert(cluster, Kinds::of(&[kind]));
        }
        Ok(())
    }

    /// Marks the clusters of tables for which `is_shared` is true and that have one reference in a sound image.
    pub(crate) fn mark_shared(&mut self, is_shared: impl Fn(ClusterIndex) -> bool) {
        const ALONE: Kinds = Kinds::of(&[
            Kind::Header,
            Kind::ActiveL1,
            Kind::RefcountTable,
            Kind::RefcountBlock,
            Kind::SnapshotTable,
            Kind::InactiveL1,
            Kind::BitmapDirectory,
        ]);
        for (cluster, kinds) in &mut self.clusters {
            if kinds.0 & ALONE.0 != 0 && is_shared(*cluster) {
                kinds.set(Kind::Shared, true);
            }
        }
    }

    /// Records that the clusters of `range` are free.
    pub(crate) fn remove(&mut self, range: ByteRange) {
        for cluster in self.clusters_of(range) {
            if self.clusters.remove(&cluster).is_some() {
                self.room += 1;
            }
        }
    }

    /// The first kind of metadata in `range` that refuses a write meant for `own`.
    pub(crate) fn overlap(&self, range: ByteRange, own: Kinds) -> Option<Kind> {
        let refusing = Kinds(self.refusing.0 & !own.0);
        let clusters = self.clusters_of(range);
        let found = self
            .clusters
            .range(clusters.start..clusters.end)
            .fold(0, |all, (_, kinds)| all | kinds.0);
        Kind::ALL
            .into_iter()
            .find(|kind| Kinds(found & refusing.0).has(*kind))
    }

    /// Refuses a write to `range`, which is meant for `own`, if it would overwrite metadata of another kind.
    ///
    /// # Errors
    /// Metadata of another kind, and damage that was met before.
    pub(crate) fn admit(&self, range: ByteRange, own: Kinds) -> Result<()> {
        self.report.require_unmarked()?;
        match self.overlap(range, own) {
            None => Ok(()),
            Some(kind) => Err(self.report.met(&format!(
                "Preventing invalid write on metadata (overlaps with {})",
                kind.name()
            ))),
        }
    }

    pub(crate) fn report(&self) -> &dyn DamageReport {
        &*self.report
    }

    /// A copy of the guarded clusters, for [`MetadataGuard::restore`].
    pub(crate) fn clusters(&self) -> Clusters {
        Clusters(self.clusters.clone())
    }

    /// Restores the guarded clusters from a copy.
    pub(crate) fn restore(&mut self, clusters: Clusters) {
        self.clusters = clusters.0;
        let room = (self.taken.len() as u64).saturating_mul(BATCH);
        self.room = room.saturating_sub(self.clusters.len() as u64);
    }

    fn clusters_of(&self, range: ByteRange) -> ClusterRange {
        ClusterRange::touched(range, self.cluster_bits)
    }
}

/// A copy of the guarded clusters.
#[derive(Clone, Debug)]
pub(crate) struct Clusters(BTreeMap<ClusterIndex, Kinds>);

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Silent;

    impl DamageReport for Silent {
        fn met(&self, what: &str) -> Error {
            Error::corrupt(what)
        }

        fn require_unmarked(&self) -> Result<()> {
            Ok(())
        }
    }

    fn guard(refusing: Kinds) -> MetadataGuard {
        let mut guard = MetadataGuard::new(16, refusing, Arc::new(Silent), Budget::default());
        for (kind, cluster, count) in [
            (Kind::Header, 0, 1),
            (Kind::ActiveL1, 3, 2),
            (Kind::RefcountBlock, 4, 1),
        ] {
            let range = ByteRange::at(cluster << 16, count << 16);
            guard.add(kind, range).expect("enough memory");
        }
        guard
    }

    fn clusters(first: u64, count: u64) -> ByteRange {
        ByteRange::at(first << 16, count << 16)
    }

    #[test]
    fn a_write_is_refused_where_another_kind_is() {
        let guard = guard(Kinds::of(&Kind::ALL));
        let l1 = Kinds::of(&[Kind::ActiveL1]);
        assert_eq!(guard.overlap(clusters(1, 2), Kinds::NONE), None);
        assert_eq!(guard.overlap(clusters(1, 3), Kinds::NONE), Some(Kind::ActiveL1));
        assert_eq!(guard.overlap(clusters(3, 1), l1), None);
        assert_eq!(guard.overlap(clusters(3, 2), l1), Some(Kind::RefcountBlock));
        assert_eq!(
            guard.admit(clusters(0, 5), l1).map_err(|error| error.chain()),
            Err("Preventing invalid write on metadata (overlaps with qcow2_header)".to_owned())
        );
        assert_eq!(
            guard.overlap(ByteRange::at(0x3_ffff, 1), Kinds::NONE),
            Some(Kind::ActiveL1)
        );
    }

    #[test]
    fn only_kinds_that_are_asked_for_refuse() {
        let guard = guard(Kinds::of(&[Kind::RefcountBlock]));
        assert_eq!(guard.overlap(clusters(0, 4), Kinds::NONE), None);
        assert_eq!(
            guard.overlap(clusters(0, 5), Kinds::NONE),
            Some(Kind::RefcountBlock)
        );
    }

    #[test]
    fn a_cluster_that_was_freed_refuses_nothing() {
        let mut guard = guard(Kinds::of(&Kind::ALL));
        guard.remove(clusters(3, 1));
        assert_eq!(guard.overlap(clusters(3, 1), Kinds::NONE), None);
        assert_eq!(guard.overlap(clusters(4, 1), Kinds::NONE), Some(Kind::ActiveL1));
    }
}
