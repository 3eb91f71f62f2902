//! VHDX, the format of Hyper-V: a disk in payload blocks, and a block allocation table with the offset of each block.
//!
//! ```text
//!   0         64 KiB   192 KiB        1 MiB
//!   |"vhdxfile"|header x2|region table x2|log|block allocation table|metadata|block|block| ...
//! ```
//!
//! As in Microsoft's specification MS-VHDX, "Virtual Hard Disk v2 (VHDX) File Format". Payload blocks have 1 MiB to
//! 256 MiB, logical sectors 512 or 4096 bytes. A differencing disk is only read: it is the overlay of another disk, its
//! parent, and has each block wholly, in those sectors that a sector bitmap block names, or not at all.
//!
//! * `header`: the two headers and the two region tables;
//! * `metadata`: the sizes of the disk, its sectors and its blocks; `parent`: the parent of a differencing disk;
//! * `bat`: the block allocation table, cached in pages;
//! * `log`: atomic changes of the tables, and their replay after a crash;
//! * `write`, `create`, `check`, `info`, `resize`: operations.
//!
//! # What a crash leaves
//!
//! Blocks are written first. The new entries of the table are then written to the log, the GUID of the log entry is
//! written to the header, the table is written, and the GUID in the header is cleared, with a flush between any two
//! steps. If the GUID is set when the image is opened, the log is replayed. An image that is opened for reading only is
//! not changed: reads see the file as it would be after the replay.

mod bat;
mod check;
mod create;
mod header;
mod info;
mod log;
mod metadata;
mod parent;
mod resize;
#[cfg(test)]
mod tests;
mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::Options;
use diskimage_core::{
    Budget, ByteRange, Capabilities, Check, CheckReport, CreatePlan, CreateRequest, Device, DiskIdentity,
    Error, Format, FormatProperties, HoleMeaning, Info, Layer, Measure, MeasureSource, Objects, OpenRequest,
    Probe, Progress, ReadOnlyView, Repair, ResizeRequest, Result, Run, RunKind, Score, WritePlan, ZeroMode,
    errno, to_index,
};

use self::bat::{Bat, Chunks, Payload, SECTORS_OF_CHUNK, bitmap_offset};
use self::header::{FILE_SIGNATURE, Guid, Header, Regions};
use self::log::{Changes, Replayed};
use self::metadata::Metadata;
use self::parent::OpenParent;
use self::write::Stored;
use crate::layer_kit::random;
use crate::layer_kit::range_claims::RangeClaims;
use crate::layer_kit::reserved::Reserved;
use crate::layer_kit::sector_bitmaps::{BitOrder, SectorBitmaps};

/// The unit of writes: a sector rather than a block, as the rest of a new block is zero.
const SECTOR: u64 = 512;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Vhdx;

impl Format for Vhdx {
    fn name(&self) -> &'static str {
        "vhdx"
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
        if probe.head.starts_with(FILE_SIGNATURE) {
            100
        } else {
            0
        }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        let name = request.name;
        let layer = VhdxLayer::open(&request).map_err(|error| match error.errno() {
            Some(_) => error.context(format!("Could not open '{name}'")),
            None => error,
        });
        Ok(Arc::new(layer?))
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

/// An opened image.
#[derive(Debug)]
struct VhdxLayer {
    file: Arc<dyn Device>,
    block_size: u64,
    chunks: Chunks,
    /// The parent of a differencing disk.
    parent: Option<OpenParent>,
    /// `DataWriteGuid` when the image was opened.
    identity: DiskIdentity,
    /// Whether the log was replayed when the image was opened.
    was_replayed: bool,
    state: Mutex<State>,
    /// Claims on the blocks of requests in flight, exclusive where a write allocates.
    claims: RangeClaims,
    budget: Budget,
}

/// The mutable state of an open image. Its lock is never held during I/O of guest data.
#[derive(Debug)]
struct State {
    header: Header,
    /// The index of that header in [`header::HEADERS`].
    slot: usize,
    regions: Regions,
    metadata: Metadata,
    bat: Bat,
    bitmaps: SectorBitmaps,
    /// The metadata of the image, which no block may overlap.
    reserved: Reserved,
    /// The offsets of all blocks; loaded by the first write.
    stored: Option<Stored>,
    /// The lowest offset for the next new block.
    end: u64,
    /// Whether the header got new write GUIDs since the image was opened.
    marked: bool,
    /// The sequence number of the last log entry written.
    sequence: u64,
}

/// The file as it is after the log is replayed; `None` if the log is empty.
fn replayed(
    request: &OpenRequest<'_>,
    file: &Arc<dyn Device>,
    header: &Header,
) -> Result<Option<Arc<ReadOnlyView<Replayed>>>> {
    if header.log_guid == Guid::default() {
        return Ok(None);
    }
    let changes = Changes::read(&**file, header.log, header.log_guid, &request.context.budget)?;
    if changes.is_some() && request.for_check && !request.write {
        return Err(Error::unsupported(format!(
            "VHDX image file '{}' opened read-only, but contains a log that needs to be replayed",
            request.name
        ))
        .hint("To replay the log, run:")
        .and_hint(format!("qemu-img check -r all '{}'", request.name)));
    }
    Ok(changes.map(|changes| Arc::new(ReadOnlyView(Replayed::new(Arc::clone(file), changes)))))
}

/// The end of everything that an image has: its regions, and the blocks in the table of `entries` entries.
fn needed_len(
    contents: &Arc<dyn Device>,
    regions: &Regions,
    log: ByteRange,
    (entries, block_size): (u64, u64),
) -> Result<u64> {
    let mut bat = Bat::new(Arc::clone(contents), regions.bat);
    let mut end = regions.reserved(log).end();
    let mut next = 0;
    while next < entries {
        let before = next;
        for entry in bat.entries(next)? {
            if let Some(offset) = Payload::of(entry, true).ok().and_then(Payload::offset) {
                end = end.max(offset.saturating_add(block_size));
            }
            next += 1;
        }
        debug_assert!(next > before, "a page has entries");
    }
    Ok(end)
}

/// What helps where a differencing image is to be written.
const HOW_TO_WRITE: &str = "Convert the image, which includes the data of its parents, or write to an overlay: qemu-img \
                            create -f qcow2 -F vhdx -b IMAGE OVERLAY";

impl VhdxLayer {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let mut file = Arc::clone(&request.file);
        let mut signature = [0; 8];
        file.read_padded(&mut signature, 0)?;
        if signature != *FILE_SIGNATURE {
            return Err(Error::from_errno(errno::EINVAL));
        }
        let (mut header, mut slot) = Header::read(&*file)?;
        let replayed = replayed(request, &file, &header)?;
        let contents = match &replayed {
            Some(replayed) => Arc::<ReadOnlyView<Replayed>>::clone(replayed),
            None => Arc::clone(&file),
        };
        let regions = Regions::read(&*contents, header.log)?;
        let (metadata, locator) = Metadata::read(&*contents, regions.metadata)?;
        if locator.is_some() && request.write {
            return Err(
                Error::unsupported("Differencing VHDX images are opened for reading only").hint(HOW_TO_WRITE),
            );
        }
        let parent = locator
            .map(|locator| OpenParent::find(locator, request))
            .transpose()?;
        let chunks = Chunks::new(metadata.block_size, metadata.sector);
        let entries = chunks.entries(metadata.disk_size.div_ceil(metadata.block_size));
        if entries.saturating_mul(bat::ENTRY) > regions.bat.len() {
            return Err(Error::from_errno(errno::EINVAL));
        }
        let was_replayed = replayed.is_some();
        if !request.write {
            file = contents;
        } else if header.log_guid != Guid::default() {
            // Replays the log only after the checks above: an image that is damaged after the replay is not changed.
            if let Some(replayed) = replayed {
                let needed = needed_len(&contents, &regions, header.log, (entries, metadata.block_size))?;
                replayed.0.apply(needed)?;
            }
            header.log_guid = Guid::default();
            slot = header.replace(&*file, slot)?;
        }
        let reserved = regions.reserved(header.log);
        let identity = DiskIdentity {
            id: header.data_write,
            time_stamp: None,
        };
        let state = State {
            bitmaps: SectorBitmaps::new(&file, BitOrder::LowestFirst),
            bat: Bat::new(Arc::clone(&file), regions.bat),
            end: file.len().next_multiple_of(header::MIB).max(reserved.end()),
            reserved,
            stored: None,
            header,
            slot,
            regions,
            metadata,
            marked: false,
            sequence: 0,
        };
        Ok(Self {
            file,
            block_size: metadata.block_size,
            chunks,
            parent,
            identity,
            was_replayed,
            state: Mutex::new(state),
            claims: RangeClaims::default(),
            budget: request.context.budget.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table's entry for block `block`.
    fn payload(&self, state: &mut State, block: u64) -> Result<Payload> {
        Payload::of(
            state.bat.entry(self.chunks.entry_of(block))?,
            self.is_differencing(),
        )
    }

    fn is_differencing(&self) -> bool {
        self.parent.is_some()
    }

    /// Maps the start of `range`, which lies in a block stored at `offset` as far as the sector bitmap says.
    fn map_partly(&self, state: &mut State, range: ByteRange, offset: u64) -> Result<Run> {
        let entry = self.chunks.bitmap_entry_of(range.start() / self.block_size);
        let Some(bitmap) = bitmap_offset(state.bat.entry(entry)?) else {
            return Err(Error::corrupt(format!(
                "The sector bitmap of BAT entry {entry} is not present"
            )));
        };
        let bitmap = ByteRange::at(bitmap, header::MIB);
        state.reserved.require_outside("sector bitmap", bitmap)?;
        let sector = state.metadata.sector;
        let inside = range.first(self.block_size - range.start() % self.block_size);
        let sectors = inside.align_out(sector);
        let first = sectors.start() / sector % SECTORS_OF_CHUNK;
        let (is_written, count) = state.bitmaps.run(bitmap, first, sectors.len() / sector)?;
        let end = (sectors.start() + count * sector).min(inside.end());
        let kind = if is_written {
            RunKind::Data {
                device: Arc::clone(&self.file),
                offset: offset.saturating_add(range.start() % self.block_size),
                holes: HoleMeaning::ZeroData,
            }
        } else {
            RunKind::Unallocated { host: None }
        };
        Ok(Run {
            len: end - range.start(),
            kind,
        })
    }
}

impl State {
    /// Gives the header new write GUIDs before the first change, as the specification demands; once.
    fn mark_changed(&mut self, file: &dyn Device) -> Result<()> {
        if self.marked {
            return Ok(());
        }
        let mut header = self.header.clone();
        (header.file_write, header.data_write) = (random::guid()?, random::guid()?);
        self.slot = header.replace(file, self.slot)?;
        self.header = header;
        self.marked = true;
        Ok(())
    }

    /// Flushes the blocks, and writes the dirty entries of the table through the log.
    fn publish(&mut self, file: &dyn Device) -> Result<()> {
        let units = self.bat.dirty_units();
        if units.is_empty() {
            return Ok(());
        }
        file.flush()?;
        self.write_logged(file, &units)?;
        self.bat.mark_clean();
        Ok(())
    }

    /// Writes units of 4 KiB through the log, durably.
    fn write_logged(&mut self, file: &dyn Device, units: &[(u64, Box<[u8; bat::UNIT]>)]) -> Result<()> {
        if self.header.log_guid != Guid::default() {
            // An earlier call failed half-way. Its entry is replayed, for the log must not be overwritten while the
            // header refers to it.
            let budget = Budget::default();
            if let Some(changes) = Changes::read(file, self.header.log, self.header.log_guid, &budget)? {
                changes.apply(file, file.len())?;
            }
            self.set_log_guid(file, Guid::default())?;
        }
        for units in units.chunks(log::room(self.header.log.len())?.max(1)) {
            let guid = random::guid()?;
            self.sequence += 1;
            let entry = log::entry(guid, self.sequence, units, file.len())?;
            file.write_at(&entry, self.header.log.start())?;
            file.flush()?;
            self.set_log_guid(file, guid)?;
            for (offset, bytes) in units {
                file.write_at(&bytes[..], *offset)?;
            }
            file.flush()?;
            self.set_log_guid(file, Guid::default())?;
        }
        Ok(())
    }

    /// Sets the GUID in the header of the log entries to replay; zero for none.
    fn set_log_guid(&mut self, file: &dyn Device, guid: Guid) -> Result<()> {
        let mut header = self.header.clone();
        header.log_guid = guid;
        match header.replace(file, self.slot) {
            Ok(slot) => {
                (self.header, self.slot) = (header, slot);
                Ok(())
            }
            Err(error) => {
                // The file may have either header now; assume that the log is to be replayed.
                if guid != Guid::default() {
                    self.header.log_guid = guid;
                }
                Err(error)
            }
        }
    }
}

impl Layer for VhdxLayer {
    fn format(&self) -> &'static str {
        "vhdx"
    }

    fn len(&self) -> u64 {
        self.lock().metadata.disk_size
    }

    fn granularity(&self) -> u64 {
        self.block_size
    }

    fn write_unit(&self) -> u64 {
        SECTOR
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let size = self.block_size;
        let mut state = self.lock();
        let block = range.start() / size;
        let first = self.payload(&mut state, block)?;
        let mut range = range;
        if let Some(offset) = first.offset() {
            state
                .reserved
                .require_outside("block", ByteRange::at(offset, size))?;
            let host = offset.saturating_add(range.start() % size);
            range = range.first(state.reserved.room_at(host));
        }
        if let Payload::Partly(offset) = first {
            return self.map_partly(&mut state, range, offset);
        }
        let mut len = size - range.start() % size;
        let mut next = block + 1;
        // Blocks that are contiguous in the file, or without storage, are one run.
        'run: while len < range.len() {
            let in_chunk = to_index(self.chunks.left_in_chunk(next))?;
            for entry in state.bat.entries(self.chunks.entry_of(next))?.take(in_chunk) {
                let expected = match first {
                    Payload::At(offset) => Payload::At(offset.saturating_add((next - block) * size)),
                    other => other,
                };
                if len >= range.len() || Payload::of(entry, self.is_differencing()).ok() != Some(expected) {
                    break 'run;
                }
                len += size;
                next += 1;
            }
        }
        let kind = match first {
            Payload::Zero => RunKind::Zero { host: None },
            Payload::Parent => RunKind::Unallocated { host: None },
            Payload::At(offset) | Payload::Partly(offset) => RunKind::Data {
                device: Arc::clone(&self.file),
                offset: offset.saturating_add(range.start() % size),
                // Blocks are allocated by growing the file: a hole is zeroes that belong to the block.
                holes: HoleMeaning::ZeroData,
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
        Ok(self.collect_info())
    }

    fn check_resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_size(request)
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.grow(request)
    }

    fn flush(&self) -> Result<()> {
        self.lock().publish(&*self.file)?;
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            check: Some(self),
            backed: self.is_differencing().then_some(self),
            identity: Some(&self.identity),
            // The map of a differencing disk is that of its chain.
            hides_allocation: !self.is_differencing(),
            ..Capabilities::default()
        }
    }
}

impl Check for VhdxLayer {
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        self.check_bat(repair, progress)
    }
}
