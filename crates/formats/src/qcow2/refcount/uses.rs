//! What refers to each cluster, whatever its refcount says.
//!
//! Refcounts are what other programs wrote, and damage changes them: a count of zero hands a cluster that holds data to
//! the next write. So a cluster that was in the file when it was opened is allocated only if the references were
//! counted and none leads to it, and no count goes below the number of references that are left.
//!
//! ```text
//!   cluster   0 ............................. end ........
//!             in the file when it was opened | allocated since: the refcounts are this program's own
//! ```

use std::collections::{BTreeSet, HashMap};

use super::counts::ClusterCounts;

/// How many references lead to each cluster of a file.
#[derive(Debug)]
pub(in crate::qcow2) struct References {
    pub(in crate::qcow2) counts: ClusterCounts,
    /// The L2 tables that more than one L1 entry leads to, by cluster, and how many more.
    pub(in crate::qcow2) tables: HashMap<u64, u64>,
    /// The clusters behind the end of the file that something refers to.
    pub(in crate::qcow2) dangling: BTreeSet<u64>,
}

/// The references to the clusters that an image had when it was opened.
#[derive(Debug)]
pub(super) struct KnownReferences {
    /// How many clusters the file had.
    end: u64,
    /// References to each of them, once they were counted.
    counted: Option<ClusterCounts>,
    /// Clusters behind the end to which references of a damaged image lead.
    dangling: BTreeSet<u64>,
}

impl KnownReferences {
    /// Nothing counted yet in a file of `end` clusters.
    pub(super) fn new(end: u64) -> Self {
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

    /// No cluster from here on was in the file when it was opened, nor does anything refer to one.
    pub(super) fn known_end(&self) -> u64 {
        self.dangling
            .last()
            .map_or(self.end, |last| self.end.max(last + 1))
    }

    /// No cluster from here on was in the file when it was opened.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// How many references lead to `cluster`, if that is known.
    pub(super) fn of(&self, cluster: u64) -> Option<u64> {
        let counts = self.counted.as_ref().filter(|_| cluster < self.end)?;
        Some(counts.of(cluster))
    }

    /// Whether `cluster` must not be allocated though its refcount is zero.
    pub(super) fn keeps(&self, cluster: u64) -> bool {
        if cluster < self.end {
            self.of(cluster) != Some(0)
        } else {
            self.dangling.contains(&cluster)
        }
    }

    /// One more reference leads to `cluster`.
    pub(super) fn add(&mut self, cluster: u64) {
        if cluster < self.end
            && let Some(counts) = &mut self.counted
            && counts.add(cluster, 1).is_err()
        {
            // No memory for it: from here on nothing is known.
            self.counted = None;
        }
    }

    /// One reference to `cluster` is gone; how many are left, if that is known.
    pub(super) fn remove(&mut self, cluster: u64) -> Option<u64> {
        let left = self.of(cluster)?.saturating_sub(1);
        let counts = self.counted.as_mut()?;
        if counts.set(cluster, left).is_err() {
            self.counted = None;
        }
        Some(left)
    }
}
