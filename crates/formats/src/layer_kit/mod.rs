//! The mechanisms that formats share, one in each file.
//!
//! | module | for |
//! |---|---|
//! | [`page_cache`] | cached pages of metadata: dirty sectors, eviction, order of writing back |
//! | [`metadata_cache`] | pages of tables anywhere in the file, written back in crash order |
//! | [`paged_table`] | one table of fixed entries, cached in pages |
//! | [`metadata_guard`], [`reserved`] | protection of the format's own structures from writes |
//! | [`allocating_plan`], [`in_place_write`], [`encoded_write`] | write plans |
//! | [`clear`] | storage that is made to read as zero |
//! | [`new_file`] | the room that a new image needs in its file |
//! | [`range_claims`] | claims on the guest ranges of requests in flight |
//! | [`random`] | random bytes, new UUIDs and their text |
//! | [`sector_bitmaps`] | which sectors of a block were written |
//! | [`foreign_name`], [`parent`] | where files are looked for that an image names as another machine does |
//! | [`slot_bitmap`], [`cluster_set`] | which block slots, or clusters, of a file are in use |
//! | [`table_scan`] | how far a table goes on with the same entry |
//! | [`two_level_map`] | L1 and L2 tables over clusters that are never freed |
//! | [`read_only_layer`] | layers of formats that are only read |
//! | [`decoded_blocks`] | large encoded blocks of such formats, decoded by several threads |
//! | [`repair_on_open`] | repairs made while an image is opened |
//! | [`count_used`] | the number of clusters that a copy would allocate |
//! | [`preallocation`] | preallocation modes that a format does not support |

pub(crate) mod allocating_plan;
pub(crate) mod clear;
pub(crate) mod cluster_set;
pub(crate) mod count_used;
pub(crate) mod decoded_blocks;
pub(crate) mod encoded_write;
pub(crate) mod foreign_name;
pub(crate) mod in_place_write;
pub(crate) mod metadata_cache;
pub(crate) mod metadata_guard;
pub(crate) mod new_file;
pub(crate) mod offset;
pub(crate) mod page_cache;
pub(crate) mod paged_table;
pub(crate) mod parent;
pub(crate) mod preallocation;
pub(crate) mod random;
pub(crate) mod range_claims;
pub(crate) mod read_only_layer;
pub(crate) mod repair_on_open;
pub(crate) mod reserved;
pub(crate) mod sector_bitmaps;
pub(crate) mod slot_bitmap;
pub(crate) mod table_scan;
pub(crate) mod two_level_map;
