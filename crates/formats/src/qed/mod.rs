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
//! The format is specified in QEMU's document "QED Image Format". `header` parses and writes the header, `entry` the
//! entries of the tables; [`two_level_map`](crate::layer_kit::two_level_map) reads and changes them.

mod check;
mod create;
mod entry;
mod header;
mod resize;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use diskimage_core::options::Options;
use diskimage_core::{
    Backed, Backing, Budget, ByteRange, Capabilities, Check, CheckReport, CreatePlan, CreateRequest, Device,
    Error, Format, FormatProperties, Info, Layer, Measure, MeasureSource, Objects, OpenRequest, Probe,
    Progress, Repair, ResizeRequest, Result, Run, Score, WritePlan, ZeroMode,
};

use self::entry::Entries;
use self::header::{Geometry, Header, MAGIC, feature};

use crate::layer_kit::metadata_cache::{Table, WriteOrder};

use crate::layer_kit::offset::HostOffset;
use crate::layer_kit::two_level_map::{Shape, TwoLevelMap};

/// The format's entry in the table of formats.
#[derive(Debug)]
pub struct QedFormat;

impl Format for QedFormat {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(create::OPTIONS),
                has_backing: true,
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
        Ok(CreatePlan::new(move |files| {
            create::create(&request, &*files.file)
        }))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        create::measure(options, source)
    }
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
            end: HostOffset::new(header::end_of(file.len(), geometry.cluster_size)),
        };
        let entries = Entries {
            file: Arc::clone(&file),
            geometry,
            first: HostOffset::new(header.first_host()),
            before_first_change: AtomicBool::new(unchecked),
            header: Mutex::new(header),
        };
        let size = entries.header().image_size;
        // As in qemu-img, whose sizes are signed: a disk of 2^63 bytes has none.
        let len = AtomicU64::new(if i64::try_from(size).is_ok() { size } else { 0 });
        let reserved = entries.header().reserved();
        let layer = Self {
            tree: TwoLevelMap::new(file, shape, entries, reserved, &request.context.budget),
            geometry,
            write: request.write,
            len,
            budget: request.context.budget.clone(),
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
        resize::check(self, request)
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_resize(request)?;
        resize::grow(self, request)
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
