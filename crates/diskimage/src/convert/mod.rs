//! The conversion engine.
//!
//! A cursor hands out segments of the guest's disk to workers. Each worker asks the status of its own segment, reads
//! what has to be read, finds zeroes, compresses if asked to, and hands the outcome on:
//!
//! ```text
//!   cursor ──▶ worker: status → read → zero test → (encode) ──▶ positional: write where the guest says
//!          ──▶ worker: ...                                  ──▶ ordered:    wait for the turn, set places aside,
//!                                                                           pass the turn on, write, commit
//! ```
//!
//! The ordered way gives out places in guest order, so the file that comes out is the same whatever the number of
//! threads. Memory is bounded by workers times segment, whatever the images say of themselves. The first error, in guest
//! order, ends the conversion and is the one reported; removing what was written so far is the caller's affair.

mod pieces;
mod rate;
mod source;
mod worker;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use diskimage_core::{Device, Encoder, Error, Image, Progress, Result, align_up, errno};

use crate::cursor::Cursor;
use crate::files::{files_of, files_of_chain};
use rate::RateLimit;
use source::Sources;
use worker::Worker;

/// What is copied where, and how.
pub struct Conversion<'a> {
    /// The images to copy, one after the other.
    pub sources: &'a [Arc<Image>],
    /// Where to; opened for writing and as large as the sources together, or larger.
    pub target: &'a Image,
    /// Zeroes in runs of at least this many bytes are not written as data. With 0 everything is.
    pub sparse: u64,
    /// Whether to compress. Whole clusters of zeroes are left out.
    pub compress: bool,
    /// Whether places in the target may be given out in any order.
    pub out_of_order: bool,
    /// How many threads at most; as many as there are processors if not given.
    pub parallel: Option<NonZeroU32>,
    /// The most bytes to write per second.
    pub rate: Option<u64>,
    /// Whether to ask the storage to copy, without looking for zeroes in what it says is data.
    pub copy_offload: bool,
    /// Whether to go on with zeroes where the source cannot be read.
    pub salvage: bool,
    /// Set if the target has an image below it with the contents of the images below the source: the length of that
    /// image. Only what the topmost [`Conversion::layers`] images of the source have themselves is copied then.
    pub backing_len: Option<u64>,
    /// How many images of the source's chain are copied from, with [`Conversion::backing_len`].
    pub layers: u32,
    /// Whether zeroes in what is data according to tables are looked for.
    pub detect_zeroes: bool,
    /// Whether the target reads as zero so far, but for what shows from the image below.
    pub target_is_zero: bool,
    /// Told about each sector that could not be read, with `salvage`.
    pub on_lost: Option<OnLost<'a>>,
    /// Told how many bytes of how many are done.
    pub progress: Progress<'a>,
}

/// Takes the offset of an unreadable sector and why it is.
pub type OnLost<'a> = &'a (dyn Fn(&Error) + Sync);

/// The original's default for [`Conversion::sparse`].
pub const DEFAULT_SPARSE: u64 = 4096;

/// The largest value of [`Conversion::sparse`].
pub const MAX_SPARSE: u64 = 16 << 20;

/// The unit in which images are concatenated and zeroes are looked for.
const SECTOR: u64 = 512;

/// How much a worker takes on at once. Clusters for one segment are allocated in one piece.
const SEGMENT: u64 = 2 << 20;

/// The same when compressing, where the work on a segment takes much longer than taking it.
const COMPRESS_SEGMENT: u64 = 256 << 10;

/// More threads than this only take memory.
const MAX_WORKERS: usize = 16;

impl<'a> Conversion<'a> {
    /// A conversion as the original does it by default, into a new image.
    pub fn new(sources: &'a [Arc<Image>], target: &'a Image) -> Self {
        Self {
            sources,
            target,
            sparse: DEFAULT_SPARSE,
            compress: false,
            out_of_order: false,
            parallel: None,
            rate: None,
            copy_offload: false,
            salvage: false,
            backing_len: None,
            layers: 1,
            detect_zeroes: true,
            target_is_zero: target.layer().is_zero_when_new(),
            on_lost: None,
            progress: Progress::none(),
        }
    }

    /// How long a target has to be.
    pub fn len(&self) -> u64 {
        total_len(self.sources)
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies. How many bytes were data.
    ///
    /// # Errors
    /// Options that do not go together, a target that is too small, and the first failure to read or write in guest
    /// order.
    pub fn run(&self) -> Result<u64> {
        self.check()?;
        let job = Job::new(self)?;
        if self.salvage {
            job.sources.report_unreadable_status()?;
        }
        self.progress.set(0, job.sources.len());
        let segments = job.sources.len().div_ceil(job.segment);
        let workers = usize::try_from(segments)
            .unwrap_or(usize::MAX)
            .min(self.workers());
        let encoders = (0..workers).map(|_| self.encoder()).collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            for encoder in encoders {
                let job = &job;
                scope.spawn(move || Worker::new(job, encoder).run());
            }
        });
        if let Some(error) = job.cursor.finish() {
            return Err(error);
        }
        self.progress.set(job.sources.len(), job.sources.len());
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
            Some(_) => usize::try_from(self.layers).unwrap_or(usize::MAX),
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
            // What was lost is told in order.
            return 1;
        }
        let processors = thread::available_parallelism().map_or(1, usize::from);
        // Whoever waits for its turn does nothing: some more than there are processors keep all of them busy.
        let wanted = if self.compress {
            processors + 2
        } else {
            processors + 1
        };
        let most = self.parallel.map_or(MAX_WORKERS, |most| {
            usize::try_from(most.get()).unwrap_or(MAX_WORKERS)
        });
        wanted.min(most).clamp(1, MAX_WORKERS)
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        if !self.compress {
            return Ok(None);
        }
        match self.target.layer().encoder()? {
            Some(encoder) => Ok(Some(encoder)),
            None if self.target.layer().granularity() > 1 => Ok(Some(Box::new(NoEncoder))),
            None => Err(Error::unsupported(
                "Compression not supported for this file format",
            )),
        }
    }
}

/// For images that hold no compressed clusters, although others of their format do: refuses the first one.
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

/// The length of the disk that `sources` make up together: each fills whole sectors.
pub fn total_len(sources: &[Arc<Image>]) -> u64 {
    sources
        .iter()
        .fold(0, |sum, image| sum.saturating_add(align_up(image.len(), SECTOR)))
}

/// Whether the target is a plain file behind the system's cache. Its file system copies one write at a time.
fn takes_one_write(target: &Image) -> bool {
    let layer = target.layer();
    let device = layer.data_file().unwrap_or_else(|| layer.file());
    let is_file = |file: &std::fs::File| file.metadata().is_ok_and(|metadata| metadata.is_file());
    device.limits().alignment == 1 && device.as_file().is_some_and(is_file)
}

/// Whether the storage can copy by itself. The drivers of the original that have no way to ask for it look for zeroes as
/// usual, so that the copy takes no more room.
fn can_offload(conversion: &Conversion<'_>) -> bool {
    let takes_part = |image: &Image| OFFLOADING.contains(&image.layer().format());
    takes_part(conversion.target) && conversion.sources.iter().all(|image| takes_part(image))
}

const OFFLOADING: &[&str] = &["raw", "qcow2", "file", "host_device"];

/// What the workers share.
struct Job<'a> {
    conversion: &'a Conversion<'a>,
    sources: Sources<'a>,
    cursor: Cursor<Error>,
    /// Bytes that a worker takes on at once.
    segment: u64,
    /// Cleared once the storage turned out not to copy by itself.
    offload: AtomicBool,
    rate: RateLimit,
    /// Held to write to a file that takes one write at a time anyway: the others wait without turning on the spot, and
    /// read and decode meanwhile.
    writing: Option<Mutex<()>>,
    done: AtomicU64,
    /// Bytes of data among them.
    copied: AtomicU64,
}

impl<'a> Job<'a> {
    fn new(conversion: &'a Conversion<'a>) -> Result<Self> {
        let sources = Sources::new(conversion);
        let cluster = conversion.target.layer().granularity();
        let segment = if conversion.compress {
            COMPRESS_SEGMENT.max(cluster)
        } else {
            SEGMENT.max(conversion.sparse.next_power_of_two())
        };
        if segment > MAX_SPARSE {
            return Err(Error::unsupported("Clusters of this size cannot be compressed"));
        }
        Ok(Self {
            conversion,
            cursor: Cursor::new(sources.len(), segment),
            sources,
            segment,
            offload: AtomicBool::new(conversion.copy_offload && can_offload(conversion)),
            rate: RateLimit::new(conversion.rate),
            writing: takes_one_write(conversion.target).then(Mutex::default),
            done: AtomicU64::new(0),
            copied: AtomicU64::new(0),
        })
    }

    /// Whether places in the target are given out in guest order.
    fn ordered(&self) -> bool {
        let plain = self.conversion.target.layer().granularity() == 1;
        self.conversion.compress || !(plain || self.conversion.out_of_order)
    }

    fn add_progress(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.conversion.progress.set(done, self.sources.len());
    }
}

#[cfg(test)]
mod tests;
