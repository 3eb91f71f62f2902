//! Computes the size of the file that a conversion would need.

use diskimage_core::options::Options;
use diskimage_core::{CompressionLevel, Error, ErrorKind, Measure, MeasureSource, Preallocation, Result};

use super::encrypt::Encryption;
use super::header::{Geometry, limit};
use super::options::{CreateOptions, Wording};
use crate::codec::NOT_MEASURED;
use crate::layer_kit::count_used::data_bytes;

/// The sizes for an image with these options.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    let created = CreateOptions::parse(options, Wording::Options)?;
    CompressionLevel::require_absent(options, NOT_MEASURED)?;
    let encryption = Encryption::measure(options)?;
    let geometry = created.geometry;
    let cluster = geometry.cluster_size();
    let size = source.len().next_multiple_of(cluster);
    if geometry.l1_entries(size) * 8 > limit::L1_BYTES {
        return Err(Error::new(
            ErrorKind::Limit,
            "The image size is too large (try using a larger cluster size)",
        ));
    }
    let metadata = metadata_clusters(geometry, size) * cluster + encryption.next_multiple_of(cluster);
    let is_copied = matches!(source, MeasureSource::Image(_));
    let (data, bitmaps) = match source {
        MeasureSource::Size(_) => (0, None),
        MeasureSource::Image(image) => (data_bytes(image, cluster)?, image.layer().bitmap_bytes(cluster)?),
    };
    let data = match created.preallocation {
        Preallocation::Falloc | Preallocation::Full => size,
        // Which data the backing image has, and need not be copied, is unknown.
        _ if created.backing_file.is_some() && is_copied => size,
        Preallocation::Off | Preallocation::Metadata => data,
    };
    let bitmaps = bitmaps.filter(|_| created.version >= 3);
    Ok(Measure {
        required: metadata + data,
        fully_allocated: metadata + size,
        bitmaps,
    })
}

/// The number of metadata clusters of a fully allocated disk of `size` bytes.
fn metadata_clusters(geometry: Geometry, size: u64) -> u64 {
    let cluster = geometry.cluster_size();
    let data = size / cluster;
    let l2 = geometry.l1_entries(size);
    let counted = 1 + (l2 * 8).div_ceil(cluster) + l2 + data;
    // Refcount blocks also count themselves and the table: a few rounds until the sum no longer changes.
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
