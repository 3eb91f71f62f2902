//! What drivers are about to do, told to the device below, so that tests can have it fail right then.
//!
//! The names are those of QEMU's `blkdebug` (`BlkdebugEvent` in its reference of QMP).

/// A step that a driver is about to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(&'static str);

impl Event {
    /// Reading bytes of the guest.
    pub const READ_AIO: Self = Self("read_aio");
    /// Writing bytes of the guest.
    pub const WRITE_AIO: Self = Self("write_aio");
    /// Reading a compressed cluster.
    pub const READ_COMPRESSED: Self = Self("read_compressed");
    /// Writing a compressed cluster.
    pub const WRITE_COMPRESSED: Self = Self("write_compressed");
    /// Reading the rest of a cluster that is partly written.
    pub const COW_READ: Self = Self("cow_read");
    /// Writing that rest to the new place of the cluster.
    pub const COW_WRITE: Self = Self("cow_write");
    /// Changing the table of tables.
    pub const L1_UPDATE: Self = Self("l1_update");
    /// Writing a longer table of tables.
    pub const L1_GROW_WRITE_TABLE: Self = Self("l1_grow_write_table");
    /// Having the header point to it.
    pub const L1_GROW_ACTIVATE_TABLE: Self = Self("l1_grow_activate_table");
    /// Clearing the end of the table of tables.
    pub const L1_SHRINK_WRITE_TABLE: Self = Self("l1_shrink_write_table");
    /// Reading a table of clusters.
    pub const L2_LOAD: Self = Self("l2_load");
    /// Changing a table of clusters.
    pub const L2_UPDATE: Self = Self("l2_update");
    /// Reading the table of refcount blocks.
    pub const REFTABLE_LOAD: Self = Self("reftable_load");
    /// Having the table of refcount blocks say something else.
    pub const REFTABLE_UPDATE: Self = Self("reftable_update");
    /// Reading a refcount block.
    pub const REFBLOCK_LOAD: Self = Self("refblock_load");
    /// Changing a refcount block.
    pub const REFBLOCK_UPDATE: Self = Self("refblock_update");
    /// Setting aside a new refcount block.
    pub const REFBLOCK_ALLOC: Self = Self("refblock_alloc");
    /// Setting aside clusters.
    pub const CLUSTER_ALLOC: Self = Self("cluster_alloc");
    /// Setting aside parts of clusters, for compressed data.
    pub const CLUSTER_ALLOC_BYTES: Self = Self("cluster_alloc_bytes");
    /// Giving back clusters.
    pub const CLUSTER_FREE: Self = Self("cluster_free");
    /// Writing out what is only in memory.
    pub const FLUSH_TO_OS: Self = Self("flush_to_os");
    /// Making what was written durable.
    pub const FLUSH_TO_DISK: Self = Self("flush_to_disk");
    /// Giving up all data of an image.
    pub const EMPTY_IMAGE_PREPARE: Self = Self("empty_image_prepare");

    /// Its name.
    pub fn name(self) -> &'static str {
        self.0
    }
}
