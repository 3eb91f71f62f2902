//! Creation of new images.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{ByteRange, CreateRequest, Device, Error, Measure, MeasureSource, Result, to_index};
use zerocopy::IntoBytes;

use super::footer::{Footer, HEADER_OFFSET, Kind, SECTOR, SizeBy};
use super::header::{BLOCK, DynamicHeader};
use crate::layer_kit::count_used::data_bytes;
use crate::layer_kit::new_file::make_room;
use crate::layer_kit::preallocation;

/// The options of `create`, in the order in which qemu-img prints their values.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::new(
        "subformat",
        OptionKind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    OptionDef::new(
        "force_size",
        OptionKind::Flag,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based \
         calculation",
    ),
];

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    preallocation::check(request.options)?;
    let footer = footer_for(request.options, request.size)?;
    let size = footer.size(SizeBy::CurrentSize)?;
    let (header, end) = match footer.kind() {
        Kind::Fixed => (None, size),
        Kind::Dynamic | Kind::Differencing => {
            let header = DynamicHeader::new(size)?;
            (Some(header), header.table_end())
        }
    };
    make_room(file, end + SECTOR)?;
    if let Some(header) = header {
        fill(file, ByteRange::new(header.table_offset(), end), u8::MAX)?;
        file.write_at(header.as_bytes(), HEADER_OFFSET)?;
        file.write_at(footer.as_bytes(), 0)?;
    }
    file.write_at(footer.as_bytes(), end)
}

/// The footer of a new disk of `size` bytes with the options of `create`.
fn footer_for(options: &Options, size: u64) -> Result<Footer> {
    let kind = match options.text("subformat") {
        None | Some("dynamic") => Kind::Dynamic,
        Some("fixed") => Kind::Fixed,
        Some(other) => {
            return Err(Error::invalid(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    Footer::new(size, kind, options.flag("force_size").unwrap_or(false))
}

/// Fills `range` with `byte`, in chunks.
pub(super) fn fill(file: &dyn Device, range: ByteRange, byte: u8) -> Result<()> {
    const CHUNK: usize = 64 << 10;
    let mut rest = range;
    let bytes = vec![byte; to_index(range.len())?.min(CHUNK)];
    while !rest.is_empty() {
        let chunk = to_index(rest.len())?.min(bytes.len());
        file.write_at(&bytes[..chunk], rest.start())?;
        rest = rest.skip(chunk as u64);
    }
    Ok(())
}

/// How many bytes the file of a new image will have.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    preallocation::check(options)?;
    let footer = footer_for(options, source.len())?;
    let size = footer.size(SizeBy::CurrentSize)?;
    let (empty, data, fully) = match footer.kind() {
        Kind::Fixed => (size, 0, 0),
        Kind::Dynamic | Kind::Differencing => {
            let header = DynamicHeader::new(size)?;
            let stored = |bytes: u64| bytes / header.block() * (header.bitmap() + header.block());
            let data = match source {
                MeasureSource::Size(_) => 0,
                MeasureSource::Image(image) => stored(data_bytes(image, BLOCK.into())?),
            };
            let fully = stored(u64::from(header.entries()) * header.block());
            (header.table_end(), data, fully)
        }
    };
    Ok(Measure {
        required: empty + data + SECTOR,
        fully_allocated: empty + fully + SECTOR,
        bitmaps: None,
    })
}
