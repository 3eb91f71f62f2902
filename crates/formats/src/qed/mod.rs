//! qed: QEMU's format between the two versions of qcow2, designed to need few flushes.
//!
//! ```text
//!   | header | L1 table | cluster | L2 table | cluster | cluster | ...
//!     1..n     table_size           table_size               clusters
//!
//!   header ──► L1 table ──► L2 tables ──► clusters          guest offset → host offset
//! ```
//!
//! An entry is 0 if its table or cluster is unallocated, 1 (in an L2 table) if the cluster reads as zero, else a host
//! offset. All numbers are little-endian. Storage is never freed: there are no refcounts, and clusters that nothing
//! refers to leak. While clusters are being allocated, a bit in the header says that the image has to be checked when
//! it is opened again.
//!
//! The format is specified in QEMU's document "QED Image Format". `header` parses and writes the header, `check` checks
//! the tables; [`two_level_map`](crate::layer_kit::two_level_map) reads and changes them.

mod check;
mod header;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    Backed, Backing, Budget, ByteRange, Capabilities, Check, CheckReport, CreatePlan, CreateRequest, Device,
    Error, ErrorKind, Format, FormatProperties, Info, Layer, Measure, MeasureSource, Objects, OpenRequest,
    Preallocation, Probe, Progress, Repair, ResizeRequest, Result, Run, Score, WritePlan, ZeroMode, errno,
};

use self::header::{Geometry, Header, MAGIC, feature};
use crate::KNOWN_FORMATS;
use crate::layer_kit::count_used;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::preallocation;
use crate::layer_kit::two_level_map::{Cluster, EntryCodec, Shape, TwoLevelMap};

/// The format's entry in the table of formats.
#[derive(Debug)]
pub struct QedFormat;

const CREATE_OPTIONS: &[OptionDef] = &[
    OptionDef {
        name: "size",
        kind: OptionKind::Size,
        help: "Virtual disk size",
        default: None,
    },
    OptionDef {
        name: "backing_file",
        kind: OptionKind::Text,
        help: "File name of a base image",
        default: None,
    },
    OptionDef {
        name: "backing_fmt",
        kind: OptionKind::Text,
        help: "Image format of the base image",
        default: None,
    },
    OptionDef {
        name: "cluster_size",
        kind: OptionKind::Size,
        help: "Cluster size (in bytes)",
        default: Some("65536"),
    },
    OptionDef {
        name: "table_size",
        kind: OptionKind::Size,
        help: "L1/L2 table size (in clusters)",
        default: None,
    },
];

/// Clusters of a table without the option `table_size`.
const DEFAULT_TABLE_SIZE: u64 = 4;

impl Format for QedFormat {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(CREATE_OPTIONS),
                has_backing: true,
                keeps_failed_file: true,
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if probe.head.starts_with(&MAGIC.to_le_bytes()) {
            100
        } else {
            0
        }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(Qed::open(request)?))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        Ok(CreatePlan::new(move |files| create(&request, &*files.file)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        let header = new_header(options, source.len())?;
        let size = header.geometry.cluster_size;
        let backed = header.backing.is_some();
        let used = count_used::clusters(source, size, header.geometry.coverage(), backed)?;
        let all = count_used::all_clusters(source.len(), size, header.geometry.coverage());
        let bytes = |(clusters, tables): (u64, u64)| {
            let start = header.l1_offset + header.geometry.table_len();
            start + clusters * size + tables * header.geometry.table_len()
        };
        Ok(Measure {
            required: bytes(used),
            fully_allocated: bytes(all),
            bitmaps: None,
        })
    }
}

/// Writes a new image to `file`.
fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    preallocation::check(request.options)?;
    let header = new_header(request.options, request.size)?;
    let geometry = header.geometry;
    let tables = ByteRange::at(header.l1_offset, geometry.table_len());
    if file.is_zero_when_new() {
        file.resize(tables.end(), Preallocation::Off)?;
    } else {
        file.write_zeroes(tables, ZeroMode::KeepAllocated)?;
    }
    header.write(file, true)
}

/// The header of a new image.
fn new_header(options: &Options, size: u64) -> Result<Header> {
    let backing_format = options.text("backing_fmt");
    if let Some(name) = backing_format.filter(|name| !KNOWN_FORMATS.contains(name)) {
        return Err(Error::invalid(format!(
            "Parameter 'backing-fmt' does not accept value '{name}'"
        )));
    }
    let cluster_size = options.size("cluster_size").unwrap_or(0);
    let table_size = options.size("table_size").unwrap_or(DEFAULT_TABLE_SIZE);
    let geometry = Geometry::for_new(cluster_size, table_size)?;
    let image_size = size.checked_next_multiple_of(header::SECTOR);
    let image_size = image_size.filter(|size| geometry.fits(*size)).ok_or_else(|| {
        Error::invalid(format!(
            "QED image size must be a non-zero multiple of cluster size and less than {} bytes",
            geometry.max_size()
        ))
    })?;
    let backing = options.text("backing_file").map(|name| Backing {
        name: name.into(),
        format: backing_format.map(str::to_owned),
    });
    let mut header = Header::new(geometry, image_size);
    header.set_backing(backing.as_ref())?;
    Ok(header)
}

/// An open image.
#[derive(Debug)]
struct Qed {
    tree: TwoLevelMap<Entries>,
    geometry: Geometry,
    write: bool,
    len: AtomicU64,
    budget: Budget,
}

impl Qed {
    fn open(request: OpenRequest<'_>) -> Result<Self> {
        let file = request.file;
        let mut header = header::read(&*file)?;
        if request.write && header.autoclear != 0 {
            header.autoclear = 0;
            // Autoclear bits are cleared before the first change, for which they might not hold.
            header.write(&*file, false)?;
        }
        let unchecked = header.features & feature::NEED_CHECK != 0;
        let geometry = header.geometry;
        let shape = Shape {
            cluster_size: geometry.cluster_size,
            l1: Table {
                class: WriteOrder::L1,
                offset: header.l1_offset,
                len: geometry.table_len(),
            },
            l2_len: geometry.table_len(),
            // Rounded down: no entry refers to a cluster that the file has only in part.
            end: header::end_of(file.len(), geometry.cluster_size),
        };
        let entries = Entries {
            file: Arc::clone(&file),
            geometry,
            first: header.first_host(),
            before_first_change: AtomicBool::new(unchecked),
            header: Mutex::new(header),
        };
        let size = entries.header().image_size;
        // As in qemu-img, whose sizes are signed: a disk of 2^63 bytes has none.
        let len = AtomicU64::new(if i64::try_from(size).is_ok() { size } else { 0 });
        let reserved = entries.header().reserved();
        let layer = Self {
            tree: TwoLevelMap::new(file, shape, entries, reserved, &request.budget),
            geometry,
            write: request.write,
            len,
            budget: request.budget,
        };
        if request.write && unchecked && !request.for_check {
            layer.check(Repair::All, &Progress::none())?;
        }
        Ok(layer)
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.tree.scheme().header()
    }

    fn require_writable(&self) -> Result<()> {
        if self.write {
            Ok(())
        } else {
            Err(Error::read_only())
        }
    }
}

impl Layer for Qed {
    fn format(&self) -> &'static str {
        "qed"
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn granularity(&self) -> u64 {
        self.geometry.cluster_size
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        self.tree.map(range)
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        self.require_writable()?;
        self.tree.plan_write(range)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_writable()?;
        self.tree.zero_clusters(range, mode)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: Some(self.geometry.cluster_size),
            ..Info::default()
        })
    }

    fn check_resize(&self, request: &ResizeRequest) -> Result<()> {
        preallocation::require_off(request.preallocation)?;
        if !self.geometry.fits(request.len) {
            return Err(Error::invalid("Invalid image size specified"));
        }
        // The size in the header may be larger than that of the disk.
        if request.len < self.header().image_size {
            return Err(Error::unsupported("Shrinking images is currently not supported"));
        }
        Ok(())
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_resize(request)?;
        let shown = ByteRange::new(self.len(), request.backing_len.min(request.len))
            .align_out(self.geometry.cluster_size);
        // The partial last cluster is not zeroed: it holds the end of the disk.
        let shown = ByteRange::new(
            self.len().next_multiple_of(self.geometry.cluster_size),
            shown.end(),
        );
        if !shown.is_empty() {
            self.tree.zero_clusters(shown, ZeroMode::Unmap)?;
        }
        self.tree.flush()?;
        self.tree.scheme().change_header(|header| {
            header.image_size = request.len;
            Ok(())
        })?;
        self.len.store(request.len, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.tree.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        self.tree.file()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            backed: Some(self),
            check: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Backed for Qed {
    fn backing(&self) -> Option<Backing> {
        self.header().backing.clone()
    }

    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.require_writable()?;
        // Data that was written to this image must be durable before its backing image changes.
        self.tree.flush()?;
        self.tree
            .scheme()
            .change_header(|header| header.set_backing(backing))
    }
}

impl Check for Qed {
    fn check(&self, repair: Repair, _progress: &Progress<'_>) -> Result<CheckReport> {
        let report = check::check(self, repair)?;
        if self.write && repair != Repair::No {
            self.tree.flush()?;
        }
        Ok(report)
    }
}

/// The encoding of qed's table entries.
#[derive(Debug)]
struct Entries {
    file: Arc<dyn Device>,
    geometry: Geometry,
    /// The host offset behind the header, the first that an entry can have.
    first: u64,
    header: Mutex<Header>,
    /// Whether the header says that the image has to be checked.
    before_first_change: AtomicBool,
}

/// The L2 entry of a cluster that reads as zero.
const ZERO: u64 = 1;

impl Entries {
    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the header, durably.
    fn change_header(&self, change: impl FnOnce(&mut Header) -> Result<()>) -> Result<()> {
        let mut header = self.header();
        let mut new = header.clone();
        change(&mut new)?;
        new.write(&*self.file, new.backing != header.backing)?;
        *header = new;
        Ok(())
    }

    fn mark(&self, need_check: bool) -> Result<()> {
        if self.before_first_change.load(Ordering::Relaxed) == need_check {
            return Ok(());
        }
        let mut header = self.header();
        let mut new = header.clone();
        new.set_feature(feature::NEED_CHECK, need_check);
        new.write(&*self.file, false)?;
        *header = new;
        self.before_first_change.store(need_check, Ordering::Relaxed);
        Ok(())
    }

    /// Whether `len` bytes at `offset` are whole clusters behind the header and before `end`.
    fn is_valid(&self, offset: u64, len: u64, end: u64) -> bool {
        offset.is_multiple_of(self.geometry.cluster_size)
            && offset >= self.first
            && offset.checked_add(len).is_some_and(|last| last <= end)
    }

    /// The error for an entry that refers to `len` bytes at `offset`.
    fn invalid(&self, offset: u64, len: u64) -> Error {
        let placed = offset.is_multiple_of(self.geometry.cluster_size) && offset >= self.first;
        let missing = self.file.require(offset, len).err().filter(|_| placed);
        missing.unwrap_or_else(|| Error::damage(ErrorKind::Invalid, errno::EINVAL))
    }
}

impl EntryCodec for Entries {
    const BIG_ENDIAN: bool = false;
    const TABLES_FIRST: bool = false;

    fn l2_table(&self, entry: u64, end: u64) -> Result<Option<u64>> {
        match entry {
            0 => Ok(None),
            offset if self.is_valid(offset, self.geometry.table_len(), end) => Ok(Some(offset)),
            // As in qemu-img, a missing table is the same error as an invalid offset.
            offset => {
                let error = self.invalid(offset, self.geometry.table_len());
                Err(Error::damage(error.kind(), errno::EINVAL))
            }
        }
    }

    fn cluster(&self, entry: u64, end: u64) -> Result<Cluster> {
        match entry {
            0 => Ok(Cluster::None),
            ZERO => Ok(Cluster::Zero),
            offset if self.is_valid(offset, self.geometry.cluster_size, end) => Ok(Cluster::Host(offset)),
            offset => Err(self.invalid(offset, self.geometry.cluster_size)),
        }
    }

    fn word(&self, cluster: Cluster) -> u64 {
        match cluster {
            Cluster::None => 0,
            Cluster::Zero => ZERO,
            Cluster::Host(offset) | Cluster::Encoded { offset, .. } => offset,
        }
    }

    fn zero(&self) -> Option<Cluster> {
        Some(Cluster::Zero)
    }

    fn before_first_change(&self) -> Result<()> {
        self.mark(true)
    }

    fn settled(&self) -> Result<()> {
        self.mark(false)
    }
}
