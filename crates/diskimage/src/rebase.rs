//! Rebase: changes the backing image of an overlay and keeps the guest data.
//!
//! Unallocated clusters of the overlay read as the backing image, which may differ between the old chain and the new
//! one. Units that differ are written to the overlay; only then the overlay stores the name of the new backing image:
//!
//! ```text
//!   overlay     [data][ -  ][ -  ][zero]          - unallocated
//!   old chain   [  a ][  b ][  c ][  d ]
//!   new chain   [  x ][  b ][  y ][  z ]          only c is written
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use diskimage_core::errno;
use diskimage_core::{
    AlignedBuf, Backing, ByteRange, Device, Encoder, Error, ExtentKind, Image, Progress, Result, ResultExt,
    RunKind, StatusDetail, ZeroMode, align_down, is_zero, saturating_index, to_index,
};
use diskimage_formats::format_by_name;

use crate::cursor::{Cursor, End, Segment};
use crate::files::{files_below, files_of, files_of_chain, flush, share_a_file};
use crate::graph::full_backing_name;
use crate::open_options::OpenOptions;
use crate::steps::{Origin, Part, STEP, Steps};
use crate::workers;

/// A change of the backing image that keeps the guest data.
#[derive(Debug)]
pub struct Rebase<'a> {
    /// The overlay, opened for writing with its present chain.
    pub image: &'a Arc<Image>,
    /// The new backing image; `None` for an image without one.
    pub new: Option<&'a Arc<Image>>,
    /// Whether clusters are written compressed.
    pub compress: bool,
    /// Receives the number of bytes done and the total.
    pub progress: Progress<'a>,
    /// Whether progress counts the pieces that the image has not allocated, in the steps of `qemu-img`.
    pub steps: bool,
}

const READING_OLD: &str = "error while reading from old backing file";
const READING_NEW: &str = "error while reading from new backing file";

/// The length of a segment in bytes.
const SEGMENT: u64 = 2 << 20;

/// The largest number of workers. A limit of this program.
const MAX_WORKERS: usize = 16;

impl Rebase<'_> {
    /// Writes the units that would read differently on the new backing image. The overlay still stores the name of the
    /// old one, on which its guest data is the same; [`set_backing`] stores the name of the new one.
    ///
    /// # Errors
    /// The new chain contains the overlay, which would be changed while it is read; or the first failed read or write in
    /// guest order.
    pub fn run(&self) -> Result<()> {
        self.refuse_loop()?;
        let len = self.image.len();
        let steps = self.steps.then(|| self.count_steps());
        if steps.is_none() {
            self.progress.set(0, len);
        }
        let cluster = self.image.layer().granularity();
        let segment = SEGMENT.max(cluster);
        let buffer = to_index(segment)?;
        let cursor = Cursor::new(ByteRange::new(0, len), segment);
        let done = AtomicU64::new(0);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let segments = saturating_index(len.div_ceil(segment));
        let workers = (processors + 1).min(MAX_WORKERS).min(segments);
        if workers > 0 {
            workers::run(
                workers,
                || self.worker(buffer),
                |worker| self.work(&cursor, &done, steps.as_ref(), worker),
            )?;
        }
        if let Some(error) = cursor.finish() {
            return Err(error);
        }
        flush(self.image)?;
        match &steps {
            Some(steps) => steps.finish(),
            None => self.progress.set(len, len),
        }
        Ok(())
    }

    fn count_steps(&self) -> Steps<'_> {
        let len = self.image.len();
        // As in qemu-img, rounded down: the last steps may be beyond 100 %.
        let total = len / len.clamp(1, STEP);
        let done = AtomicU64::new(0);
        Steps::new(1, move |_| {
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            self.progress.set(done, total);
        })
    }

    /// The depth in the old chain of the image that the new chain begins with.
    fn shared_depth(&self) -> Option<u32> {
        let new = self.new?;
        let chain = std::iter::successors(self.image.backing(), |image| image.backing());
        chain
            .zip(0..)
            .find(|(image, _)| share_a_file(image, new))
            .map(|(_, depth)| depth)
    }

    /// The parts of `range` that qemu-img compares: those that the image has not allocated, and of which the images above
    /// a chain that stays have allocated something.
    fn compared_parts(&self, range: ByteRange) -> Result<Vec<Part>> {
        let shared = self.shared_depth();
        let mut parts = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let run = self.image.layer().map(rest)?;
            let mut part = rest.first(run.len);
            let mut is_compared = matches!(run.kind, RunKind::Unallocated { .. });
            if let (true, Some(shared), Some(old)) = (is_compared, shared, self.image.backing()) {
                let within = part.intersect(ByteRange::new(0, old.len()));
                is_compared = false;
                if !within.is_empty() {
                    let extent = old.status(within, StatusDetail::Allocation)?;
                    part = part.first(extent.len);
                    is_compared = extent.depth < shared && extent.kind != ExtentKind::Unallocated;
                }
            }
            rest = rest.skip(part.len());
            if is_compared {
                parts.push(Part {
                    range: part,
                    origins: [Origin::default(); 2],
                    longest: STEP,
                });
            }
        }
        Ok(parts)
    }

    fn refuse_loop(&self) -> Result<()> {
        let own = files_of(self.image);
        match self.new {
            Some(new) if !own.is_disjoint(&files_of_chain(new, usize::MAX)) => {
                Err(loop_error(&self.image.name()))
            }
            _ => Ok(()),
        }
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        if !self.compress {
            return Ok(None);
        }
        match self.image.layer().encoder(None)? {
            Some(encoder) => Ok(Some(encoder)),
            None => Err(Error::unsupported(
                "Compression not supported for this file format",
            )),
        }
    }

    /// A worker with buffers of `len` bytes.
    fn worker(&self, len: usize) -> Result<Worker<'_>> {
        Ok(Worker {
            rebase: self,
            old: AlignedBuf::new(len)?,
            new: AlignedBuf::new(len)?,
            writes: Vec::new(),
            parts: Vec::new(),
            encoder: self.encoder()?,
            encoded: Vec::new(),
        })
    }

    fn work(
        &self,
        cursor: &Cursor<Error>,
        done: &AtomicU64,
        steps: Option<&Steps<'_>>,
        mut worker: Worker<'_>,
    ) {
        while let Some(segment) = cursor.claim() {
            match worker.segment(cursor, segment) {
                Ok(end) => {
                    if let Some(steps) = steps {
                        steps.segment(segment.number, std::mem::take(&mut worker.parts));
                        continue;
                    }
                    let bytes = end - segment.range.start();
                    let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    self.progress.set(done, self.image.len());
                }
                Err(End::Stopped) => return,
                Err(End::Failed(error)) => return cursor.fail(segment.number, error),
            }
        }
    }
}

/// Stores the name and the format of a backing image in the header, after [`check_backing`]. The layer flushes earlier
/// writes first.
///
/// # Errors
/// `Could not change the backing file to 'NAME'`, with the reason: those of [`check_backing`], no room in the header,
/// or a failed write.
pub fn set_backing(image: &Image, backing: Option<&Backing>, options: &OpenOptions) -> Result<()> {
    check_backing(image, backing, options)?;
    let outcome = image
        .durable_change(|| image.layer().set_backing(backing))
        .map_err(|error| match error.errno() {
            Some(errno::ENOSPC) => Error::invalid("No space left in the file header"),
            _ => error,
        });
    outcome.context(|| could_not(backing))
}

/// Checks the arguments of [`set_backing`] before the image is changed. The chain of the backing image is looked at with
/// `options`.
///
/// # Errors
/// The image's format has no backing files, the format of the backing image is not given, or the chain of the backing
/// image contains the image.
pub fn check_backing(image: &Image, backing: Option<&Backing>, options: &OpenOptions) -> Result<()> {
    if backing.is_some_and(|backing| backing.format.is_none()) {
        return Err(Error::invalid("backing format must be specified").context(could_not(backing)));
    }
    let format = format_by_name(image.layer().format());
    if !format.is_some_and(|format| format.properties().has_backing) {
        return Err(Error::from_errno(errno::ENOTSUP).context(could_not(backing)));
    }
    refuse_link_to_itself(image, backing, options).context(|| could_not(backing))
}

/// Refuses a backing image whose chain contains `image`.
fn refuse_link_to_itself(image: &Image, backing: Option<&Backing>, options: &OpenOptions) -> Result<()> {
    let Some(backing) = backing else { return Ok(()) };
    let name = full_backing_name(&image.base_name(), backing.name.text());
    let files = files_below(&name, backing.format.as_deref(), options);
    match files.is_disjoint(&files_of(image)) {
        true => Ok(()),
        false => Err(loop_error(&name)),
    }
}

fn loop_error(name: &str) -> Error {
    Error::invalid(format!("Backing file '{name}' creates an infinite loop"))
}

fn could_not(backing: Option<&Backing>) -> String {
    let name = backing.map(|backing| backing.name.text()).unwrap_or_default();
    format!("Could not change the backing file to '{name}'")
}

struct Worker<'a> {
    rebase: &'a Rebase<'a>,
    /// The bytes of the current segment on the old chain.
    old: AlignedBuf,
    /// The bytes of the current segment on the new chain.
    new: AlignedBuf,
    /// The ranges to write.
    writes: Vec<UnitWrite>,
    /// The parts of the segment that count as steps.
    parts: Vec<Part>,
    encoder: Option<Box<dyn Encoder>>,
    encoded: Vec<u8>,
}

/// A range of whole units that differs on the new chain.
#[derive(Clone, Copy)]
struct UnitWrite {
    range: ByteRange,
    /// Whether all its bytes are zero.
    zero: bool,
}

impl Worker<'_> {
    /// Processes one segment, extended over what needs no read after it, and returns its end.
    fn segment(&mut self, cursor: &Cursor<Error>, segment: Segment) -> std::result::Result<u64, End> {
        let image = self.rebase.image;
        self.writes.clear();
        let mut rest = segment.range;
        let mut end = rest.end();
        let mut ends_unread = true;
        if let Some((known_end, ())) = segment.known {
            (rest, end, ends_unread) = (rest.skip(rest.len()), known_end, false);
        }
        while !rest.is_empty() {
            let (part, same) = self.same_units(rest)?;
            rest = rest.skip(part.len());
            ends_unread = same;
            if !same {
                self.compare(part, segment.range.start())?;
            }
        }
        let outlook = if ends_unread { cursor.outlook() } else { None };
        while outlook.is_some() && end < image.len() {
            let (part, same) = self.same_units(ByteRange::new(end, image.len()))?;
            let longer = if same {
                cursor.extend_or_tell(end, part.end(), ())
            } else {
                end
            };
            if longer == end {
                break;
            }
            end = longer;
        }
        drop(outlook);
        if self.rebase.steps {
            let all = ByteRange::new(segment.range.start(), end);
            self.parts = self.rebase.compared_parts(all)?;
        }
        if self.writes.is_empty() {
            cursor.pass(segment.number)?;
            return Ok(end);
        }
        let _turn = cursor.wait(segment.number)?;
        for index in 0..self.writes.len() {
            self.write(self.writes[index], segment.range.start())
                .context(|| "Error while writing to COW image")?;
        }
        Ok(end)
    }

    /// The unit of writes in bytes: a smaller write would leave the rest of the unit to the backing image.
    fn unit(&self) -> u64 {
        let layer = self.rebase.image.layer();
        if self.encoder.is_some() {
            layer.granularity()
        } else {
            layer.write_unit()
        }
    }

    /// [`Worker::same`] in whole units.
    fn same_units(&self, range: ByteRange) -> Result<(ByteRange, bool)> {
        let (part, same) = self.same(range)?;
        let unit = self.unit();
        if part.end() == range.end() || part.end().is_multiple_of(unit) {
            return Ok((part, same));
        }
        let whole = align_down(part.end(), unit);
        Ok(if same && whole > range.start() {
            (ByteRange::new(range.start(), whole), true)
        } else {
            let end = whole.saturating_add(unit).min(range.end());
            (ByteRange::new(range.start(), end), false)
        })
    }

    /// The part at the start of `range` that is the same on both chains by its status (`true`), or that has to be
    /// compared (`false`).
    fn same(&self, range: ByteRange) -> Result<(ByteRange, bool)> {
        let run = self.rebase.image.layer().map(range);
        let run = run.context(|| "error while reading image metadata")?;
        let part = range.first(run.len);
        if !matches!(run.kind, RunKind::Unallocated { .. }) {
            return Ok((part, true));
        }
        let old = backing_run(self.rebase.image.backing(), part).context(|| READING_OLD)?;
        let part = part.first(old.len);
        let new = backing_run(self.rebase.new, part).context(|| READING_NEW)?;
        let part = part.first(new.len);
        let same = match (old.source, new.source) {
            (RunSource::Zero, RunSource::Zero) => true,
            (RunSource::Host(one, at), RunSource::Host(other, other_at)) => one == other && at == other_at,
            _ => false,
        };
        Ok((part, same))
    }

    /// Collects the units of `part` that differ. `start` is the guest offset of the buffers.
    fn compare(&mut self, part: ByteRange, start: u64) -> Result<()> {
        let index = |at: u64| to_index(at - start);
        let span = index(part.start())?..index(part.end())?;
        // The part is unallocated in the image, which therefore reads as the old chain.
        read(Some(self.rebase.image), &mut self.old[span.clone()], part.start()).context(|| READING_OLD)?;
        read(self.rebase.new, &mut self.new[span], part.start()).context(|| READING_NEW)?;
        let unit = self.unit();
        let mut at = part.start();
        while at < part.end() {
            let next = align_down(at, unit).saturating_add(unit).min(part.end());
            let span = index(at)?..index(next)?;
            if self.old[span.clone()] != self.new[span.clone()] {
                let zero = is_zero(&self.old[span]);
                match self.writes.last_mut() {
                    Some(last) if last.range.end() == at && last.zero == zero => {
                        last.range = ByteRange::new(last.range.start(), next);
                    }
                    _ => self.writes.push(UnitWrite {
                        range: ByteRange::new(at, next),
                        zero,
                    }),
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Writes a range of the old chain to the image. `start` is the guest offset of the buffers.
    fn write(&mut self, UnitWrite { range: part, zero }: UnitWrite, start: u64) -> Result<()> {
        let image = self.rebase.image;
        let index = |at: u64| to_index(at - start);
        if zero {
            image.write_zeroes(part, ZeroMode::Unmap)?;
            // In an image that has no backing image so far, a format without zero clusters leaves them unallocated.
            let run = image.layer().map(part)?;
            return match run.kind {
                RunKind::Unallocated { .. } => {
                    image.write_at(&self.old[index(part.start())?..index(part.end())?], part.start())
                }
                _ => Ok(()),
            };
        }
        let Some(encoder) = &mut self.encoder else {
            return image.write_at(&self.old[index(part.start())?..index(part.end())?], part.start());
        };
        let cluster = image.layer().granularity();
        let mut rest = part;
        while !rest.is_empty() {
            let one = rest.first(cluster - rest.start() % cluster);
            rest = rest.skip(one.len());
            let bytes = &self.old[index(one.start())?..index(one.end())?];
            if one.len() == cluster && encoder.encode(bytes, &mut self.encoded)? {
                image.write_encoded(one.start(), &self.encoded)?;
            } else {
                image.write_at(bytes, one.start())?;
            }
        }
        Ok(())
    }
}

/// A run of a backing chain.
struct BackingRun {
    len: u64,
    source: RunSource,
}

/// Where the bytes of a run of a backing chain come from.
enum RunSource {
    Zero,
    /// Unencoded bytes at this host offset of the file with this identity.
    Host((u64, u64), u64),
    /// Anything else, like compressed clusters.
    Other,
}

/// The run of the chain of `image` at the start of `range`; zero without an image and beyond its end.
fn backing_run(image: Option<&Arc<Image>>, range: ByteRange) -> Result<BackingRun> {
    let within = image.map(|image| range.intersect(ByteRange::new(0, image.len())));
    let (Some(image), Some(within)) = (image, within.filter(|within| !within.is_empty())) else {
        return Ok(BackingRun {
            len: range.len(),
            source: RunSource::Zero,
        });
    };
    let extent = image.status(within, StatusDetail::Zeroes)?;
    let host = extent.host.and_then(|(device, offset)| {
        device
            .identity()
            .map(|identity| RunSource::Host(identity, offset))
    });
    Ok(BackingRun {
        len: extent.len,
        source: match host {
            _ if extent.kind.is_zero() => RunSource::Zero,
            Some(host) => host,
            None => RunSource::Other,
        },
    })
}

/// Reads `buf.len()` bytes of the chain of `image`; zeroes without an image and beyond its end.
fn read(image: Option<&Arc<Image>>, buf: &mut [u8], offset: u64) -> Result<()> {
    match image {
        Some(image) => {
            let device: &dyn Device = &**image;
            device.read_padded(buf, offset)
        }
        None => {
            buf.fill(0);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{contents, image_on};

    fn rebase(image: &Arc<Image>, new: Option<&Arc<Image>>, compress: bool) {
        Rebase {
            image,
            new,
            compress,
            progress: Progress::none(),
            steps: false,
        }
        .run()
        .expect("rebases");
    }

    fn filled(len: u64, parts: &[(u64, u64, u8)]) -> Arc<Image> {
        let image = image_on("qcow2", "cluster_size=4k", len, None);
        for (at, len, value) in parts {
            let bytes = vec![*value; usize::try_from(*len).expect("small")];
            image.write_at(&bytes, *at).expect("writes");
        }
        image
    }

    /// The layer of `image` on another chain.
    fn on_chain(image: &Arc<Image>, new: Option<&Arc<Image>>) -> Image {
        Image::new(Arc::clone(image.layer()), new.cloned(), "on chain", false)
    }

    #[test]
    fn guest_data_is_the_same_on_the_new_backing_image() {
        let old = filled(100 << 10, &[(0, 60_000, 1), (70_000, 5000, 2)]);
        let shorter = filled(30 << 10, &[(0, 20_000, 1), (25_000, 512, 3)]);
        let longer = filled(300 << 10, &[(0, 250_000, 4)]);
        let holes = filled(200 << 10, &[(60_000, 10_000, 5), (150_000, 500, 6)]);
        for options in ["", "cluster_size=512", "extended_l2=on", "compat=0.10"] {
            for compress in [false, true] {
                for new in [None, Some(&shorter), Some(&longer), Some(&old), Some(&holes)] {
                    let top = image_on("qcow2", options, 200 << 10, Some(&old));
                    top.write_at(&[9; 3000], 50_000).expect("writes");
                    let before = contents(&top);
                    rebase(&top, new, compress);
                    assert!(contents(&top) == before, "{options} {compress}");
                    assert!(contents(&on_chain(&top, new)) == before, "{options} {compress}");
                }
            }
        }
    }

    #[test]
    fn only_units_that_differ_are_written() {
        let old = filled(64 << 10, &[(0, 64 << 10, 1)]);
        let new = filled(64 << 10, &[(0, 64 << 10, 1), (8192, 1, 2)]);
        let top = image_on("qcow2", "cluster_size=4k", 64 << 10, Some(&old));
        rebase(&top, Some(&new), false);
        let run = |at| top.layer().map(ByteRange::new(at, 64 << 10)).expect("maps");
        assert_eq!(run(0).len, 8192);
        assert!(matches!(run(0).kind, RunKind::Unallocated { .. }));
        assert_eq!(run(8192).len, 4096);
        assert!(matches!(run(8192).kind, RunKind::Data { .. }));
        assert!(matches!(run(12288).kind, RunKind::Unallocated { .. }));
    }
}
