//! VHD, the format of Virtual PC and old Hyper-V: a disk stored whole with a footer behind it, or in blocks that a table
//! finds.
//!
//! ```text
//!   fixed     |------------------- disk --------------------|footer|
//!
//!   dynamic   |copy of footer|header|block allocation table |bitmap|block|bitmap|block|footer|
//!                                      -  3  -  1            (offsets in sectors; "-" reads as zero)
//! ```
//!
//! As specified in Microsoft's "Virtual Hard Disk Image Format Specification" 1.0. The bitmap in front of a block says
//! which of its sectors were written; without a disk below they all count, and all its bits are set. Differencing disks
//! are refused.
//!
//! # Which size counts
//!
//! Virtual PC goes by the geometry, others by the size in the footer; who made the disk decides, or the node option
//! `force_size_calc`.
//!
//! # What a crash leaves
//!
//! New blocks go over the footer at the end. The copy in front is what is read first, so the disk can be read at any
//! moment. Blocks and the new footer are durable before the table refers to them.

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
        let (footer, in_front) = Footer::read(&*request.file)?;
        let size = footer
            .size(by)
            .map_err(|error| error.context(format!("Could not open '{}'", request.name)))?;
        let (blocks, reserved) = if in_front {
            // As in the original, whatever kind of disk the footer names.
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
            budget: request.budget,
        }))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        Ok(CreatePlan::new(move |files| create(&request, &*files.file)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        preallocation::check(options)?;
        let footer = wanted(options, source.len())?;
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
    let footer = wanted(request.options, request.size)?;
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

/// The footer of the disk that the options describe.
fn wanted(options: &Options, size: u64) -> Result<Footer> {
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

/// Writes `byte` all over `range`, piece by piece.
fn fill(file: &dyn Device, range: ByteRange, byte: u8) -> Result<()> {
    const PIECE: usize = 64 << 10;
    let mut rest = range;
    let bytes = vec![byte; to_index(range.len())?.min(PIECE)];
    while !rest.is_empty() {
        let piece = to_index(rest.len())?.min(bytes.len());
        file.write_at(&bytes[..piece], rest.start())?;
        rest = rest.skip(piece as u64);
    }
    Ok(())
}

/// What no part of a fixed disk can be in a file of `len` bytes.
fn behind_footer(len: u64) -> Reserved {
    let end = len.next_multiple_of(SECTOR);
    Reserved::new([("footer", ByteRange::new(end.saturating_sub(SECTOR), u64::MAX))])
}

/// The entry of a block that reads as zero.
const NO_BLOCK: Entry = u32::MAX.to_be_bytes();

/// Where an entry of the table says that a block's bitmap is.
fn place(entry: Entry) -> Option<u64> {
    (entry != NO_BLOCK).then(|| u64::from(u32::from_be_bytes(entry)) * SECTOR)
}

/// An opened image.
#[derive(Debug)]
struct VpcLayer {
    file: Arc<dyn Device>,
    /// Bytes of a block of dynamic disks.
    granularity: Option<u64>,
    state: Mutex<State>,
    /// Blocks that are being written, exclusive where they have no storage yet.
    claims: RangeClaims,
    budget: Budget,
}

/// What changes while an image is open. Its lock is never held while guest data moves.
#[derive(Debug)]
struct State {
    footer: Footer,
    /// The disk's size in bytes.
    size: u64,
    /// The blocks of dynamic disks.
    blocks: Option<Blocks>,
    /// What is in the file of a fixed disk besides the disk.
    reserved: Reserved,
}

/// The blocks of a dynamic disk.
#[derive(Debug)]
struct Blocks {
    header: DynamicHeader,
    /// Where the header is.
    header_offset: u64,
    table: PagedTable,
    /// The copy of the footer, the header and the table.
    reserved: Reserved,
    /// The same without what the disk does not need of the table.
    relied_on: Reserved,
    /// Where blocks are; known from the first write on.
    stored: Option<Pieces>,
    /// The first byte that belongs to a block.
    first: u64,
    /// Where blocks and tables end and the footer is.
    end: u64,
    /// Slots before the end that no block has.
    free: Vec<u64>,
    /// Whether the footer has to be written at the end.
    moved: bool,
}

impl Blocks {
    /// Reads the header, and where the blocks are.
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
            for place in some.iter().filter_map(|entry| place(*entry)) {
                first = first.min(place);
                end = end.max(place + header.bitmap() + header.block());
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
            moved: false,
        })
    }

    /// Where block `block` of the disk is stored.
    ///
    /// # Errors
    /// Tables that overlap, and a block that lies in them: the image is damaged.
    fn host(&mut self, block: u64) -> Result<Option<u64>> {
        self.relied_on.require_apart()?;
        let entry = self.table.entries(block)?.first().copied();
        let Some(place) = entry.and_then(place) else {
            return Ok(None);
        };
        self.relied_on.require_outside("block", self.whole(place))?;
        Ok(Some(place + self.header.bitmap()))
    }

    /// The block at `place` with its bitmap.
    fn whole(&self, place: u64) -> ByteRange {
        ByteRange::at(place, self.header.bitmap() + self.header.block())
    }

    /// Publishes the blocks written so far.
    fn publish(&mut self, footer: &Footer, file: &dyn Device) -> Result<()> {
        if self.moved {
            file.write_at(footer.as_bytes(), self.end)?;
            self.moved = false;
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
                // Neighbours without storage are one run; blocks never touch, as there are bitmaps between.
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
