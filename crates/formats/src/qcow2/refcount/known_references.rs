//! The known references to each cluster, independent of its refcount.
//!
//! Refcounts in the file may be wrong: the allocator would overwrite a data cluster whose refcount is zero. So a
//! cluster that was in the file when it was opened is allocated only if the references were counted and none refers to
//! it, and no refcount falls below the number of remaining references.
//!
//! ```text
//!   cluster   0 ............................. end ........
//!             in the file when it was opened | allocated since: this program wrote the refcounts
//! ```

use std::collections::{BTreeSet, HashMap};

use super::counts::ClusterCounts;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange};

/// The references to each cluster of a file, as counted.
#[derive(Debug)]
pub(in crate::qcow2) struct References {
    pub(in crate::qcow2) counts: ClusterCounts,
    /// L2 tables to which more than one L1 entry refers, by cluster, and the number of references after the first.
    pub(in crate::qcow2) tables: HashMap<ClusterIndex, u64>,
    /// Clusters beyond the end of the file that are referred to.
    pub(in crate::qcow2) dangling: BTreeSet<ClusterIndex>,
}

/// The references to the clusters that an image had when it was opened.
#[derive(Debug)]
pub(super) struct KnownReferences {
    /// The end of the clusters that the file had.
    end: ClusterIndex,
    /// The references to each of them; `None` until they are counted.
    counted: Option<ClusterCounts>,
    /// Clusters beyond the end to which a damaged image refers.
    dangling: BTreeSet<ClusterIndex>,
}

impl KnownReferences {
    /// The references of a file whose clusters end at `end`, not counted yet.
    pub(super) fn new(end: ClusterIndex) -> Self {
        Self {
            end,
            counted: None,
            dangling: BTreeSet::new(),
        }
    }

    pub(super) fn set(&mut self, references: References) {
        self.counted = Some(references.counts);
        self.dangling = references.dangling;
    }

    pub(super) fn is_counted(&self) -> bool {
        self.counted.is_some()
    }

    /// No cluster from here on was in the file when it was opened, and none is referred to.
    pub(super) fn known_end(&self) -> ClusterIndex {
        self.dangling
            .last()
            .map_or(self.end, |last| self.end.max(last.plus(1)))
    }

    /// No cluster from here on was in the file when it was opened.
    pub(super) fn end(&self) -> ClusterIndex {
        self.end
    }

    /// The number of references to `cluster`, if it is known.
    pub(super) fn of(&self, cluster: ClusterIndex) -> Option<u64> {
        let counts = self.counted.as_ref().filter(|_| cluster < self.end)?;
        Some(counts.of(cluster))
    }

    /// The end of the last cluster before `end` that is known to have a reference.
    pub(super) fn used_end(&self, end: ClusterIndex) -> ClusterIndex {
        let counts = self.counted.as_ref();
        counts.map_or(ClusterIndex::new(0), |counts| counts.used_end(end.min(self.end)))
    }

    /// Whether `cluster` must not be allocated although its refcount is zero.
    pub(super) fn keeps(&self, cluster: ClusterIndex) -> bool {
        if cluster < self.end {
            self.of(cluster) != Some(0)
        } else {
            self.dangling.contains(&cluster)
        }
    }

    /// Adds a reference to `cluster`.
    pub(super) fn add(&mut self, cluster: ClusterIndex) {
        self.add_run(ClusterRange::at(cluster, 1));
    }

    /// Adds a reference to each of `clusters`.
    pub(super) fn add_run(&mut self, clusters: ClusterRange) {
        let known = self.known(clusters);
        let counted = self.counted.as_mut();
        if counted.is_some_and(|counts| counts.add_run(known).is_err()) {
            // Without memory for the counts, all are dropped.
            self.counted = None;
        }
    }

    /// Removes a reference from each of `clusters`.
    pub(super) fn remove_run(&mut self, clusters: ClusterRange) {
        let known = self.known(clusters);
        let counted = self.counted.as_mut();
        if counted.is_some_and(|counts| counts.remove_run(known).is_err()) {
            self.counted = None;
        }
    }

    /// Those of `clusters` that the file had.
    fn known(&self, clusters: ClusterRange) -> ClusterRange {
        ClusterRange::new(clusters.start, clusters.end.min(self.end))
    }

    /// Removes a reference to `cluster`. Returns how many are left, if it is known.
    pub(super) fn remove(&mut self, cluster: ClusterIndex) -> Option<u64> {
        let left = self.of(cluster)?.saturating_sub(1);
        let counts = self.counted.as_mut()?;
        if counts.set(cluster, left).is_err() {
            self.counted = None;
        }
        Some(left)
    }
}
