//! Which clusters of a file hold metadata, so that no write lands on a table that it does not mean.
//!
//! ```text
//!   cluster   0        1                2                3          4          5
//!           | header | refcount table | refcount block | L1 table | L2 table | guest data ...
//!   kinds     Header   RefcountTable    RefcountBlock    ActiveL1   ActiveL2   none
//! ```
//!
//! A sound image has one kind for a cluster at most. A damaged one may say of the L1 table's cluster that it is free, or
//! a refcount block, or a guest's. Every place that is about to be written is shown to the guard first, with the kinds
//! that the write is meant for; any other kind there refuses the write.
//!
//! This is for images whose metadata is allocated and freed in clusters while they are open, as in qcow2. Formats whose
//! structures stay where they are have [`reserved`](super::reserved): a few ranges with names, and pieces of one length.

use std::collections::BTreeMap;
use std::sync::Arc;

use diskimage_core::{Budget, ByteRange, Error, Reservation, Result};

/// What a cluster of metadata is. The order is the order in which they are looked for.
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
    /// Anything, where a table lies that has one reference in a sound image.
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

    /// qemu-img's words for it.
    fn words(self) -> &'static str {
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

    /// Those of `kinds`.
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

/// What is told of damage that is met while an image is being written.
pub(crate) trait DamageReport: std::fmt::Debug + Send + Sync {
    /// Says, and marks in the image, that it is damaged: `what` is wrong. The error of the request that met it.
    fn met(&self, what: &str) -> Error;

    /// Refuses if the image was marked as damaged: nothing more is written to it.
    ///
    /// # Errors
    /// A mark.
    fn require_unmarked(&self) -> Result<()>;
}

/// The metadata of one open image.
#[derive(Debug)]
pub(crate) struct MetadataGuard {
    cluster_bits: u32,
    clusters: BTreeMap<u64, Kinds>,
    /// The kinds that refuse a write.
    refusing: Kinds,
    report: Arc<dyn DamageReport>,
    budget: Budget,
    taken: Vec<Reservation>,
    /// Clusters that the memory taken from the budget still has room for.
    room: u64,
}

/// Memory of a cluster in the map, and how many of them are taken from the budget at once.
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

    /// Notes that `range` holds metadata of `kind`.
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

    /// Notes which clusters of tables that nothing shares in a sound image are shared all the same.
    pub(crate) fn mark_shared(&mut self, is_shared: impl Fn(u64) -> bool) {
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

    /// Notes that the clusters of `range` are free.
    pub(crate) fn remove(&mut self, range: ByteRange) {
        for cluster in self.clusters_of(range) {
            if self.clusters.remove(&cluster).is_some() {
                self.room += 1;
            }
        }
    }

    /// Whether the metadata in `range` includes a kind that refuses a write meant for `own`: the first one.
    pub(crate) fn overlap(&self, range: ByteRange, own: Kinds) -> Option<Kind> {
        let refusing = Kinds(self.refusing.0 & !own.0);
        let found = self
            .clusters
            .range(self.clusters_of(range))
            .fold(0, |all, (_, kinds)| all | kinds.0);
        Kind::ALL
            .into_iter()
            .find(|kind| Kinds(found & refusing.0).has(*kind))
    }

    /// Refuses a write to `range`, which is meant for `own`, where it would land on something else.
    ///
    /// # Errors
    /// Metadata of another kind, and damage that was met before.
    pub(crate) fn admit(&self, range: ByteRange, own: Kinds) -> Result<()> {
        self.report.require_unmarked()?;
        match self.overlap(range, own) {
            None => Ok(()),
            Some(kind) => Err(self.report.met(&format!(
                "Preventing invalid write on metadata (overlaps with {})",
                kind.words()
            ))),
        }
    }

    pub(crate) fn report(&self) -> &dyn DamageReport {
        &*self.report
    }

    /// What is guarded now.
    pub(crate) fn clusters(&self) -> Clusters {
        Clusters(self.clusters.clone())
    }

    /// Guards what was guarded before.
    pub(crate) fn restore(&mut self, clusters: Clusters) {
        self.clusters = clusters.0;
        let room = (self.taken.len() as u64).saturating_mul(BATCH);
        self.room = room.saturating_sub(self.clusters.len() as u64);
    }

    fn clusters_of(&self, range: ByteRange) -> std::ops::Range<u64> {
        let first = range.start() >> self.cluster_bits;
        first..range.end().div_ceil(1 << self.cluster_bits).max(first)
    }
}

/// The clusters that were guarded at some moment.
#[derive(Clone, Debug)]
pub(crate) struct Clusters(BTreeMap<u64, Kinds>);

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Told;

    impl DamageReport for Told {
        fn met(&self, what: &str) -> Error {
            Error::corrupt(what)
        }

        fn require_unmarked(&self) -> Result<()> {
            Ok(())
        }
    }

    fn guard(refusing: Kinds) -> MetadataGuard {
        let mut guard = MetadataGuard::new(16, refusing, Arc::new(Told), Budget::default());
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
