//! Creation of new images.
//!
//! ```text
//!   |headers: 1 MiB|log|block allocation table|metadata: 1 MiB|4 MiB free|blocks of a fixed image
//! ```

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{ByteRange, CreateRequest, Device, Error, Measure, MeasureSource, Result, ZeroMode};

use super::SECTOR;
use super::bat::{Chunks, ENTRY, absent, present};
use super::header::{FILE_SIGNATURE, Guid, Header, MIB, Regions};
use super::metadata::{MAX_BLOCK, MAX_DISK, MIN_BLOCK, Metadata};
use crate::layer_kit::count_used::data_bytes;
use crate::layer_kit::new_file::make_room;
use crate::layer_kit::{preallocation, random};

/// The options of `create`, in the order in which qemu-img prints their values.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::new("size", OptionKind::Size, "Virtual disk size; max of 64TB."),
    OptionDef::new("log_size", OptionKind::Size, "Log size; min 1MB.").or("1048576"),
    OptionDef::new(
        "block_size",
        OptionKind::Size,
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
    )
    .or("0"),
    OptionDef::new(
        "subformat",
        OptionKind::Text,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
    ),
    OptionDef::new(
        "block_state_zero",
        OptionKind::Flag,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using \
         'qemu-img convert' with subformat=dynamic.",
    ),
];

/// The checked options of a new image, and the offsets that follow from them.
struct Layout {
    disk_size: u64,
    block_size: u64,
    chunks: Chunks,
    is_fixed: bool,
    /// Whether entries of blocks without storage are in state zero rather than not present.
    says_zero: bool,
    log: ByteRange,
    regions: Regions,
    /// The offset of the first block.
    data: u64,
}

impl Layout {
    fn new(options: &Options, disk_size: u64) -> Result<Self> {
        if disk_size > MAX_DISK {
            return Err(Error::invalid("Image size too large; max of 64TB"));
        }
        let log_size = match options.size("log_size") {
            Some(0) => return Err(Error::invalid("Log size must be a multiple of 1 MB")),
            size => size.unwrap_or(MIB).max(MIB),
        };
        let disk_size = disk_size.next_multiple_of(512);
        if log_size >= 4 << 30 {
            return Err(Error::invalid("Log size must be smaller than 4 GB"));
        }
        let block_size = match options.size("block_size").unwrap_or(0) {
            0 => usual_block_size(disk_size),
            size => size.clamp(MIN_BLOCK, MAX_BLOCK).next_multiple_of(MIB),
        };
        if !block_size.is_power_of_two() {
            return Err(Error::invalid("Block size must be a power of two"));
        }
        let is_fixed = match options.text("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "Parameter 'subformat' does not accept value '{other}'"
                )));
            }
        };
        preallocation::check(options)?;
        let log = ByteRange::at(MIB, log_size.next_multiple_of(MIB));
        let chunks = Chunks::new(block_size, SECTOR);
        let bat_len = match disk_size {
            // qemu-img takes an empty disk to have 2^32 blocks, and refuses images with a shorter table.
            0 => (chunks.count(1 << 32) * ENTRY).next_multiple_of(MIB),
            size => (chunks.entries(size.div_ceil(block_size)) * ENTRY).next_multiple_of(MIB),
        };
        let bat = ByteRange::at(log.end(), bat_len.max(MIB));
        let metadata = ByteRange::at(bat.end(), MIB);
        Ok(Self {
            disk_size,
            block_size,
            chunks,
            is_fixed,
            says_zero: options.flag("block_state_zero") != Some(false),
            log,
            regions: Regions {
                bat,
                metadata,
                others: Vec::new(),
            },
            data: metadata.end() + GAP,
        })
    }

    fn blocks(&self) -> u64 {
        self.disk_size.div_ceil(self.block_size)
    }

    /// The length of the new file.
    fn end(&self) -> u64 {
        let blocks = if self.is_fixed { self.blocks() } else { 0 };
        self.data + blocks * self.block_size
    }

    /// Writes the block allocation table, in chunks.
    fn write_bat(&self, file: &dyn Device) -> Result<()> {
        const CHUNK: usize = 64 << 10;
        let mut bytes = Vec::with_capacity(CHUNK);
        let mut offset = self.regions.bat.start();
        let mut index = 0;
        for block in 0..self.blocks() {
            let entry = if self.is_fixed {
                present(self.data + block * self.block_size)
            } else {
                absent(self.says_zero)
            };
            let at = self.chunks.entry_of(block);
            // The entry of a sector bitmap in between: not present.
            for _ in index..at {
                bytes.extend_from_slice(&[0; 8]);
            }
            bytes.extend_from_slice(&entry.to_le_bytes());
            index = at + 1;
            if bytes.len() >= CHUNK {
                file.write_at(&bytes, offset)?;
                offset += bytes.len() as u64;
                bytes.clear();
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        file.write_at(&bytes, offset)
    }
}

/// Bytes between the metadata and the first block, as in qemu-img.
const GAP: u64 = 4 * MIB;

/// The default block size of a disk of `disk_size` bytes, as in qemu-img.
fn usual_block_size(disk_size: u64) -> u64 {
    match disk_size {
        size if size > 32 << 40 => 64 * MIB,
        size if size > 100 << 30 => 32 * MIB,
        size if size > 1 << 30 => 16 * MIB,
        _ => 8 * MIB,
    }
}

/// Writes a new image.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    let layout = Layout::new(request.options, request.size)?;
    make_room(file, layout.end())?;
    let mut start = vec![0; 64 << 10];
    start[..8].copy_from_slice(FILE_SIGNATURE);
    for (at, unit) in CREATOR.encode_utf16().enumerate() {
        start[8 + at * 2..10 + at * 2].copy_from_slice(&unit.to_le_bytes());
    }
    file.write_at(&start, 0)?;
    let mut number = [0; 4];
    number.copy_from_slice(&random::guid()?[..4]);
    let mut header = Header {
        sequence: u32::from_le_bytes(number).into(),
        file_write: random::guid()?,
        data_write: random::guid()?,
        log_guid: Guid::default(),
        log: layout.log,
    };
    header.write(file, 0)?;
    header.sequence += 1;
    header.write(file, 1)?;
    if !file.is_zero_when_new() {
        let tables = ByteRange::new(layout.log.start(), layout.data);
        file.write_zeroes(tables, ZeroMode::KeepAllocated)?;
    }
    layout.write_bat(file)?;
    let metadata = Metadata::to_bytes(layout.block_size, layout.disk_size)?;
    file.write_at(&metadata, layout.regions.metadata.start())?;
    layout.regions.write(file)
}

/// The field `Creator` of the file type identifier.
const CREATOR: &str = "qemu-img-rs";

/// How many bytes the file of a new image will have.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    let layout = Layout::new(options, source.len())?;
    let fully_allocated = layout.data + layout.blocks() * layout.block_size;
    let required = match source {
        _ if layout.is_fixed => fully_allocated,
        MeasureSource::Size(_) => layout.data,
        MeasureSource::Image(image) => layout.data + data_bytes(image, layout.block_size)?,
    };
    Ok(Measure {
        required,
        fully_allocated,
        bitmaps: None,
    })
}
