//! Creates images, and measures them.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{CreateRequest, Device, Measure, MeasureSource, Result, to_index};

use super::NO_BLOCK;
use super::header::{BLOCK, Header, map_bytes};
use crate::layer_kit::count_used::data_bytes;
use crate::layer_kit::new_file::make_room;
use crate::layer_kit::preallocation;

/// The options of creation.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::new("static", OptionKind::Flag, "VDI static (pre-allocated) image").or("off"),
];

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    let is_static = request.options.flag("static").unwrap_or(false);
    preallocation::check(request.options)?;
    let header = Header::new(request.size, is_static)?;
    make_room(file, header.host(header.allocated()))?;
    write_new_map(file, &header, is_static)?;
    file.write_at(&header.to_bytes()?, 0)
}

/// Writes the map of a new image in chunks; the rest of its last sector is zero.
fn write_new_map(file: &dyn Device, header: &Header, is_static: bool) -> Result<()> {
    const CHUNK: usize = 64 << 10;
    let mut bytes = Vec::with_capacity(CHUNK);
    let mut offset = header.map_offset;
    for block in 0..header.blocks {
        bytes.extend(if is_static { block.to_le_bytes() } else { NO_BLOCK });
        if bytes.len() == CHUNK {
            file.write_at(&bytes, offset)?;
            offset += bytes.len() as u64;
            bytes.clear();
        }
    }
    let end = header.map_offset + map_bytes(header.blocks);
    bytes.resize(to_index(end - offset)?, 0);
    if bytes.is_empty() {
        return Ok(());
    }
    file.write_at(&bytes, offset)
}

/// The length of the file of a new image.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    preallocation::check(options)?;
    let header = Header::new(source.len(), false)?;
    let fully_allocated = header.host(header.blocks);
    let required = match source {
        _ if options.flag("static").unwrap_or(false) => fully_allocated,
        MeasureSource::Size(_) => header.data_offset,
        MeasureSource::Image(image) => header.data_offset + data_bytes(image, BLOCK)?,
    };
    Ok(Measure {
        required,
        fully_allocated,
        bitmaps: None,
    })
}
