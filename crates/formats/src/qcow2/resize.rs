//! Resizes the disk.

use std::ops::Range;

use diskimage_core::errno;
use diskimage_core::{
    ByteRange, Error, ErrorKind, Event, Preallocation, ResizeRequest, Result, ResultExt, RunKind, ZeroMode,
};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::entry::L2Entry;
use super::header::{field, limit};
use super::{FreedStorage, ImageState, Qcow2};
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::metadata_guard::Kind;
use crate::layer_kit::offset::{GuestOffset, HostOffset};

impl Qcow2 {
    /// Refuses an impossible resize before anything has changed.
    pub(super) fn check_resize_impl(&self, request: &ResizeRequest) -> Result<()> {
        if !request.len.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if self.lock().snapshots.count > 0 && self.header.version < 3 {
            return Err(Error::unsupported("Can't resize a v2 image which has snapshots"));
        }
        self.bitmaps_can_follow(&self.lock(), request.len)
    }

    /// Grows or shrinks the disk.
    pub(super) fn resize_impl(&self, request: &ResizeRequest) -> Result<()> {
        self.check_resize_impl(request)?;
        let mut state = self.lock();
        let old = state.size;
        if request.len != old {
            self.begin_resize(&mut state)?;
        }
        drop(state);
        let outcome = if request.len < old {
            self.shrink_to(request)
        } else {
            self.grow_to(request)
        };
        // Also after a failure: the bitmaps are stored for the size that the disk has then.
        let stored = self.finish_resize(&mut self.lock(), old);
        outcome.and(stored)
    }

    /// Grows the disk. The added range is unallocated, preallocated if the request asks for it, or zero where the
    /// backing image has bytes.
    pub(super) fn grow_to(&self, request: &ResizeRequest) -> Result<()> {
        let geometry = self.header.geometry;
        let entries = geometry.l1_entries(request.len);
        if entries * 8 > limit::L1_BYTES || i64::try_from(request.len).is_err() {
            return Err(Error::from_errno(errno::EFBIG).context("Failed to grow the L1 table"));
        }
        let old = self.lock().size;
        // A crash during an earlier shrink may have left clusters beyond the end of the disk.
        self.free_beyond(old, self.l1_coverage())
            .context(|| "Failed to free clusters beyond the end of the disk")?;
        self.grow_l1(&mut self.lock(), entries)
            .context(|| "Failed to grow the L1 table")?;
        let data_len = self.data.len();
        let added = self.add_storage(request, old);
        if added.is_err() {
            self.release_added_storage(old, data_len);
        }
        added?;
        self.set_size(request.len)
            .context(|| "Failed to update the image size")
    }

    /// The size of the largest disk that the L1 table can map.
    fn l1_coverage(&self) -> u64 {
        self.lock().l1.len / 8 * self.header.geometry.l2_coverage()
    }

    /// Preallocates storage behind a disk of `old` bytes as the request asks, and hides the backing image there, before
    /// the size changes.
    fn add_storage(&self, request: &ResizeRequest, old: u64) -> Result<()> {
        let geometry = self.header.geometry;
        if self.has_data_file() {
            let mode = match request.preallocation {
                Preallocation::Metadata => Preallocation::Off,
                mode => mode,
            };
            self.data.resize(request.len.max(self.data.len()), mode)?;
        }
        if request.preallocation != Preallocation::Off && request.len > old {
            let mode = if self.has_data_file() {
                Preallocation::Metadata
            } else {
                request.preallocation
            };
            // The rest of the old last cluster already belongs to an allocated or unallocated cluster.
            let start = old.next_multiple_of(geometry.cluster_size());
            self.preallocate(ByteRange::new(start, request.len), mode)
                .context(|| preallocating(mode))?;
        }
        if old < request.backing_len {
            self.hide_backing(old, request)?;
        }
        Ok(())
    }

    /// After a failure, frees the storage added behind a disk of `old` bytes, whose data file had `data_len` bytes.
    fn release_added_storage(&self, old: u64, data_len: u64) {
        // The first error is reported. Clusters that remain are freed when the disk grows the next time.
        let freed = self.with_punched_holes(|| self.free_beyond(old, self.l1_coverage()));
        let _ = match self.has_data_file() {
            true => freed.and_then(|()| self.data.resize(data_len, Preallocation::Off)),
            false => freed.and_then(|()| self.cut_file()),
        };
    }

    /// Zeroes the range added to a disk of `old` bytes where the backing image would be visible, before the size
    /// changes.
    fn hide_backing(&self, old: u64, request: &ResizeRequest) -> Result<()> {
        let geometry = self.header.geometry;
        let start = old.next_multiple_of(geometry.cluster_size());
        let rest = ByteRange::new(old.next_multiple_of(geometry.subcluster_size()), start);
        if !rest.is_empty() {
            // An unsupported request is fine: a compressed cluster hides the backing image.
            ignore_unsupported(self.write_zeroes_impl(rest, ZeroMode::KeepAllocated))?;
        }
        let (end, mode) = match request.preallocation {
            Preallocation::Off => (request.len.min(request.backing_len), ZeroMode::Unmap),
            // The preallocated tables mark the whole added range as zero.
            Preallocation::Metadata => (request.len, ZeroMode::KeepAllocated),
            // Preallocated clusters hide the backing image, but not if they have subclusters.
            _ if geometry.extended_l2 => (request.len, ZeroMode::KeepAllocated),
            _ => return Ok(()),
        };
        let added = ByteRange::new(start, end.next_multiple_of(geometry.cluster_size()).max(start));
        if added.is_empty() {
            return Ok(());
        }
        let zeroed = self.write_zeroes_impl(added, mode);
        if request.preallocation == Preallocation::Off && !is_supported(&zeroed) {
            return self.preallocate(added, Preallocation::Full);
        }
        ignore_unsupported(zeroed)
    }

    fn set_size(&self, len: u64) -> Result<()> {
        let mut state = self.lock();
        self.write_back(&mut state)?;
        state.metadata.cache.sync()?;
        self.file.write_at(&len.to_be_bytes(), field::SIZE)?;
        state.metadata.cache.sync()?;
        state.size = len;
        Ok(())
    }

    /// Moves the L1 table to newly allocated clusters for `entries` entries, if it has fewer.
    fn grow_l1(&self, state: &mut ImageState, entries: u64) -> Result<()> {
        let old = state.l1;
        if entries * 8 <= old.len {
            return Ok(());
        }
        let count = u32::try_from(entries).map_err(|_| Error::invalid("Active L1 table too large"))?;
        let clusters = (entries * 8).div_ceil(self.header.geometry.cluster_size());
        let offset = self.allocate(state, clusters, Some(Kind::ActiveL1))?;
        let table = Table {
            class: WriteOrder::L1,
            offset: offset.get(),
            len: entries * 8,
        };
        if let Err(error) = self.write_grown_l1(state, old, table) {
            state.metadata.release_new_table(table);
            return Err(error);
        }
        let mut location = [0; 12];
        location[..4].copy_from_slice(U32::new(count).as_bytes());
        location[4..].copy_from_slice(U64::new(table.offset).as_bytes());
        self.file.event(Event::L1_GROW_ACTIVATE_TABLE);
        self.file.write_at(&location, field::L1_SIZE)?;
        // From here on readers find the new table.
        state.l1 = table;
        state.metadata.cache.sync()?;
        if old.len > 0 {
            state.metadata.cache.forget(old);
            self.free_later(state, old.range(), WriteOrder::L1.kinds())?;
        }
        Ok(())
    }

    /// Writes the L1 table `table`, which starts with the entries of `old`.
    fn write_grown_l1(&self, state: &mut ImageState, old: Table, table: Table) -> Result<()> {
        state.metadata.cache.insert_zeroed(table)?;
        for at in (0..old.len).step_by(8) {
            let entry = state.metadata.cache.number(old, at)?;
            if entry != 0 {
                state.metadata.cache.set_number(table, at, entry)?;
            }
        }
        self.file.event(Event::L1_GROW_WRITE_TABLE);
        state.metadata.cache.write_back()?;
        state.metadata.cache.sync()
    }

    /// Shrinks the disk, then frees the clusters and tables beyond the new end, and cuts the file behind the last
    /// cluster in use. After a crash in between, the disk has the new size, and the clusters beyond its end are freed
    /// when it grows.
    fn shrink_to(&self, request: &ResizeRequest) -> Result<()> {
        if request.preallocation != Preallocation::Off {
            return Err(Error::invalid(
                "Preallocation can't be used for shrinking an image",
            ));
        }
        let geometry = self.header.geometry;
        let old = self.lock().size;
        // The new size must be durable before any cluster beyond it is freed.
        self.set_size(request.len)
            .context(|| "Failed to update the image size")?;
        self.with_punched_holes(|| {
            self.free_beyond(request.len, old)
                .context(|| "Failed to discard cropped clusters")?;
            self.file.event(Event::L1_SHRINK_WRITE_TABLE);
            self.free_l2_tables(geometry.l1_entries(request.len)..geometry.l1_entries(old))
                .and_then(|()| self.write_back(&mut self.lock()))
                .context(|| "Failed to reduce the number of L2 tables")
        })?;
        if self.has_data_file() {
            self.data.resize(self.data_end(request.len), Preallocation::Off)?;
        }
        self.cut_file()
    }

    /// Frees the clusters behind the last cluster of a disk of `len` bytes, up to guest offset `end`.
    fn free_beyond(&self, len: u64, end: u64) -> Result<()> {
        let start = len.next_multiple_of(self.header.geometry.cluster_size());
        let beyond = ByteRange::new(start, end.max(start));
        if beyond.is_empty() || self.is_unallocated(beyond)? {
            return Ok(());
        }
        self.replace_entries(beyond, |_| Some(L2Entry::UNALLOCATED))
    }

    fn is_unallocated(&self, range: ByteRange) -> Result<bool> {
        let mut state = self.lock();
        let l1 = state.l1;
        let run = self.map_in(&mut state.metadata.cache, l1, range)?;
        Ok(run.len == range.len() && matches!(run.kind, RunKind::Unallocated { host: None }))
    }

    /// Runs `work`, which frees clusters, and discards their storage once nothing durable refers to them.
    fn with_punched_holes(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.lock().freed_storage = FreedStorage::Discarded;
        let outcome = work().and_then(|()| {
            let mut state = self.lock();
            self.write_back(&mut state)?;
            state.metadata.cache.sync()
        });
        self.lock().freed_storage = FreedStorage::Kept;
        outcome
    }

    /// The length of the data file of a disk of `len` bytes. An encrypted disk keeps its whole last cluster: the zeroes
    /// behind its end are encrypted, and bytes that the file gets when it grows again do not decrypt to zeroes.
    fn data_end(&self, len: u64) -> u64 {
        if self.encrypted.is_some() {
            len.next_multiple_of(self.header.geometry.cluster_size())
        } else {
            len
        }
    }

    /// Frees the L2 tables of these entries of the L1 table. The tables have no allocated clusters left.
    fn free_l2_tables(&self, entries: Range<u64>) -> Result<()> {
        let mut state = self.claims.wait_idle(|| self.lock());
        for index in entries {
            let l1 = state.l1;
            let guest = GuestOffset::new(index * self.header.geometry.l2_coverage());
            if let Some(l2) = self.l2_table(&mut state.metadata.cache, l1, guest)? {
                state.metadata.cache.set_number(l1, index * 8, 0)?;
                self.free_later(&mut state, l2.range(), WriteOrder::L2.kinds())?;
            }
        }
        Ok(())
    }

    /// Frees all clusters and the tables that refer to them. Afterwards the backing image is visible everywhere.
    pub(super) fn make_empty_impl(&self) -> Result<()> {
        self.file.event(Event::EMPTY_IMAGE_PREPARE);
        let geometry = self.header.geometry;
        let size = self.lock().size;
        self.with_punched_holes(|| {
            if size > 0 {
                self.replace_entries(ByteRange::new(0, size), |_| Some(L2Entry::UNALLOCATED))?;
            }
            self.free_l2_tables(0..geometry.l1_entries(size))
        })?;
        self.cut_file()
    }

    /// Frees refcount blocks whose refcounts are all zero, and cuts the file behind the last cluster in use.
    fn cut_file(&self) -> Result<()> {
        let mut state = self.lock();
        let bits = self.header.geometry.cluster_bits;
        let metadata = &mut state.metadata;
        metadata
            .drop_empty_blocks()
            .context(|| "Failed to discard unused refblocks")?;
        let end = HostOffset::new(self.file.len()).cluster_end(bits);
        let len = metadata.used_end(end)?.offset(bits).get();
        if len < self.file.len() {
            self.file.resize(len, Preallocation::Off)
        } else {
            Ok(())
        }
    }
}

/// The context of a failed preallocation.
fn preallocating(mode: Preallocation) -> &'static str {
    match mode {
        Preallocation::Off | Preallocation::Metadata => "Allocating clusters failed",
        Preallocation::Falloc => "Failed to resize underlying file: Could not preallocate new data",
        Preallocation::Full => "Failed to resize underlying file: Could not write zeros for preallocation",
    }
}

/// Whether the outcome is anything but the error for an unsupported operation.
fn is_supported(outcome: &Result<()>) -> bool {
    !matches!(outcome, Err(error) if error.kind() == ErrorKind::Unsupported)
}

fn ignore_unsupported(outcome: Result<()>) -> Result<()> {
    if is_supported(&outcome) { outcome } else { Ok(()) }
}
