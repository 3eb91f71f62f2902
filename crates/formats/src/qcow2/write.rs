//! Writes guest data: allocation, zeroing, discarding and preallocation.
//!
//! A plan allocates clusters under the lock, the caller writes guest data into them without the lock, and `commit`
//! makes the L2 entries point to them. Until then nothing refers to the clusters: a crash leaks them at worst.

use std::cell::Cell;
use std::sync::{Arc, MutexGuard};

use diskimage_core::{
    ByteRange, Device, EncodedCluster, Error, Preallocation, Result, WritePlan, WriteRun, ZeroMode,
    saturating_u32,
};

use super::entry::{COPIED, Cluster, L2Entry, Subclusters};
use super::header::Geometry;
use super::header::feature::Autoclear;
use super::{ImageState, MAX_FREED, Qcow2, WriteOrder};
use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator};
use crate::layer_kit::clear::clear;
use crate::layer_kit::encoded_write::{self, EncodedWrite, Piece};
use crate::layer_kit::metadata_cache::Table;
use crate::layer_kit::metadata_guard::{DamageReport, Kind, Kinds};
use crate::layer_kit::offset::{GuestOffset, HostOffset};
use crate::layer_kit::range_claims::{Access, RangeClaims};

type Plan<'a> = AllocatingPlan<'a, Qcow2>;

/// A planned change of L2 entries: of one, or of a run of entries without host clusters that get contiguous ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L2Change {
    l2: Table,
    /// The first entry.
    index: u64,
    /// The number of entries, at least one.
    count: u64,
    /// What all of them were.
    old: L2Entry,
    /// What the first one becomes.
    new: L2Entry,
}

impl L2Change {
    /// A change of the entry `index` of `l2`.
    fn one(l2: Table, index: u64, old: L2Entry, new: L2Entry) -> Self {
        let count = 1;
        Self {
            l2,
            index,
            count,
            old,
            new,
        }
    }

    /// Whether clusters were allocated for the change.
    fn has_new_cluster(&self) -> bool {
        self.old.kind != self.new.kind
    }

    /// The change without its first `done` entries, if any is left.
    fn skip(self, done: u64, geometry: Geometry) -> Option<Self> {
        let count = self.count.checked_sub(done).filter(|count| *count > 0)?;
        let kind = match self.new.kind {
            Cluster::Host(offset) => Cluster::Host(offset.plus(done * geometry.cluster_size())),
            kind => kind,
        };
        Some(Self {
            index: self.index + done,
            count,
            new: L2Entry { kind, ..self.new },
            ..self
        })
    }
}

impl Allocator for Qcow2 {
    type State = ImageState;
    type Change = L2Change;
    /// Any write to a cluster may change its entry, so claims are exclusive.
    const ACCESS: Access = Access::Exclusive;

    fn lock(&self) -> MutexGuard<'_, ImageState> {
        self.lock()
    }

    fn claims(&self) -> &RangeClaims {
        &self.claims
    }

    fn publish(&self, state: &mut ImageState, changes: &mut Vec<L2Change>) -> Result<()> {
        while let Some(change) = changes.pop() {
            let cache = &mut state.metadata.cache;
            let written = self.write_run(cache, change.l2, change.index, change.count, change.new);
            // What tables refer to must not be freed, and what they do not refer to must be.
            changes.extend(change.skip(*written.as_ref().unwrap_or(&0), self.header.geometry));
            written?;
            if change.has_new_cluster() {
                self.free_replaced(state, change.old)?;
            }
        }
        Ok(())
    }

    fn free(&self, state: &mut ImageState, changes: Vec<L2Change>) {
        for change in changes.into_iter().filter(L2Change::has_new_cluster) {
            // A cluster that cannot be released leaks, which is harmless.
            let _ = self.release_unused(state, &change);
        }
    }
}

/// Newly allocated contiguous clusters and the guest clusters that they are for.
#[derive(Clone, Copy, Debug)]
struct ClusterRun {
    guest: GuestOffset,
    offset: HostOffset,
    count: u64,
}

/// Builds a plan: finds or allocates the clusters that `range` touches.
struct Draft<'a, 'p> {
    image: &'a Qcow2,
    range: ByteRange,
    plan: &'p mut Plan<'a>,
}

impl Draft<'_, '_> {
    fn add_clusters(&mut self, state: &mut ImageState) -> Result<()> {
        let geometry = self.image.header.geometry;
        let size = geometry.cluster_size();
        let cover = self.range.align_out(size);
        let (mut at, end) = (GuestOffset::new(cover.start()), GuestOffset::new(cover.end()));
        while at < end {
            let l2 = self.image.ensure_l2(state, at)?;
            let stop = geometry.l2_end(at).min(end);
            while at < stop {
                let index = geometry.l2_index(at);
                let old = self
                    .image
                    .read_entry_to_write(&mut state.metadata.cache, l2, index, at)?;
                if let Some(offset) = self.image.writable_in_place(state, old)? {
                    self.add_in_place(l2, index, at, old, offset);
                    at = at.plus(size);
                    continue;
                }
                // Following entries that need clusters, too, get them in the same run.
                let most = stop.since(at) / size;
                let mut olds = vec![(old, 1)];
                let mut count = 1;
                while count < most {
                    let next = index + count;
                    let unused =
                        self.image
                            .count_unallocated(&mut state.metadata.cache, l2, next, most - count)?;
                    if unused > 0 {
                        olds.push((L2Entry::UNALLOCATED, unused));
                        count += unused;
                        continue;
                    }
                    let guest = at.plus(count * size);
                    let entry = self
                        .image
                        .read_entry_to_write(&mut state.metadata.cache, l2, next, guest)?;
                    if self.image.writable_in_place(state, entry)?.is_some() {
                        break;
                    }
                    olds.push((entry, 1));
                    count += 1;
                }
                let first = self.image.allocate_data(state, at, count)?;
                let mut done = 0;
                for (old, count) in olds {
                    let run = ClusterRun {
                        guest: at.plus(done * size),
                        offset: first.plus(done * size),
                        count,
                    };
                    self.add_new_run(l2, index + done, old, run);
                    done += count;
                }
                at = at.plus(count * size);
            }
        }
        self.plan.view_runs(|guest, host| self.image.data_at(guest, host));
        Ok(())
    }

    /// Adds a cluster that is written in place. Subclusters that hold no data yet are written as a whole.
    fn add_in_place(&mut self, l2: Table, index: u64, guest: GuestOffset, old: L2Entry, offset: HostOffset) {
        let part = self.touched(guest);
        let covered = self.rounded(part, guest, old.sub.allocated);
        let sub = old.sub.with_data(self.mask(covered, guest));
        self.add_run(covered, offset.plus(covered.start() - guest.get()));
        if sub != old.sub {
            let new = L2Entry { sub, ..old };
            self.plan.add_change(covered, L2Change::one(l2, index, old, new));
        }
    }

    /// Adds newly allocated clusters for entries that are all like `old`: as one change if each is written as a whole.
    fn add_new_run(&mut self, l2: Table, index: u64, old: L2Entry, run: ClusterRun) {
        let size = self.image.header.geometry.cluster_size();
        let mut done = 0;
        while done < run.count {
            let (guest, offset) = (run.guest.plus(done * size), run.offset.plus(done * size));
            let left = ByteRange::at(guest.get(), (run.count - done) * size);
            let whole = self.range.intersect(left).len() / size;
            if whole < 2 || self.touched(guest).len() < size {
                self.add_new(l2, index + done, guest, old, offset);
                done += 1;
                continue;
            }
            let covered = guest.range(whole * size);
            self.add_run(covered, offset);
            let change = L2Change {
                count: whole,
                ..L2Change::one(
                    l2,
                    index + done,
                    old,
                    L2Entry::data(offset, Subclusters::ALLOCATED),
                )
            };
            self.plan.add_change(covered, change);
            done += whole;
        }
    }

    /// Adds a newly allocated cluster, for an entry without a cluster or with a shared one.
    fn add_new(&mut self, l2: Table, index: u64, guest: GuestOffset, old: L2Entry, offset: HostOffset) {
        let (covered, sub) = if old.sub.allocated == 0 {
            let covered = self.rounded(self.touched(guest), guest, 0);
            (covered, old.sub.with_data(self.mask(covered, guest)))
        } else {
            // The old cluster's data is copied, so the whole cluster is written.
            (
                guest.range(self.image.header.geometry.cluster_size()),
                Subclusters::ALLOCATED,
            )
        };
        self.add_run(covered, offset.plus(covered.start() - guest.get()));
        let new = L2Entry::data(offset, sub);
        self.plan.add_change(covered, L2Change::one(l2, index, old, new));
    }

    fn touched(&self, guest: GuestOffset) -> ByteRange {
        self.range
            .intersect(guest.range(self.image.header.geometry.cluster_size()))
    }

    /// Rounds `part` of the cluster at `guest` outward: each end moves to a subcluster boundary unless that subcluster
    /// has data.
    fn rounded(&self, part: ByteRange, guest: GuestOffset, allocated: u32) -> ByteRange {
        let sub = self.image.header.geometry.subcluster_size();
        let has_data = |at: u64| allocated & bit((at - guest.get()) / sub) != 0;
        let out = part.align_out(sub);
        let start = if has_data(part.start()) {
            part.start()
        } else {
            out.start()
        };
        let end = if has_data(part.end() - 1) {
            part.end()
        } else {
            out.end()
        };
        ByteRange::new(start, end)
    }

    fn mask(&self, covered: ByteRange, guest: GuestOffset) -> u32 {
        subcluster_mask(self.image.header.geometry, covered, guest)
    }

    fn add_run(&mut self, guest: ByteRange, offset: HostOffset) {
        self.plan.add_run(WriteRun {
            guest,
            device: Arc::clone(&self.image.data),
            offset: offset.get(),
        });
    }
}

impl Qcow2 {
    /// Plans a write: finds or allocates its clusters.
    pub(super) fn plan_write_impl(&self, range: ByteRange) -> Result<Plan<'_>> {
        self.plan_change(range, |state, plan| {
            let image = self;
            Draft { image, range, plan }.add_clusters(state)
        })
    }

    /// A plan for a change to `range`, whose clusters are claimed until the plan ends.
    fn plan_change<'a>(
        &'a self,
        range: ByteRange,
        draft: impl FnOnce(&mut ImageState, &mut Plan<'a>) -> Result<()>,
    ) -> Result<Plan<'a>> {
        if !self.may_write() {
            return Err(Error::read_only());
        }
        let cover = range.align_out(self.header.geometry.cluster_size());
        AllocatingPlan::new(self, cover, |state, plan| {
            self.begin_change(state, range)?;
            draft(state, plan)
        })
    }

    /// Prepares a change to `range`: refuses a damaged image, sets the dirty bit and marks bitmaps as in use.
    fn begin_change(&self, state: &mut ImageState, range: ByteRange) -> Result<()> {
        self.corruption.require_unmarked()?;
        self.mark_dirty()?;
        self.note_write(state, range)
    }

    /// Allocates a run of `count` clusters for guest data. In an external data file, host offset and guest offset are
    /// equal.
    fn allocate_data(&self, state: &mut ImageState, guest: GuestOffset, count: u64) -> Result<HostOffset> {
        if self.has_data_file() {
            return Ok(HostOffset::new(guest.get()));
        }
        self.allocate(state, count, None)
    }

    /// Releases clusters that were allocated but to which nothing refers.
    fn release_unused(&self, state: &mut ImageState, change: &L2Change) -> Result<()> {
        match change.new.host_clusters(self.header.geometry) {
            Some(first) if !self.has_data_file() => {
                let len = first
                    .len()
                    .max(change.count * self.header.geometry.cluster_size());
                state.metadata.release(ByteRange::at(first.start(), len))
            }
            _ => Ok(()),
        }
    }

    /// Frees the clusters of an entry that has been replaced.
    pub(super) fn free_replaced(&self, state: &mut ImageState, entry: L2Entry) -> Result<()> {
        match entry.host_clusters(self.header.geometry) {
            Some(host) if !self.has_data_file() => self.free_later(state, host, Kinds::NONE),
            _ => Ok(()),
        }
    }

    /// The L2 table for `guest`. It is allocated if it is missing, and copied if a snapshot shares it.
    pub(super) fn ensure_l2(&self, state: &mut ImageState, guest: GuestOffset) -> Result<Table> {
        let at = self.header.geometry.l1_index(guest) * 8;
        let entry = state.metadata.cache.number(state.l1, at)?;
        let shared = self.l2_table(&mut state.metadata.cache, state.l1, guest)?;
        if let Some(table) = shared {
            self.count_before_write(state)?;
            if entry & COPIED != 0 && self.is_used_once(state, HostOffset::new(table.offset)) {
                return Ok(table);
            }
        }
        let len = self.header.geometry.cluster_size();
        let offset = self.allocate(state, 1, Some(Kind::ActiveL2))?;
        let table = Table {
            class: WriteOrder::L2,
            offset: offset.get(),
            len,
        };
        state.metadata.cache.insert_zeroed(table)?;
        if let Some(old) = shared {
            let mut at = 0;
            while at < len {
                let part = state.metadata.cache.bytes(old, at)?.to_vec();
                state.metadata.cache.bytes_mut(table, at)?.copy_from_slice(&part);
                at += part.len() as u64;
            }
        }
        state
            .metadata
            .cache
            .set_number(state.l1, at, table.offset | COPIED)?;
        if let Some(old) = shared {
            self.free_later(state, old.range(), WriteOrder::L2.kinds())?;
        }
        Ok(table)
    }

    /// The offset of the entry's cluster if it may be written in place.
    ///
    /// # Errors
    /// A cluster that overlaps metadata.
    fn writable_in_place(&self, state: &ImageState, entry: L2Entry) -> Result<Option<HostOffset>> {
        match entry.kind {
            Cluster::Host(offset) if entry.copied && self.has_data_file() => Ok(Some(offset)),
            Cluster::Host(offset) if entry.copied => {
                let cluster = offset.range(self.header.geometry.cluster_size());
                state.metadata.cache.admit(cluster, Kinds::NONE)?;
                Ok(self.is_used_once(state, offset).then_some(offset))
            }
            _ => Ok(None),
        }
    }

    /// Allocates storage for the compressed form of clusters.
    pub(super) fn plan_encoded_impl(&self, clusters: &[EncodedCluster]) -> Result<EncodedWrite<'_, Self>> {
        let size = self.header.geometry.cluster_size();
        let is_one = |cluster: &EncodedCluster| {
            let len = cluster.bytes.len() as u64;
            len > 0 && len < size && cluster.offset.is_multiple_of(size)
        };
        if !clusters.iter().all(is_one) {
            return Err(Error::invalid("Not the compressed form of one cluster"));
        }
        if self.has_data_file() {
            return Err(Error::unsupported(
                "Compressed clusters cannot be in an external data file",
            ));
        }
        let (first, last) = encoded_write::in_order(clusters)?;
        let mut pieces = Vec::with_capacity(clusters.len());
        let plan = self.plan_change(ByteRange::new(first, last.saturating_add(size)), |state, plan| {
            for cluster in clusters {
                let offset = self.allocate_encoded(state, plan, cluster)?;
                pieces.push(Piece::plain(offset.get(), &cluster.bytes));
            }
            state.padding = true;
            Ok(())
        })?;
        Ok(EncodedWrite {
            plan,
            device: Arc::clone(&self.file),
            pieces,
        })
    }

    /// Allocates storage for the compressed form of one cluster, directly behind that of the one before if possible.
    fn allocate_encoded(
        &self,
        state: &mut ImageState,
        plan: &mut Plan<'_>,
        cluster: &EncodedCluster,
    ) -> Result<HostOffset> {
        let geometry = self.header.geometry;
        let guest = GuestOffset::new(cluster.offset);
        let stored = cluster.bytes.len() as u64;
        let l2 = self.ensure_l2(state, guest)?;
        let index = geometry.l2_index(guest);
        self.count_before_allocating(state, 1)?;
        let old = self.read_entry(&mut state.metadata.cache, l2, index)?;
        let offset = state.metadata.allocate_bytes(stored)?;
        let new = L2Entry {
            kind: Cluster::Compressed { offset, stored },
            copied: false,
            sub: Subclusters::ALLOCATED,
        };
        plan.add_change(
            guest.range(geometry.cluster_size()),
            L2Change::one(l2, index, old, new),
        );
        Ok(offset)
    }

    /// Zeroes clusters by changing their entries.
    pub(super) fn write_zeroes_impl(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if self.header.features.autoclear.has(Autoclear::DATA_FILE_RAW) {
            return self.zero_raw_data(range, mode);
        }
        if self.header.version < 3 && self.header.backing.is_some() {
            return Err(Error::unsupported("Version 2 images have no zero clusters"));
        }
        if !range.start().is_multiple_of(self.header.geometry.cluster_size())
            || (!range.end().is_multiple_of(self.header.geometry.cluster_size())
                && range.end() != self.lock().size)
        {
            return self.zero_subclusters(range);
        }
        let v3 = self.header.version >= 3;
        self.replace_entries(range, |old| {
            let keep = mode == ZeroMode::KeepAllocated && matches!(old.kind, Cluster::Host(_));
            match (v3, keep) {
                (true, true) => Some(L2Entry {
                    sub: Subclusters::ZERO,
                    ..old
                }),
                (true, false) => Some(L2Entry {
                    sub: Subclusters::ZERO,
                    ..L2Entry::UNALLOCATED
                }),
                (false, _) => Some(L2Entry::UNALLOCATED),
            }
        })
    }

    /// Zeroes subclusters of one cluster by changing its entry. The cluster stays allocated for the other subclusters.
    fn zero_subclusters(&self, range: ByteRange) -> Result<()> {
        let geometry = self.header.geometry;
        let guest = GuestOffset::new(range.start()).align_down(geometry.cluster_size());
        let mask = subcluster_mask(geometry, range, guest);
        let compressed = Cell::new(false);
        self.replace_entries(range, |old| {
            compressed.set(matches!(old.kind, Cluster::Compressed { .. }));
            let sub = Subclusters {
                allocated: old.sub.allocated & !mask,
                zero: old.sub.zero | mask,
            };
            (!compressed.get()).then_some(L2Entry { sub, ..old })
        })?;
        if compressed.get() {
            return Err(Error::unsupported("Compressed clusters have no subclusters"));
        }
        Ok(())
    }

    /// Frees the clusters of `range`; afterwards they read as zeroes.
    pub(super) fn discard_impl(&self, range: ByteRange) -> Result<()> {
        let has_backing = self.header.backing.is_some();
        if self.header.features.autoclear.has(Autoclear::DATA_FILE_RAW)
            || (has_backing && self.header.version < 3)
        {
            return Ok(());
        }
        self.replace_entries(range, |old| match (old.kind, has_backing) {
            (Cluster::None, _) if old.sub == Subclusters::NONE => None,
            (_, true) => Some(L2Entry {
                sub: Subclusters::ZERO,
                ..L2Entry::UNALLOCATED
            }),
            (_, false) => Some(L2Entry::UNALLOCATED),
        })
    }

    /// Allocates clusters for all of `range`, which reads as zeroes afterwards.
    pub(super) fn preallocate(&self, range: ByteRange, mode: Preallocation) -> Result<()> {
        let geometry = self.header.geometry;
        let step = geometry.l2_coverage();
        let mut rest = range;
        while !rest.is_empty() {
            let part = rest.first((rest.start() / step + 1).saturating_mul(step) - rest.start());
            let mut plan = self.plan_write_impl(part)?;
            if geometry.extended_l2 {
                for change in plan.changes_mut() {
                    // The cluster is allocated, but none of its subclusters: the backing image stays visible.
                    change.new.sub = change.old.sub;
                }
            }
            let host = |run: &WriteRun| ByteRange::at(run.offset, run.guest.len());
            let filled = plan.runs().iter().try_for_each(|run| match mode {
                Preallocation::Off | Preallocation::Metadata => self.reserve(&*run.device, host(run)),
                Preallocation::Falloc => run.device.write_zeroes(host(run), ZeroMode::KeepAllocated),
                Preallocation::Full => run.device.write_zero_bytes(host(run)),
            });
            if filled.is_err() && !self.has_data_file() {
                // A part may have been allocated. On a full disk there is no room for tables either while it is.
                for run in plan.runs() {
                    let _ = run
                        .device
                        .discard(host(run).intersect(ByteRange::new(0, run.device.len())));
                }
            }
            filled?;
            let past_end = ByteRange::new(part.end(), part.align_out(geometry.cluster_size()).end());
            if let Some(run) = plan.runs().last().filter(|_| !past_end.is_empty()) {
                // The last cluster is written to its end, as in qemu-img.
                let host = ByteRange::at(run.offset + (part.end() - run.guest.start()), past_end.len());
                run.device.write_zero_bytes(host)?;
            }
            Box::new(plan).commit()?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Grows the file to the end of `host`, and makes the clusters in `host` read as zeroes: reused ones hold old bytes.
    fn reserve(&self, device: &dyn Device, host: ByteRange) -> Result<()> {
        if !self.has_data_file() {
            return clear(device, host);
        }
        // The contents of a data file are the guest's and stay.
        if device.len() < host.end() {
            device.resize(host.end(), Preallocation::Off)?;
        }
        Ok(())
    }

    /// Writes zeroes to a raw data file, which must hold them itself.
    fn zero_raw_data(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let plan = self.plan_write_impl(range)?;
        for run in plan.runs() {
            run.device
                .write_zeroes(ByteRange::at(run.offset, run.guest.len()), mode)?;
        }
        Box::new(plan).commit()
    }

    /// Replaces the L2 entries of `range` by the results of `change`, which are not allocated or keep the cluster. Frees the
    /// old clusters and discards their storage. A data file is zeroed at once: after a crash the old entry may still refer to it.
    pub(super) fn replace_entries(
        &self,
        range: ByteRange,
        change: impl Fn(L2Entry) -> Option<L2Entry>,
    ) -> Result<()> {
        let geometry = self.header.geometry;
        if !self.may_write() {
            return Err(Error::read_only());
        }
        let cover = range.align_out(geometry.cluster_size());
        let (_claim, mut state) = self.claims.claim(cover, Access::Exclusive, || self.lock());
        self.begin_change(&mut state, range)?;
        let mut zeroed = Vec::new();
        let mut uncovers_backing = false;
        let mut rest = cover;
        while !rest.is_empty() {
            let guest = GuestOffset::new(rest.start());
            let part = rest.first(geometry.l2_end(guest).since(guest));
            rest = rest.skip(part.len());
            let l1 = state.l1;
            let missing = self.l2_table(&mut state.metadata.cache, l1, guest)?.is_none();
            if missing && change(L2Entry::UNALLOCATED).is_none_or(|new| new == L2Entry::UNALLOCATED) {
                continue;
            }
            let l2 = self.ensure_l2(&mut state, guest)?;
            let first = geometry.l2_index(guest);
            for index in first..first + part.len() / geometry.cluster_size() {
                let old = self.read_entry(&mut state.metadata.cache, l2, index)?;
                if let Some(new) = change(old).filter(|new| *new != old) {
                    self.write_entry(&mut state.metadata.cache, l2, index, new)?;
                    if new.kind == old.kind {
                        continue;
                    }
                    uncovers_backing |= new == L2Entry::UNALLOCATED && self.header.backing.is_some();
                    if let Cluster::Host(offset) = old.kind {
                        let storage = offset.range(geometry.cluster_size());
                        match self.has_data_file() {
                            true => push_range(&mut zeroed, storage),
                            false => state.discarded.push(storage),
                        }
                    }
                    self.free_replaced(&mut state, old)?;
                }
            }
            if zeroed.len() >= MAX_FREED {
                self.zero_data(&mut state, &mut zeroed, uncovers_backing)?;
            }
        }
        self.zero_data(&mut state, &mut zeroed, uncovers_backing)
    }

    /// Zeroes ranges of the data file that entries referred to. Where the backing image shows through instead, nothing
    /// durable may refer to them any more: after a crash their zeroes would hide it.
    fn zero_data(
        &self,
        state: &mut ImageState,
        ranges: &mut Vec<ByteRange>,
        uncovers_backing: bool,
    ) -> Result<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        if uncovers_backing {
            self.write_back(state)?;
            state.metadata.cache.sync()?;
        }
        ranges
            .drain(..)
            .try_for_each(|range| self.data.write_zeroes(range, ZeroMode::Unmap))
    }
}

/// Appends `range`, or extends the last range if it ends there.
fn push_range(ranges: &mut Vec<ByteRange>, range: ByteRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == range.start() => *last = ByteRange::new(last.start(), range.end()),
        _ => ranges.push(range),
    }
}

/// The bits of the subclusters that `range` touches. `range` is inside the cluster at `guest`.
fn subcluster_mask(geometry: Geometry, range: ByteRange, guest: GuestOffset) -> u32 {
    if !geometry.extended_l2 {
        return u32::MAX;
    }
    let sub = geometry.subcluster_size();
    let first = (range.start() - guest.get()) / sub;
    let end = (range.end() - guest.get()).div_ceil(sub);
    (first..end).fold(0, |mask, i| mask | bit(i))
}

/// The bit of subcluster `index`; 0 for an index beyond the last.
fn bit(index: u64) -> u32 {
    1u32.checked_shl(saturating_u32(index)).unwrap_or(0)
}
