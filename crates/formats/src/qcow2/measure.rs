//! How large a file would be.

use diskimage_core::options::Options;
use diskimage_core::{Error, ErrorKind, Measure, MeasureSource, Preallocation, Result};

use super::encrypt::Encryption;
use super::header::{Geometry, limit};
use super::options::{CreateOptions, Wording};
use crate::layer_kit::count_used::data_bytes;

/// The size of an image with these options.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    let wanted = CreateOptions::parse(options, Wording::Options)?;
    let encryption = Encryption::measure(options)?;
    let geometry = wanted.geometry;
    let cluster = geometry.cluster_size();
    let size = source.len().next_multiple_of(cluster);
    if geometry.l1_entries(size) * 8 > limit::L1_BYTES {
        return Err(Error::new(
            ErrorKind::Limit,
            "The image size is too large (try using a larger cluster size)",
        ));
    }
    let metadata = metadata_clusters(geometry, size) * cluster + encryption.next_multiple_of(cluster);
    let (data, bitmaps) = match source {
        MeasureSource::Size(_) => (0, None),
        MeasureSource::Image(image) => (data_bytes(image, cluster)?, image.layer().bitmap_bytes(cluster)?),
    };
    let data = match wanted.preallocation {
        Preallocation::Falloc | Preallocation::Full => size,
        // What is in the image below and need not be copied is not known.
        _ if wanted.backing_file.is_some() => size,
        Preallocation::Off | Preallocation::Metadata => data,
    };
    let bitmaps = bitmaps.filter(|_| wanted.version >= 3);
    Ok(Measure {
        required: metadata + data,
        fully_allocated: metadata + size,
        bitmaps,
    })
}

/// Clusters of tables for a disk of `size` bytes, all of it written.
fn metadata_clusters(geometry: Geometry, size: u64) -> u64 {
    let cluster = geometry.cluster_size();
    let data = size / cluster;
    let l2 = geometry.l1_entries(size);
    let counted = 1 + (l2 * 8).div_ceil(cluster) + l2 + data;
    // Refcount blocks and their table count themselves: a few rounds until the sum no longer changes.
    let (mut blocks, mut table) = (0, 0);
    loop {
        let more_blocks = (counted + blocks + table).div_ceil(geometry.refcount_block_entries());
        let more_table = (more_blocks * 8).div_ceil(cluster);
        if (more_blocks, more_table) == (blocks, table) {
            return counted - data + blocks + table;
        }
        (blocks, table) = (more_blocks, more_table);
    }
}
