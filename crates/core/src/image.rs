//! A layer with its backing image: the disk that the guest sees.
//!
//! This is the only code that walks a backing chain, reads zeroes beyond the end of a short backing image, copies the
//! rest of a partly written cluster (copy-on-write) and checks bounds. Formats do none of this.
//!
//! ```text
//!   guest bytes   |-------- len() --------|
//!   layer         [data][ ? ][zero][  ?   ]      ? = unallocated: read the backing image
//!   backing             [data]     [ ? |          its end: zeroes after it
//!   its backing                    [dat]
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::errno;
use crate::flush_on_drop::FlushOnDrop;
use crate::{
    AmendRequest, BackingIdentity, ByteRange, DecodedBlockCache, Device, Encoded, EncodedCluster,
    EncodedForm, EncodedPlan, Error, ErrorKind, Event, Extent, ExtentKind, HoleMeaning, Info, Layer, Limits,
    Node, NodeOptions, OnLost, Preallocation, ResizeRequest, Result, Run, RunKind, StatusDetail, WritePlan,
    WriteRun, ZeroMode, align_down, align_up, is_zero, to_index, write_zero_chunks,
};

/// An opened image and its backing chain.
///
/// Dirty metadata stays in memory until [`Device::flush`] writes it back and makes all writes durable. [`Image::close`]
/// flushes and drops the image. A drop flushes too if there are changes since the last flush, but cannot return an
/// error: lost changes are reported only to the callback of [`Image::set_on_lost`]. After a change that failed half
/// way, a drop writes nothing: cached metadata may contradict the file.
#[derive(Debug)]
pub struct Image {
    /// Dropped before `backing`.
    guarded: Arc<FlushOnDrop>,
    backing: Option<Arc<Image>>,
    /// How the backing image differs from the one that this image was created on.
    backing_mismatch: Option<String>,
    write: bool,
    limits: Limits,
    node: Node,
    /// The image is a protocol or filter without a format: its bytes are those of the layer's file.
    is_bare: bool,
    zeroes: ZeroDetection,
    /// Whether the check for missing bytes of the file, which the first write needs, has passed.
    is_complete: AtomicBool,
    /// Held during that check.
    completeness_check: Mutex<()>,
    /// The cluster decoded last: sequential small reads hit the same compressed cluster.
    decoded: DecodedBlockCache<Encoded>,
}

/// The smallest unit that a disk writes.
const SECTOR: usize = 512;

impl Image {
    /// An image of `layer` and its `backing` image. `name` is the filename that the user gave.
    pub fn new(
        layer: Arc<dyn Layer>,
        backing: Option<Arc<Image>>,
        name: impl Into<String>,
        write: bool,
    ) -> Self {
        let node = Node {
            driver: layer.format(),
            options: NodeOptions::new(),
            node_name: None,
            name: Some(name.into()),
            children: vec![("file".to_owned(), Arc::clone(layer.file()))],
            format_is_stated: false,
        };
        let limits = Limits {
            alignment: 1,
            ..layer.file().limits().clone()
        };
        let compared = backing
            .as_ref()
            .map(|below| layer.check_backing(&**below.layer()));
        let backing_mismatch = match compared {
            Some(Ok(BackingIdentity::Other(what))) => Some(what),
            // What keeps the image from being opened is an error of those who open chains.
            _ => None,
        };
        Self {
            guarded: Arc::new(FlushOnDrop::new(layer)),
            backing,
            backing_mismatch,
            write,
            limits,
            node,
            is_bare: false,
            zeroes: ZeroDetection::Off,
            is_complete: AtomicBool::new(false),
            completeness_check: Mutex::new(()),
            decoded: DecodedBlockCache::default(),
        }
    }

    /// The same image with this node in the block graph, which includes the name.
    #[must_use]
    pub fn with_node(self, node: Node) -> Self {
        Self { node, ..self }
    }

    /// The same image as a protocol or filter that is used without a format: in the block graph it is the node of its
    /// file, and what is known of the bytes is what that one knows.
    #[must_use]
    pub fn bare(self) -> Self {
        let node = self.layer().file().node();
        Self {
            node,
            is_bare: true,
            ..self
        }
    }

    /// The same image with detection of zeroes in written data.
    #[must_use]
    pub fn with_zero_detection(self, zeroes: ZeroDetection) -> Self {
        Self { zeroes, ..self }
    }

    /// The layer on top.
    pub fn layer(&self) -> &Arc<dyn Layer> {
        self.guarded.layer()
    }

    /// Sets the callback for changes that a drop of the image could not write back, unless one is set already.
    pub fn set_on_lost(&self, on_lost: Arc<OnLost>) {
        self.guarded.set_on_lost(on_lost);
    }

    /// Makes all changes durable, also those of backing images that were opened for writing, and drops the image.
    ///
    /// # Errors
    /// Those of [`Device::flush`]; an earlier change that failed half way, after which nothing more is written; and
    /// [`ErrorKind::Invalid`] if there are other references to the image: all is durable then, but the image stays
    /// open.
    pub fn close(self: Arc<Self>) -> Result<()> {
        let chain = std::iter::successors(Some(&self), |image| image.backing.as_ref());
        let written = chain.filter(|image| image.write);
        // A failure does not keep the other images from being flushed.
        let failures: Vec<_> = written.filter_map(|image| image.guarded.close().err()).collect();
        match failures.into_iter().next() {
            Some(error) => Err(error),
            None if Arc::strong_count(&self) > 1 => Err(Error::invalid("Image is still in use")),
            None => Ok(()),
        }
    }

    /// Runs `change`, which changes the layer directly and is durable once it has succeeded, as all changes of
    /// snapshots, bitmaps and backing file names are. If it fails half way, a drop writes nothing.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn durable_change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        self.guarded.durable_change(change)
    }

    /// The filename that relative names in the image are resolved against: its own, or that of its file.
    pub fn base_name(&self) -> String {
        self.node().base_name()
    }

    /// The backing image.
    pub fn backing(&self) -> Option<&Arc<Image>> {
        self.backing.as_ref()
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.write
    }

    /// The same image without its backing chain: reads return the data of this layer only.
    #[must_use]
    pub fn without_backing(&self) -> Self {
        let image = Self::new(Arc::clone(self.layer()), None, "", self.write)
            .with_node(self.node.clone())
            .with_zero_detection(self.zeroes);
        Self {
            guarded: Arc::clone(&self.guarded),
            is_bare: self.is_bare,
            ..image
        }
    }

    /// Allocates storage for the bytes of `range`, which is not empty. Clusters are allocated in the order of these
    /// calls; the bytes may then be written by several threads at once.
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn begin_write(&self, range: ByteRange) -> Result<PendingWrite<'_>> {
        self.require_writable()?;
        self.require_backing_unchanged()?;
        let range = self.check_bounds(range.start(), range.len())?;
        self.decoded.clear();
        Ok(PendingWrite {
            image: self,
            range,
            plan: self.guarded.change(|| self.layer().plan_write(range))?,
        })
    }

    /// Reads `range` into `buf` and replaces `bytes` by its encoded form, if it is one cluster of the disk that an image of
    /// the chain stores in this form. Otherwise the result is `false`, and `buf` holds anything.
    ///
    /// # Errors
    /// As [`Device::read_at`].
    pub fn read_encoded(
        &self,
        range: ByteRange,
        form: EncodedForm,
        buf: &mut [u8],
        bytes: &mut Vec<u8>,
    ) -> Result<bool> {
        if range.is_empty() || range.end() > self.len() {
            return Ok(false);
        }
        let (image, _, run) = self.resolve(range)?;
        match &run.kind {
            RunKind::Encoded(encoded) if encoded.cluster == range => {
                let codec = image.layer().codec()?;
                Ok(codec.form() == Some(form) && codec.decode_and_keep(encoded, buf, bytes)?)
            }
            _ => Ok(false),
        }
    }

    /// Stores the encoded form of one whole cluster.
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn write_encoded(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let cluster = EncodedCluster {
            offset,
            bytes: 0..bytes.len(),
        };
        self.begin_encoded(&[cluster])?.finish(bytes)
    }

    /// Allocates storage for the encoded form of whole clusters, which are given in guest order, at least one. It is
    /// allocated in the order of these calls and of [`Image::begin_write`]; the bytes may then be written by several
    /// threads at once.
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn begin_encoded(&self, clusters: &[EncodedCluster]) -> Result<PendingEncoded<'_>> {
        self.require_writable()?;
        self.decoded.clear();
        Ok(PendingEncoded {
            image: self,
            plan: self
                .guarded
                .change(|| self.layer().codec()?.plan_encoded(clusters))?,
        })
    }

    /// Discards all data, so that reads return the backing image everywhere, if the format supports it.
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn make_empty(&self) -> Result<()> {
        self.require_writable()?;
        self.decoded.clear();
        self.guarded.change(|| self.layer().make_empty())
    }

    /// Changes the size of the disk.
    ///
    /// # Errors
    /// Sizes that the format does not support, and as [`Device::write_at`].
    pub fn resize_with(&self, request: &ResizeRequest) -> Result<()> {
        self.require_writable()?;
        self.decoded.clear();
        self.layer().check_resize(request)?;
        let old = self.len();
        if request.len > old {
            self.zero_beyond_end()?;
            self.copy_up_last_unit()?;
            self.extend_file_to_unit_end()?;
        }
        let request = &ResizeRequest {
            backing_len: self.backing_len(),
            ..request.clone()
        };
        self.guarded.change(|| self.layer().resize(request))?;
        if request.len < old {
            return match self.zero_beyond_end() {
                // It is zeroed when the disk grows.
                Err(error) if error.kind() == ErrorKind::NoSpace => Ok(()),
                other => other,
            };
        }
        Ok(())
    }

    /// Changes creation options. The image has to be opened again afterwards.
    ///
    /// # Errors
    /// Options that the format cannot change, and as [`Device::write_at`].
    pub fn amend(&self, request: &AmendRequest<'_>) -> Result<()> {
        self.require_writable()?;
        self.decoded.clear();
        if request.options.size("size").is_some_and(|len| len > self.len()) {
            self.zero_beyond_end()?;
            self.copy_up_last_unit()?;
        }
        let request = AmendRequest {
            backing_len: self.backing_len(),
            ..*request
        };
        self.guarded.last_change(|| self.layer().amend(&request))
    }

    fn backing_len(&self) -> u64 {
        self.backing.as_ref().map_or(0, |below| below.len())
    }

    /// Zeroes the bytes beyond the end of the disk in its last unit, which a shrink has cut off: they must not reappear
    /// when the disk grows.
    fn zero_beyond_end(&self) -> Result<()> {
        if !self.layer().capabilities().keeps_tail {
            return Ok(());
        }
        let beyond = ByteRange::new(self.len(), align_up(self.len(), self.layer().granularity()));
        if beyond.is_empty() {
            return Ok(());
        }
        let len = to_index(beyond.len())?;
        let mut bytes = vec![0; len];
        self.read_own(beyond, &mut bytes)?;
        if is_zero(&bytes) {
            return Ok(());
        }
        bytes.fill(0);
        let write = PendingWrite {
            image: self,
            range: beyond,
            plan: self.layer().plan_write(beyond)?,
        };
        write.finish(&bytes)
    }

    /// Reads `range` from the layer without its backing image. The range may lie beyond the end of the disk.
    fn read_own(&self, range: ByteRange, buf: &mut [u8]) -> Result<()> {
        let (mut rest, mut buf) = (range, buf);
        while !rest.is_empty() {
            let run = self.layer().map(rest)?;
            let len = to_index(run.len.min(rest.len()))?;
            let (head, tail) = buf.split_at_mut(len);
            match &run.kind {
                // The file may end before bytes beyond the end of the disk.
                RunKind::Data { device, offset, .. } => device.read_padded(head, *offset)?,
                _ => self.read_run(&run, rest.start(), head)?,
            }
            rest = rest.skip(run.len);
            buf = tail;
        }
        Ok(())
    }

    /// Copies the last unit of the disk from the backing image into the layer, if the rest of the unit would expose the
    /// backing image once the disk grows. The disk reads as before.
    fn copy_up_last_unit(&self) -> Result<()> {
        let Some(below) = &self.backing else { return Ok(()) };
        let (end, unit) = (self.len(), self.layer().write_unit());
        let last = ByteRange::new(align_down(end, unit), end);
        let hidden = ByteRange::new(end, align_up(end, unit)).intersect(ByteRange::new(0, below.len()));
        if last.is_empty() || hidden.is_empty() || below.is_known_zero(hidden)? {
            return Ok(());
        }
        let RunKind::Unallocated { .. } = self.layer().map(last)?.kind else {
            return Ok(());
        };
        // Zeroes up to the end of the unit are written as well, as in qemu-img.
        let mut bytes = vec![0; to_index(unit)?];
        let inside = to_index(last.len())?;
        self.read_at(&mut bytes[..inside], last.start())?;
        self.begin_write(last)?
            .finish_with(|device, offset, _| device.write_at(&bytes, offset))
    }

    /// Extends the file to the end of the last unit of the disk: the rest of the unit becomes part of the disk when it
    /// grows.
    fn extend_file_to_unit_end(&self) -> Result<()> {
        let (end, unit) = (self.len(), self.layer().granularity());
        let rest = align_up(end, unit) - end;
        if end == 0 || rest == 0 {
            return Ok(());
        }
        let RunKind::Data { device, offset, .. } = self.layer().map(ByteRange::at(end - 1, 1))?.kind else {
            return Ok(());
        };
        let rest = ByteRange::at(offset.saturating_add(1), rest);
        match device.len() < rest.end() {
            true => device.write_zeroes(rest, ZeroMode::KeepAllocated),
            false => Ok(()),
        }
    }

    fn require_writable(&self) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        if self.is_complete.load(Ordering::Acquire) {
            return Ok(());
        }
        let _alone = self
            .completeness_check
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !self.is_complete.load(Ordering::Acquire) {
            if self.layer().needs_whole_file() {
                self.layer().require_whole_file()?;
            }
            self.is_complete.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Checks that no image of the first `depth` in the chain has a backing image that has changed.
    fn require_backing_unchanged_down_to(&self, depth: u32) -> Result<()> {
        let mut image = self;
        for _ in 0..depth.max(1) {
            image.require_backing_unchanged()?;
            let Some(below) = &image.backing else { break };
            image = below;
        }
        Ok(())
    }

    fn require_backing_unchanged(&self) -> Result<()> {
        match &self.backing_mismatch {
            // qemu-img reports the error number alone.
            Some(mismatch) => Err(Error::invalid(mismatch.as_str()).report_then(errno::EINVAL)),
            None => Ok(()),
        }
    }

    /// The image of the chain that has the bytes at the start of `range`, its depth, and the run. Bytes beyond the end
    /// of a short backing image are unallocated in its overlay.
    fn resolve(&self, range: ByteRange) -> Result<(&Image, u32, Run)> {
        let (mut image, mut depth, mut range) = (self, 0, range);
        loop {
            let run = image.layer().map(range)?;
            debug_assert!(
                run.len > 0 && run.len <= range.len(),
                "{}: bad run {run:?}",
                image.layer().format()
            );
            let (RunKind::Unallocated { .. }, Some(below)) = (&run.kind, &image.backing) else {
                return Ok((image, depth, run));
            };
            let there = range.first(run.len).intersect(ByteRange::new(0, below.len()));
            if there.is_empty() {
                return Ok((image, depth, run));
            }
            (image, depth, range) = (below, depth + 1, there);
        }
    }

    fn check_bounds(&self, offset: u64, len: u64) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(ByteRange::new(offset, end)),
            _ => Err(Error::from_errno(errno::EIO)),
        }
    }

    /// Reads a run of this image's own layer into `buf`, which has the length of the run.
    fn read_run(&self, run: &Run, guest: u64, buf: &mut [u8]) -> Result<()> {
        match &run.kind {
            RunKind::Zero { .. } | RunKind::Unallocated { .. } => buf.fill(0),
            RunKind::Data { device, offset, .. } => {
                // A file may end inside the last cluster, but only beyond the end of the disk, which is not read.
                device.require(*offset, buf.len() as u64)?;
                device.event(Event::READ_AIO);
                device.read_at(buf, *offset)?;
            }
            RunKind::Encoded(encoded) if encoded.cluster == ByteRange::at(guest, buf.len() as u64) => {
                self.layer().codec()?.decode(encoded, buf)?;
            }
            RunKind::Encoded(encoded) => {
                let cluster = self.decode_cluster(encoded)?;
                let skip = to_index(guest - encoded.cluster.start())?;
                let part = cluster.get(skip..).and_then(|rest| rest.get(..buf.len()));
                buf.copy_from_slice(part.ok_or_else(|| Error::corrupt("Run lies outside its cluster"))?);
            }
        }
        Ok(())
    }

    fn decode_cluster(&self, encoded: &Encoded) -> Result<Arc<Vec<u8>>> {
        self.decoded.get_or_decode(*encoded, || {
            let mut cluster = vec![0; to_index(encoded.cluster.len())?];
            self.layer().codec()?.decode(encoded, &mut cluster)?;
            Ok(cluster)
        })
    }

    /// Copy-on-write: fills the part of `run` that lies outside `request` with the present data of the disk.
    fn copy_on_write(&self, run: &WriteRun, request: ByteRange) -> Result<()> {
        // Storage beyond the end of the file has never been written: zeroes there need not be written, except for the
        // last ones, so that the file reaches to the end of the cluster and does not look truncated.
        let is_unwritten = run.offset >= run.device.len() && !run.device.is_view();
        let sides = [
            ByteRange::new(run.guest.start(), request.start()),
            ByteRange::new(request.end(), run.guest.end()),
        ];
        for side in sides.into_iter().filter(|side| !side.is_empty()) {
            let mut buf = vec![0; to_index(side.len())?];
            let inside = side.intersect(ByteRange::new(0, self.len()));
            if !inside.is_empty() {
                let there = to_index(inside.len())?;
                run.device.event(Event::COW_READ);
                self.read_at(&mut buf[..there], inside.start())?;
            }
            let host = ByteRange::at(run.offset + (side.start() - run.guest.start()), side.len());
            if is_unwritten && is_zero(&buf) {
                if side.end() == run.guest.end() {
                    let last_block = (last_block_len(&*run.device) as u64).min(host.len());
                    run.device
                        .write_zeroes(host.skip(host.len() - last_block), ZeroMode::KeepAllocated)?;
                }
                continue;
            }
            run.device.event(Event::COW_WRITE);
            run.device.write_at(&buf, host.start())?;
        }
        Ok(())
    }

    fn write_data(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        self.begin_write(range)?.finish(buf)
    }

    fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        write_zero_chunks(range, |zeroes, offset| {
            self.write_data(zeroes, ByteRange::at(offset, zeroes.len() as u64))
        })
    }

    /// The first part of `range` that is zeroed by one method, and whether that is the layer's `write_zeroes`.
    fn zeroing_step(&self, range: ByteRange) -> (ByteRange, bool) {
        let (unit, subunit) = (self.layer().granularity(), self.layer().write_unit());
        // A range that ends with the disk counts as aligned.
        let end = |unit| {
            if range.end() == self.len() {
                range.end()
            } else {
                align_down(range.end(), unit)
            }
        };
        let until = |end: u64| range.first(end.saturating_sub(range.start()));
        if !range.start().is_multiple_of(subunit) {
            return (until(align_up(range.start(), subunit)), false);
        }
        let units = until(end(unit));
        if range.start().is_multiple_of(unit) && !units.is_empty() {
            return (units, true);
        }
        let subunits = until(end(subunit).min(align_down(range.start(), unit).saturating_add(unit)));
        if subunits.is_empty() {
            (range, false)
        } else {
            (subunits, true)
        }
    }

    /// Whether `range` reads as zero according to tables alone.
    fn is_known_zero(&self, range: ByteRange) -> Result<bool> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.status(rest, StatusDetail::Allocation)?;
            if !extent.kind.is_zero() {
                return Ok(false);
            }
            rest = rest.skip(extent.len);
        }
        Ok(true)
    }
}

/// A write whose storage is allocated. A drop frees the storage and leaves the image as it was.
#[must_use]
pub struct PendingWrite<'a> {
    image: &'a Image,
    range: ByteRange,
    plan: Box<dyn WritePlan + 'a>,
}

impl PendingWrite<'_> {
    /// The guest bytes that will be written.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// Writes `buf`, which has the length of the range, and makes the bytes part of the image.
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn finish(self, buf: &[u8]) -> Result<()> {
        let start = self.range.start();
        self.finish_with(|device, offset, guest| {
            let from = to_index(guest.start() - start)?;
            let len = to_index(guest.len())?;
            let part = buf.get(from..).and_then(|rest| rest.get(..len));
            device.write_at(
                part.ok_or_else(|| Error::invalid("Too few bytes to write"))?,
                offset,
            )
        })
    }

    /// Calls `fill` to write the bytes of each run, and makes them part of the image. The arguments of `fill` are the
    /// host device, the host offset and the guest range.
    ///
    /// # Errors
    /// As [`Device::write_at`], and those of `fill`.
    pub fn finish_with(
        self,
        mut fill: impl FnMut(&Arc<dyn Device>, u64, ByteRange) -> Result<()>,
    ) -> Result<()> {
        for run in self.plan.runs() {
            let ours = run.guest.intersect(self.range);
            self.image.copy_on_write(run, self.range)?;
            run.device.event(Event::WRITE_AIO);
            fill(&run.device, run.offset + (ours.start() - run.guest.start()), ours)?;
        }
        self.image.guarded.change(|| self.plan.commit())
    }
}

impl std::fmt::Debug for PendingWrite<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingWrite")
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

/// A write of encoded clusters whose storage has been allocated.
#[must_use = "a drop frees the storage"]
pub struct PendingEncoded<'a> {
    image: &'a Image,
    plan: Box<dyn EncodedPlan + 'a>,
}

impl PendingEncoded<'_> {
    /// Writes the clusters, whose bytes are ranges of `buf`, and makes them part of the image.
    ///
    /// # Errors
    /// As [`Device::write_at`].
    pub fn finish(self, buf: &[u8]) -> Result<()> {
        self.image.guarded.change(|| self.plan.finish(buf))
    }
}

impl std::fmt::Debug for PendingEncoded<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingEncoded").finish_non_exhaustive()
    }
}

impl Device for Image {
    fn len(&self) -> u64 {
        self.layer().len()
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = self.check_bounds(offset, buf.len() as u64)?;
        let mut buf = buf;
        while !rest.is_empty() {
            let (image, depth, run) = self.resolve(rest)?;
            if depth > 0 || matches!(run.kind, RunKind::Unallocated { .. }) {
                self.require_backing_unchanged_down_to(depth)?;
            }
            let len = to_index(run.len.min(rest.len()))?;
            let (head, tail) = buf.split_at_mut(len);
            image.read_run(&run, rest.start(), head)?;
            rest = rest.skip(run.len);
            buf = tail;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let request = self.check_bounds(offset, buf.len() as u64)?;
        if request.is_empty() {
            return self.require_writable();
        }
        if let Some(mode) = self.zeroes.mode()
            && is_zero(buf)
        {
            return self.write_zeroes(request, mode);
        }
        self.write_data(buf, request)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_writable()?;
        let range = self.check_bounds(range.start(), range.len())?;
        self.decoded.clear();
        let mut rest = range;
        while !rest.is_empty() {
            let (part, by_layer) = self.zeroing_step(rest);
            rest = rest.skip(part.len());
            if by_layer {
                match self.guarded.change(|| self.layer().write_zeroes(part, mode)) {
                    Err(error) if error.kind() == ErrorKind::Unsupported && mode != ZeroMode::FastOnly => {
                        self.write_zero_bytes(part)?;
                    }
                    other => other?,
                }
            } else if !self.is_known_zero(part)? {
                self.write_zero_bytes(part)?;
            }
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.require_writable()?;
        let range = self.check_bounds(range.start(), range.len())?;
        self.decoded.clear();
        let unit = self.layer().granularity();
        let end = if range.end() == self.len() {
            range.end()
        } else {
            align_down(range.end(), unit)
        };
        let middle = ByteRange::new(range.align_in(unit).start(), end);
        if middle.is_empty() {
            Ok(())
        } else {
            self.guarded.change(|| self.layer().discard(middle))
        }
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        let (_, depth, run) = self.resolve(range)?;
        let extent = |len, kind, host: Option<(Arc<dyn Device>, u64)>| Extent {
            len,
            kind,
            depth,
            // Computed bytes have no host offset.
            host: host.filter(|(device, _)| !device.is_view()),
        };
        Ok(match run.kind {
            RunKind::Zero { host } => extent(run.len, ExtentKind::Zero, host),
            RunKind::Unallocated { host } => extent(run.len, ExtentKind::Unallocated, host),
            RunKind::Encoded(_) => extent(run.len, ExtentKind::Compressed, None),
            RunKind::Data {
                device,
                offset,
                holes,
            } => {
                let inside = ByteRange::at(offset, run.len).intersect(ByteRange::new(0, device.len()));
                if detail == StatusDetail::Zeroes && holes != HoleMeaning::Ignored && !inside.is_empty() {
                    let below = device.status(inside, detail)?;
                    let len = below.len.min(run.len);
                    if holes == HoleMeaning::Zero && self.is_bare && is_of_image(&below) {
                        return Ok(Extent { len, ..below });
                    }
                    let kind = match (below.kind, holes) {
                        (ExtentKind::UnknownHole, HoleMeaning::Zero) => ExtentKind::UnknownHole,
                        // qemu-img takes bytes that come from deeper in that chain as unknown.
                        (_, HoleMeaning::Zero) if below.depth > 0 => ExtentKind::UnknownHole,
                        (kind, _) if !kind.is_zero() => ExtentKind::Data,
                        (ExtentKind::PreallocatedZero, HoleMeaning::Zero) => ExtentKind::PreallocatedZero,
                        (_, HoleMeaning::Zero) => ExtentKind::Zero,
                        (_, _) => ExtentKind::FileHole,
                    };
                    let host = match kind {
                        ExtentKind::UnknownHole => None,
                        _ => below
                            .host
                            .filter(|_| holes == HoleMeaning::Zero)
                            .or(Some((device, offset))),
                    };
                    extent(len, kind, host)
                } else {
                    extent(run.len, ExtentKind::Data, Some((device, offset)))
                }
            }
        })
    }

    fn flush(&self) -> Result<()> {
        if !self.write {
            return Ok(());
        }
        self.guarded.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.resize_with(&ResizeRequest::new(len, preallocation))
    }

    fn as_image(&self) -> Option<&Image> {
        Some(self)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        let own = self.layer().file().allocated_bytes()?;
        let parts = self.layer().parts();
        parts.iter().try_fold(own, |sum, (_, part)| {
            Some(sum.saturating_add(part.allocated_bytes()?))
        })
    }

    fn name(&self) -> String {
        self.node.shown_name()
    }

    fn node(&self) -> Node {
        if self.is_bare {
            self.layer().file().node()
        } else {
            self.node.clone()
        }
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            backing: self.layer().backing(),
            ..self.layer().info()?
        })
    }
}

/// How many bytes are written to extend a file: one sector, or the alignment of the device if that is larger.
fn last_block_len(device: &dyn Device) -> usize {
    usize::try_from(device.limits().alignment).map_or(SECTOR, |unit| unit.max(SECTOR))
}

/// Whether the status of a device comes from the tables of an image, which is passed on unchanged.
fn is_of_image(extent: &Extent) -> bool {
    extent.host.is_some() || extent.depth > 0 || extent.kind == ExtentKind::Unallocated
}

/// Whether written data is searched for zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroDetection {
    /// Zeroes are written like other data.
    #[default]
    Off,
    /// Zeroes are stored by `write_zeroes`, with storage allocated.
    On,
    /// Zeroes are stored by `write_zeroes`, without storage where the format supports it.
    Unmap,
}

impl ZeroDetection {
    fn mode(self) -> Option<ZeroMode> {
        match self {
            Self::Off => None,
            Self::On => Some(ZeroMode::KeepAllocated),
            Self::Unmap => Some(ZeroMode::Unmap),
        }
    }
}
