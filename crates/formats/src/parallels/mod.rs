//! Parallels: expandable images of Parallels Desktop and Virtuozzo, a disk in clusters and a table with the offset of
//! each cluster.
//!
//! ```text
//!   | header | table of 32-bit entries |   | cluster | cluster | cluster | ...
//!     64 B     bat_entries                 ^ data_off
//!
//!   entry 0: no cluster, reads as zero
//!   else an offset, in clusters (WithouFreSpacExt) or sectors (WithoutFreeSpace)
//! ```
//!
//! One more cluster can hold the Format Extension, which refers to dirty bitmaps. They are read only. The first write
//! to an image removes them, as they would miss the changes. The format is specified in QEMU's document "Parallels
//! Expandable Image File Format".
//!
//! # What a crash leaves
//!
//! Clusters are written first, then the table, with a flush in between. The slot of a released cluster is free once the
//! table without it is durable. So a crash leaks clusters at worst, and the field `in_use` of the header, set from the
//! first change until the next flush, shows that it may have.

mod bat;
mod check;
mod create;
mod extension;
mod growth;
mod header;
mod write;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::Options;
use diskimage_core::{
    Bitmaps, Budget, ByteRange, Capabilities, Check, CheckReport, CreatePlan, CreateRequest, Device, Error,
    Format, FormatProperties, HoleMeaning, Info, Layer, Measure, MeasureSource, Note, Objects, OpenRequest,
    Preallocation, Probe, Progress, Repair, ResizeRequest, Result, Run, RunKind, Score, WritePlan, ZeroMode,
};

use self::bat::offset_of;
use self::extension::Extension;
use self::header::{HEADER_LEN, Header, SECTOR};

use crate::layer_kit::paged_table::PagedTable;

use crate::layer_kit::range_claims::RangeClaims;
use crate::layer_kit::repair_on_open;
use crate::layer_kit::reserved::{Pieces, Reserved};
use crate::layer_kit::slot_bitmap::SlotBitmap;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Parallels;

impl Format for Parallels {
    fn name(&self) -> &'static str {
        "parallels"
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
        if header::is_parallels(probe.head) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(ParallelsLayer::open(request)?))
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
struct ParallelsLayer {
    file: Arc<dyn Device>,
    write: bool,
    cluster: u64,
    size: u64,
    /// The header and the entries of the table that the disk needs: no cluster is read there.
    relied_on: Reserved,
    /// The dirty bitmaps; `None` if the image is open for writing.
    extension: Option<Extension>,
    /// A warning about the extension, and what was repaired on opening.
    notes: Vec<Note>,
    state: Mutex<State>,
    /// Claims on the clusters of requests in flight, exclusive where a write allocates or a cluster is released.
    claims: RangeClaims,
    budget: Budget,
}

/// The mutable state of an open image. Its lock is never held during I/O of guest data.
#[derive(Debug)]
struct State {
    header: Header,
    table: PagedTable,
    /// How many entries the file had room for on opening; it was truncated if the table has more.
    entries_in_file: u64,
    /// The byte offset of slot 0.
    first_slot: u64,
    /// The length of the file once it is flushed: the end of the last cluster in use since the image was opened.
    data_end: u64,
    /// Whether the header has a valid `data_off`.
    has_data_off: bool,
    /// Whether the image was not closed, and has not been repaired since.
    unclean: bool,
    /// Whether this layer has marked the image as in use.
    marked: bool,
    /// Which slots are in use; loaded by the first allocation.
    slots: Option<SlotBitmap>,
    /// Offsets of released clusters; their slots are free once the table in the file no longer refers to them.
    released: Vec<u64>,
    /// Whether the offsets of all clusters are those of slots.
    is_aligned: bool,
    /// The offsets of all clusters; loaded by the first write, if not `is_aligned`.
    stored: Option<Pieces>,
    /// The preallocation when the file grows: its mode, and how many bytes more than needed.
    growth: Option<(Preallocation, u64)>,
}

impl ParallelsLayer {
    fn open(request: OpenRequest<'_>) -> Result<Self> {
        let growth = growth::growth(&request.options.take_known(growth::OPTIONS)?)?;
        let (file, budget) = (request.file, request.context.budget.clone());
        let mut bytes = [0; HEADER_LEN];
        file.read_padded(&mut bytes, 0)?;
        let header = Header::parse(&bytes)?;
        let file_len = file.len();
        let start = header.data_start(file_len);
        let has_data_off = header.has_data_off(file_len);
        let (mut extension, mut notes) = (None, Vec::new());
        match header.extension {
            Some(_) if request.write => {
                notes.push(Note::Warning("Format Extension ignored in RW mode".to_owned()));
            }
            Some(offset) => extension = Some(Extension::read(&file, &header, offset, &budget)?),
            None => {}
        }
        let mut layer = Self {
            write: request.write,
            cluster: header.cluster,
            size: header.size,
            relied_on: header.relied_on(),
            extension,
            notes,
            state: Mutex::new(State {
                table: PagedTable::new(Arc::clone(&file), HEADER_LEN as u64, header.entries.into()),
                entries_in_file: file_len.saturating_sub(HEADER_LEN as u64) / 4,
                first_slot: header.first_slot(start),
                data_end: start,
                has_data_off,
                unclean: header.is_in_use(),
                marked: false,
                slots: None,
                released: Vec::new(),
                is_aligned: true,
                stored: None,
                growth,
                header,
            }),
            claims: RangeClaims::default(),
            file,
            budget,
        };
        if request.write && !request.for_check {
            layer.repair_for_writing()?;
        }
        Ok(layer)
    }

    /// Repairs damage that would make writing unsafe.
    fn repair_for_writing(&mut self) -> Result<()> {
        if self.is_sound()? {
            return Ok(());
        }
        let notes = repair_on_open::run(|progress| {
            self.check_table(Repair::All, progress)?;
            self.flush()
        })?;
        self.notes.extend(notes);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes back the table, and marks the image as closed unless a write is in flight.
    fn mark_closed(&self, state: &mut State) -> Result<()> {
        let file = &*self.file;
        state.publish(file)?;
        if !state.marked || !self.claims.is_idle() {
            return Ok(());
        }
        if file.len() < state.data_end {
            file.resize(state.data_end, Preallocation::Off)?;
        } else if file.len() > state.data_end {
            // A device of fixed length cannot be truncated: extra bytes at its end do no harm.
            let _ = file.resize(state.data_end, Preallocation::Off);
        }
        file.flush()?;
        let mut header = state.header.clone();
        header.set_in_use(false);
        file.write_at(&header.to_bytes(), 0)?;
        state.header = header;
        state.marked = false;
        Ok(())
    }
}

impl ParallelsLayer {
    /// The dirty bitmaps of the extension; `None` if it has none.
    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        self.extension
            .as_ref()
            .filter(|extension| !extension.is_empty())
            .map(|extension| extension as &dyn Bitmaps)
    }
}

impl Layer for ParallelsLayer {
    fn format(&self) -> &'static str {
        "parallels"
    }

    fn len(&self) -> u64 {
        self.size
    }

    fn notes(&self) -> &[Note] {
        &self.notes
    }

    fn granularity(&self) -> u64 {
        self.cluster
    }

    /// A sector rather than a cluster: the rest of a new cluster is a hole.
    fn write_unit(&self) -> u64 {
        SECTOR
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let mut state = self.lock();
        let (cluster, unit) = (self.cluster, state.header.unit);
        let first = state.offset(range.start() / cluster)?;
        let range = match first {
            None => range,
            Some(offset) => {
                let whole = ByteRange::at(offset, cluster);
                self.relied_on.require_outside("cluster", whole)?;
                let host = offset.saturating_add(range.start() % cluster);
                range.first(self.relied_on.room_at(host))
            }
        };
        let mut len = cluster - range.start() % cluster;
        let mut expected = first;
        // Clusters that are contiguous in the file, or without storage, are one run.
        'run: while len < range.len() {
            let index = (range.start() + len) / cluster;
            let Some(entries) = state.entries(index)? else {
                len = if first.is_none() { range.len() } else { len };
                break;
            };
            if first.is_none() {
                // Equal entries are counted at once: a table may have half a billion of them.
                if entries
                    .first()
                    .and_then(|entry| offset_of(*entry, unit))
                    .is_some()
                {
                    break;
                }
                let count = state.table.count_equal(index)?;
                len = len.saturating_add(count.saturating_mul(cluster));
                continue;
            }
            for entry in entries {
                expected = expected.map(|offset| offset.saturating_add(cluster));
                if offset_of(*entry, unit) != expected || len >= range.len() {
                    break 'run;
                }
                len += cluster;
            }
        }
        let kind = match first {
            None => RunKind::Unallocated { host: None },
            Some(offset) => RunKind::Data {
                device: Arc::clone(&self.file),
                offset: offset.saturating_add(range.start() % cluster),
                holes: HoleMeaning::Ignored,
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

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.release(range)
    }

    fn info(&self) -> Result<Info> {
        // qemu-img prints no cluster size for this format.
        Ok(Info::default())
    }

    fn check_resize(&self, _request: &ResizeRequest) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_resize(request)
    }

    fn flush(&self) -> Result<()> {
        self.mark_closed(&mut self.lock())?;
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            bitmaps: self.bitmaps(),
            supports_bitmaps: true,
            check: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Check for ParallelsLayer {
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        let repair = if self.write { repair } else { Repair::No };
        let report = self.check_table(repair, progress)?;
        if repair != Repair::No {
            self.flush()?;
        }
        Ok(report)
    }
}
