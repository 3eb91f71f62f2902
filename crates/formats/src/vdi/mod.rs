//! VDI, the format of VirtualBox: a disk in blocks of 1 MiB, and a block map that gives the slot of each block.
//!
//! ```text
//!   file   |header|block map      |block|block|block|block|
//!             512  2 - 0 1     slot 0     1     2     3       "-" no block: reads as zero
//!
//!   disk   |  2  |     |  0  |  1  |
//! ```
//!
//! Static images have all blocks allocated from the start. Differencing images, those with a backing image, are
//! refused, as in qemu-img.
//!
//! # What a crash leaves
//!
//! Blocks are written first, then the header's count of allocated blocks, then the map, with a flush between the blocks
//! and the map. So the map never refers to a block whose bytes are not durable, nor to a slot at or beyond the count,
//! which is the slot that qemu-img allocates next. A crash leaks blocks at worst; leaked slots are free when the image
//! is opened again.

mod check;
mod create;
mod header;
mod resize;
#[cfg(test)]
mod tests;
mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::Options;
use diskimage_core::{
    Budget, ByteRange, Capabilities, Check, CheckReport, CreatePlan, CreateRequest, Device, Error, Format,
    FormatProperties, HoleMeaning, Info, Layer, Measure, MeasureSource, Objects, OpenRequest, Preallocation,
    Probe, Progress, Repair, ResizeRequest, Result, Run, RunKind, Score, WritePlan, ZeroMode,
};

use crate::layer_kit::paged_table::{Entry, PagedTable};
use crate::layer_kit::range_claims::RangeClaims;
use crate::layer_kit::reserved::Reserved;
use crate::layer_kit::slot_bitmap::SlotBitmap;
use header::{BLOCK, Header, SECTOR};

/// The format's entry in the table.
#[derive(Debug)]
pub struct Vdi;

impl Format for Vdi {
    fn name(&self) -> &'static str {
        "vdi"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(create::OPTIONS),
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if header::is_vdi(probe.head) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        let mut sector = [0; 512];
        request.file.read_padded(&mut sector, 0)?;
        let header = Header::parse(&sector)?;
        Ok(Arc::new(VdiLayer {
            is_static: header.is_static(),
            state: Mutex::new(State {
                map: PagedTable::new(Arc::clone(&request.file), header.map_offset, header.blocks.into()),
                reserved: header.reserved(),
                relied_on: header.relied_on(),
                header,
                slots: None,
                missing: None,
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

/// The entry of a block that reads as zero.
const NO_BLOCK: Entry = u32::MAX.to_le_bytes();
/// The smallest entry without a slot: `DISCARDED` is a block that the guest has discarded, the next one, [`NO_BLOCK`],
/// a block that was never allocated.
const DISCARDED: u32 = u32::MAX - 1;

/// The slot in an entry of the map; `None` if the block has no storage.
fn slot(entry: Entry) -> Option<u32> {
    Some(u32::from_le_bytes(entry)).filter(|slot| *slot < DISCARDED)
}

/// An opened image.
#[derive(Debug)]
struct VdiLayer {
    file: Arc<dyn Device>,
    is_static: bool,
    state: Mutex<State>,
    /// Claims on the blocks of requests in flight, exclusive where a write allocates.
    claims: RangeClaims,
    budget: Budget,
}

/// The mutable state of an open image. Its lock is never held during I/O of guest data.
#[derive(Debug)]
struct State {
    header: Header,
    /// The header and the whole map: no block is written there.
    reserved: Reserved,
    /// The header and the entries of the map that the disk needs: no block is read there.
    relied_on: Reserved,
    map: PagedTable,
    /// Which slots are in use; loaded before the first allocation or change of a block.
    slots: Option<SlotBitmap>,
    /// A slot in the map that lies beyond the end of the file, if there is one; found when `slots` is loaded.
    missing: Option<u32>,
}

impl VdiLayer {
    /// Checks that the file holds all bytes of block `block`, in slot `slot`, that belong to the disk. Other programs
    /// may leave out the part of the last block beyond the end of the disk.
    fn require_block(&self, header: &Header, block: u64, slot: u32) -> Result<()> {
        let needed =
            ByteRange::at(block.saturating_mul(BLOCK), BLOCK).intersect(ByteRange::new(0, header.size));
        self.file.require(header.host(slot), needed.len())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes back the header's count and the map, in the order that the module's documentation states.
    fn publish_blocks(&self, state: &mut State) -> Result<()> {
        let end = match &state.slots {
            Some(slots) if state.missing.is_none() => slots.end(),
            // Nothing was allocated. Growing a truncated file would make its missing blocks look present.
            _ => return Ok(()),
        };
        let file = &self.file;
        // Other programs take a file that ends inside its last block for damaged.
        if state.header.host(end) > file.len() {
            file.resize(state.header.host(end), Preallocation::Off)?;
        }
        let counted = state.header.allocated();
        if end > counted {
            state.write_count(end, file)?;
        }
        if state.map.is_dirty() {
            file.flush()?;
            state.map.write_back()?;
        }
        if end < counted && self.claims.is_idle() {
            file.flush()?;
            state.write_count(end, file)?;
        }
        Ok(())
    }
}

impl State {
    /// The slot of block `block` of the disk.
    fn slot(&mut self, block: u64) -> Result<Option<u32>> {
        Ok(self.map.entries(block)?.first().copied().and_then(slot))
    }

    /// Writes the header with `allocated` as its count of blocks.
    fn write_count(&mut self, allocated: u32, file: &Arc<dyn Device>) -> Result<()> {
        let mut header = self.header.clone();
        header.set_allocated(allocated);
        file.write_at(&header.to_bytes()?, 0)?;
        self.header = header;
        Ok(())
    }
}

impl Layer for VdiLayer {
    fn format(&self) -> &'static str {
        "vdi"
    }

    fn len(&self) -> u64 {
        self.lock().header.size
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    /// A sector rather than a block: the rest of a new block is a hole.
    fn write_unit(&self) -> u64 {
        SECTOR
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let mut state = self.lock();
        state.relied_on.require_apart()?;
        let first = state.slot(range.start() / BLOCK)?;
        let range = match first {
            None => range,
            Some(slot) => {
                // Entries of zeroes, which a hole has, all refer to the first block: the map was lost.
                if state.map.hole(range.start() / BLOCK)? > 1 {
                    return Err(Error::corrupt(format!(
                        "The entry of block {} of the map lies in a hole of the file",
                        range.start() / BLOCK
                    )));
                }
                let stored = state.header.stored(slot);
                state.relied_on.require_outside("block", stored)?;
                let host = stored.start() + range.start() % BLOCK;
                range.first(state.relied_on.room_at(host))
            }
        };
        let mut len = BLOCK - range.start() % BLOCK;
        let mut expected = first;
        // Blocks in adjacent slots, or without storage, are one run.
        'run: while len < range.len() {
            let before = len;
            let block = (range.start() + len) / BLOCK;
            if first.is_none() {
                // Equal entries are counted at once: a map may have half a billion of them.
                if state.slot(block)?.is_some() {
                    break;
                }
                len = len.saturating_add(state.map.count_equal(block)?.saturating_mul(BLOCK));
                continue;
            }
            for entry in state.map.entries(block)? {
                expected = expected.map(|slot| slot.saturating_add(1));
                if slot(*entry) != expected || len >= range.len() {
                    break 'run;
                }
                len += BLOCK;
            }
            debug_assert!(len > before, "a page has entries");
        }
        let kind = match first {
            None => RunKind::Zero { host: None },
            Some(slot) => RunKind::Data {
                device: Arc::clone(&self.file),
                offset: state.header.host(slot) + range.start() % BLOCK,
                holes: if self.is_static {
                    HoleMeaning::ZeroData
                } else {
                    HoleMeaning::Ignored
                },
            },
        };
        Ok(Run {
            len: len.min(range.len()),
            kind,
        })
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        self.plan(range)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.zero(range, mode)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: Some(BLOCK),
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
        !self.is_static || self.file.is_zero_when_new()
    }

    fn flush(&self) -> Result<()> {
        self.publish_blocks(&mut self.lock())?;
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            check: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Check for VdiLayer {
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        if repair != Repair::No {
            return Err(Error::unsupported("This image format does not support checks"));
        }
        self.check_map(progress)
    }
}
