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
//! which of its sectors were written: the others read as zero, whatever the block has in their place. A new block is
//! zeroed and gets a bitmap with all bits set, as in qemu-img. In a differencing disk, the overlay of another disk (its
//! parent), sectors that were not written read from the parent, and a new block has the bits of its written sectors only.
//!
//! * `footer` with `geometry`, `header`: kind and size of the disk, and the size of its blocks;
//! * `bat`: the block allocation table, cached in pages;
//! * `parent`: the identity of the parent of a differencing disk;
//! * `write`, `create`, `resize`, `info`: operations.
//!
//! # The size of the disk
//!
//! The size of the disk is that of the geometry in images of Virtual PC, and the field `current_size` of the footer in
//! images of most other programs. The field `creator_application` decides, or the node option `force_size_calc`.
//!
//! # What a crash leaves
//!
//! New blocks overwrite the footer at the end of the file. Readers use the copy at the start of the file, so the disk
//! can be read at any moment. Blocks and the new footer are durable before the table refers to the blocks, and sectors
//! before their bits are set.
//!
//! A fixed disk has no copy of its footer. When it grows, the new footer is durable before the old one, which is then
//! inside the disk, is zeroed: after a crash in between, the first 512 bytes that were added are those of the old footer.

mod bat;
mod create;
mod footer;
mod geometry;
mod header;
mod info;
mod parent;
mod resize;
#[cfg(test)]
mod tests;
mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    Budget, ByteRange, Capabilities, CreatePlan, CreateRequest, Device, DiskIdentity, Error, Format,
    FormatProperties, HoleMeaning, Info, LOOSE, Layer, Measure, MeasureSource, Objects, OpenRequest, Probe,
    ResizeRequest, Result, Run, RunKind, Score, WritePlan, ZeroMode,
};

use self::bat::{Blocks, NO_BLOCK};
use self::footer::{Footer, Kind, SECTOR, SizeBy};
use crate::layer_kit::in_place_write::InPlaceWrite;
use crate::layer_kit::parent::Parent;
use crate::layer_kit::range_claims::RangeClaims;
use crate::layer_kit::reserved::Reserved;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Vpc;

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
                create_options: Some(create::OPTIONS),
                strong_options: &["force_size_calc"],
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if footer::is_vpc(probe.head) {
            100
        } else if footer::ends_fixed_disk(probe.tail, probe.len) {
            LOOSE
        } else {
            0
        }
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
        let (blocks, reserved) = if is_copy || footer.kind() != Kind::Fixed {
            // As in qemu-img, the header is read and checked whatever the disk type in the footer is.
            let blocks = Blocks::open(&request.file, &footer, is_copy, size)?;
            let reserved = blocks.reserved.clone();
            (Some(blocks).filter(|_| footer.kind() != Kind::Fixed), reserved)
        } else {
            (None, behind_footer(request.file.len()))
        };
        let parent = match &blocks {
            Some(blocks) if blocks.is_differencing => {
                let locators = blocks.header.parent_locators(&*request.file)?;
                Some(Parent::find(locators, request.name, &*request.context.gate)?)
            }
            _ => None,
        };
        Ok(Arc::new(VpcLayer {
            parent,
            identity: footer.identity(),
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
        Ok(CreatePlan::new(move |files| {
            create::create(&request, &*files.file)
        }))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        create::measure(options, source)
    }
}

/// The range of a file of `len` bytes that cannot hold data of a fixed disk: its footer, and all beyond.
fn behind_footer(len: u64) -> Reserved {
    let end = len.next_multiple_of(SECTOR);
    Reserved::new([("footer", ByteRange::new(end.saturating_sub(SECTOR), u64::MAX))])
}

/// An opened image.
#[derive(Debug)]
struct VpcLayer {
    file: Arc<dyn Device>,
    /// The parent of a differencing disk.
    parent: Option<Parent>,
    identity: DiskIdentity,
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

    /// A sector rather than a block: the rest of a new block is zero.
    fn write_unit(&self) -> u64 {
        self.granularity.map_or(1, |_| SECTOR)
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
        let not_written = match blocks.is_differencing {
            true => RunKind::Unallocated { host: None },
            false => RunKind::Zero { host: None },
        };
        let mut len = unit - range.start() % unit;
        let kind = match blocks.host(range.start() / unit)? {
            Some(host) => {
                let start = range.start() % unit;
                let (is_written, run) = blocks.written(host, start, len.min(range.len()))?;
                len = run;
                if is_written {
                    data(host + start, HoleMeaning::Ignored)
                } else {
                    not_written
                }
            }
            None => {
                // Adjacent blocks without storage are one run. Allocated blocks are never contiguous: a bitmap lies
                // between them.
                while len < range.len() {
                    let block = (range.start() + len) / unit;
                    if blocks.table.entry(block)? != NO_BLOCK {
                        break;
                    }
                    len = len.saturating_add(blocks.table.count_equal(block)?.saturating_mul(unit));
                }
                not_written
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
        if self.parent.is_some() {
            return Err(Error::unsupported(
                "Zeroes that hide the parent are written as data",
            ));
        }
        let (_claim, stored) = self.stored(range)?;
        for bytes in stored {
            self.file.write_zeroes(bytes, mode)?;
        }
        Ok(())
    }

    fn info(&self) -> Result<Info> {
        Ok(self.collect_info())
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

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            backed: self.parent.is_some().then_some(self),
            identity: Some(&self.identity),
            ..Capabilities::default()
        }
    }
}
