//! Creates images, and measures them.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{ByteRange, CreateRequest, Device, Measure, MeasureSource, Result, ZeroMode};

use super::header::Header;
use crate::layer_kit::count_used::data_bytes;
use crate::layer_kit::new_file::make_room;
use crate::layer_kit::preallocation;

/// The options of creation.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef {
        name: "cluster_size",
        kind: OptionKind::Size,
        help: "Parallels image cluster size",
        default: Some("1048576"),
        is_listed: true,
    },
];

/// The default of `cluster_size`.
const DEFAULT_CLUSTER: u64 = 1 << 20;

/// The size of an image of `source`.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    preallocation::check(options)?;
    let header = Header::new(
        source.len(),
        options.size("cluster_size").unwrap_or(DEFAULT_CLUSTER),
    )?;
    let start = header.data_start(u64::MAX);
    let used = match source {
        MeasureSource::Size(_) => 0,
        MeasureSource::Image(image) => data_bytes(image, header.cluster)?,
    };
    Ok(Measure {
        required: start + used,
        fully_allocated: start + u64::from(header.entries) * header.cluster,
        bitmaps: None,
    })
}

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    preallocation::check(request.options)?;
    let cluster_size = request.options.size("cluster_size").unwrap_or(DEFAULT_CLUSTER);
    let header = Header::new(request.size, cluster_size)?;
    let start = header.data_start(u64::MAX);
    make_room(file, start)?;
    file.write_zeroes(ByteRange::new(0, start), ZeroMode::KeepAllocated)?;
    file.write_at(&header.to_bytes(), 0)
}
