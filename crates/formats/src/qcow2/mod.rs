//! qcow2, versions 2 and 3: QEMU's own format.
//!
//! ```text
//!   header ──► L1 table ──► L2 tables ──► data clusters       guest offset → host offset
//!     │   └──► refcount table ──► refcount blocks             host cluster → how often it is used
//!     ├──► snapshot table (each snapshot has an L1 table of its own)
//!     └──► bitmap directory
//! ```
//!
//! The format is specified in QEMU's interoperability document "qcow2". One file here is one structure of it or one
//! thing done to an image:
//!
//! * `header` (with features, extensions and its rewrites), `entry`, `refcount`: structures, as bytes and as types;
//! * `metadata`: the cache of tables and the refcounts of an open image; `protection`: keeps writes off metadata;
//! * `map`, `write`, `compress`: the mapping of guest bytes to host bytes, and allocation;
//! * `create`, `resize`, `measure`, `check`, `snapshot`, `bitmap`, `info`: operations. The inherent method that does
//!   the work of a trait method `x` is `x_impl`.

mod amend;
mod bitmap;
mod check;
mod compress;
mod create;
mod encrypt;
mod entry;
mod files;
mod header;
mod hex;
mod info;
mod map;
mod measure;
mod metadata;
mod options;
mod protection;
mod refcount;
mod resize;
mod snapshot;
mod write;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use diskimage_core::options::Options;
use diskimage_core::{
    Amend, AmendRequest, Backed, Backing, Budget, ByteRange, Capabilities, Check, CheckReport, Codec,
    CompressionLevel, CreatePlan, CreateRequest, Device, Encoded, EncodedCluster, EncodedForm, EncodedPlan,
    Encoder, Error, ErrorKind, Event, Format, FormatProperties, Info, Layer, Measure, MeasureSource, Note,
    Objects, OpenRequest, Preallocation, Probe, Progress, Repair, ResizeRequest, Result, ResultExt, Run,
    Score, WritePlan, ZeroMode,
};

use self::encrypt::Encrypted;
use self::files::{data_file, read_header};
use self::header::feature::{Autoclear, Compatible, Incompatible};
use self::header::{Header, field};
use self::metadata::Metadata;
use self::protection::corruption::Corruption;
use self::snapshot::SnapshotTable;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::metadata_guard::Kinds;
use crate::layer_kit::offset::{ClusterRange, HostOffset};
use crate::layer_kit::range_claims::RangeClaims;
use crate::layer_kit::repair_on_open;

/// The table entry.
#[derive(Debug)]
pub struct Qcow2Format;

impl Format for Qcow2Format {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(options::CREATE),
                amend_options: Some(amend::AMEND),
                children: &["data-file"],
                implicit_children: &["data-file"],
                strong_options: &["encrypt.key-secret"],
                has_backing: true,
                has_compression: true,
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        let version = probe.head.get(4..8).map_or(0, |field| {
            field.iter().fold(0, |n, byte| n << 8 | u32::from(*byte))
        });
        if probe.head.starts_with(&header::MAGIC.to_be_bytes()) && version >= 2 {
            100
        } else {
            0
        }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Qcow2::open(request)?)
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        // Relative to the current directory, as it is opened.
        let data_file = request.options.text("data_file").map(str::to_owned);
        let plan = CreatePlan::new(move |mut files| create::create(&request, &mut files));
        Ok(plan.with_parts(data_file.into_iter().collect(), files::data_permissions(true)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        measure::measure(options, source)
    }
}

/// An open image.
///
/// The lock of `state` is held while tables are read and written, never during I/O of guest data. Meanwhile `claims`
/// keeps other requests off the clusters; [`RangeClaims`] documents the order of the two locks.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    header: Header,
    file: Arc<dyn Device>,
    /// The device with the stored guest data: the same as `file` unless the image has an external data file.
    data: Arc<dyn Device>,
    /// The encryption of guest data, if the image is encrypted.
    encrypted: Option<Encrypted>,
    /// Whether the image may be written. Cleared once it was amended.
    write: AtomicBool,
    budget: Budget,
    /// Whether the file has far less storage than its tables map; see `map`.
    sparse: OnceLock<bool>,
    /// Handles damage that requests find.
    corruption: Arc<Corruption>,
    /// The kinds of metadata that are guarded against writes.
    overlap_checks: Kinds,
    /// The repairs that were made when the image was opened.
    notes: Vec<Note>,
    state: Mutex<ImageState>,
    /// The clusters that requests in flight may change.
    claims: RangeClaims,
}

/// The parts from which an open image is assembled.
struct Parts {
    header: Header,
    file: Arc<dyn Device>,
    data: Arc<dyn Device>,
    encrypted: Option<Encrypted>,
    budget: Budget,
    overlap_checks: Kinds,
}

/// The state that changes while an image is open.
#[derive(Debug)]
pub(crate) struct ImageState {
    metadata: Metadata,
    size: u64,
    l1: Table,
    snapshots: SnapshotTable,
    /// Freed host ranges. Their refcounts are decremented after the tables that no longer refer to them are durable.
    freed: Vec<ByteRange>,
    /// What becomes of the storage of freed clusters.
    freed_storage: FreedStorage,
    /// Freed host ranges whose storage is discarded in any case: guest data that was zeroed or discarded.
    discarded: Vec<ByteRange>,
    /// From this many bytes of L2 tables on, snapshots change them in copies.
    copied_from: u64,
    /// The file ends in a compressed cluster that is not padded to a sector.
    padding: bool,
    /// The number of clusters that were allocated behind the end although the file had free ones.
    appended: u64,
    /// The state of the persistent bitmaps.
    bitmaps: bitmap::Tracker,
}

/// What becomes of the storage of freed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FreedStorage {
    /// It stays allocated in the file, for the next allocation.
    Kept,
    /// It becomes a hole.
    Discarded,
}

impl ImageState {
    /// The state of an image with this header. Nothing else is read.
    fn new(parts: &Parts) -> Self {
        let header = &parts.header;
        Self {
            metadata: Metadata::new(parts),
            size: header.size,
            l1: Table {
                class: WriteOrder::L1,
                offset: header.l1_table_offset,
                len: u64::from(header.l1_size) * 8,
            },
            snapshots: SnapshotTable {
                offset: header.snapshots_offset,
                count: header.nb_snapshots,
            },
            freed: Vec::new(),
            freed_storage: FreedStorage::Kept,
            discarded: Vec::new(),
            copied_from: refcount::recount::COPIED_FROM,
            padding: false,
            appended: 0,
            bitmaps: bitmap::Tracker::new(header),
        }
    }
}

/// The number of freed ranges that are collected before their refcounts are decremented.
const MAX_FREED: usize = 4096;

impl Qcow2 {
    /// Opens the image on a device.
    ///
    /// # Errors
    /// An invalid header, and a data file that cannot be opened.
    pub(crate) fn open(mut request: OpenRequest<'_>) -> Result<Arc<Self>> {
        let header = read_header(&request.file, request.for_check)?;
        let overlap_checks = protection::overlap_check::parse(request.options, header.geometry)?;
        if header.features.incompatible.has(Incompatible::CORRUPT) && request.write && !request.for_check {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "qcow2: Image is corrupt; cannot be opened read/write",
            ));
        }
        let encrypted = Encrypted::open(&header, &mut request)?;
        let data = match data_file(&header, &mut request)? {
            Some(data) => data,
            None => Arc::clone(&request.file),
        };
        let parts = Parts {
            header,
            file: request.file,
            data,
            encrypted,
            budget: request.context.budget.clone(),
            overlap_checks,
        };
        let mut layer = Self::assemble(parts, request.write, request.write && !request.for_check);
        if layer.may_write() {
            layer.begin_writing(request.for_check)?;
        } else if request.no_data {
            layer.notes = layer.warnings()?;
        }
        layer.notes.extend(layer.header.stale_bitmaps());
        Ok(Arc::new(layer))
    }

    /// Assembles the image from `parts` without reading anything. `write` says whether it may be written, `mark_damage`
    /// whether damage that a request finds sets the corrupt bit.
    fn assemble(parts: Parts, write: bool, mark_damage: bool) -> Self {
        Self {
            state: Mutex::new(ImageState::new(&parts)),
            corruption: Arc::new(Corruption::new(&parts.header, &parts.file, mark_damage)),
            header: parts.header,
            file: parts.file,
            data: parts.data,
            encrypted: parts.encrypted,
            write: AtomicBool::new(write),
            budget: parts.budget,
            sparse: OnceLock::new(),
            overlap_checks: parts.overlap_checks,
            notes: Vec::new(),
            claims: RangeClaims::default(),
        }
    }

    /// The parts of another layer over the same files, with this `header`.
    fn parts(&self, header: Header) -> Parts {
        Parts {
            header,
            file: Arc::clone(&self.file),
            data: Arc::clone(&self.data),
            encrypted: self.encrypted.clone(),
            budget: self.budget.clone(),
            overlap_checks: self.overlap_checks,
        }
    }

    fn lock(&self) -> MutexGuard<'_, ImageState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_write(&self) -> bool {
        self.write.load(Ordering::Relaxed)
    }

    fn has_data_file(&self) -> bool {
        self.header.features.incompatible.has(Incompatible::DATA_FILE)
    }

    fn is_lazy(&self) -> bool {
        self.header.features.compatible.has(Compatible::LAZY_REFCOUNTS)
    }

    /// Clears unknown autoclear features, and repairs an image that was not closed.
    fn begin_writing(&mut self, for_check: bool) -> Result<()> {
        let autoclear = self.header.features.autoclear.0;
        if autoclear & !Autoclear::KNOWN != 0 {
            self.file
                .write_at(&(autoclear & Autoclear::KNOWN).to_be_bytes(), field::AUTOCLEAR)?;
            // The bits must be off before any write that they do not cover.
            self.file.flush()?;
        }
        if self.header.features.incompatible.has(Incompatible::DIRTY) && !for_check {
            self.notes = repair_on_open::run(|progress| self.repair_dirty(progress))
                .context(|| "Could not repair dirty image")?;
            // A repair may have moved tables.
            self.header = read_header(&self.file, false)?;
        }
        if !for_check {
            self.require_end()?;
        }
        self.guard_metadata(&mut self.lock())?;
        if !for_check {
            if self.header.stale_bitmaps().is_some() {
                self.forget_stale_bitmaps()?;
            }
            self.begin_tracking()?;
        }
        Ok(())
    }

    /// What of the image cannot be shown or used, for `info`.
    fn warnings(&self) -> Result<Vec<Note>> {
        let mut warnings = self.bitmap_warnings()?;
        let snapshots = self.readable_snapshots().1;
        warnings.extend(
            snapshots.map(|error| Note::Warning(format!("Not all snapshots can be read: {}", error.chain()))),
        );
        Ok(warnings)
    }

    /// Sets the dirty bit if the image has lazy refcounts.
    fn mark_dirty(&self) -> Result<()> {
        if self.is_lazy() {
            self.corruption.set_incompatible(Incompatible::DIRTY, true)
        } else {
            Ok(())
        }
    }

    /// Writes tables back, then decrements the refcounts of freed clusters.
    fn write_back(&self, state: &mut ImageState) -> Result<()> {
        state.metadata.cache.write_back()?;
        if !state.freed.is_empty() {
            if state.freed_storage == FreedStorage::Discarded || !state.discarded.is_empty() {
                self.ensure_references_counted(state)?;
            }
            state.metadata.cache.sync()?;
            let mut freed = std::mem::take(&mut state.freed);
            let mut discarded = std::mem::take(&mut state.discarded);
            for range in &freed {
                state.metadata.release(*range)?;
            }
            state.metadata.cache.write_back()?;
            if state.freed_storage == FreedStorage::Discarded {
                freed.sort_unstable_by_key(|range| range.start());
                self.punch_holes(state, &freed)?;
            } else if state.metadata.refcounts.references_are_counted() {
                discarded.sort_unstable_by_key(|range| range.start());
                self.punch_holes(state, &discarded)?;
            }
        }
        Ok(())
    }

    /// Discards the storage of clusters that are no longer in use. `freed` is sorted.
    fn punch_holes(&self, state: &mut ImageState, freed: &[ByteRange]) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        let mut hole = ByteRange::new(0, 0);
        for cluster in freed.iter().flat_map(|range| {
            // Without a cluster that ends beyond the range.
            let (start, end) = (HostOffset::new(range.start()), HostOffset::new(range.end()));
            ClusterRange::new(start.cluster(bits), end.cluster(bits))
        }) {
            if state.metadata.count(cluster)? > 0 {
                continue;
            }
            let storage = ClusterRange::at(cluster, 1).bytes(bits);
            if hole.end() == storage.start() {
                hole = ByteRange::new(hole.start(), storage.end());
            } else {
                self.file.discard(hole)?;
                hole = storage;
            }
        }
        self.file.discard(hole)
    }

    /// Frees host bytes, which were metadata of the kinds `own`, once nothing durable refers to them. In a damaged
    /// image, bytes that also belong to other metadata are not freed.
    fn free_later(&self, state: &mut ImageState, range: ByteRange, own: Kinds) -> Result<()> {
        if state.metadata.cache.is_guarded(range, own) {
            return Ok(());
        }
        state.freed.push(range);
        if state.freed.len() >= MAX_FREED {
            self.write_back(state)
        } else {
            Ok(())
        }
    }
}

impl Layer for Qcow2 {
    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn len(&self) -> u64 {
        self.lock().size
    }

    fn granularity(&self) -> u64 {
        self.header.geometry.cluster_size()
    }

    fn write_unit(&self) -> u64 {
        self.header.geometry.subcluster_size()
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let mut state = self.lock();
        let l1 = state.l1;
        self.map_in(&mut state.metadata.cache, l1, range)
    }

    fn needs_whole_file(&self) -> bool {
        // Refcounts decide where new clusters are allocated, and opening has checked the end of the file.
        false
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        Ok(Box::new(self.plan_write_impl(range)?))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.write_zeroes_impl(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.discard_impl(range)
    }

    fn notes(&self) -> &[Note] {
        &self.notes
    }

    fn info(&self) -> Result<Info> {
        self.info_impl()
    }

    fn check_resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_resize_impl(request)
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.resize_impl(request)
    }

    fn is_zero_when_new(&self) -> bool {
        // Preallocated clusters hold zeroes, which do not decrypt to zeroes.
        self.encrypted.is_none() || !self.has_tables()
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        if std::mem::take(&mut state.padding) {
            self.file
                .resize(self.file.len().next_multiple_of(512), Preallocation::Off)?;
        }
        self.write_back(&mut state)?;
        self.file.event(Event::FLUSH_TO_DISK);
        state.metadata.cache.sync()?;
        self.store_bitmaps(&mut state)?;
        self.corruption.clear_dirty()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            codec: Some(self),
            backed: Some(self),
            snapshots: Some(self),
            bitmaps: (self.header.version >= 3).then_some(self),
            supports_bitmaps: self.header.version >= 3,
            bitmap_obstacle: (self.header.version < 3)
                .then_some("Cannot store dirty bitmaps in qcow2 v2 files"),
            check: Some(self),
            amend: Some(self),
            data_file: self.has_data_file().then_some(&self.data),
            unfinished: (self.header.version >= 3).then_some(&*self.corruption),
            keeps_tail: true,
            ..Capabilities::default()
        }
    }
}

impl Codec for Qcow2 {
    fn decode(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        self.decode_impl(encoded, buf)
    }

    fn form(&self) -> Option<EncodedForm> {
        (!self.has_data_file()).then(|| self.form_impl())
    }

    fn decode_and_keep(&self, encoded: &Encoded, buf: &mut [u8], bytes: &mut Vec<u8>) -> Result<bool> {
        self.decode_and_keep_impl(encoded, buf, bytes)
    }

    fn encoder(&self, level: Option<CompressionLevel>) -> Result<Option<Box<dyn Encoder>>> {
        if self.has_data_file() {
            Ok(None)
        } else {
            self.encoder_impl(level).map(Some)
        }
    }

    fn plan_encoded(&self, clusters: &[EncodedCluster]) -> Result<Box<dyn EncodedPlan + '_>> {
        Ok(Box::new(self.plan_encoded_impl(clusters)?))
    }
}

impl Backed for Qcow2 {
    fn backing(&self) -> Option<Backing> {
        self.header.backing.clone()
    }

    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.set_backing_impl(backing)
    }

    fn make_empty(&self) -> Result<()> {
        self.make_empty_impl()
    }
}

impl Check for Qcow2 {
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        self.check_impl(repair, progress)
    }
}

impl Amend for Qcow2 {
    fn amend(&self, request: &AmendRequest<'_>) -> Result<()> {
        self.amend_impl(request)
    }
}
