//! New images.
//!
//! ```text
//!   sector 0 header   1 descriptor   21 redundant directory, its tables   directory, its tables   first grain
//! ```
//!
//! All grain tables are allocated when the image is created, and are empty.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    CompressionLevel, CreatePlan, CreateRequest, Device, Error, Measure, MeasureSource, NewFiles,
    Permissions, Preallocation, Result, errno, name,
};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use super::descriptor::{self, NO_PARENT, NewDescriptor};
use super::extent::{add_zeroes, beside};
use super::header::{DEFLATE, Geometry, HOSTED_MAGIC, HostedHeader, LINE_ENDS, SECTOR, SECTOR_BYTES, flag};
use super::new_cid;
use crate::codec::NOT_MEASURED;
use crate::layer_kit::count_used::data_bytes;
use crate::layer_kit::preallocation;

/// The options of `create`, in the order in which qemu-img prints their values.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::new(
        "adapter_type",
        OptionKind::Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    OptionDef::BACKING_FILE,
    OptionDef::new("backing_fmt", OptionKind::Text, "Must be 'vmdk' if present"),
    OptionDef::new("compat6", OptionKind::Flag, "VMDK version 6 image").or("off"),
    OptionDef::new("hwversion", OptionKind::Text, "VMDK hardware version").or("undefined"),
    OptionDef::new("toolsversion", OptionKind::Text, "VMware guest tools version"),
    OptionDef::new(
        "subformat",
        OptionKind::Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    OptionDef::new(
        "zeroed_grain",
        OptionKind::Flag,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
    OptionDef::COMPRESSION_LEVEL,
];

/// The subformats that can be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subformat {
    MonolithicSparse,
    MonolithicFlat,
    TwoGbMaxExtentSparse,
    TwoGbMaxExtentFlat,
    StreamOptimized,
}

impl Subformat {
    fn of(options: &Options) -> Result<Self> {
        let name = options.text("subformat").unwrap_or("monolithicSparse");
        Self::by_name(name).ok_or_else(|| invalid_value(name))
    }

    fn by_name(name: &str) -> Option<Self> {
        [
            Self::MonolithicSparse,
            Self::MonolithicFlat,
            Self::TwoGbMaxExtentSparse,
            Self::TwoGbMaxExtentFlat,
            Self::StreamOptimized,
        ]
        .into_iter()
        .find(|subformat| subformat.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// Whether the descriptor is in a file of its own.
    fn is_separate(self) -> bool {
        self.extent_suffix(1).is_some()
    }

    /// The suffix that the name of extent `number` appends to the image's stem; `None` if the image is a single file.
    fn extent_suffix(self, number: u64) -> Option<String> {
        match self {
            Self::MonolithicSparse | Self::StreamOptimized => None,
            Self::MonolithicFlat => Some("-flat".to_owned()),
            Self::TwoGbMaxExtentFlat => Some(format!("-f{number:03}")),
            Self::TwoGbMaxExtentSparse => Some(format!("-s{number:03}")),
        }
    }

    /// The most sectors of an extent.
    fn extent_sectors(self) -> u64 {
        match self {
            Self::TwoGbMaxExtentFlat | Self::TwoGbMaxExtentSparse => (2 << 30) / SECTOR,
            _ => u64::MAX,
        }
    }
}

/// The options of a new image, checked.
struct Wanted<'a> {
    subformat: Subformat,
    backing: Option<&'a str>,
    zeroed_grain: bool,
    adapter_type: &'a str,
    hardware_version: &'a str,
    tools_version: &'a str,
}

impl<'a> Wanted<'a> {
    fn parse(options: &'a Options) -> Result<Self> {
        let adapter_type = options.text("adapter_type").unwrap_or(ADAPTERS[0]);
        let subformat = Subformat::of(options)?;
        if !ADAPTERS.contains(&adapter_type) {
            return Err(invalid_value(adapter_type));
        }
        let compat6 = options.flag("compat6") == Some(true);
        let hardware_version = match options.text("hwversion") {
            None | Some("undefined") if compat6 => "6",
            None | Some("undefined") => "4",
            Some(_) if compat6 => {
                return Err(Error::invalid("compat6 cannot be enabled with hwversion set"));
            }
            Some(version) => version,
        };
        let backing = options.text("backing_file");
        if options.text("backing_fmt").is_some_and(|format| format != "vmdk") {
            return Err(Error::invalid("backing_file must be a vmdk image"));
        }
        if subformat.is_flat() && backing.is_some() {
            return Err(Error::unsupported("Flat image can't have backing file"));
        }
        let zeroed_grain = options.flag("zeroed_grain") == Some(true);
        if subformat.is_flat() && zeroed_grain {
            return Err(Error::unsupported("Flat image can't enable zeroed grain"));
        }
        if subformat != Subformat::StreamOptimized {
            let why = format!("The subformat {} is not compressed", subformat.name());
            CompressionLevel::require_absent(options, &why)?;
        }
        // As in qemu-img, extents are never preallocated.
        preallocation::check(options)?;
        Ok(Self {
            subformat,
            backing,
            zeroed_grain,
            adapter_type,
            hardware_version,
            tools_version: options.text("toolsversion").unwrap_or("2147483647"),
        })
    }

    /// The descriptor of a disk of `size` bytes with these extent lines.
    fn descriptor(&self, cid: u32, parent_cid: u32, extents: &[String], size: u64) -> String {
        let descriptor = NewDescriptor {
            cid,
            parent_cid,
            create_type: self.subformat.name(),
            parent: self.backing,
            extents,
            hardware_version: self.hardware_version,
            adapter_type: self.adapter_type,
            tools_version: self.tools_version,
            sectors: size.div_ceil(SECTOR),
        };
        descriptor.text()
    }
}

fn invalid_value(value: &str) -> Error {
    Error::invalid(format!("invalid parameter value: {value}"))
}

/// The allowed adapter types, the default first.
const ADAPTERS: &[&str] = &["ide", "buslogic", "lsilogic", "legacyESX"];

/// Parses the options, and names the files of the extents.
pub(super) fn plan(request: CreateRequest<'_>) -> Result<CreatePlan<'_>> {
    let wanted = Wanted::parse(request.options)?;
    let extents = extents(wanted.subformat, request.name, request.size)?;
    let names = extents.iter().filter_map(|extent| extent.name.as_deref());
    let parts = names
        .map(|name| beside(request.name, name))
        .collect::<Result<_>>()?;
    let reads_backing = wanted.backing.is_some();
    let encodes = wanted.subformat == Subformat::StreamOptimized;
    let plan = CreatePlan::new(move |files| create(&request, &wanted, &extents, files));
    Ok(plan
        .with_parts(parts, Permissions::WRITE)
        .with_reads_backing(reads_backing)
        .with_encodes(encodes))
}

/// An extent of a new image.
struct NewExtent {
    sectors: u64,
    /// The file's name without directory; `None` for the image's own file.
    name: Option<String>,
}

fn extents(subformat: Subformat, name: &str, size: u64) -> Result<Vec<NewExtent>> {
    let (stem, ending) = stem_and_ending(last_component(name));
    let mut left = size.div_ceil(SECTOR);
    let mut extents = Vec::new();
    // An empty disk has no extents in separate files.
    while left > 0 || (extents.is_empty() && !subformat.is_separate()) {
        let sectors = left.min(subformat.extent_sectors());
        let number = extents.len() as u64 + 1;
        if number > MAX_EXTENTS {
            return Err(Error::from_errno(errno::EFBIG));
        }
        extents.push(NewExtent {
            sectors,
            name: subformat
                .extent_suffix(number)
                .map(|suffix| format!("{stem}{suffix}{ending}")),
        });
        left -= sectors;
    }
    Ok(extents)
}

/// The most bytes of an extent in an image of this create type; `None` if there is no limit.
pub(super) fn extent_limit(create_type: &str) -> Option<u64> {
    Subformat::by_name(create_type)?
        .extent_sectors()
        .checked_mul(SECTOR)
}

/// Whether a sparse extent's grains and tables have the lengths that new extents get.
pub(super) fn has_default_layout(geometry: &Geometry) -> bool {
    (geometry.grain, geometry.entries) == (GRAIN * SECTOR, GTES)
}

/// The descriptor's line for an extent.
pub(super) fn line(is_flat: bool, sectors: u64, name: &str) -> String {
    if is_flat {
        format!("RW {sectors} FLAT \"{name}\" 0")
    } else {
        format!("RW {sectors} SPARSE \"{name}\"")
    }
}

/// The name of extent `number` of an image of this create type. It is derived from `name`, the name of extent `before`;
/// if that name does not have the usual suffix, from `image`, the name of the image.
pub(super) fn next_name(
    create_type: &str,
    image: &str,
    (before, name): (u64, &str),
    number: u64,
) -> Option<String> {
    let subformat = Subformat::by_name(create_type)?;
    let suffix = subformat.extent_suffix(before)?;
    let (stem, ending) = stem_and_ending(name);
    let (stem, ending) = match stem.strip_suffix(&suffix) {
        Some(stem) => (stem, ending),
        None => stem_and_ending(last_component(image)),
    };
    Some(format!("{stem}{}{ending}", subformat.extent_suffix(number)?))
}

/// A path without its directory.
fn last_component(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Splits a path before the extension of its file name.
fn stem_and_ending(path: &str) -> (&str, &str) {
    let start = path.len() - last_component(path).len();
    match path[start..].rfind('.') {
        Some(dot) => path.split_at(start + dot),
        None => (path, ""),
    }
}

/// The most extents of an image: the limit of opening one.
pub(super) const MAX_EXTENTS: u64 = descriptor::MAX_EXTENTS as u64;

/// Writes a new image.
fn create(
    request: &CreateRequest<'_>,
    wanted: &Wanted<'_>,
    extents: &[NewExtent],
    files: NewFiles<'_>,
) -> Result<()> {
    let parent_cid = match wanted.backing {
        None => NO_PARENT,
        Some(_) => files
            .backing
            .and_then(|backing| backing.layer().cid())
            .ok_or_else(|| Error::invalid("backing_file must be a vmdk image"))?,
    };
    let is_flat = wanted.subformat.is_flat();
    let file_name = files.file.name();
    let own = last_component(&file_name);
    let lines: Vec<String> = extents
        .iter()
        .map(|extent| line(is_flat, extent.sectors, extent.name.as_deref().unwrap_or(own)))
        .collect();
    let text = wanted.descriptor(new_cid()?, parent_cid, &lines, request.size);
    let text = name::to_bytes(&text);
    let (offset, room, no_room) = match wanted.subformat.is_separate() {
        true => (0, descriptor::MAX_LEN, errno::EFBIG),
        false => (
            DESCRIPTOR_SECTOR * SECTOR,
            DESCRIPTOR_SECTORS * SECTOR,
            errno::ENOSPC,
        ),
    };
    if text.len() as u64 > room {
        return Err(Error::from_errno(no_room));
    }
    for extent in extents {
        let separate = match &extent.name {
            None => None,
            Some(part) => Some((files.make_part)(&beside(request.name, part)?)?),
        };
        let device = separate.as_ref().unwrap_or(&files.file);
        if is_flat {
            device.resize(extent.sectors * SECTOR, Preallocation::Off)?;
        } else {
            let compressed = wanted.subformat == Subformat::StreamOptimized;
            write_sparse(&**device, extent.sectors, wanted.zeroed_grain, compressed)?;
        }
        if let Some(device) = separate {
            device.flush()?;
        }
    }
    let mut text = text.into_owned();
    if wanted.subformat.is_separate() && !files.file.is_zero_when_new() {
        // What a device has behind the descriptor must not be taken for a part of it.
        text.resize((text.len() + 1).next_multiple_of(SECTOR_BYTES), 0);
    }
    files.file.write_at(&text, offset)?;
    files.file.flush()
}

/// The size of a new image, all its files together.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    let wanted = Wanted::parse(options)?;
    CompressionLevel::require_absent(options, NOT_MEASURED)?;
    let mut lines = Vec::new();
    let (mut metadata, mut grains) = (0, 0);
    for extent in extents(wanted.subformat, MEASURED, source.len())? {
        if !wanted.subformat.is_flat() {
            metadata += Overhead::of(extent.sectors)?.end() * SECTOR;
            grains += extent.sectors.div_ceil(GRAIN);
        }
        lines.push(line(
            wanted.subformat.is_flat(),
            extent.sectors,
            &extent.name.unwrap_or_default(),
        ));
    }
    if wanted.subformat.is_separate() {
        metadata += wanted.descriptor(0, NO_PARENT, &lines, source.len()).len() as u64;
    }
    let grain = match wanted.subformat {
        // The compressed length is not known in advance; the bound is that of incompressible data.
        Subformat::StreamOptimized => (GRAIN + STREAM_OVERHEAD) * SECTOR,
        _ => GRAIN * SECTOR,
    };
    let data = if wanted.subformat.is_flat() {
        source.len().next_multiple_of(SECTOR)
    } else {
        grains * grain
    };
    let used = match source {
        _ if wanted.subformat.is_flat() => data,
        MeasureSource::Size(_) => 0,
        MeasureSource::Image(_) if wanted.backing.is_some() => data,
        MeasureSource::Image(image) => data_bytes(image, GRAIN * SECTOR)? / (GRAIN * SECTOR) * grain,
    };
    Ok(Measure {
        required: metadata + used,
        fully_allocated: metadata + data,
        bitmaps: None,
    })
}

/// The name that `measure` assumes for the image: names of extents count towards the descriptor's length.
const MEASURED: &str = "disk.vmdk";

/// The first sector of the descriptor in a sparse extent, and the sectors reserved for it.
const DESCRIPTOR_SECTOR: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;

/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Entries of a grain table.
const GTES: u64 = 512;
/// Sectors of a grain table.
const TABLE: u64 = GTES * 4 / SECTOR;

/// Sectors that an incompressible grain needs in addition: for the marker, the zlib stream's overhead, and the padding.
const STREAM_OVERHEAD: u64 = 1;

/// The metadata in front of the grains of a sparse extent, in sectors.
struct Overhead {
    tables: u64,
    /// Sectors of a directory.
    directory: u64,
}

impl Overhead {
    const REDUNDANT_AT: u64 = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS;

    fn of(sectors: u64) -> Result<Self> {
        let tables = sectors.div_ceil(GRAIN * GTES);
        let overhead = Self {
            tables,
            directory: (tables * 4).div_ceil(SECTOR),
        };
        match u32::try_from(overhead.end()) {
            Ok(_) => Ok(overhead),
            Err(_) => Err(Error::from_errno(errno::EFBIG)),
        }
    }

    fn directory_at(&self) -> u64 {
        Self::REDUNDANT_AT + self.directory + self.tables * TABLE
    }

    fn end(&self) -> u64 {
        (self.directory_at() + self.directory + self.tables * TABLE).next_multiple_of(GRAIN)
    }
}

/// Writes the header and the empty tables of a sparse extent.
pub(super) fn write_sparse(
    device: &dyn Device,
    sectors: u64,
    zeroed_grain: bool,
    compressed: bool,
) -> Result<()> {
    let overhead = Overhead::of(sectors)?;
    let (over_head, directory_at) = (overhead.end(), overhead.directory_at());
    let mut flags = flag::LINE_ENDS | flag::REDUNDANT;
    if zeroed_grain {
        flags |= flag::ZEROED_GRAIN;
    }
    if compressed {
        flags |= flag::COMPRESSED | flag::MARKERS;
    }
    let version = match (compressed, zeroed_grain) {
        (true, _) => 3,
        (false, true) => 2,
        (false, false) => 1,
    };
    let header = HostedHeader {
        magic: HOSTED_MAGIC,
        version: U32::new(version),
        flags: U32::new(flags),
        capacity: U64::new(sectors),
        grain_size: U64::new(GRAIN),
        descriptor_offset: U64::new(DESCRIPTOR_SECTOR),
        descriptor_size: U64::new(DESCRIPTOR_SECTORS),
        num_gtes_per_gt: U32::new(512),
        rgd_offset: U64::new(Overhead::REDUNDANT_AT),
        gd_offset: U64::new(directory_at),
        over_head: U64::new(over_head),
        unclean_shutdown: 0,
        line_ends: LINE_ENDS,
        compress_algorithm: U16::new(if compressed { DEFLATE } else { 0 }),
        pad: [0; 433],
    };
    // On a device, the end-of-stream marker is part of it.
    let end = if compressed && !device.is_zero_when_new() {
        over_head + 1
    } else {
        over_head
    };
    add_zeroes(device, 0, end * SECTOR)?;
    device.write_at(header.as_bytes(), 0)?;
    for at in [Overhead::REDUNDANT_AT, directory_at] {
        write_directory(device, at, overhead.tables, at + overhead.directory)?;
    }
    Ok(())
}

/// Writes a directory at sector `at`, in chunks. Its `tables` grain tables are consecutive, from sector `first` on.
fn write_directory(device: &dyn Device, at: u64, tables: u64, first: u64) -> Result<()> {
    let mut done = 0;
    while done < tables {
        let count = (tables - done).min(CHUNK);
        let mut bytes = Vec::new();
        for nth in done..done + count {
            // Cannot fail: `Overhead::of` checked that the end of all tables fits.
            let sector = u32::try_from(first + nth * TABLE).map_err(|_| Error::from_errno(errno::EFBIG))?;
            bytes.extend_from_slice(&sector.to_le_bytes());
        }
        device.write_at(&bytes, at * SECTOR + done * 4)?;
        done += count;
    }
    Ok(())
}

/// Entries of a directory in one write.
const CHUNK: u64 = 16384;
