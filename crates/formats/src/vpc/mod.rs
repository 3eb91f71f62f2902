//! VHD, the format of Virtual PC and old Hyper-V: a fixed disk, stored contiguously with a footer behind it, or a
//! dynamic disk, in blocks that the block allocation table refers to.
//!
//! ```text
//!   fixed     |------------------- disk --------------------|footer|
//!
//!   dynamic   |copy of footer|header|block allocation table |bitmap|block|bitmap|block|footer|
//!                                      -  3  -  1            (offsets in sectors; "-" reads as zero)
//! ```
//!
//! As specified in Microsoft's "Virtual Hard Disk Image Format Specification" 1.0. The bitmap in front of a block says
//! which of its sectors belong to this disk rather than to its backing image. Without a backing image all do: the
//! bitmap is not read, and written with all bits set. Differencing disks are refused.
//!
//! # The size of the disk
//!
//! The size of the disk is that of the geometry in images of Virtual PC, and the field `current_size` of the footer in
//! images of most other programs. The field `creator_application` decides, or the node option `force_size_calc`.
//!
//! # What a crash leaves
//!
//! New blocks overwrite the footer at the end of the file. Readers use the copy at the start of the file, so the disk
//! can be read at any moment. Blocks and the new footer are durable before the table refers to the blocks.

mod footer;
mod resize;
#[cfg(test)]
mod tests;
mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    Budget, ByteRange, CreatePlan, CreateRequest, Device, Error, Format, FormatProperties, HoleMeaning, Info,
    Layer, Measure, MeasureSource, Objects, OpenRequest, Preallocation, Probe, ResizeRequest, Result, Run,
    RunKind, Score, WritePlan, ZeroMode, to_index,
};
use zerocopy::IntoBytes;

use crate::layer_kit::count_used::data_bytes;
use crate::layer_kit::in_place_write::InPlaceWrite;
use crate::layer_kit::paged_table::{Entry, PagedTable};
use crate::layer_kit::preallocation;
use crate::layer_kit::range_claims::RangeClaims;
use crate::layer_kit::reserved::{Pieces, Reserved};
use footer::{BLOCK, DynamicHeader, Footer, HEADER_OFFSET, Kind, SECTOR, SizeBy};

/// The format's entry in the table.
#[derive(Debug)]
pub struct Vpc;

const CREATE_OPTIONS: &[OptionDef] = &[
    OptionDef::new("size", OptionKind::Size, "Virtual disk size"),
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

const NODE_OPTIONS: &[OptionDef] = &[OptionDef::new(
    "force_size_calc",
    OptionKind::Text,
    "Which size counts: current_size or chs",
)];

impl Format for Vpc {
    fn name(&self) -> &'static str {
        "vpc"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(CREATE_OPTIONS),
                strong_options: &["force_size_calc"],
                keeps_failed_file: true,
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if footer::is_vpc(probe.head) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        let options = request.options.take_known(NODE_OPTIONS)?;
        let by = match options.text("force_size_calc") {
            None => SizeBy::Creator,
            Some("current_size") => SizeBy::CurrentSize,
            Some("chs") => SizeBy::Geometry,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "Invalid size calculation mode: '{other}'"
                )));
            }
        };
        let (footer, is_copy) = Footer::read(&*request.file)?;
        let size = footer
            .size(by)
            .map_err(|error| error.context(format!("Could not open '{}'", request.name)))?;
        let (blocks, reserved) = if is_copy {
            // As in qemu-img, the header is read and checked whatever the disk type in the footer is.
            let blocks = Blocks::open(&request.file, footer.header_offset(), size)?;
            let reserved = blocks.reserved.clone();
            (Some(blocks).filter(|_| footer.kind() == Kind::Dynamic), reserved)
        } else {
            (None, behind_footer(request.file.len()))
        };
        Ok(Arc::new(VpcLayer {
            granularity: blocks.as_ref().map(|blocks| blocks.header.block()),
            state: Mutex::new(State {
                footer,
                size,
                blocks,
                reserved,
            }),
            claims: RangeClaims::default(),
            file: request.file,
            budget: request.context.budget.clone(),
        }))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        Ok(CreatePlan::new(move |files| create(&request, &*files.file)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        preallocation::check(options)?;
        let footer = footer_for(options, source.len())?;
        let size = footer.size(SizeBy::CurrentSize)?;
        let (empty, data, fully) = match footer.kind() {
            Kind::Fixed => (size, 0, 0),
            Kind::Dynamic => {
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
}

/// Writes a new image to `file`.
fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    preallocation::check(request.options)?;
    let footer = footer_for(request.options, request.size)?;
    let size = footer.size(SizeBy::CurrentSize)?;
    let (header, end) = match footer.kind() {
        Kind::Fixed => (None, size),
        Kind::Dynamic => {
            let header = DynamicHeader::new(size)?;
            (Some(header), header.table_end())
        }
    };
    if file.is_zero_when_new() {
        file.resize(end + SECTOR, Preallocation::Off)?;
    } else if end + SECTOR > file.len() {
        return Err(Error::unsupported(file.fixed_len_message()));
    }
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
fn fill(file: &dyn Device, range: ByteRange, byte: u8) -> Result<()> {
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

/// The range of a file of `len` bytes that cannot hold data of a fixed disk: its footer, and all beyond.
fn behind_footer(len: u64) -> Reserved {
    let end = len.next_multiple_of(SECTOR);
    Reserved::new([("footer", ByteRange::new(end.saturating_sub(SECTOR), u64::MAX))])
}

/// The entry of a block that reads as zero.
const NO_BLOCK: Entry = u32::MAX.to_be_bytes();

/// The byte offset of a block's bitmap, which comes right before its data; `None` if the block has no storage.
fn bitmap_offset(entry: Entry) -> Option<u64> {
    (entry != NO_BLOCK).then(|| u64::from(u32::from_be_bytes(entry)) * SECTOR)
}

/// An opened image.
#[derive(Debug)]
struct VpcLayer {
    file: Arc<dyn Device>,
    /// Bytes of a block; `None` for fixed disks.
    granularity: Option<u64>,
    state: Mutex<State>,
    /// Claims on the blocks of requests in flight, exclusive where a write allocates.
    claims: RangeClaims,
    budget: Budget,
}

/// The mutable state of an open image. Its lock is never held during I/O of guest data.
#[derive(Debug)]
struct State {
    footer: Footer,
    /// The disk's size in bytes.
    size: u64,
    /// The blocks; `None` for fixed disks.
    blocks: Option<Blocks>,
    /// The metadata of the image: the footer of a fixed disk, the header and table of a dynamic one.
    reserved: Reserved,
}

/// The blocks of a dynamic disk.
#[derive(Debug)]
struct Blocks {
    header: DynamicHeader,
    /// The byte offset of the header.
    header_offset: u64,
    table: PagedTable,
    /// The copy of the footer, the header and the whole table: no block is written there.
    reserved: Reserved,
    /// The same with the entries of the table that the disk needs only: no block is read there.
    relied_on: Reserved,
    /// The offsets of all blocks; loaded by the first write.
    stored: Option<Pieces>,
    /// The lowest offset of a block.
    first: u64,
    /// The end of blocks and tables: the offset of the footer.
    end: u64,
    /// Offsets before `end` of blocks that were allocated and released again.
    free: Vec<u64>,
    /// Whether the footer has to be written at `end`.
    footer_is_dirty: bool,
}

impl Blocks {
    /// Reads the header, and walks the table for the range of the file that blocks occupy.
    fn open(file: &Arc<dyn Device>, header_offset: u64, size: u64) -> Result<Self> {
        let header = DynamicHeader::read(&**file, header_offset, size)?;
        let reserved = header.reserved(header_offset);
        let truncated = || {
            Error::corrupt(
                "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.",
            )
        };
        let entries = header.entries().into();
        let mut table = PagedTable::new(Arc::clone(file), header.table_offset(), entries);
        let (mut first, mut end) = (u64::MAX, reserved.end());
        let file_end = file.len().next_multiple_of(SECTOR);
        if end > file_end {
            return Err(truncated());
        }
        let mut block = 0;
        while block < entries {
            let some = table.entries(block)?;
            block += some.len() as u64;
            for offset in some.iter().filter_map(|entry| bitmap_offset(*entry)) {
                first = first.min(offset);
                end = end.max(offset + header.bitmap() + header.block());
            }
        }
        if end > file_end {
            return Err(truncated());
        }
        Ok(Self {
            header,
            header_offset,
            table,
            relied_on: header.relied_on(header_offset, size),
            reserved,
            stored: None,
            first,
            end,
            free: Vec::new(),
            footer_is_dirty: false,
        })
    }

    /// The byte offset of the data of block `block`.
    ///
    /// # Errors
    /// Tables that overlap each other or the block: the image is damaged.
    fn host(&mut self, block: u64) -> Result<Option<u64>> {
        self.relied_on.require_apart()?;
        let entry = self.table.entries(block)?.first().copied();
        let Some(offset) = entry.and_then(bitmap_offset) else {
            return Ok(None);
        };
        self.relied_on.require_outside("block", self.whole(offset))?;
        Ok(Some(offset + self.header.bitmap()))
    }

    /// The bytes of the block at `offset`, its bitmap included.
    fn whole(&self, offset: u64) -> ByteRange {
        ByteRange::at(offset, self.header.bitmap() + self.header.block())
    }

    /// Writes the footer at the end of the file, flushes, and writes back the table.
    fn publish(&mut self, footer: &Footer, file: &dyn Device) -> Result<()> {
        if self.footer_is_dirty {
            file.write_at(footer.as_bytes(), self.end)?;
            self.footer_is_dirty = false;
        }
        if self.table.is_dirty() {
            file.flush()?;
            self.table.write_back()?;
        }
        Ok(())
    }
}

impl VpcLayer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layer for VpcLayer {
    fn format(&self) -> &'static str {
        "vpc"
    }

    fn len(&self) -> u64 {
        self.lock().size
    }

    fn granularity(&self) -> u64 {
        self.granularity.unwrap_or(1)
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let data = |offset, holes| RunKind::Data {
            device: Arc::clone(&self.file),
            offset,
            holes,
        };
        let mut state = self.lock();
        let State { blocks, reserved, .. } = &mut *state;
        let Some(blocks) = blocks else {
            reserved.require_outside("sector", range.first(1))?;
            return Ok(Run {
                len: range.len().min(reserved.room_at(range.start())),
                kind: data(range.start(), HoleMeaning::ZeroData),
            });
        };
        let unit = blocks.header.block();
        let mut len = unit - range.start() % unit;
        let kind = match blocks.host(range.start() / unit)? {
            Some(host) => data(host + range.start() % unit, HoleMeaning::Ignored),
            None => {
                // Adjacent blocks without storage are one run. Allocated blocks are never contiguous: a bitmap lies
                // between them.
                'run: while len < range.len() {
                    for entry in blocks.table.entries((range.start() + len) / unit)? {
                        if *entry != NO_BLOCK || len >= range.len() {
                            break 'run;
                        }
                        len += unit;
                    }
                }
                RunKind::Zero { host: None }
            }
        };
        Ok(Run {
            len: len.min(range.len()),
            kind,
        })
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        if self.granularity.is_some() {
            return self.plan(range);
        }
        self.lock().reserved.require_outside("range", range)?;
        Ok(Box::new(InPlaceWrite::new(
            range,
            Arc::clone(&self.file),
            range.start(),
        )))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let (_claim, stored) = self.stored(range)?;
        for bytes in stored {
            self.file.write_zeroes(bytes, mode)?;
        }
        Ok(())
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: self.granularity,
            ..Info::default()
        })
    }

    fn check_resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_size(request)
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.grow(request.len)
    }

    fn is_zero_when_new(&self) -> bool {
        self.granularity.is_some() || self.file.is_zero_when_new()
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        let State { footer, blocks, .. } = &mut *state;
        if let Some(blocks) = blocks {
            blocks.publish(footer, &*self.file)?;
        }
        drop(state);
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }
}
