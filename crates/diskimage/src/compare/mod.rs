//! Compares the guest data of two images.
//!
//! A cursor hands out segments to workers. In strict mode one worker takes the join disk, since the ends of extents
//! matter and an extent may reach over several segments:
//!
//! ```text
//!   first     [ segment ][ segment ][ segment ][ last ]
//!   second    [ segment ][ segment ][ se]
//!             └────────── common ───────┘└─── rest ───┘    the rest must be zero
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use diskimage_core::{
    AlignedBuf, ByteRange, Device, Error, Extent, Image, Progress, ResultExt, StatusDetail, is_zero,
    saturating_index,
};

use crate::cursor::{Cursor, Segment};
use crate::file_holes::SparseFiles;
use crate::map::MappedExtent;
use crate::steps::{Origin, Part, STEP, Steps};
use crate::workers;

/// Two images to compare.
#[derive(Debug)]
pub struct Comparison<'a> {
    /// The first image.
    pub first: &'a Image,
    /// The second image.
    pub second: &'a Image,
    /// The names of the images in error messages.
    pub names: [&'a str; 2],
    /// Whether the sizes and the allocation status must be the same too.
    pub strict: bool,
    /// Receives the number of bytes done and the total.
    pub progress: Progress<'a>,
    /// Whether progress is reported in guest order in the steps of `qemu-img`.
    pub steps: bool,
}

/// The outcome of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// One image is longer and the common part is equal. Without a difference the rest of the longer image is zero.
    pub sizes_differ: bool,
    /// The first difference.
    pub difference: Option<Difference>,
}

/// How images differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The data of the sector at this guest offset differs.
    Content(u64),
    /// The allocation status of the extents at this guest offset differs (strict mode).
    Status(u64),
    /// The sizes differ (strict mode).
    Size,
}

/// Why images could not be compared.
#[derive(Debug)]
pub enum CompareError {
    /// The allocation status of an extent could not be read.
    Status(Failure),
    /// Guest data could not be read.
    Read(Failure),
    /// The memory for buffers could not be had.
    Memory(Error),
}

/// The error that ended a comparison.
#[derive(Debug)]
pub struct Failure {
    /// The error of the image.
    pub error: Error,
    /// Whether the error is in the rest of the longer image; the common part is equal then.
    pub in_rest: bool,
}

/// Differences are reported in units of this many bytes.
const SECTOR: usize = 512;

/// The length of a segment in bytes.
const SEGMENT: u64 = 1 << 20;

/// The largest number of workers. A limit of this program.
const MAX_WORKERS: usize = 16;

/// The result that stops all workers.
enum Found {
    Difference(Difference),
    Error(CompareError),
}

impl From<CompareError> for Found {
    fn from(error: CompareError) -> Self {
        Self::Error(error)
    }
}

impl Comparison<'_> {
    /// Compares the images.
    ///
    /// # Errors
    /// The first failure in guest order, unless a difference precedes it.
    pub fn run(&self) -> Result<Verdict, CompareError> {
        let (first, second) = (self.first.len(), self.second.len());
        let differ = |difference, sizes_differ| {
            Ok(Verdict {
                sizes_differ,
                difference,
            })
        };
        if self.strict && first != second {
            return differ(Some(Difference::Size), false);
        }
        let common = first.min(second);
        let len = first.max(second);
        // Strict mode compares the ends of extents, so one worker walks over the join disk.
        let segment = if self.strict { len.max(1) } else { SEGMENT };
        let cursor = Cursor::new(ByteRange::new(0, len), segment);
        let done = AtomicU64::new(0);
        let steps = self
            .steps
            .then(|| Steps::new(1, |step| self.progress.set(step.end(), len)));
        if steps.is_none() {
            self.progress.set(0, len);
        }
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let segments = saturating_index(len.div_ceil(segment));
        let workers = processors.min(segments).min(MAX_WORKERS);
        if workers > 0 {
            workers::run(
                workers,
                || self.worker(),
                |worker| self.work(&cursor, &done, steps.as_ref(), worker),
            )
            .map_err(CompareError::Memory)?;
        }
        if let Some(steps) = &steps {
            steps.finish();
        }
        match cursor.finish() {
            None => differ(None, first != second),
            Some(Found::Difference(difference)) => {
                let in_tail = matches!(difference, Difference::Content(at) if at >= common);
                differ(Some(difference), in_tail)
            }
            Some(Found::Error(error)) => Err(error),
        }
    }

    fn worker(&self) -> diskimage_core::Result<Worker<'_>> {
        Ok(Worker {
            comparison: self,
            reach: [self.first, self.second].into_iter().map(reach).min(),
            parts: Vec::new(),
            first: Side::new(self.first, self.names[0], self)?,
            second: Side::new(self.second, self.names[1], self)?,
        })
    }

    fn work(
        &self,
        cursor: &Cursor<Found>,
        done: &AtomicU64,
        steps: Option<&Steps<'_>>,
        mut worker: Worker<'_>,
    ) {
        while let Some(segment) = cursor.claim() {
            let outcome = worker.compare(cursor, segment);
            let parts = std::mem::take(&mut worker.parts);
            if let Some(steps) = steps {
                if outcome.is_err() {
                    let last = parts.last().map(|part| part.range);
                    steps.fail(last.map_or(segment.range.start(), ByteRange::start));
                }
                steps.segment(segment.number, parts);
            }
            match outcome {
                Ok(_) if steps.is_some() => {}
                Ok(end) => {
                    let bytes = end - segment.range.start();
                    let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    self.progress.set(done, self.first.len().max(self.second.len()));
                }
                Err(found) => return cursor.fail(segment.number, found),
            }
        }
    }
}

/// One worker.
struct Worker<'a> {
    comparison: &'a Comparison<'a>,
    /// The range of the disk within which qemu-img takes zeroes along.
    reach: Option<u64>,
    /// The steps of the segment; the last one may be incomplete.
    parts: Vec<Part>,
    first: Side<'a>,
    second: Side<'a>,
}

impl Worker<'_> {
    /// Compares one segment and extends it over the extents after it that are known to be zero. Returns its end.
    fn compare(&mut self, cursor: &Cursor<Found>, segment: Segment) -> Result<u64, Found> {
        if let Some((end, ())) = segment.known {
            return Ok(end);
        }
        let mut at = segment.range.start();
        let mut end = segment.range.end();
        let mut outlook = None;
        loop {
            let Stretch {
                len,
                zero,
                holes,
                origins,
            } = self.step(at, end)?;
            let part = ByteRange::at(at, len).intersect(ByteRange::new(at, end));
            self.count(part, zero, origins);
            if !zero && !holes {
                self.contents(part)?;
            }
            at = part.end();
            if at < end {
                continue;
            }
            if !zero || end >= self.first.image.len().max(self.second.image.len()) {
                return Ok(end);
            }
            // A zero extent is not read, so it may be longer than a segment.
            outlook = outlook.or_else(|| cursor.outlook());
            if outlook.is_none() {
                return Ok(end);
            }
            end = match self.step(at, u64::MAX)? {
                Stretch { len, zero: true, .. } if self.comparison.steps => {
                    cursor.extend(end, end.saturating_add(len))
                }
                Stretch { len, zero: true, .. } => cursor.extend_or_tell(end, end.saturating_add(len), ()),
                _ => end,
            };
            if at == end {
                return Ok(end);
            }
        }
    }

    /// Adds a stretch to the steps of the segment.
    fn count(&mut self, range: ByteRange, zero: bool, origins: [Origin; 2]) {
        if !self.comparison.steps {
            return;
        }
        let reach = self.reach.filter(|_| zero).unwrap_or(u64::MAX);
        let mut rest = range;
        while !rest.is_empty() {
            let range = rest.first(reach - rest.start() % reach);
            rest = rest.skip(range.len());
            // A run ends where the range does.
            let origins = origins.map(|origin| origin.within(range.start() / reach));
            self.parts.push(Part {
                range,
                origins,
                longest: if zero { u64::MAX } else { STEP },
            });
        }
    }

    /// The stretch at `at`: the part of both extents there that they have in common.
    fn step(&mut self, at: u64, ask_to: u64) -> Result<Stretch, Found> {
        let first = self.first.entry(at, ask_to)?;
        let second = self.second.entry(at, ask_to)?;
        let (first, second) = match (first, second) {
            (Some(first), Some(second)) => (first, second),
            // One image is longer: the rest must be zero.
            (Some(one), None) | (None, Some(one)) => {
                return Ok(Stretch {
                    len: one.range.len(),
                    zero: one.kind.is_zero(),
                    holes: false,
                    origins: [origin(&one), Origin::default()],
                });
            }
            (None, None) => {
                return Ok(Stretch {
                    len: u64::MAX - at,
                    zero: true,
                    holes: false,
                    origins: [Origin::default(); 2],
                });
            }
        };
        // As in qemu-img, the last extent of an image has another status than the same extent in the middle.
        let kind = |side: &Side<'_>, entry: &MappedExtent| {
            let is_last = entry.range.end() == side.image.len();
            (entry.kind, entry.host.is_some(), is_last)
        };
        let same = kind(&self.first, &first) == kind(&self.second, &second);
        if self.comparison.strict && !same {
            return Err(Found::Difference(Difference::Status(at)));
        }
        let len = first.range.len().min(second.range.len());
        Ok(Stretch {
            len,
            zero: first.kind.is_zero() && second.kind.is_zero(),
            holes: self.first.is_hole(&first, len) && self.second.is_hole(&second, len),
            origins: [origin(&first), origin(&second)],
        })
    }

    /// Compares the bytes of `range`. A part of it may lie beyond the end of one image.
    fn contents(&mut self, range: ByteRange) -> Result<(), Found> {
        let mut rest = range;
        while !rest.is_empty() {
            let part = rest.first(CHUNK as u64);
            rest = rest.skip(part.len());
            let first = self.first.read(part)?;
            let second = self.second.read(part)?;
            let differs = match (first.is_empty(), second.is_empty()) {
                (false, false) if first == second => None,
                (false, false) => {
                    let mut pairs = first.chunks(SECTOR).zip(second.chunks(SECTOR));
                    pairs.position(|(one, other)| one != other)
                }
                (false, true) => first.chunks(SECTOR).position(|sector| !is_zero(sector)),
                (true, _) => second.chunks(SECTOR).position(|sector| !is_zero(sector)),
            };
            if let Some(sector) = differs {
                let at = part.start() + (sector * SECTOR) as u64;
                return Err(Found::Difference(Difference::Content(at)));
            }
        }
        Ok(())
    }
}

/// A stretch that both images have in one extent.
struct Stretch {
    len: u64,
    /// Whether both images know it to be zero.
    zero: bool,
    /// Whether it is data in both that is a hole of the file.
    holes: bool,
    origins: [Origin; 2],
}

fn origin(entry: &MappedExtent) -> Origin {
    let extent = Extent {
        len: entry.range.len(),
        kind: entry.kind,
        depth: entry.depth,
        host: entry.host.clone(),
    };
    Origin::of(&extent, entry.range.start())
}

/// The range of the disk within which qemu-img takes zeroes of `image` along: that of an L2 table.
fn reach(image: &Image) -> u64 {
    let layer = image.layer();
    if layer.format() != "qcow2" {
        return u64::MAX;
    }
    let cluster = layer.granularity();
    let entry = if layer.write_unit() < cluster { 16 } else { 8 };
    cluster.saturating_mul(cluster / entry).max(1)
}

/// The number of bytes read at once: both buffers stay in the processor's caches until they have been compared.
const CHUNK: usize = 256 << 10;

/// One of the two images, with the buffer and the current extent of one worker.
struct Side<'a> {
    image: &'a Image,
    name: &'a str,
    /// Whether neighbouring extents of the same status are joined (strict mode).
    join: bool,
    /// The length of the common part.
    common: u64,
    entry: Option<MappedExtent>,
    sparse: SparseFiles,
    buf: AlignedBuf,
}

impl<'a> Side<'a> {
    fn new(image: &'a Image, name: &'a str, comparison: &Comparison<'_>) -> diskimage_core::Result<Self> {
        Ok(Self {
            image,
            name,
            join: comparison.strict,
            common: comparison.first.len().min(comparison.second.len()),
            entry: None,
            sparse: SparseFiles::of(image),
            buf: AlignedBuf::new(CHUNK)?,
        })
    }

    /// The extent at `at`; `None` beyond the end of the image.
    fn entry(&mut self, at: u64, ask_to: u64) -> Result<Option<MappedExtent>, CompareError> {
        if !self.join {
            return self.status(ByteRange::new(at, ask_to.min(self.image.len())));
        }
        if self.entry.as_ref().is_none_or(|entry| entry.range.end() <= at) {
            self.entry = self.joined(at)?;
        }
        Ok(self.entry.as_ref().map(|entry| MappedExtent {
            range: ByteRange::new(at, entry.range.end()),
            ..entry.clone()
        }))
    }

    /// Whether the first `len` bytes of the extent are a hole of a file.
    fn is_hole(&self, entry: &MappedExtent, len: u64) -> bool {
        !entry.kind.is_zero() && self.sparse.is_hole(entry.host.as_ref(), len)
    }

    /// The extent at `at`, joined with those that continue it.
    fn joined(&self, at: u64) -> Result<Option<MappedExtent>, CompareError> {
        let Some(mut entry) = self.status(ByteRange::new(at, self.image.len()))? else {
            return Ok(None);
        };
        while let Some(next) = self.status(ByteRange::new(entry.range.end(), self.image.len()))?
            && entry.continues_in(&next)
        {
            entry.range = ByteRange::new(entry.range.start(), next.range.end());
        }
        Ok(Some(entry))
    }

    fn status(&self, range: ByteRange) -> Result<Option<MappedExtent>, CompareError> {
        if range.is_empty() {
            return Ok(None);
        }
        let in_rest = range.start() >= self.common;
        let extent = self
            .image
            .status(range, StatusDetail::Zeroes)
            .context(|| format!("Sector allocation test failed for {}", self.name))
            .map_err(|error| CompareError::Status(Failure { error, in_rest }))?;
        Ok(Some(MappedExtent::new(range.start(), extent)))
    }

    /// Reads `range`, at most a chunk, padded with zeroes; an empty slice if the image ends before `range`.
    fn read(&mut self, range: ByteRange) -> Result<&[u8], CompareError> {
        if range.start() >= self.image.len() {
            return Ok(&[]);
        }
        let in_rest = range.start() >= self.common;
        let len = saturating_index(range.len()).min(self.buf.len());
        let buf = &mut self.buf[..len];
        let device: &dyn Device = self.image;
        device
            .read_padded(buf, range.start())
            .context(|| format!("Error while reading offset {} of {}", range.start(), self.name))
            .map_err(|error| CompareError::Read(Failure { error, in_rest }))?;
        Ok(buf)
    }
}

#[cfg(test)]
mod tests;
