//! VMDK, VMware's virtual disks: version 5.0 of its "Virtual Disk Format", and the sparse extents of ESX.
//!
//! ```text
//!   monolithicSparse, streamOptimized             one file
//!   |header|descriptor|directory, tables|directory, tables|grains ...
//!
//!   all other create types                        a descriptor, and files that it names
//!   |descriptor| ──► |extent| |extent| ...       as bytes, or |header|directory, tables|grains ..., or no file: zeroes
//!
//!   grain directory ──► grain tables ──► grains (64 KiB), deflated with a marker in front in streamOptimized:
//!                                        |sector of the disk: 8|length: 4|zlib stream|padding to a sector|
//! ```
//!
//! * `descriptor`, `header`: the on-disk structures, as bytes and as checked types;
//! * `extent`: the files of the disk, opened through the gate;
//! * `tables`: cached pages of directories and tables, and the order in which they are written;
//! * `occupied`: the metadata of an extent, which guest data must not overwrite;
//! * `write`, `stream`: allocation of grains;
//! * `create`, `check`, `info`, `resize` with `layout`: operations.
//!
//! # What a crash leaves
//!
//! Grains are durable before tables refer to them: they leak at worst. The first write changes the content ID in the
//! descriptor. An overlay records that of its parent, and nothing is read from a parent with another one. So once a
//! commit has begun, the overlay alone is not readable, as in qemu-img; its own data stays, and the commit can be run
//! again.

mod check;
mod create;
mod descriptor;
mod extent;
mod header;
mod info;
mod layout;
mod occupied;
mod resize;
mod stream;
mod tables;
#[cfg(test)]
mod tests;
mod write;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use diskimage_core::options::Options;
use diskimage_core::{
    Backed, Backing, BackingIdentity, BackingSearch, Budget, ByteRange, Capabilities, Check, CheckReport,
    Codec, CompressionLevel, CreatePlan, CreateRequest, Device, Encoded, EncodedCluster, EncodedForm,
    EncodedPlan, Encoder, Error, ErrorKind, Event, Format, FormatProperties, HoleMeaning, Info, LOOSE, Layer,
    MAX_DEVICE_LEN, Measure, MeasureSource, MultiFile, Name, Note, Objects, OpenRequest, Preallocation,
    Probe, Progress, Repair, ResizeRequest, Result, Run, RunKind, Score, WritePlan, ZeroMode, errno, is_zero,
    to_index,
};

use self::descriptor::{Descriptor, NO_PARENT};
use self::extent::{Extent, Storage};
use self::header::{Geometry, Hosted, SECTOR};
use self::occupied::Occupied;
use self::tables::{Grain, GrainTables};
use crate::codec;
use crate::layer_kit::clear::zero_existing;
use crate::layer_kit::foreign_name::{names_beside, own_name};
use crate::layer_kit::random;
use crate::layer_kit::range_claims::RangeClaims;

/// The format's entry in the table of formats.
#[derive(Debug)]
pub struct Vmdk;

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(create::OPTIONS),
                has_backing: true,
                has_compression: true,
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        let sparse = [header::HOSTED_MAGIC, header::COWD_MAGIC];
        if sparse.iter().any(|magic| probe.head.starts_with(magic)) || descriptor::is_descriptor(probe.head) {
            100
        } else if descriptor::is_loose_descriptor(probe.head) {
            LOOSE
        } else {
            0
        }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(VmdkLayer::open(&request)?))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        create::plan(request)
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        create::measure(options, source)
    }
}

/// An open image.
///
/// `state` is locked while tables are read and written, never during guest I/O. `claims` serializes requests to the same
/// grains; [`RangeClaims`] says in which order it and `state` are locked. `extents` is locked last.
#[derive(Debug)]
struct VmdkLayer {
    file: Arc<dyn Device>,
    /// The name of the image. Names of extents are relative to its directory.
    name: String,
    /// The bytes of `file` that hold the descriptor; `None` if the file holds nothing else.
    descriptor_range: Option<ByteRange>,
    descriptor: Descriptor,
    /// The extents in disk order, without gaps. Growing the disk replaces the whole list.
    extents: RwLock<Arc<[Extent]>>,
    /// Bytes of a grain; 1 if no extent has grains.
    grain: u64,
    /// Whether grains are deflated.
    compressed: bool,
    budget: Budget,
    notes: Vec<Note>,
    state: Mutex<State>,
    /// Grains that requests in flight are about to change.
    claims: RangeClaims,
}

/// What changes while an image is open.
#[derive(Debug)]
struct State {
    tables: GrainTables,
    /// For each extent, the host offset at which the next grain is allocated.
    free: Vec<u64>,
    cid: u32,
    /// The metadata of sparse extents, by extent index; read before the first write to each.
    occupied: HashMap<usize, Occupied>,
    /// Whether the descriptor has a new CID since the image was opened.
    marked: bool,
}

impl VmdkLayer {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        if request.file.is_empty() {
            return Err(Error::corrupt("File is too small, not a valid image"));
        }
        let mut magic = [0; 4];
        request.file.read_padded(&mut magic, 0)?;
        if magic == header::HOSTED_MAGIC {
            let mut hosted = Hosted::read(&*request.file)?;
            let range = embedded_descriptor(&request.file, &hosted.geometry)?;
            hosted.geometry.descriptor = range;
            if hosted.geometry.capacity > 0 {
                if request.write {
                    hosted.geometry.require_handled()?;
                }
                let bytes = read_descriptor(&request.file, Some(range))?;
                let descriptor = if hosted.geometry.compressed && is_zero(&bytes) {
                    Descriptor::of_bare_stream()
                } else {
                    with_name(request, Descriptor::parse_head(&bytes))?
                };
                let extents = vec![extent::embedded(&request.file, request.name, &hosted)?];
                return Self::new(request, Some(range), descriptor, extents);
            }
            return Self::open_described(request, Some(range));
        }
        Self::open_described(request, None)
    }

    /// Opens an image whose extents are in files of their own.
    fn open_described(request: &OpenRequest<'_>, range: Option<ByteRange>) -> Result<Self> {
        let bytes = read_descriptor(&request.file, range)?;
        let Some(create_type) = Descriptor::create_type(&bytes) else {
            return Err(Error::corrupt("invalid VMDK image descriptor"));
        };
        if !SEPARATE
            .iter()
            .any(|known| known.eq_ignore_ascii_case(&create_type))
        {
            return Err(Error::unsupported(format!(
                "Unsupported image type '{create_type}'"
            )));
        }
        let mut descriptor = with_name(request, Descriptor::parse(&bytes))?;
        let extents = extent::open_all(&descriptor, request)?;
        // Their lines, of which there may be thousands, are not needed any more.
        descriptor.extents = Vec::new();
        Self::new(request, range, descriptor, extents)
    }

    fn new(
        request: &OpenRequest<'_>,
        descriptor_range: Option<ByteRange>,
        descriptor: Descriptor,
        extents: Vec<Extent>,
    ) -> Result<Self> {
        let len = extents.last().map_or(0, Extent::end);
        if len > MAX_DEVICE_LEN {
            return Err(extent::too_large());
        }
        let mut geometries = extents.iter().filter_map(Extent::geometry);
        let grain = geometries.clone().next().map_or(1, |geometry| geometry.grain);
        let compressed = geometries.any(|geometry| geometry.compressed);
        if compressed && request.write && extents.len() > 1 {
            return Err(Error::unsupported(
                "Compressed extents can only be written where they are the only one",
            ));
        }
        let mut notes = Vec::new();
        for extent in &extents {
            let compressed = extent.geometry().is_some_and(|geometry| geometry.compressed);
            if compressed && !extent.is_on_device() && stream::lacks_end(&*extent.device)? {
                let text = format!(
                    "'{}' has no end-of-stream marker, it may have been cut off",
                    extent.name
                );
                notes.push(Note::Warning(text));
            }
        }
        let mut tables = GrainTables::default();
        let mut free = Vec::new();
        for (index, extent) in extents.iter().enumerate() {
            free.push(match extent.geometry() {
                Some(geometry) if request.write && extent.is_on_device() => {
                    let end = stream::end_of_contents(&mut tables, &extents, index, &geometry)?;
                    end.checked_next_multiple_of(extent.unit()).unwrap_or(u64::MAX)
                }
                _ => extent.end_of_file(),
            });
        }
        let state = State {
            tables,
            free,
            cid: descriptor.cid,
            occupied: HashMap::new(),
            marked: false,
        };
        Ok(Self {
            file: Arc::clone(&request.file),
            name: request.name.to_owned(),
            descriptor_range,
            descriptor,
            extents: RwLock::new(extents.into()),
            grain,
            compressed,
            budget: request.context.budget.clone(),
            notes,
            state: Mutex::new(state),
            claims: RangeClaims::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extents(&self) -> Arc<[Extent]> {
        Arc::clone(&self.extents.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The grains of `extent` that `range` touches; `range` is in guest offsets and lies in `extent`.
    fn grains(extent: &Extent, geometry: &Geometry, range: ByteRange) -> ByteRange {
        let (start, end) = (extent.within(range.start()), extent.within(range.end()));
        ByteRange::new(start / geometry.grain, end.div_ceil(geometry.grain))
    }

    fn map_sparse(
        &self,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        range: ByteRange,
    ) -> Result<Run> {
        let extent = &extents[index];
        let grains = Self::grains(extent, geometry, range);
        let (grain, count) = self.lock().tables.scan(extents, index, geometry, grains)?;
        let first = extent.start + grains.start() * geometry.grain;
        let into = range.start() - first;
        let mut len = (count * geometry.grain).saturating_sub(into).min(range.len());
        if let Grain::At(offset) = grain {
            let relied_on = &extent.relied_on;
            if geometry.compressed {
                relied_on.require_outside("grain", ByteRange::at(offset, 1))?;
            } else {
                relied_on.require_outside("grain", ByteRange::at(offset, geometry.grain))?;
                len = len.min(relied_on.room_at(offset).saturating_sub(into));
            }
        }
        let kind = match grain {
            Grain::Unallocated => RunKind::Unallocated { host: None },
            Grain::Zero => RunKind::Zero { host: None },
            Grain::At(offset) if geometry.compressed => RunKind::Encoded(Encoded {
                offset,
                stored: stream::most_stored(geometry),
                cluster: ByteRange::at(first, geometry.grain),
            }),
            Grain::At(offset) => RunKind::Data {
                device: Arc::clone(&extent.device),
                offset: offset.saturating_add(into),
                holes: HoleMeaning::Ignored,
            },
        };
        Ok(Run { len, kind })
    }

    /// Writes a new CID before the first change of the disk.
    fn mark_changed(&self, state: &mut State) -> Result<()> {
        if state.marked {
            return Ok(());
        }
        self.require_descriptor(state)?;
        if self.compressed {
            self.continue_stream(state)?;
        }
        let cid = new_cid()?;
        self.change_descriptor(|old| Descriptor::with_cid(old, cid))?;
        // The CID is durable before any new data is: an overlay must not take the new contents for those that it was
        // made on.
        self.file.flush()?;
        state.cid = cid;
        state.marked = true;
        Ok(())
    }

    /// Overwrites the descriptor in place with the text that `change` makes of it.
    fn change_descriptor(&self, change: impl FnOnce(&[u8]) -> Vec<u8>) -> Result<()> {
        let old = self.read_descriptor()?;
        descriptor::require_changeable(&old)?;
        let mut bytes = change(&old);
        self.require_room(&bytes)?;
        // Only zero padding may be overwritten. Other bytes in the range that the header gives belong to another
        // structure.
        let old_len = old.iter().position(|byte| *byte == 0).unwrap_or(old.len());
        bytes.resize(bytes.len().max(old_len), 0);
        let added = old.get(old_len..bytes.len().min(old.len()));
        if added.is_some_and(|added| !is_zero(added)) {
            return Err(Error::from_errno(errno::ENOSPC));
        }
        let start = self.descriptor_range.map_or(0, ByteRange::start);
        self.file.write_at(&bytes, start)
    }

    fn read_descriptor(&self) -> Result<Vec<u8>> {
        read_descriptor(&self.file, self.descriptor_range)
    }

    /// Refuses a descriptor that is longer than the range of the old one.
    fn require_room(&self, text: &[u8]) -> Result<()> {
        let room = self.descriptor_range.map_or(descriptor::MAX_LEN, ByteRange::len);
        if text.len() as u64 > room {
            return Err(Error::from_errno(errno::ENOSPC));
        }
        Ok(())
    }
}

/// The create types of images whose descriptor is in a file of its own. The extents' lines say all that differs between
/// them.
const SEPARATE: &[&str] = &[
    "monolithicFlat",
    "vmfs",
    "vmfsSparse",
    "seSparse",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "2GbMaxExtentSparse",
    "2GbMaxExtentFlat",
    "streamOptimized",
    "vmfsThin",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
    "vmfsRaw",
    "vmfsRDM",
    "vmfsRDMP",
    "vmfsRawDeviceMap",
    "vmfsPassthroughRawDeviceMap",
    "custom",
    "fullDevice",
    "partitionedDevice",
];

/// Names the image in an error that is only an error number.
fn with_name(request: &OpenRequest<'_>, descriptor: Result<Descriptor>) -> Result<Descriptor> {
    descriptor.map_err(|error| match error.errno() {
        Some(_) => error.context(format!("Could not open '{}'", request.name)),
        None => error,
    })
}

/// How far a descriptor behind the header reaches at most.
const EMBEDDED_END: u64 = 21 * SECTOR;

/// Where the descriptor of a sparse file is: as its header says or, if none is there, right behind the header, where qemu-img
/// reads it in any case.
fn embedded_descriptor(file: &Arc<dyn Device>, geometry: &Geometry) -> Result<ByteRange> {
    let stated = geometry.descriptor;
    let tables = geometry
        .redundant
        .map_or(geometry.directory, |at| at.min(geometry.directory));
    let behind_header = ByteRange::new(SECTOR, tables.clamp(SECTOR, EMBEDDED_END));
    for range in [stated, behind_header] {
        if descriptor::is_descriptor(&read_descriptor(file, Some(range))?) {
            return Ok(range);
        }
    }
    Ok(stated)
}

/// Reads the descriptor in `file`: the bytes of `range`, or the whole file.
///
/// # Errors
/// Those of reading, and a text that goes on beyond [`descriptor::MAX_LEN`]: extents would be missing.
fn read_descriptor(file: &Arc<dyn Device>, range: Option<ByteRange>) -> Result<Vec<u8>> {
    let range = range.unwrap_or(ByteRange::new(0, file.len()));
    let len = range.len().min(descriptor::MAX_LEN);
    let mut bytes = vec![0; to_index(len)?];
    file.read_padded(&mut bytes, range.start())?;
    if len < range.len() && !bytes.contains(&0) {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("The descriptor has more than {} bytes", descriptor::MAX_LEN),
        ));
    }
    Ok(bytes)
}

/// A new random content ID.
fn new_cid() -> Result<u32> {
    let mut bytes = [0; 4];
    random::fill(&mut bytes)?;
    // The highest number stands for "no parent".
    Ok(u32::from_le_bytes(bytes).min(NO_PARENT - 1))
}

impl Layer for VmdkLayer {
    fn format(&self) -> &'static str {
        "vmdk"
    }

    fn notes(&self) -> &[Note] {
        &self.notes
    }

    fn len(&self) -> u64 {
        self.extents().last().map_or(0, Extent::end)
    }

    fn granularity(&self) -> u64 {
        self.grain
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let extents = self.extents();
        let (index, extent) = extent::at(&extents, range.start())?;
        let range = range.intersect(ByteRange::new(extent.start, extent.end()));
        match extent.storage {
            Storage::Flat { offset } => Ok(Run {
                len: range.len(),
                kind: RunKind::Data {
                    device: Arc::clone(&extent.device),
                    offset: offset + extent.within(range.start()),
                    holes: HoleMeaning::ZeroData,
                },
            }),
            Storage::Sparse(geometry) => self.map_sparse(&extents, index, &geometry, range),
            Storage::Zero => Ok(Run {
                len: range.len(),
                kind: RunKind::Zero { host: None },
            }),
            Storage::NoAccess => Err(extent.no_access()),
        }
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        match self.compressed {
            true => stream::plan(self, range),
            false => write::plan(self, range),
        }
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.zero(range, mode)
    }

    fn info(&self) -> Result<Info> {
        Ok(self.collect_info())
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.grow(request)
    }

    fn check_resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_size(request)
    }

    fn is_zero_when_new(&self) -> bool {
        self.extents().iter().all(|extent| match extent.storage {
            Storage::Flat { .. } => extent.device.is_zero_when_new(),
            Storage::Sparse(_) | Storage::Zero => true,
            Storage::NoAccess => false,
        })
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        let extents = self.extents();
        for (extent, free) in extents.iter().zip(&state.free) {
            let Some(geometry) = extent.geometry().filter(|_| state.marked) else {
                continue;
            };
            let end = match geometry.compressed {
                // The end-of-stream marker is a sector of zeroes.
                true => *free + SECTOR,
                // The last grain is stored with its full length.
                false => *free,
            };
            if extent.is_on_device() {
                let marker = ByteRange::new(*free, end);
                zero_existing(&*extent.device, marker, ZeroMode::KeepAllocated)?;
            } else if extent.device.len() < end {
                extent.device.resize(end, Preallocation::Off)?;
            }
        }
        state.tables.write_back(&extents)?;
        self.file.event(Event::FLUSH_TO_DISK);
        for (_, part) in self.parts() {
            part.flush()?;
        }
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            codec: Some(self),
            backed: Some(self),
            check: Some(self),
            multi_file: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Codec for VmdkLayer {
    fn require_encoded(&self, encoded: &Encoded) -> Result<()> {
        let extents = self.extents();
        let (_, extent) = extent::at(&extents, encoded.cluster.start())?;
        let len = stream::stored_len(&*extent.device, encoded.offset)?;
        extent.device.require(encoded.offset, len)
    }

    fn decode(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        self.decode_grain(encoded, buf)
    }

    fn form(&self) -> Option<EncodedForm> {
        self.compressed.then_some(EncodedForm {
            codec: codec::ZLIB,
            cluster: self.grain,
        })
    }

    fn decode_and_keep(&self, encoded: &Encoded, buf: &mut [u8], bytes: &mut Vec<u8>) -> Result<bool> {
        self.decode_and_keep_grain(encoded, buf, bytes)
    }

    fn encoder(&self, level: Option<CompressionLevel>) -> Result<Option<Box<dyn Encoder>>> {
        stream::encoder(self, level).map(Some)
    }

    fn plan_encoded(&self, clusters: &[EncodedCluster]) -> Result<Box<dyn EncodedPlan + '_>> {
        Ok(Box::new(self.plan_grains(clusters)?))
    }

    fn needs_encoding(&self) -> bool {
        self.compressed
    }
}

impl Backed for VmdkLayer {
    fn backing(&self) -> Option<Backing> {
        let name = self.descriptor.parent.clone()?;
        Some(Backing {
            name,
            format: Some("vmdk".to_owned()),
        })
    }

    fn cid(&self) -> Option<u32> {
        Some(self.lock().cid)
    }

    fn check_backing(&self, backing: &dyn Layer) -> Result<BackingIdentity> {
        let expected = self.descriptor.parent_cid;
        let Some(found) = backing.cid().filter(|found| *found != expected) else {
            return Ok(BackingIdentity::Recorded);
        };
        Ok(BackingIdentity::Other(format!(
            "The backing image has the content ID {found:#010x}, but '{}' was made when it was {expected:#010x} \
             (parentCID): the backing image has changed since, or is another one",
            self.name
        )))
    }

    fn backing_search(&self) -> BackingSearch {
        let Some(parent) = &self.descriptor.parent else {
            return BackingSearch::default();
        };
        let decoded = self.descriptor.decoded_parent.as_ref();
        let text = decoded.unwrap_or(parent).text();
        let mut names = vec![text.to_owned()];
        names.extend(names_beside(text));
        // Last comes the file name, which is also looked for in other letter case.
        names.push(own_name(text).to_owned());
        BackingSearch {
            names: names.into_iter().map(Name::from).collect(),
            ..BackingSearch::default()
        }
    }
}

impl Check for VmdkLayer {
    fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        if repair != Repair::No {
            return Err(Error::unsupported("This image format does not support checks"));
        }
        self.run_check(progress)
    }
}

impl MultiFile for VmdkLayer {
    fn parts(&self) -> Vec<(String, Arc<dyn Device>)> {
        let extents = self.extents();
        let separate = extents.iter().filter(|extent| extent.has_part());
        separate
            .zip(0..)
            .map(|(extent, nth): (_, usize)| (format!("extents.{nth}"), Arc::clone(&extent.device)))
            .collect()
    }

    fn new_parts(&self, request: &ResizeRequest) -> Result<Vec<String>> {
        self.added_parts(request)
    }
}
