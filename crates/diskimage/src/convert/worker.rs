//! One worker: takes segments until there are no more.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;

use diskimage_core::{
    AlignedBuf, ByteRange, Device, Encoder, Error, ExtentKind, Image, PendingWrite, Result, ResultExt,
    StatusDetail, ZeroMode, align_down, align_up,
};

use super::Job;
use super::pieces::{Kind, Piece, ZeroTest, push, round_to_units};
use crate::cursor::{Cursor, End, Segment};

/// The state of one worker; its buffers live as long as it does.
pub(super) struct Worker<'a> {
    job: &'a Job<'a>,
    target: &'a Image,
    encoder: Option<Box<dyn Encoder>>,
    zero_test: Option<ZeroTest>,
    /// The bytes of the segment at hand.
    buf: AlignedBuf,
    /// Parts of the segment that `buf` does not have: their status said enough.
    stale: Vec<ByteRange>,
    pieces: Vec<Piece>,
    actions: Vec<Piece>,
    hosts: Vec<Host>,
    steps: Vec<Step>,
    encoded: Vec<u8>,
    cluster: Vec<u8>,
}

/// Where the storage itself has the bytes of a piece.
struct Host {
    range: ByteRange,
    device: Arc<dyn Device>,
    offset: u64,
}

/// What is to be done about clusters of a compressed target.
enum Step {
    Zero(ByteRange),
    Plain(ByteRange),
    Encoded { offset: u64, bytes: Range<usize> },
}

impl<'a> Worker<'a> {
    pub(super) fn new(job: &'a Job<'a>, encoder: Option<Box<dyn Encoder>>) -> Self {
        let conversion = job.conversion;
        let zero_test = match (conversion.sparse, &encoder) {
            (0, _) => None,
            _ if !conversion.detect_zeroes => None,
            (_, Some(_)) => Some(ZeroTest::clusters(conversion.target.layer().granularity())),
            (sparse, None) => Some(ZeroTest::sparse(sparse)),
        };
        let segment = usize::try_from(job.segment).unwrap_or(0);
        Self {
            job,
            target: conversion.target,
            zero_test,
            buf: AlignedBuf::new(segment),
            stale: Vec::new(),
            pieces: Vec::new(),
            actions: Vec::new(),
            hosts: Vec::new(),
            steps: Vec::new(),
            // All at once: a buffer that grows step by step leaves its former selves behind.
            encoded: Vec::with_capacity(if encoder.is_some() { segment } else { 0 }),
            cluster: Vec::new(),
            encoder,
        }
    }

    /// Works until there is nothing left to do or something has failed.
    pub(super) fn run(mut self) {
        let _guard = StopOnPanic(&self.job.cursor);
        while let Some(segment) = self.job.cursor.claim() {
            match self.convert(segment) {
                Ok(end) => self.job.add_progress(end - segment.range.start()),
                Err(End::Stopped) => return,
                Err(End::Failed(error)) => return self.job.cursor.fail(segment.number, error),
            }
        }
    }

    /// Does all about one segment. Where it ended: zeroes after it may have been taken along.
    fn convert(&mut self, segment: Segment) -> std::result::Result<u64, End> {
        self.scan(segment.range)?;
        let end = self.extend_over_zeroes(segment.range.end())?;
        self.decide(segment.range)?;
        self.clear_stale(segment.range.start());
        let data = self.actions.iter().filter(|action| action.kind == Kind::Data);
        let bytes = data.map(|action| action.range.len()).sum();
        self.job.rate.take(bytes);
        self.job.copied.fetch_add(bytes, Ordering::Relaxed);
        if self.encoder.is_some() {
            self.encode(segment.range)?;
            self.put_encoded(segment)?;
        } else if self.job.ordered() {
            self.write_in_order(segment)?;
        } else {
            self.write_positional(segment.range.start())?;
        }
        Ok(end)
    }

    /// Finds out what the segment consists of, and reads what has to be read.
    fn scan(&mut self, segment: ByteRange) -> Result<()> {
        self.pieces.clear();
        self.stale.clear();
        self.hosts.clear();
        let offload = self.job.offload.load(Ordering::Relaxed);
        let mut rest = segment;
        while !rest.is_empty() {
            let status = self.job.sources.status(rest)?;
            let (mut run, mut kind) = (rest.first(status.len), status.kind);
            if kind == Kind::Below {
                (run, kind) = self.whole_clusters_below(run);
            }
            rest = rest.skip(run.len());
            match (kind, status.host) {
                (Kind::Data, Some((device, offset))) if offload => {
                    self.pieces.push(Piece { range: run, kind });
                    self.hosts.push(Host {
                        range: run,
                        device,
                        offset,
                    });
                }
                (Kind::Data, _) => self.read(run, segment.start())?,
                (kind, _) => {
                    push(&mut self.pieces, run, kind);
                    self.stale.push(run);
                }
            }
        }
        Ok(())
    }

    /// A compressed cluster holds all of its bytes, so one that the image below has only a part of is read whole.
    fn whole_clusters_below(&self, run: ByteRange) -> (ByteRange, Kind) {
        if self.encoder.is_none() || run.end() == self.job.sources.len() && self.starts_cluster(run.start()) {
            return (run, Kind::Below);
        }
        let cluster = self.target.layer().granularity();
        let whole = run.align_in(cluster);
        if whole.is_empty() {
            (run, Kind::Data)
        } else if whole.start() > run.start() {
            (ByteRange::new(run.start(), whole.start()), Kind::Data)
        } else {
            (whole, Kind::Below)
        }
    }

    fn starts_cluster(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.target.layer().granularity())
    }

    fn read(&mut self, run: ByteRange, start: u64) -> Result<()> {
        let buf = slice_mut(&mut self.buf, run, start)?;
        self.job.sources.read(buf, run.start())?;
        match self.zero_test {
            Some(test) => test.split(buf, run.start(), &mut self.pieces),
            None => push(&mut self.pieces, run, Kind::Data),
        }
        Ok(())
    }

    /// Makes the segment longer while what follows needs no reading: a disk of nothing takes no time.
    fn extend_over_zeroes(&mut self, end: u64) -> Result<u64> {
        if self.job.conversion.salvage {
            // What is lost is told once by whoever takes it on.
            return Ok(end);
        }
        let mut end = end;
        let len = self.job.sources.len();
        while let Some(last) = self.pieces.last().copied()
            && last.kind != Kind::Data
            && end < len
        {
            let status = self.job.sources.status(ByteRange::new(end, len))?;
            if status.kind != last.kind {
                break;
            }
            let longer = self.job.cursor.extend(end, end + status.len);
            if longer == end {
                break;
            }
            push(&mut self.pieces, ByteRange::new(end, longer), last.kind);
            end = longer;
        }
        Ok(end)
    }

    /// Turns what the segment consists of into what has to be done.
    fn decide(&mut self, segment: ByteRange) -> Result<()> {
        let unit = if self.encoder.is_some() {
            self.target.layer().granularity()
        } else {
            self.target.layer().write_unit()
        };
        self.actions.clear();
        let all = self
            .pieces
            .last()
            .map_or(segment, |last| ByteRange::new(segment.start(), last.range.end()));
        if unit > 1 && self.hosts.is_empty() && (self.encoder.is_some() || !self.is_in_place(segment)?) {
            round_to_units(&self.pieces, all, unit, &mut self.actions);
        } else {
            self.actions.extend_from_slice(&self.pieces);
        }
        let conversion = self.job.conversion;
        let disk = ByteRange::new(0, self.target.len());
        let shows_below = match (conversion.target_is_zero, conversion.backing_len) {
            (false, _) => disk.end(),
            (true, None) => 0,
            (true, Some(len)) => align_up(len, unit),
        };
        self.actions.retain_mut(|action| {
            action.range = action.range.intersect(disk);
            if action.kind == Kind::Zero {
                action.range = action.range.intersect(ByteRange::new(0, shows_below));
            }
            action.kind != Kind::Below && !action.range.is_empty()
        });
        Ok(())
    }

    /// Whether the target has storage for the segment already: then only what is data is written, and the rest may
    /// stay a hole of the file. Only the segment's start is looked at, where nobody else writes.
    fn is_in_place(&self, segment: ByteRange) -> Result<bool> {
        let start = segment.intersect(ByteRange::new(0, self.target.len()));
        if start.is_empty() {
            return Ok(false);
        }
        let extent = self.target.status(start.first(1), StatusDetail::Allocation)?;
        Ok(extent.depth == 0 && extent.host.is_some() && extent.kind != ExtentKind::Unallocated)
    }

    /// Puts zeroes into the parts of data actions that were never read.
    fn clear_stale(&mut self, start: u64) {
        let mut stale = self.stale.iter().peekable();
        for action in self.actions.iter().filter(|action| action.kind == Kind::Data) {
            while stale.next_if(|run| run.end() <= action.range.start()).is_some() {}
            let mut here = stale.clone();
            while let Some(run) = here.next_if(|run| run.start() < action.range.end()) {
                if let Ok(part) = slice_mut(&mut self.buf, run.intersect(action.range), start) {
                    part.fill(0);
                }
            }
        }
    }

    /// Writes where the guest says.
    fn write_positional(&mut self, start: u64) -> Result<()> {
        for action in &self.actions {
            if action.kind == Kind::Zero {
                write_zeroes(self.target, action.range)?;
                continue;
            }
            let place = self.target.begin_write(action.range);
            let place = place.context(|| write_error(action.range))?;
            finish(self.job, &self.hosts, &mut self.buf, start, place)?;
        }
        Ok(())
    }

    /// Has places given out in the segment's turn, and writes when it is over.
    fn write_in_order(&mut self, segment: Segment) -> std::result::Result<(), End> {
        let cursor = &self.job.cursor;
        if self.actions.is_empty() {
            return Ok(cursor.pass(segment.number)?);
        }
        let start = segment.range.start();
        let cluster = self.target.layer().granularity();
        let turn = cursor.wait(segment.number)?;
        let mut places: Vec<PendingWrite<'_>> = Vec::new();
        for action in &self.actions {
            // Two plans for one cluster would wait for each other.
            let shared = places.last().is_some_and(|last| {
                align_up(last.range().end(), cluster) > align_down(action.range.start(), cluster)
            });
            if shared {
                for place in places.drain(..) {
                    finish(self.job, &self.hosts, &mut self.buf, start, place)?;
                }
            }
            match action.kind {
                Kind::Data => {
                    let place = self.target.begin_write(action.range);
                    places.push(place.context(|| write_error(action.range))?);
                }
                _ => write_zeroes(self.target, action.range)?,
            }
        }
        drop(turn);
        for place in places {
            finish(self.job, &self.hosts, &mut self.buf, start, place)?;
        }
        Ok(())
    }

    /// Encodes the clusters of data actions.
    fn encode(&mut self, segment: ByteRange) -> Result<()> {
        let Some(encoder) = &mut self.encoder else {
            return Ok(());
        };
        let cluster = self.target.layer().granularity();
        self.steps.clear();
        self.encoded.clear();
        for action in &self.actions {
            if action.kind == Kind::Zero {
                self.steps.push(Step::Zero(action.range));
                continue;
            }
            let mut rest = action.range;
            while !rest.is_empty() {
                let part = rest.first(cluster - rest.start() % cluster);
                rest = rest.skip(part.len());
                // The last cluster of the disk is encoded whole as well.
                let whole = ByteRange::at(part.start(), cluster);
                slice_mut(
                    &mut self.buf,
                    ByteRange::new(part.end(), whole.end()),
                    segment.start(),
                )?
                .fill(0);
                let bytes = slice_mut(&mut self.buf, whole, segment.start())?;
                if encoder
                    .encode(bytes, &mut self.cluster)
                    .context(|| write_error(part))?
                {
                    let from = self.encoded.len();
                    self.encoded.extend_from_slice(&self.cluster);
                    self.steps.push(Step::Encoded {
                        offset: part.start(),
                        bytes: from..self.encoded.len(),
                    });
                } else {
                    self.steps.push(Step::Plain(part));
                }
            }
        }
        Ok(())
    }

    /// Stores encoded clusters in the segment's turn.
    fn put_encoded(&mut self, segment: Segment) -> std::result::Result<(), End> {
        let cursor = &self.job.cursor;
        if self.steps.is_empty() {
            return Ok(cursor.pass(segment.number)?);
        }
        let _turn = cursor.wait(segment.number)?;
        for step in &self.steps {
            match step {
                Step::Zero(range) => write_zeroes(self.target, *range)?,
                Step::Plain(range) => {
                    let bytes = slice_mut(&mut self.buf, *range, segment.range.start())?;
                    self.target
                        .write_at(bytes, range.start())
                        .context(|| write_error(*range))?;
                }
                Step::Encoded { offset, bytes } => {
                    let bytes = self.encoded.get(bytes.clone()).unwrap_or_default();
                    self.target
                        .write_encoded(*offset, bytes)
                        .context(|| write_error(ByteRange::at(*offset, 1)))?;
                }
            }
        }
        Ok(())
    }
}

/// Writes the bytes of `place` from `buf`, whose first byte is the one at `start`, or has the storage copy them.
fn finish(job: &Job<'_>, hosts: &[Host], buf: &mut [u8], start: u64, place: PendingWrite<'_>) -> Result<()> {
    let _writing = job
        .writing
        .as_ref()
        .map(|one| one.lock().unwrap_or_else(PoisonError::into_inner));
    let range = place.range();
    let index = hosts.partition_point(|host| host.range.end() <= range.start());
    let host = hosts
        .get(index)
        .filter(|host| host.range.start() <= range.start());
    let Some(host) = host else {
        return place
            .finish(slice_mut(buf, range, start)?)
            .context(|| write_error(range));
    };
    place
        .finish_with(|device, offset, guest| {
            let from = ByteRange::at(host.offset + (guest.start() - host.range.start()), guest.len());
            if job.offload.load(Ordering::Relaxed) {
                host.device.require(from.start(), from.len())?;
                if host.device.copy_to(from, &**device, offset)? {
                    return Ok(());
                }
                job.offload.store(false, Ordering::Relaxed);
            }
            let bytes = slice_mut(buf, guest, start)?;
            job.sources.read(bytes, guest.start())?;
            device.write_at(bytes, offset)
        })
        .context(|| write_error(range))
}

fn write_zeroes(target: &Image, range: ByteRange) -> Result<()> {
    target
        .write_zeroes(range, ZeroMode::Unmap)
        .context(|| write_error(range))
}

fn write_error(range: ByteRange) -> String {
    format!("error while writing at byte {}", range.start())
}

/// The bytes of `range` in a buffer whose first byte is the one at `start`.
fn slice_mut(buf: &mut [u8], range: ByteRange, start: u64) -> Result<&mut [u8]> {
    let from = range
        .start()
        .checked_sub(start)
        .and_then(|from| usize::try_from(from).ok());
    let len = usize::try_from(range.len()).ok();
    from.zip(len)
        .and_then(|(from, len)| buf.get_mut(from..)?.get_mut(..len))
        .ok_or_else(|| Error::invalid("Request larger than its buffer"))
}

/// Keeps the other workers from waiting for a turn that never comes.
struct StopOnPanic<'a>(&'a Cursor<Error>);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(0, Error::invalid("The conversion was interrupted"));
        }
    }
}
