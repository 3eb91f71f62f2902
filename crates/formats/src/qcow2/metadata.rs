//! The metadata of an open image: its tables in memory, and the refcounts that say which clusters are in use.
//!
//! ```text
//!   Metadata ──► Refcounts        which clusters are free, how often each is used
//!       │            │  reads and changes refcount blocks in
//!       └────────────┴──► MetadataCache      pages of all tables, written back in crash order
//! ```
//!
//! Refcounts are entries of tables, so each of their operations needs the cache. This type holds both; all allocations
//! and releases of clusters go through it.

use std::sync::Arc;

use diskimage_core::{ByteRange, Result};

use super::Parts;
use super::refcount::{RefcountChange, Refcounts};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};
use crate::layer_kit::metadata_guard::Kind;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};

/// The cache of tables and the refcounts in it.
#[derive(Debug)]
pub(super) struct Metadata {
    pub(super) cache: MetadataCache,
    pub(super) refcounts: Refcounts,
}

impl Metadata {
    /// The metadata of an image. Nothing is read.
    pub(super) fn new(parts: &Parts) -> Self {
        let cache = MetadataCache::new(Arc::clone(&parts.file), Arc::clone(&parts.data));
        Self {
            cache: cache.with_budget(&parts.budget),
            refcounts: Refcounts::new(&parts.header, parts.file.len()),
        }
    }

    /// Allocates a run of `count` clusters, for metadata of the kind `kind` or for guest data. Returns the offset of
    /// the first.
    ///
    /// # Errors
    /// A file that cannot grow any more, and damage.
    pub(super) fn allocate(&mut self, count: u64, kind: Option<Kind>) -> Result<HostOffset> {
        self.refcounts.allocate(&mut self.cache, count, kind)
    }

    /// Allocates `len` bytes for a compressed cluster. See [`Refcounts::allocate_bytes`].
    ///
    /// # Errors
    /// As [`Metadata::allocate`].
    pub(super) fn allocate_bytes(&mut self, len: u64) -> Result<HostOffset> {
        self.refcounts.allocate_bytes(&mut self.cache, len)
    }

    /// Decrements the refcount of each cluster that `range` touches. See [`Refcounts::release`].
    ///
    /// # Errors
    /// Failures to read or write refcount blocks.
    pub(super) fn release(&mut self, range: ByteRange) -> Result<()> {
        self.refcounts.release(&mut self.cache, range)
    }

    /// Releases a new table to which nothing refers. If that fails, its clusters leak, which is harmless.
    pub(super) fn release_new_table(&mut self, table: Table) {
        self.cache.forget(table);
        let released = self.release(table.range());
        let _ = released.and_then(|()| self.cache.write_back());
    }

    /// The refcount of `cluster`.
    ///
    /// # Errors
    /// Failures to read, and damage in the refcount table.
    pub(super) fn count(&mut self, cluster: ClusterIndex) -> Result<u64> {
        self.refcounts.count(&mut self.cache, cluster)
    }

    /// Checks that the refcounts of `clusters` can be changed. See [`Refcounts::check_run`].
    ///
    /// # Errors
    /// Clusters with a refcount of zero, or refcounts at their maximum.
    pub(super) fn check_run(&mut self, clusters: ClusterRange, change: RefcountChange) -> Result<()> {
        self.refcounts.check_run(&mut self.cache, clusters, change)
    }

    /// Changes the refcounts of `clusters`, and calls `freed` for each that is free then, in order.
    ///
    /// # Errors
    /// As [`Metadata::check_run`]; the clusters before the failed one are changed.
    pub(super) fn change_run(
        &mut self,
        clusters: ClusterRange,
        change: RefcountChange,
        freed: impl FnMut(ClusterIndex),
    ) -> Result<()> {
        self.refcounts
            .change_run(&mut self.cache, clusters, change, freed)
    }

    /// Replaces `counts` with the refcounts of the first of `clusters`, at least of one.
    ///
    /// # Errors
    /// As [`Metadata::count`].
    pub(super) fn read_run(&mut self, clusters: ClusterRange, counts: &mut Vec<u64>) -> Result<()> {
        self.refcounts.read_run(&mut self.cache, clusters, counts)
    }

    /// Makes all changes of tables durable.
    ///
    /// # Errors
    /// Failures to write.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.cache.write_back()?;
        self.cache.sync()
    }

    /// Whether any cluster from `first` on has a refcount above zero, or has a block that could hold one.
    ///
    /// # Errors
    /// Failures to read, and damage in the refcount table.
    pub(super) fn counts_beyond(&mut self, first: ClusterIndex) -> Result<bool> {
        self.refcounts.counts_beyond(&mut self.cache, first)
    }

    /// Whether a cluster that the file had when it was opened is free.
    ///
    /// # Errors
    /// Failures to read, and damage in the refcount table.
    pub(super) fn has_free_before_end(&mut self) -> Result<bool> {
        self.refcounts.has_free_before_end(&mut self.cache)
    }

    /// Frees the refcount blocks whose refcounts are all zero.
    ///
    /// # Errors
    /// Failures to read or write.
    pub(super) fn drop_empty_blocks(&mut self) -> Result<()> {
        self.refcounts.drop_empty_blocks(&mut self.cache)
    }

    /// The end of the last cluster before `end` that is in use. See [`Refcounts::used_end`].
    ///
    /// # Errors
    /// Failures to read.
    pub(super) fn used_end(&mut self, end: ClusterIndex) -> Result<ClusterIndex> {
        self.refcounts.used_end(&mut self.cache, end)
    }

    /// Releases the refcount structures `old`, to which nothing refers any more.
    ///
    /// # Errors
    /// Failures to read or write: what is left leaks.
    pub(super) fn release_structure(&mut self, old: &Refcounts) -> Result<()> {
        self.refcounts.release_structure(&mut self.cache, old)
    }
}
