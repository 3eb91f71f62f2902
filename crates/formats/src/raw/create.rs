//! Creates images, and measures them.

use diskimage_core::options::{OptionDef, Options};
use diskimage_core::{
    ByteRange, CreateRequest, Device, Error, Measure, MeasureSource, Preallocation, Result, ZeroMode,
    align_up, errno,
};

use super::disk_range::SECTOR;
use crate::layer_kit;
use crate::layer_kit::new_file::require_room;

/// The options of creation.
pub(super) const OPTIONS: &[OptionDef] = &[OptionDef::SIZE];

/// The size of an image of `source`.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    preallocation(options)?;
    let size = align_up(source.len(), SECTOR);
    Ok(Measure {
        required: size,
        fully_allocated: size,
        bitmaps: None,
    })
}

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    let size = disk_size(request.size)?;
    if file.is_zero_when_new() {
        return file.resize(size, preallocation(request.options)?);
    }
    // A device, which has the storage that it has.
    layer_kit::preallocation::require_off(preallocation_mode(request.options)?)?;
    require_room(file, size)?;
    // What the device held before should not be taken for an image's header.
    let head = ByteRange::new(0, SECTOR.min(file.len()));
    file.write_zeroes(head, ZeroMode::KeepAllocated)
}

fn preallocation(options: &Options) -> Result<Preallocation> {
    match preallocation_mode(options)? {
        Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        mode => Ok(mode),
    }
}

fn preallocation_mode(options: &Options) -> Result<Preallocation> {
    let name = options.text("preallocation").unwrap_or("off");
    Preallocation::from_name(name).ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))
}

fn disk_size(size: u64) -> Result<u64> {
    let rounded = align_up(size, SECTOR);
    if rounded < size || i64::try_from(rounded).is_err() {
        return Err(Error::from_errno(errno::EINVAL).context("Could not resize file"));
    }
    Ok(rounded)
}
