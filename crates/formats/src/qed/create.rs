//! Creates images, and measures them.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    Backing, ByteRange, CreateRequest, Device, Error, Measure, MeasureSource, Preallocation, Result, ZeroMode,
};

use super::header::{self, Geometry, Header};
use crate::known_formats::KNOWN_FORMATS;
use crate::layer_kit::{count_used, preallocation};

/// The options of creation.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::BACKING_FILE,
    OptionDef::BACKING_FMT,
    OptionDef::new("cluster_size", OptionKind::Size, "Cluster size (in bytes)").or("65536"),
    OptionDef::new("table_size", OptionKind::Size, "L1/L2 table size (in clusters)"),
];

/// Clusters of a table without the option `table_size`.
const DEFAULT_TABLE_SIZE: u64 = 4;

/// The size of an image of `source`.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    let header = new_header(options, source.len())?;
    let size = header.geometry.cluster_size;
    let backed = header.backing.is_some();
    let used = count_used::clusters(source, size, header.geometry.coverage(), backed)?;
    let all = count_used::all_clusters(source.len(), size, header.geometry.coverage());
    let bytes = |(clusters, tables): (u64, u64)| {
        let start = header.l1_offset + header.geometry.table_len();
        start + clusters * size + tables * header.geometry.table_len()
    };
    Ok(Measure {
        required: bytes(used),
        fully_allocated: bytes(all),
        bitmaps: None,
    })
}

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    preallocation::check(request.options)?;
    let header = new_header(request.options, request.size)?;
    let geometry = header.geometry;
    let tables = ByteRange::at(header.l1_offset, geometry.table_len());
    if file.is_zero_when_new() {
        file.resize(tables.end(), Preallocation::Off)?;
    } else {
        file.write_zeroes(tables, ZeroMode::KeepAllocated)?;
    }
    header.write(file, true)
}

/// The header of a new image.
fn new_header(options: &Options, size: u64) -> Result<Header> {
    let backing_format = options.text("backing_fmt");
    if let Some(name) = backing_format.filter(|name| !KNOWN_FORMATS.contains(name)) {
        return Err(Error::invalid(format!(
            "Parameter 'backing-fmt' does not accept value '{name}'"
        )));
    }
    let cluster_size = options.size("cluster_size").unwrap_or(0);
    let table_size = options.size("table_size").unwrap_or(DEFAULT_TABLE_SIZE);
    let geometry = Geometry::for_new(cluster_size, table_size)?;
    let image_size = size.checked_next_multiple_of(header::SECTOR);
    let image_size = image_size.filter(|size| geometry.fits(*size)).ok_or_else(|| {
        Error::invalid(format!(
            "QED image size must be a non-zero multiple of cluster size and less than {} bytes",
            geometry.max_size()
        ))
    })?;
    let backing = options.text("backing_file").map(|name| Backing {
        name: name.into(),
        format: backing_format.map(str::to_owned),
    });
    let mut header = Header::new(geometry, image_size);
    header.set_backing(backing.as_ref())?;
    Ok(header)
}
