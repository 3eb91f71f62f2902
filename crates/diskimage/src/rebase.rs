//! Putting an image on top of another one than before, its disk unchanged.
//!
//! Where the image itself has nothing, what shows from below may differ between the old chain and the new one. These
//! parts are written to the image, in units that get storage of their own, and only then the image names the new chain:
//!
//! ```text
//!   image       [data][ ?  ][ ?  ][zero]
//!   old chain   [  a ][  b ][  c ][  d ]
//!   new chain   [  x ][  b ][  y ][  z ]          only c has to be written
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use diskimage_core::errno;
use diskimage_core::{
    AlignedBuf, Backing, ByteRange, Device, Encoder, Error, Image, Progress, Result, ResultExt, RunKind,
    StatusDetail, ZeroMode, align_down, is_zero,
};
use diskimage_formats::format_by_name;

use crate::cursor::{Cursor, End, Segment};
use crate::files::{Above, Follow, files_of};
use crate::graph::full_backing_name;

/// A change of the image below that leaves the disk as it is.
#[derive(Debug)]
pub struct Rebase<'a> {
    /// The image, opened for writing with its present chain.
    pub image: &'a Arc<Image>,
    /// What is to be below; nothing if nobody is.
    pub new: Option<&'a Arc<Image>>,
    /// Whether what is written is compressed.
    pub compress: bool,
    /// Told how many bytes of how many are done.
    pub progress: Progress<'a>,
}

/// How much a worker takes on at once.
const SEGMENT: u64 = 2 << 20;

/// More threads than this only take memory.
const MAX_WORKERS: usize = 16;

impl Rebase<'_> {
    /// Writes what would look different on top of the new image. The image still names the old one afterwards, on which
    /// its disk is the same; naming the new one is [`set_backing`]'s.
    ///
    /// # Errors
    /// The first failure to read or write in guest order.
    pub fn run(&self) -> Result<()> {
        let len = self.image.len();
        self.progress.set(0, len);
        let cluster = self.image.layer().granularity();
        let segment = SEGMENT.max(cluster);
        let cursor = Cursor::new(len, segment);
        let done = AtomicU64::new(0);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let segments = usize::try_from(len.div_ceil(segment)).unwrap_or(usize::MAX);
        let workers = (processors + 1).min(MAX_WORKERS).min(segments);
        let encoders = (0..workers).map(|_| self.encoder()).collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            for encoder in encoders {
                let (cursor, done) = (&cursor, &done);
                scope.spawn(move || self.work(cursor, done, segment, encoder));
            }
        });
        if let Some(error) = cursor.finish() {
            return Err(error);
        }
        self.image.flush()?;
        self.progress.set(len, len);
        Ok(())
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        if !self.compress {
            return Ok(None);
        }
        match self.image.layer().encoder()? {
            Some(encoder) => Ok(Some(encoder)),
            None => Err(Error::unsupported(
                "Compression not supported for this file format",
            )),
        }
    }

    fn work(
        &self,
        cursor: &Cursor<Error>,
        done: &AtomicU64,
        segment: u64,
        encoder: Option<Box<dyn Encoder>>,
    ) {
        let len = usize::try_from(segment).unwrap_or(0);
        let mut worker = Worker {
            rebase: self,
            old: AlignedBuf::new(len),
            new: AlignedBuf::new(len),
            parts: Vec::new(),
            encoder,
            encoded: Vec::new(),
        };
        while let Some(segment) = cursor.claim() {
            match worker.segment(cursor, segment) {
                Ok(end) => {
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

/// Has the image name `backing` below it from now on; the layer makes durable what was written before.
///
/// # Errors
/// `Could not change the backing file to 'NAME'`, and why.
pub fn set_backing(image: &Image, backing: Option<&Backing>) -> Result<()> {
    check_backing(image, backing)?;
    let outcome = image
        .durable_change(|| image.layer().set_backing(backing))
        .map_err(|error| match error.errno() {
            Some(errno::ENOSPC) => Error::invalid("No space left in the file header"),
            _ => error,
        });
    outcome.context(|| could_not(backing))
}

/// Refuses what [`set_backing`] would refuse, before anything has changed.
///
/// # Errors
/// An image whose format has no images below, one below without a format, and one that leads back to the image.
pub fn check_backing(image: &Image, backing: Option<&Backing>) -> Result<()> {
    if backing.is_some_and(|backing| backing.format.is_none()) {
        return Err(Error::invalid("backing format must be specified").context(could_not(backing)));
    }
    let format = format_by_name(image.layer().format());
    if !format.is_some_and(|format| format.has_backing()) {
        return Err(Error::from_errno(errno::ENOTSUP).context(could_not(backing)));
    }
    refuse_loop(image, backing).context(|| could_not(backing))
}

/// Refuses an image below that is `image` itself, or leads back to it.
fn refuse_loop(image: &Image, backing: Option<&Backing>) -> Result<()> {
    let Some(backing) = backing else { return Ok(()) };
    let name = full_backing_name(&image.base_name(), backing.name.text());
    let follow = Follow {
        objects: &Arc::default(),
        gate: None,
    };
    let format = backing.format.as_deref();
    follow
        .files_below(&name, format, &Above::Files(files_of(image)))
        .map(drop)
}

fn could_not(backing: Option<&Backing>) -> String {
    let name = backing.map(|backing| backing.name.text()).unwrap_or_default();
    format!("Could not change the backing file to '{name}'")
}

struct Worker<'a> {
    rebase: &'a Rebase<'a>,
    /// What shows from the old chain in the segment at hand.
    old: AlignedBuf,
    new: AlignedBuf,
    /// What has to be written, and whether it is zero.
    parts: Vec<(ByteRange, bool)>,
    encoder: Option<Box<dyn Encoder>>,
    encoded: Vec<u8>,
}

impl Worker<'_> {
    /// Does all about one segment. Where it ended: what needs no reading after it is taken along.
    fn segment(&mut self, cursor: &Cursor<Error>, segment: Segment) -> std::result::Result<u64, End> {
        let image = self.rebase.image;
        self.parts.clear();
        let mut rest = segment.range;
        let mut quiet = true;
        while !rest.is_empty() {
            let (part, same) = self.same_units(rest)?;
            rest = rest.skip(part.len());
            quiet = same;
            if !same {
                self.compare(part, segment.range.start())?;
            }
        }
        let mut end = segment.range.end();
        while quiet && end < image.len() {
            let (part, same) = self.same_units(ByteRange::new(end, image.len()))?;
            let longer = if same { cursor.extend(end, part.end()) } else { end };
            if longer == end {
                break;
            }
            end = longer;
        }
        if self.parts.is_empty() {
            cursor.pass(segment.number)?;
            return Ok(end);
        }
        let _turn = cursor.wait(segment.number)?;
        for index in 0..self.parts.len() {
            let (part, zero) = self.parts[index];
            self.write(part, zero, segment.range.start())
                .context(|| "Error while writing to COW image")?;
        }
        Ok(end)
    }

    /// What is written at once: smaller pieces would leave the rest of a unit to what is below.
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

    /// How much at the start of `range` needs no look at its bytes, or how much does.
    fn same(&self, range: ByteRange) -> Result<(ByteRange, bool)> {
        let run = self.rebase.image.layer().map(range)?;
        let part = range.first(run.len);
        if !matches!(run.kind, RunKind::Unallocated { .. }) {
            return Ok((part, true));
        }
        let old = below(self.rebase.image.backing(), part)?;
        let part = part.first(old.len);
        let new = below(self.rebase.new, part)?;
        let part = part.first(new.len);
        let same = match (old.place, new.place) {
            (Place::Zero, Place::Zero) => true,
            (Place::Host(one, at), Place::Host(other, other_at)) => one == other && at == other_at,
            _ => false,
        };
        Ok((part, same))
    }

    /// Finds the units of `part` that differ.
    fn compare(&mut self, part: ByteRange, start: u64) -> Result<()> {
        let place = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
        let span = place(part.start())..place(part.end());
        // Where the image has nothing, what it reads as is what shows from below.
        read(Some(self.rebase.image), &mut self.old[span.clone()], part.start())?;
        read(self.rebase.new, &mut self.new[span], part.start())?;
        let unit = self.unit();
        let mut at = part.start();
        while at < part.end() {
            let next = align_down(at, unit).saturating_add(unit).min(part.end());
            let span = place(at)..place(next);
            if self.old[span.clone()] != self.new[span.clone()] {
                let zero = is_zero(&self.old[span]);
                match self.parts.last_mut() {
                    Some((last, was)) if last.end() == at && *was == zero => {
                        *last = ByteRange::new(last.start(), next);
                    }
                    _ => self.parts.push((ByteRange::new(at, next), zero)),
                }
            }
            at = next;
        }
        Ok(())
    }

    fn write(&mut self, part: ByteRange, zero: bool, start: u64) -> Result<()> {
        let image = self.rebase.image;
        let place = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
        if zero {
            image.write_zeroes(part, ZeroMode::Unmap)?;
            // Where nothing is below yet, a format without zero clusters has just left them out.
            let run = image.layer().map(part)?;
            return match run.kind {
                RunKind::Unallocated { .. } => {
                    image.write_at(&self.old[place(part.start())..place(part.end())], part.start())
                }
                _ => Ok(()),
            };
        }
        let Some(encoder) = &mut self.encoder else {
            return image.write_at(&self.old[place(part.start())..place(part.end())], part.start());
        };
        let cluster = image.layer().granularity();
        let mut rest = part;
        while !rest.is_empty() {
            let one = rest.first(cluster - rest.start() % cluster);
            rest = rest.skip(one.len());
            let bytes = &self.old[place(one.start())..place(one.end())];
            if one.len() == cluster && encoder.encode(bytes, &mut self.encoded)? {
                image.write_encoded(one.start(), &self.encoded)?;
            } else {
                image.write_at(bytes, one.start())?;
            }
        }
        Ok(())
    }
}

/// What an image below has at some place.
struct Known {
    len: u64,
    place: Place,
}

/// Where bytes of an image below are.
enum Place {
    Zero,
    /// At this offset of the storage with this identity, as they are.
    Host((u64, u64), u64),
    Elsewhere,
}

fn below(image: Option<&Arc<Image>>, range: ByteRange) -> Result<Known> {
    let there = image.map(|image| range.intersect(ByteRange::new(0, image.len())));
    let (Some(image), Some(there)) = (image, there.filter(|there| !there.is_empty())) else {
        return Ok(Known {
            len: range.len(),
            place: Place::Zero,
        });
    };
    let extent = image.status(there, StatusDetail::Zeroes)?;
    let host = extent
        .host
        .and_then(|(device, offset)| device.identity().map(|identity| Place::Host(identity, offset)));
    Ok(Known {
        len: extent.len,
        place: match host {
            _ if extent.kind.is_zero() => Place::Zero,
            Some(host) => host,
            None => Place::Elsewhere,
        },
    })
}

/// Fills `buf` with what an image reads as, zeroes beyond its end.
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

    /// The top of its layer on another chain.
    fn moved(image: &Arc<Image>, new: Option<&Arc<Image>>) -> Image {
        Image::new(Arc::clone(image.layer()), new.cloned(), "moved", false)
    }

    #[test]
    fn the_disk_is_the_same_on_the_new_image() {
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
                    assert!(contents(&moved(&top, new)) == before, "{options} {compress}");
                }
            }
        }
    }

    #[test]
    fn only_what_differs_is_written() {
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
