//! One worker of a conversion: claims segments until all are claimed or one has failed.
//!
//! ```text
//!   scan ──▶ runs ──▶ decide ──▶ actions ──▶ write_positional
//!                                        ──▶ write_in_order
//!                                        ──▶ encode ──▶ steps ──▶ write_encoded_in_order
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use diskimage_core::{
    AlignedBuf, ByteRange, Device, EncodedCluster, EncodedForm, Encoder, Error, ExtentKind, Image,
    PendingEncoded, PendingWrite, Result, ResultExt, StatusDetail, ZeroMode, align_down, align_up,
    vec_with_room,
};

use super::CopyJob;
use super::runs::{CopyKind, CopyRun, ZeroTest, push_run, round_to_units};
use crate::cursor::{Cursor, End, Segment};
use crate::steps::{Origin, Part, STEP};

/// The state of one worker. Its buffers are reused for every segment.
pub(super) struct Worker<'a> {
    job: &'a CopyJob<'a>,
    target: &'a Image,
    encoder: Option<Box<dyn Encoder>>,
    /// The form of encoded clusters that the target can take as they are.
    form: Option<EncodedForm>,
    zero_test: Option<ZeroTest>,
    /// The bytes of the current segment.
    buf: AlignedBuf,
    /// Ranges of the segment that were not read into `buf`, since their status was enough.
    unread: Vec<ByteRange>,
    /// The runs of the segment in the source.
    runs: Vec<CopyRun>,
    /// The runs to write to the target.
    actions: Vec<CopyRun>,
    hosts: Vec<HostRun>,
    /// The data of the segment by its status, for the steps of the progress.
    parts: Vec<Part>,
    steps: Vec<ClusterWrite>,
    /// The encoded clusters of `steps`, as ranges of `encoded`.
    clusters: Vec<EncodedCluster>,
    encoded: Vec<u8>,
    /// The clusters of the segment that were read in encoded form as well, by guest offset, as ranges of `kept_bytes`.
    kept: Vec<(u64, Range<usize>)>,
    kept_bytes: Vec<u8>,
    cluster: Vec<u8>,
}

/// The device and the host offset of a run that the storage may copy by itself.
struct HostRun {
    range: ByteRange,
    device: Arc<dyn Device>,
    offset: u64,
}

/// A write of one or more clusters to a compressed target.
enum ClusterWrite {
    Zero(ByteRange),
    Plain(ByteRange),
    /// A range of [`Worker::clusters`].
    Encoded(Range<usize>),
}

/// The same, with storage.
enum PendingCluster<'a> {
    Plain(PendingWrite<'a>),
    Encoded(PendingEncoded<'a>, u64),
}

impl<'a> Worker<'a> {
    /// A worker with a buffer of `segment` bytes.
    ///
    /// # Errors
    /// The memory for its buffers cannot be had.
    pub(super) fn new(
        job: &'a CopyJob<'a>,
        segment: usize,
        encoder: Option<Box<dyn Encoder>>,
    ) -> Result<Self> {
        let conversion = job.conversion;
        let zero_test = match (conversion.sparse, &encoder) {
            (0, _) => None,
            _ if !conversion.detect_zeroes => None,
            (_, Some(_)) => Some(ZeroTest::clusters(conversion.target.layer().granularity())),
            (sparse, None) => Some(ZeroTest::sparse(sparse)),
        };
        Ok(Self {
            job,
            target: conversion.target,
            // Unreadable sectors are found by reads of sectors; and who asks for a level wants clusters of that.
            form: match &encoder {
                Some(_) if !conversion.salvage && conversion.compression_level.is_none() => {
                    conversion.target.layer().encoded_form()
                }
                _ => None,
            },
            zero_test,
            buf: AlignedBuf::new(segment)?,
            unread: Vec::new(),
            runs: Vec::new(),
            actions: Vec::new(),
            hosts: Vec::new(),
            parts: Vec::new(),
            steps: Vec::new(),
            clusters: Vec::new(),
            kept: Vec::new(),
            kept_bytes: Vec::new(),
            // Allocated in full: growing step by step would fragment the heap with the smaller buffers.
            encoded: vec_with_room(if encoder.is_some() { segment } else { 0 })?,
            cluster: Vec::new(),
            encoder,
        })
    }

    /// Converts segments until all are claimed or one has failed.
    pub(super) fn run(mut self) {
        let _guard = StopOnPanic(&self.job.cursor);
        while let Some(segment) = self.job.cursor.claim() {
            match self.convert(segment) {
                Ok(end) => {
                    let parts = std::mem::take(&mut self.parts);
                    self.job
                        .add_progress(segment.number, end - segment.range.start(), parts);
                }
                Err(End::Stopped) => return,
                Err(End::Failed(error)) => {
                    if let Some(failed_at) = self.job.conversion.failed_at {
                        failed_at.fetch_min(segment.range.start(), Ordering::Relaxed);
                    }
                    return self.job.cursor.fail(segment.number, error);
                }
            }
        }
    }

    /// Converts one segment, extended over the zeroes after it, and returns its end.
    fn convert(&mut self, segment: Segment<CopyKind>) -> std::result::Result<u64, End> {
        self.begin();
        let end = match segment.known {
            Some((end, kind)) => {
                push_run(&mut self.runs, ByteRange::new(segment.range.start(), end), kind);
                end
            }
            None => {
                self.scan(segment.range)?;
                self.extend_over_zeroes(segment.range.end())?
            }
        };
        self.decide(segment.range)?;
        self.zero_unread(segment.range.start());
        let data = self.actions.iter().filter(|action| action.kind == CopyKind::Data);
        let bytes = data.map(|action| action.range.len()).sum();
        self.job.rate.admit(bytes);
        self.job.copied.fetch_add(bytes, Ordering::Relaxed);
        if self.encoder.is_some() {
            self.encode(segment.range)?;
            self.write_encoded_in_order(segment)?;
        } else if self.job.ordered() {
            self.write_in_order(segment)?;
        } else {
            self.write_positional(segment.range.start())?;
        }
        Ok(end)
    }

    /// Forgets the segment before.
    fn begin(&mut self) {
        self.runs.clear();
        self.unread.clear();
        self.hosts.clear();
        self.kept.clear();
        self.kept_bytes.clear();
    }

    /// Splits the segment into runs, and reads those that are not zero by their status.
    fn scan(&mut self, segment: ByteRange) -> Result<()> {
        let offload = self.job.offload.load(Ordering::Relaxed);
        let mut rest = segment;
        while !rest.is_empty() {
            let status = self.job.sources.status(rest)?;
            let (mut run, mut kind) = (rest.first(status.len), status.kind);
            if self.job.steps.is_some() && kind == CopyKind::Data {
                self.parts.push(Part {
                    range: run,
                    origins: [status.origin, Origin::default()],
                    longest: self.longest_step(),
                });
            }
            if kind == CopyKind::InBacking {
                (run, kind) = self.whole_clusters_in_backing(run);
            }
            rest = rest.skip(run.len());
            match (kind, status.host) {
                (CopyKind::Data, Some((device, offset))) if offload => {
                    self.runs.push(CopyRun { range: run, kind });
                    self.hosts.push(HostRun {
                        range: run,
                        device,
                        offset,
                    });
                }
                (CopyKind::Data, host)
                    if self.zero_test.is_some() && self.job.sources.is_hole(run, host.as_ref()) =>
                {
                    push_run(&mut self.runs, run, CopyKind::Zero);
                    self.unread.push(run);
                }
                (CopyKind::Data, _) => self.read(run, segment.start())?,
                (kind, _) => {
                    push_run(&mut self.runs, run, kind);
                    self.unread.push(run);
                }
            }
        }
        Ok(())
    }

    fn longest_step(&self) -> u64 {
        match &self.encoder {
            Some(_) => self.target.layer().granularity(),
            None => STEP,
        }
    }

    /// Reduces a run in the backing image to whole clusters: a compressed cluster has all its bytes, so a cluster of
    /// which the backing image has a part is read whole.
    fn whole_clusters_in_backing(&self, run: ByteRange) -> (ByteRange, CopyKind) {
        if self.encoder.is_none() || run.end() == self.job.sources.len() && self.starts_cluster(run.start()) {
            return (run, CopyKind::InBacking);
        }
        let cluster = self.target.layer().granularity();
        let whole = run.align_in(cluster);
        if whole.is_empty() {
            (run, CopyKind::Data)
        } else if whole.start() > run.start() {
            (ByteRange::new(run.start(), whole.start()), CopyKind::Data)
        } else {
            (whole, CopyKind::InBacking)
        }
    }

    fn starts_cluster(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.target.layer().granularity())
    }

    fn read(&mut self, run: ByteRange, start: u64) -> Result<()> {
        if self.form.is_none_or(|form| !self.read_and_keep(run, start, form)) {
            self.job
                .sources
                .read(slice_mut(&mut self.buf, run, start)?, run.start())?;
        }
        let buf = slice_mut(&mut self.buf, run, start)?;
        match self.zero_test {
            Some(test) => test.split(buf, run.start(), &mut self.runs),
            None => push_run(&mut self.runs, run, CopyKind::Data),
        }
        Ok(())
    }

    /// Reads `run`, which begins with a cluster that is stored in this form, and keeps the encoded form of its clusters.
    /// `false` for another run, and after an error: then it is read as any other, and the error is reported.
    fn read_and_keep(&mut self, run: ByteRange, start: u64, form: EncodedForm) -> bool {
        let first = self.kept.len();
        let mut rest = run;
        while !rest.is_empty() {
            let part = rest.first(form.cluster - rest.start() % form.cluster);
            rest = rest.skip(part.len());
            let Ok(buf) = slice_mut(&mut self.buf, part, start) else {
                return false;
            };
            let sources = &self.job.sources;
            if let Ok(true) = sources.read_encoded(part, form, buf, &mut self.cluster) {
                let from = self.kept_bytes.len();
                self.kept_bytes.extend_from_slice(&self.cluster);
                self.kept.push((part.start(), from..self.kept_bytes.len()));
            } else if self.kept.len() == first || sources.read(buf, part.start()).is_err() {
                self.kept.truncate(first);
                return false;
            }
        }
        true
    }

    /// Extends the segment while the runs after it need no read, so that an empty disk of any size takes no time.
    fn extend_over_zeroes(&mut self, end: u64) -> Result<u64> {
        if self.job.conversion.salvage {
            // The worker that claims the next segment reports its unreadable sectors; this one must not as well.
            return Ok(end);
        }
        let Some(_outlook) = self.job.cursor.outlook() else {
            return Ok(end);
        };
        let mut end = end;
        let len = self.job.sources.len();
        while let Some(last) = self.runs.last().copied()
            && last.kind != CopyKind::Data
            && end < len
        {
            let status = self.job.sources.status(ByteRange::new(end, len))?;
            if status.kind != last.kind {
                break;
            }
            let longer = self.job.cursor.extend_or_tell(end, end + status.len, status.kind);
            if longer == end {
                break;
            }
            push_run(&mut self.runs, ByteRange::new(end, longer), last.kind);
            end = longer;
        }
        Ok(end)
    }

    /// Derives the actions of the segment from its runs.
    fn decide(&mut self, segment: ByteRange) -> Result<()> {
        let unit = if self.encoder.is_some() {
            self.target.layer().granularity()
        } else {
            self.target.layer().write_unit()
        };
        self.actions.clear();
        let all = self
            .runs
            .last()
            .map_or(segment, |last| ByteRange::new(segment.start(), last.range.end()));
        if unit > 1 && self.hosts.is_empty() && (self.encoder.is_some() || !self.has_storage(segment)?) {
            round_to_units(&self.runs, all, unit, &mut self.actions);
        } else {
            self.actions.extend_from_slice(&self.runs);
        }
        let conversion = self.job.conversion;
        let disk = ByteRange::new(0, self.target.len());
        let shows_backing = match (conversion.target_is_zero, conversion.backing_len) {
            (false, _) => disk.end(),
            (true, None) => 0,
            (true, Some(len)) => align_up(len, unit),
        };
        self.actions.retain_mut(|action| {
            action.range = action.range.intersect(disk);
            if action.kind == CopyKind::Zero {
                action.range = action.range.intersect(ByteRange::new(0, shows_backing));
            }
            action.kind != CopyKind::InBacking && !action.range.is_empty()
        });
        Ok(())
    }

    /// Whether the target has allocated storage for the segment already. Then only data is written, and the rest may
    /// stay a hole of the file. Only the first byte of the segment is queried: no other worker writes there.
    fn has_storage(&self, segment: ByteRange) -> Result<bool> {
        let start = segment.intersect(ByteRange::new(0, self.target.len()));
        if start.is_empty() {
            return Ok(false);
        }
        let extent = self.target.status(start.first(1), StatusDetail::Allocation);
        let extent = extent.context(|| write_error(segment))?;
        Ok(extent.depth == 0 && extent.host.is_some() && extent.kind != ExtentKind::Unallocated)
    }

    /// Fills the unread ranges of data actions with zeroes.
    fn zero_unread(&mut self, start: u64) {
        let mut unread = self.unread.iter().peekable();
        for action in self.actions.iter().filter(|action| action.kind == CopyKind::Data) {
            while unread.next_if(|run| run.end() <= action.range.start()).is_some() {}
            let mut here = unread.clone();
            while let Some(run) = here.next_if(|run| run.start() < action.range.end()) {
                if let Ok(part) = slice_mut(&mut self.buf, run.intersect(action.range), start) {
                    part.fill(0);
                }
            }
        }
    }

    /// Writes at the guest offset: the target's layout does not depend on the order of writes.
    fn write_positional(&mut self, start: u64) -> Result<()> {
        for action in &self.actions {
            if action.kind == CopyKind::Zero {
                write_zeroes(self.job, action.range)?;
                continue;
            }
            let write = self.target.begin_write(action.range);
            let write = write.context(|| write_error(action.range))?;
            finish_write(self.job, &self.hosts, &mut self.buf, start, write)?;
        }
        Ok(())
    }

    /// Allocates clusters in the segment's turn, and writes the data after it.
    fn write_in_order(&mut self, segment: Segment<CopyKind>) -> std::result::Result<(), End> {
        let cursor = &self.job.cursor;
        if self.actions.is_empty() {
            return Ok(cursor.pass(segment.number)?);
        }
        let start = segment.range.start();
        let cluster = self.target.layer().granularity();
        let turn = cursor.wait(segment.number)?;
        let mut pending: Vec<PendingWrite<'_>> = Vec::new();
        for action in &self.actions {
            // Two pending writes of one cluster would wait for each other.
            let shared = pending.last().is_some_and(|last| {
                align_up(last.range().end(), cluster) > align_down(action.range.start(), cluster)
            });
            if shared {
                for write in pending.drain(..) {
                    finish_write(self.job, &self.hosts, &mut self.buf, start, write)?;
                }
            }
            match action.kind {
                CopyKind::Data => {
                    let write = self.target.begin_write(action.range);
                    pending.push(write.context(|| write_error(action.range))?);
                }
                _ => write_zeroes(self.job, action.range)?,
            }
        }
        drop(turn);
        for write in pending {
            finish_write(self.job, &self.hosts, &mut self.buf, start, write)?;
        }
        Ok(())
    }

    /// Encodes (compresses) the clusters of data actions.
    fn encode(&mut self, segment: ByteRange) -> Result<()> {
        let Some(encoder) = &mut self.encoder else {
            return Ok(());
        };
        let cluster = self.target.layer().granularity();
        self.steps.clear();
        self.clusters.clear();
        self.encoded.clear();
        for action in &self.actions {
            if action.kind == CopyKind::Zero {
                self.steps.push(ClusterWrite::Zero(action.range));
                continue;
            }
            let mut rest = action.range;
            while !rest.is_empty() {
                let part = rest.first(cluster - rest.start() % cluster);
                rest = rest.skip(part.len());
                // The last cluster of the disk is encoded whole as well, padded with zeroes.
                let whole = ByteRange::at(part.start(), cluster);
                slice_mut(
                    &mut self.buf,
                    ByteRange::new(part.end(), whole.end()),
                    segment.start(),
                )?
                .fill(0);
                let bytes = slice_mut(&mut self.buf, whole, segment.start())?;
                let kept = self
                    .kept
                    .binary_search_by_key(&part.start(), |(offset, _)| *offset);
                let is_encoded = match kept {
                    Ok(index) => {
                        let kept = self.kept_bytes.get(self.kept[index].1.clone());
                        self.cluster.clear();
                        self.cluster.extend_from_slice(kept.unwrap_or_default());
                        true
                    }
                    Err(_) => encoder
                        .encode(bytes, &mut self.cluster)
                        .context(|| write_error(part))?,
                };
                if is_encoded {
                    let from = self.encoded.len();
                    self.encoded.extend_from_slice(&self.cluster);
                    let index = self.clusters.len();
                    self.clusters.push(EncodedCluster {
                        offset: part.start(),
                        bytes: from..self.encoded.len(),
                    });
                    match self.steps.last_mut() {
                        Some(ClusterWrite::Encoded(clusters)) => clusters.end = index + 1,
                        _ => self.steps.push(ClusterWrite::Encoded(index..index + 1)),
                    }
                } else {
                    self.steps.push(ClusterWrite::Plain(part));
                }
            }
        }
        Ok(())
    }

    /// Allocates storage for encoded clusters in the segment's turn, and writes them after it.
    fn write_encoded_in_order(&mut self, segment: Segment<CopyKind>) -> std::result::Result<(), End> {
        let cursor = &self.job.cursor;
        if self.steps.is_empty() {
            return Ok(cursor.pass(segment.number)?);
        }
        let start = segment.range.start();
        let turn = cursor.wait(segment.number)?;
        let mut pending = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            match step {
                ClusterWrite::Zero(range) => write_zeroes(self.job, *range)?,
                ClusterWrite::Plain(range) => {
                    let write = self.target.begin_write(*range);
                    pending.push(PendingCluster::Plain(write.context(|| write_error(*range))?));
                }
                ClusterWrite::Encoded(clusters) => {
                    let clusters = self.clusters.get(clusters.clone()).unwrap_or_default();
                    let first = clusters.first().map_or(start, |cluster| cluster.offset);
                    let write = self.target.begin_encoded(clusters);
                    let write = write.context(|| write_error(ByteRange::at(first, 1)))?;
                    pending.push(PendingCluster::Encoded(write, first));
                }
            }
        }
        // Neighbours share a block, which the device may read, change and write.
        let _turn = self.job.shares_blocks.then_some(turn);
        for write in pending {
            match write {
                PendingCluster::Plain(write) => {
                    finish_write(self.job, &self.hosts, &mut self.buf, start, write)?;
                }
                PendingCluster::Encoded(write, first) => {
                    let _writing = self.job.lock_writing();
                    self.job.changed.store(true, Ordering::Relaxed);
                    write
                        .finish(&self.encoded)
                        .context(|| write_error(ByteRange::at(first, 1)))?;
                }
            }
        }
        Ok(())
    }
}

/// Finishes `write` with its bytes from `buf`, whose first byte is at guest offset `start`, or lets the storage copy
/// them.
fn finish_write(
    job: &CopyJob<'_>,
    hosts: &[HostRun],
    buf: &mut [u8],
    start: u64,
    write: PendingWrite<'_>,
) -> Result<()> {
    let _writing = job.lock_writing();
    job.changed.store(true, Ordering::Relaxed);
    let range = write.range();
    let index = hosts.partition_point(|host| host.range.end() <= range.start());
    let host = hosts
        .get(index)
        .filter(|host| host.range.start() <= range.start());
    let Some(host) = host else {
        return write
            .finish(slice_mut(buf, range, start)?)
            .context(|| write_error(range));
    };
    write
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

fn write_zeroes(job: &CopyJob<'_>, range: ByteRange) -> Result<()> {
    job.changed.store(true, Ordering::Relaxed);
    let target = job.conversion.target;
    target
        .write_zeroes(range, ZeroMode::Unmap)
        .context(|| write_error(range))
}

fn write_error(range: ByteRange) -> String {
    format!("error while writing at byte {}", range.start())
}

/// The bytes of `range` in a buffer whose first byte is at guest offset `start`.
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

/// Stops the other workers when this one panics: they would wait for its turn forever.
struct StopOnPanic<'a>(&'a Cursor<Error, CopyKind>);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(0, Error::invalid("The conversion was interrupted"));
        }
    }
}
