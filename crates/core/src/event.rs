//! Steps that drivers announce to the device below them, so that `blkdebug` can fail a request at exactly that step.
//!
//! The names are those of `BlkdebugEvent` in the QMP reference of QEMU.

/// A step that a driver is about to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(&'static str);

impl Event {
    /// Reading guest data.
    pub const READ_AIO: Self = Self("read_aio");
    /// Writing guest data.
    pub const WRITE_AIO: Self = Self("write_aio");
    /// Reading a compressed cluster.
    pub const READ_COMPRESSED: Self = Self("read_compressed");
    /// Writing a compressed cluster.
    pub const WRITE_COMPRESSED: Self = Self("write_compressed");
    /// Copy-on-write: reading the part of a cluster that the request does not cover.
    pub const COW_READ: Self = Self("cow_read");
    /// Copy-on-write: writing that part to the newly allocated cluster.
    pub const COW_WRITE: Self = Self("cow_write");
    /// Updating an L1 entry.
    pub const L1_UPDATE: Self = Self("l1_update");
    /// Writing a longer L1 table.
    pub const L1_GROW_WRITE_TABLE: Self = Self("l1_grow_write_table");
    /// Making the header point to the longer L1 table.
    pub const L1_GROW_ACTIVATE_TABLE: Self = Self("l1_grow_activate_table");
    /// Clearing the end of the L1 table.
    pub const L1_SHRINK_WRITE_TABLE: Self = Self("l1_shrink_write_table");
    /// Reading an L2 table.
    pub const L2_LOAD: Self = Self("l2_load");
    /// Updating an L2 table.
    pub const L2_UPDATE: Self = Self("l2_update");
    /// Reading the refcount table.
    pub const REFTABLE_LOAD: Self = Self("reftable_load");
    /// Updating the refcount table.
    pub const REFTABLE_UPDATE: Self = Self("reftable_update");
    /// Reading a refcount block.
    pub const REFBLOCK_LOAD: Self = Self("refblock_load");
    /// Updating a refcount block.
    pub const REFBLOCK_UPDATE: Self = Self("refblock_update");
    /// Allocating a refcount block.
    pub const REFBLOCK_ALLOC: Self = Self("refblock_alloc");
    /// Allocating clusters.
    pub const CLUSTER_ALLOC: Self = Self("cluster_alloc");
    /// Allocating parts of clusters for compressed data.
    pub const CLUSTER_ALLOC_BYTES: Self = Self("cluster_alloc_bytes");
    /// Freeing clusters.
    pub const CLUSTER_FREE: Self = Self("cluster_free");
    /// Writing back dirty metadata.
    pub const FLUSH_TO_OS: Self = Self("flush_to_os");
    /// Flushing the file.
    pub const FLUSH_TO_DISK: Self = Self("flush_to_disk");
    /// Discarding all data of an image.
    pub const EMPTY_IMAGE_PREPARE: Self = Self("empty_image_prepare");

    /// Its name.
    pub fn name(self) -> &'static str {
        self.0
    }
}
