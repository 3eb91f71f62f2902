//! Conversion: copies the guest data of one or more images into a new one.
//!
//! A cursor hands out segments of the guest disk to workers. Each worker queries the allocation status of its segment,
//! reads the data, finds zeroes, compresses if asked to, and writes in one of two ways:
//!
//! ```text
//!   cursor ──▶ worker: status → read → zero test → (encode) ──▶ positional: write at the guest offset
//!          ──▶ worker: ...                                  ──▶ in order:   wait for the turn, allocate clusters,
//!                                                                           pass the turn on, write, commit
//! ```
//!
//! Writing in order allocates clusters in guest order, so the target file is the same whatever the number of threads.
//! The buffers take at most workers times segment bytes, whatever sizes the images claim. The first error in guest
//! order stops the conversion and is reported; the caller removes the incomplete target.

mod mark;
mod rate;
mod runs;
mod source;
mod worker;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use diskimage_core::{
    ByteRange, CompressionLevel, Device, Encoder, Error, Image, Progress, Result, align_up, errno,
    saturating_index, to_index,
};

use crate::cursor::Cursor;
use crate::files::{files_of, files_of_chain, flush};
use crate::steps::{Origin, Part, STEP, Steps};
use crate::workers;
use mark::Mark;
use rate::RateLimit;
use runs::CopyKind;
use source::Sources;
use worker::Worker;

/// The sources, the target and the options of a conversion.
pub struct Conversion<'a> {
    /// The images to copy, concatenated.
    pub sources: &'a [Arc<Image>],
    /// The image to write; opened for writing and at least as large as the sources together.
    pub target: &'a Image,
    /// Zeroes in runs of at least this many bytes are not written as data. With 0 all zeroes are written as data.
    pub sparse: u64,
    /// Whether to compress. Whole clusters of zeroes are left unallocated.
    pub compress: bool,
    /// With [`Conversion::compress`]: how hard. That of the creation options is
    /// [`Prepared::compression_level`](crate::Prepared::compression_level).
    pub compression_level: Option<CompressionLevel>,
    /// Whether clusters of the target may be allocated in any order.
    pub out_of_order: bool,
    /// Whether segments are written in guest order to every target. After an error everything before the first segment
    /// that failed is written, and nothing of it or after it.
    pub in_order: bool,
    /// Receives the guest offset of the first segment that failed.
    pub failed_at: Option<&'a AtomicU64>,
    /// The largest number of threads; without it, one per processor and one more.
    pub parallel: Option<NonZeroU32>,
    /// The limit of bytes written per second.
    pub rate: Option<u64>,
    /// Whether to let the storage copy data (`copy_file_range`), without a search for zeroes in it.
    pub copy_offload: bool,
    /// Whether to write zeroes for sectors that cannot be read, and to go on.
    pub salvage: bool,
    /// The length of the target's backing image, if it has one with the same guest data as the source's backing image.
    /// Only the data of the topmost [`Conversion::layers`] images of the source is copied then.
    pub backing_len: Option<u64>,
    /// With [`Conversion::backing_len`]: the number of images of the source's chain whose data is copied.
    pub layers: u32,
    /// Whether to search for zeroes in extents that the tables of the source report as data.
    pub detect_zeroes: bool,
    /// Whether every unallocated cluster of the target reads as zero or as its backing image.
    pub target_is_zero: bool,
    /// Whether the target held something before. It is marked as incomplete until everything is copied and durable, as far
    /// as its format allows.
    pub existing_target: bool,
    /// With `salvage`: called for each sector that cannot be read.
    pub on_lost: Option<OnLost<'a>>,
    /// Receives the number of bytes done and the total.
    pub progress: Progress<'a>,
    /// Whether progress counts the data of the sources only, in the steps of `qemu-img`. Their status is then queried
    /// before anything is copied.
    pub data_steps: bool,
}

/// Takes the error of an unreadable sector; its message has the guest offset.
pub type OnLost<'a> = &'a (dyn Fn(&Error) + Sync);

/// The default of [`Conversion::sparse`], which is that of `qemu-img`.
pub const DEFAULT_SPARSE: u64 = 4096;

/// The largest value of [`Conversion::sparse`]; a limit of `qemu-img`.
pub const MAX_SPARSE: u64 = 16 << 20;

/// Images are concatenated at multiples of this, and zeroes are searched for in units of it.
const SECTOR: u64 = 512;

/// The length of a segment in bytes. The clusters of one segment are allocated at once. Longer ones take more memory and are
/// not faster.
const SEGMENT: u64 = 1 << 20;

/// The longest segment, of a target with such clusters: they are written whole. Only a longer [`Conversion::sparse`], or
/// compression, leads to longer ones.
pub(crate) const LONGEST_SEGMENT: u64 = 2 << 20;

/// The length of a segment when compressing: shorter, since compressing a segment takes much longer than claiming it.
const COMPRESS_SEGMENT: u64 = 256 << 10;

/// The largest number of workers. A limit of this program.
const MAX_WORKERS: usize = 16;

impl<'a> Conversion<'a> {
    /// A conversion into a new image with the defaults of `qemu-img convert`.
    pub fn new(sources: &'a [Arc<Image>], target: &'a Image) -> Self {
        Self {
            sources,
            target,
            sparse: DEFAULT_SPARSE,
            compress: false,
            compression_level: None,
            out_of_order: false,
            in_order: false,
            failed_at: None,
            parallel: None,
            rate: None,
            copy_offload: false,
            salvage: false,
            backing_len: None,
            layers: 1,
            detect_zeroes: true,
            target_is_zero: target.layer().is_zero_when_new(),
            existing_target: false,
            on_lost: None,
            progress: Progress::none(),
            data_steps: false,
        }
    }

    /// The length of the sources together, which the target must have at least.
    pub fn len(&self) -> u64 {
        total_len(self.sources)
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies, and returns the number of bytes that were written as data.
    ///
    /// # Errors
    /// Options contradict each other, the target is too small or one of the sources' files, or a request fails: the
    /// first error in guest order.
    pub fn run(&self) -> Result<u64> {
        self.run_on(self.workers())
    }

    /// [`Conversion::run`] on `workers` workers, unless there are fewer segments.
    fn run_on(&self, workers: usize) -> Result<u64> {
        self.check()?;
        let mut job = CopyJob::new(self, workers)?;
        // Fails before the target is marked.
        self.encoder()?;
        // Counting the steps has reported them already.
        if self.salvage && job.steps.is_none() {
            job.sources.report_unreadable_status()?;
        }
        job.begin_progress();
        let all = ByteRange::new(0, job.sources.len());
        let mark = Mark::set(self)?;
        let outcome = match mark {
            Mark::Head(head) => job
                .copy(all.skip(head.len()))
                .and_then(|()| flush(self.target))
                .and_then(|()| job.copy(head)),
            Mark::Bit | Mark::None => job.copy(all),
        };
        if outcome.is_ok() || !*job.changed.get_mut() {
            let cleared = mark.clear(self.target, outcome.is_ok());
            outcome.and(cleared)?;
        } else {
            outcome?;
        }
        job.end_progress();
        Ok(job.copied.into_inner())
    }

    fn check(&self) -> Result<()> {
        if self.sparse > MAX_SPARSE || !self.sparse.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of {SECTOR} up to \
                 {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
            )));
        }
        if self.backing_len.is_some() && self.sources.len() > 1 {
            return Err(Error::invalid(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        let layers = match self.backing_len {
            Some(_) => saturating_index(self.layers.into()),
            None => usize::MAX,
        };
        let target = files_of(self.target);
        let is_read = |source: &Arc<Image>| !files_of_chain(source, layers).is_disjoint(&target);
        if self.sources.iter().any(is_read) {
            return Err(Error::invalid("The target is one of the files that are copied"));
        }
        if align_up(self.target.len(), SECTOR) < self.len() {
            return Err(Error::invalid("output file is smaller than input file"));
        }
        Ok(())
    }

    fn workers(&self) -> usize {
        if self.salvage {
            // One worker reports unreadable sectors in guest order.
            return 1;
        }
        let processors = thread::available_parallelism().map_or(1, usize::from);
        // A worker that waits for its turn or for a server is idle: one or two more than there are processors keep all of
        // them busy. Page cache makes no worker wait.
        let idle = if self.compress {
            2
        } else if is_cached_file(self.target) && self.sources.iter().all(|source| is_cached_file(source)) {
            0
        } else {
            1
        };
        let wanted = processors + idle;
        let most = self
            .parallel
            .map_or(MAX_WORKERS, |most| saturating_index(most.get().into()));
        wanted.min(most).clamp(1, MAX_WORKERS)
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        if !self.compress {
            return Ok(None);
        }
        match self.target.layer().encoder(self.compression_level)? {
            Some(encoder) => Ok(Some(encoder)),
            None if self.target.layer().granularity() > 1 => Ok(Some(Box::new(NoEncoder))),
            None => Err(Error::unsupported(
                "Compression not supported for this file format",
            )),
        }
    }
}

/// The encoder of an image that cannot hold compressed clusters, although its format can: it refuses the first cluster.
struct NoEncoder;

impl Encoder for NoEncoder {
    fn encode(&mut self, _cluster: &[u8], _out: &mut Vec<u8>) -> Result<bool> {
        Err(Error::from_errno(errno::ENOTSUP))
    }
}

impl std::fmt::Debug for Conversion<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversion")
            .field("sources", &self.sources)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// The length of `sources` concatenated, each rounded up to whole sectors.
pub fn total_len(sources: &[Arc<Image>]) -> u64 {
    sources
        .iter()
        .fold(0, |sum, image| sum.saturating_add(align_up(image.len(), SECTOR)))
}

/// Whether the target is a regular file that is written through the page cache: the kernel serializes such writes.
/// The file itself is not asked for: a device whose file is lent has to ask for its length each time.
fn is_cached_file(image: &Image) -> bool {
    let layer = image.layer();
    let device = layer.data_file().unwrap_or_else(|| layer.file());
    device.limits().alignment == 1 && device.identity().is_some() && device.is_zero_when_new()
}

/// Whether the storage can copy by itself. For all other drivers qemu-img searches for zeroes as usual, so that the
/// copy takes no more room; this function has the same list.
fn can_offload(conversion: &Conversion<'_>) -> bool {
    let takes_part = |image: &Image| OFFLOADING.contains(&image.layer().format());
    takes_part(conversion.target) && conversion.sources.iter().all(|image| takes_part(image))
}

const OFFLOADING: &[&str] = &["raw", "qcow2", "file", "host_device"];

/// The state of a conversion that its workers share.
struct CopyJob<'a> {
    conversion: &'a Conversion<'a>,
    /// The largest number of workers.
    workers: usize,
    sources: Sources<'a>,
    cursor: Cursor<Error, CopyKind>,
    /// The length of a segment in bytes.
    segment: u64,
    /// Cleared when the storage has refused to copy by itself.
    offload: AtomicBool,
    rate: RateLimit,
    /// Held during a write to a file whose writes the kernel serializes: a worker then sleeps on this lock and does not
    /// spin on the inode's lock.
    writing: Option<Mutex<()>>,
    /// Whether the target's file is written in blocks, of which encoded clusters may share one.
    shares_blocks: bool,
    done: AtomicU64,
    /// With [`Conversion::data_steps`].
    steps: Option<Steps<'a>>,
    /// How many of the bytes done were data.
    copied: AtomicU64,
    /// Whether something was written to the target.
    changed: AtomicBool,
}

impl<'a> CopyJob<'a> {
    fn new(conversion: &'a Conversion<'a>, workers: usize) -> Result<Self> {
        let sources = Sources::new(conversion);
        let cluster = conversion.target.layer().granularity();
        let segment = if conversion.compress {
            COMPRESS_SEGMENT.max(cluster)
        } else {
            let least = SEGMENT.max(cluster.min(LONGEST_SEGMENT));
            least.max(conversion.sparse.next_power_of_two())
        };
        if segment > MAX_SPARSE {
            return Err(Error::unsupported("Clusters of this size cannot be compressed"));
        }
        let steps = match conversion.data_steps {
            true => Some(data_steps(conversion, &sources)?),
            false => None,
        };
        Ok(Self {
            conversion,
            workers,
            steps,
            cursor: Cursor::new(ByteRange::new(0, 0), segment),
            sources,
            segment,
            offload: AtomicBool::new(conversion.copy_offload && can_offload(conversion)),
            rate: RateLimit::new(conversion.rate),
            writing: is_cached_file(conversion.target).then(Mutex::default),
            shares_blocks: conversion.target.layer().file().limits().alignment > 1,
            done: AtomicU64::new(0),
            copied: AtomicU64::new(0),
            changed: AtomicBool::new(false),
        })
    }

    /// Copies a part of the disk.
    fn copy(&mut self, range: ByteRange) -> Result<()> {
        self.cursor.go_on_in(range);
        let segment = to_index(self.segment)?;
        let workers = saturating_index(range.len().div_ceil(self.segment)).min(self.workers);
        if workers > 0 {
            let make = || Worker::new(self, segment, self.conversion.encoder()?);
            workers::run(workers, make, Worker::run)?;
        }
        self.cursor.finish().map_or(Ok(()), Err)
    }

    /// Whether clusters of the target are allocated in guest order.
    fn ordered(&self) -> bool {
        let plain = self.conversion.target.layer().granularity() == 1;
        self.conversion.compress || self.conversion.in_order || !(plain || self.conversion.out_of_order)
    }

    /// Held during a write; see [`CopyJob::writing`].
    fn lock_writing(&self) -> Option<MutexGuard<'_, ()>> {
        let one = self.writing.as_ref()?;
        Some(one.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn begin_progress(&self) {
        if self.steps.is_none() {
            self.conversion.progress.set(0, self.sources.len());
        }
    }

    /// Segment `number` with `bytes` is done; `parts` are its data, for the steps.
    fn add_progress(&self, number: u64, bytes: u64, parts: Vec<Part>) {
        if let Some(steps) = &self.steps {
            return steps.segment(number, parts);
        }
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.conversion.progress.set(done, self.sources.len());
    }

    fn end_progress(&self) {
        match &self.steps {
            Some(steps) => steps.finish(),
            None => self
                .conversion
                .progress
                .set(self.sources.len(), self.sources.len()),
        }
    }
}

/// The steps in which qemu-img copies the data of `sources`: compressing, cluster by cluster.
fn data_steps<'a>(conversion: &Conversion<'a>, sources: &Sources<'_>) -> Result<Steps<'a>> {
    let (unit, longest) = match conversion.target.layer().granularity() {
        cluster if conversion.compress => (cluster, cluster),
        _ => (1, STEP),
    };
    let total = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&total);
    let count = Steps::new(unit, move |step| {
        counted.fetch_add(step.len(), Ordering::Relaxed);
    });
    let mut rest = ByteRange::new(0, sources.len());
    let mut number = 0;
    while !rest.is_empty() {
        let status = sources.status(rest)?;
        let part = Part {
            range: rest.first(status.len),
            origins: [status.origin, Origin::default()],
            longest,
        };
        rest = rest.skip(status.len);
        if status.kind == CopyKind::Data {
            count.segment(number, vec![part]);
            number += 1;
        }
    }
    count.finish();
    let total = total.load(Ordering::Relaxed);
    let (progress, done) = (conversion.progress, AtomicU64::new(0));
    Ok(Steps::new(unit, move |step| {
        let done = done.fetch_add(step.len(), Ordering::Relaxed) + step.len();
        progress.set(done, total);
    }))
}

#[cfg(test)]
mod tests;
