//! Maps guest offsets to host offsets.

use std::ops::Range;
use std::sync::Arc;

use diskimage_core::{ByteRange, Device, HoleMeaning, Result, Run, RunKind, saturating_u32, to_index};

use super::Qcow2;
use super::entry::{COMPRESSED, COPIED, Cluster, L2Entry, OFFSET_MASK, Subclusters, ZERO, encoded};
use super::header::limit;
use super::hex::hex;
use crate::layer_kit::metadata_cache::{MetadataCache, Table, WriteOrder};
use crate::layer_kit::metadata_guard::DamageReport;
use crate::layer_kit::offset::{GuestOffset, HostOffset};

/// How guest bytes are stored. Adjacent bytes are joined into a run if the mapping continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapping {
    Unallocated(Option<HostOffset>),
    Zero(Option<HostOffset>),
    Data(HostOffset),
    Compressed {
        offset: HostOffset,
        stored: u64,
        guest: GuestOffset,
    },
}

impl Mapping {
    /// Whether the mapping `next`, `len` bytes further on, continues this one.
    fn continues(self, next: Self, len: u64) -> bool {
        match (self, next) {
            (Self::Unallocated(None), Self::Unallocated(None)) | (Self::Zero(None), Self::Zero(None)) => true,
            (Self::Unallocated(Some(at)), Self::Unallocated(Some(other)))
            | (Self::Zero(Some(at)), Self::Zero(Some(other)))
            | (Self::Data(at), Self::Data(other)) => at.plus(len) == other,
            _ => false,
        }
    }
}

impl Qcow2 {
    /// Maps the start of `range` with the L1 table `l1`, as far as one run goes.
    pub(super) fn map_in(&self, tables: &mut MetadataCache, l1: Table, range: ByteRange) -> Result<Run> {
        let geometry = self.header.geometry;
        let mut found: Option<Mapping> = None;
        let (start, end) = (GuestOffset::new(range.start()), GuestOffset::new(range.end()));
        let mut at = start;
        while at < end {
            // Goes from L2 table to L2 table; `scan_l2` goes from cluster to cluster and from subcluster to subcluster.
            // Damage of a later entry ends the run. It is reported when a run begins there.
            if found.is_some() && !self.has_usable_l2(tables, l1, at)? {
                break;
            }
            let table_end = geometry.l2_end(at);
            let Some(l2) = self.l2_table(tables, l1, at)? else {
                if found.is_some_and(|mapping| mapping != Mapping::Unallocated(None)) {
                    break;
                }
                found = Some(Mapping::Unallocated(None));
                at = table_end;
                continue;
            };
            let stop = table_end.min(end);
            if found.is_none_or(|mapping| mapping == Mapping::Unallocated(None)) {
                let hole = tables.hole(l2, geometry.l2_index(at) * geometry.l2_entry_size())?;
                let clusters = hole / geometry.l2_entry_size();
                if clusters > 0 {
                    found = Some(Mapping::Unallocated(None));
                    let first = at.align_down(geometry.cluster_size());
                    at = first.plus(clusters << geometry.cluster_bits).min(stop);
                    continue;
                }
            }
            let done = self.scan_l2(tables, l2, at..stop, start, &mut found)?;
            at = done;
            if done < stop {
                break;
            }
        }
        Ok(Run {
            len: at.min(end).since(start),
            kind: self.run_kind(start, found.unwrap_or(Mapping::Unallocated(None))),
        })
    }

    /// Extends `found`, which began at `start`, through `range` with the entries of one L2 table. Returns where it
    /// ends.
    fn scan_l2(
        &self,
        tables: &mut MetadataCache,
        l2: Table,
        range: Range<GuestOffset>,
        start: GuestOffset,
        found: &mut Option<Mapping>,
    ) -> Result<GuestOffset> {
        let geometry = self.header.geometry;
        let step = geometry.subcluster_size();
        let mut at = range.start;
        while at < range.end {
            let index = geometry.l2_index(at);
            let entry = match found {
                None => self.read_entry(tables, l2, index)?,
                // Damage in a later entry ends the run. It is reported when that entry is mapped itself.
                Some(_) => match self.parse_entry(tables, l2, index)? {
                    Ok(entry) => entry,
                    Err(_) => return Ok(at),
                },
            };
            let guest = at.align_down(geometry.cluster_size());
            let end = guest.plus(geometry.cluster_size()).min(range.end);
            let uniform = entry.sub == Subclusters::NONE
                || entry.sub == Subclusters::ZERO
                || entry.sub == Subclusters::ALLOCATED
                || !geometry.extended_l2;
            while at < end {
                let next = if uniform { end } else { at.unit_end(step).min(end) };
                let mapping = mapping_at(entry, guest, at, step);
                match *found {
                    None => *found = Some(mapping),
                    Some(before) if before.continues(mapping, at.since(start)) => {}
                    Some(_) => return Ok(at),
                }
                at = next;
            }
            // Equal entries without storage are one run; many tables have nothing else.
            if uniform && matches!(*found, Some(Mapping::Unallocated(None) | Mapping::Zero(None))) {
                let size = geometry.l2_entry_size();
                let equal = tables.count_equal(l2, index * size, to_index(size)?)?;
                at = at.max(guest.plus(equal << geometry.cluster_bits)).min(range.end);
            }
        }
        Ok(at)
    }

    fn run_kind(&self, start: GuestOffset, mapping: Mapping) -> RunKind {
        let host_of = |offset: HostOffset| (self.data_at(start, offset), offset.get());
        match mapping {
            Mapping::Unallocated(host) => RunKind::Unallocated {
                host: host.map(host_of),
            },
            Mapping::Zero(host) => RunKind::Zero {
                host: host.map(host_of),
            },
            // Clusters that were allocated but never written are holes of the file, which the tables do not record.
            Mapping::Data(offset) => RunKind::Data {
                device: self.data_at(start, offset),
                offset: offset.get(),
                holes: if self.is_sparse() {
                    HoleMeaning::ZeroData
                } else {
                    HoleMeaning::Ignored
                },
            },
            Mapping::Compressed {
                offset,
                stored,
                guest,
            } => RunKind::Encoded(encoded(offset, stored, guest, self.header.geometry)),
        }
    }

    /// Whether many data clusters have no storage, as after `preallocation=metadata`: then the file's holes are
    /// queried. The answer is cached; the thresholds are qemu-img's.
    fn is_sparse(&self) -> bool {
        *self.sparse.get_or_init(|| {
            let size = self.header.geometry.cluster_size();
            let Some(stored) = self.file.allocated_bytes().map(|bytes| bytes / size) else {
                return false;
            };
            self.file.len() / size > (stored * 10 / 9).max(stored + 2)
        })
    }

    /// The decrypted device for the mapping of `guest` to `host`.
    pub(super) fn data_at(&self, guest: GuestOffset, host: HostOffset) -> Arc<dyn Device> {
        self.encrypted
            .as_ref()
            .and_then(|encrypted| encrypted.view(&self.data, guest, host))
            .unwrap_or_else(|| Arc::clone(&self.data))
    }

    /// The L2 table for `guest`, if it exists.
    pub(super) fn l2_table(
        &self,
        tables: &mut MetadataCache,
        l1: Table,
        guest: GuestOffset,
    ) -> Result<Option<Table>> {
        let index = self.header.geometry.l1_index(guest);
        let entry = tables.number(l1, index * 8)?;
        self.l2_at(entry & OFFSET_MASK, index)
    }

    /// Whether the L1 entry for `guest` is undamaged. Damage is not reported.
    fn has_usable_l2(&self, tables: &mut MetadataCache, l1: Table, guest: GuestOffset) -> Result<bool> {
        let index = self.header.geometry.l1_index(guest);
        let entry = tables.number(l1, index * 8)?;
        Ok(self.is_usable(entry & OFFSET_MASK))
    }

    /// Whether an L2 table may be at host offset `offset`, or there is none.
    fn is_usable(&self, offset: u64) -> bool {
        let len = self.header.geometry.cluster_size();
        offset.is_multiple_of(len) && offset + len <= limit::HOST_OFFSET
    }

    /// The L2 table at host offset `offset`, read from entry `index` of an L1 table; `None` if the offset is 0.
    pub(super) fn l2_at(&self, offset: u64, index: u64) -> Result<Option<Table>> {
        let len = self.header.geometry.cluster_size();
        if offset == 0 {
            return Ok(None);
        }
        if !self.is_usable(offset) {
            let what = format!(
                "L2 table offset {} unaligned (L1 index: {})",
                hex(offset),
                hex(index)
            );
            return Err(self.corruption.met(&what));
        }
        Ok(Some(Table {
            class: WriteOrder::L2,
            offset,
            len,
        }))
    }

    /// Reads entry `index` of an L2 table.
    pub(super) fn read_entry(&self, tables: &mut MetadataCache, l2: Table, index: u64) -> Result<L2Entry> {
        self.parse_entry(tables, l2, index)?.map_err(|error| {
            let position = format!("(L2 offset: {}, L2 index: {})", hex(l2.offset), hex(index));
            self.corruption.met(&format!("{error} {position}"))
        })
    }

    /// As [`Qcow2::read_entry`], for a cluster at `guest` that is about to be written. For an unaligned
    /// cluster that would be written in place it has qemu-img's message for that case.
    pub(super) fn read_entry_to_write(
        &self,
        tables: &mut MetadataCache,
        l2: Table,
        index: u64,
        guest: GuestOffset,
    ) -> Result<L2Entry> {
        let geometry = self.header.geometry;
        let standard = tables.number(l2, index * geometry.l2_entry_size())?;
        let offset = standard & OFFSET_MASK;
        if standard & (COPIED | COMPRESSED) == COPIED && !offset.is_multiple_of(geometry.cluster_size()) {
            let noun = match standard & ZERO {
                ZERO if !geometry.extended_l2 => "Preallocated zero",
                _ => "Data",
            };
            let guest = hex(guest.get());
            return Err(self.corruption.met(&format!(
                "{noun} cluster offset {offset:#x} unaligned (guest offset: {guest})"
            )));
        }
        self.read_entry(tables, l2, index)
    }

    /// Reads entry `index` of an L2 table. The inner error is damage of the entry, which is not reported yet.
    fn parse_entry(&self, tables: &mut MetadataCache, l2: Table, index: u64) -> Result<Result<L2Entry>> {
        let geometry = self.header.geometry;
        let at = index * geometry.l2_entry_size();
        let standard = tables.number(l2, at)?;
        let bitmap = if geometry.extended_l2 {
            tables.number(l2, at + 8)?
        } else {
            0
        };
        Ok(L2Entry::parse(
            [standard, bitmap],
            geometry,
            self.header.version,
            self.has_data_file(),
        ))
    }

    /// The number of entries of an L2 table from `index` on, at most `most`, that are [`L2Entry::UNALLOCATED`]. Entries of
    /// the next page of the table are not examined.
    pub(super) fn count_unallocated(
        &self,
        tables: &mut MetadataCache,
        l2: Table,
        index: u64,
        most: u64,
    ) -> Result<u64> {
        let size = self.header.geometry.l2_entry_size();
        let (numbers, _) = tables.bytes(l2, index * size)?.as_chunks::<8>();
        let step = size / 8;
        let zeroes = numbers
            .iter()
            .take(to_index(most * step)?)
            .take_while(|number| **number == [0; 8]);
        Ok(zeroes.count() as u64 / step)
    }

    /// Changes `count` entries of an L2 table from `index` on: the first to `entry`, the others to entries alike for the
    /// host clusters behind. Returns how many were changed: those of one page of the table, at least one.
    pub(super) fn write_run(
        &self,
        tables: &mut MetadataCache,
        l2: Table,
        index: u64,
        count: u64,
        entry: L2Entry,
    ) -> Result<u64> {
        if count == 1 {
            self.write_entry(tables, l2, index, entry)?;
            return Ok(1);
        }
        let geometry = self.header.geometry;
        let numbers = to_index(geometry.l2_entry_size() / 8)?;
        let [mut standard, bitmap] = entry.to_numbers(geometry);
        let mut done = 0;
        let bytes = tables.bytes_mut(l2, index * geometry.l2_entry_size())?;
        for entry in bytes
            .as_chunks_mut::<8>()
            .0
            .chunks_exact_mut(numbers)
            .take(to_index(count)?)
        {
            entry[0] = standard.to_be_bytes();
            if let Some(second) = entry.get_mut(1) {
                *second = bitmap.to_be_bytes();
            }
            // A run of clusters that was allocated ends below the largest host offset.
            standard = standard.saturating_add(geometry.cluster_size());
            done += 1;
        }
        match done {
            // The file ends inside the entry: this reports it.
            0 => self.write_entry(tables, l2, index, entry).map(|()| 1),
            done => Ok(done),
        }
    }

    /// Changes entry `index` of an L2 table.
    pub(super) fn write_entry(
        &self,
        tables: &mut MetadataCache,
        l2: Table,
        index: u64,
        entry: L2Entry,
    ) -> Result<()> {
        let geometry = self.header.geometry;
        let at = index * geometry.l2_entry_size();
        let [standard, bitmap] = entry.to_numbers(geometry);
        tables.set_number(l2, at, standard)?;
        if geometry.extended_l2 {
            tables.set_number(l2, at + 8, bitmap)
        } else {
            Ok(())
        }
    }
}

/// The mapping of `at` in the cluster that starts at `guest`.
fn mapping_at(entry: L2Entry, guest: GuestOffset, at: GuestOffset, subcluster: u64) -> Mapping {
    // A cluster has 32 subclusters, so the shift is below 32.
    let bit = 1u32
        .checked_shl(saturating_u32(at.since(guest) / subcluster))
        .unwrap_or(0);
    match entry.kind {
        Cluster::Compressed { offset, stored } => Mapping::Compressed {
            offset,
            stored,
            guest,
        },
        Cluster::Host(offset) if entry.sub.zero & bit != 0 => {
            Mapping::Zero(Some(offset.plus(at.since(guest))))
        }
        Cluster::Host(offset) if entry.sub.allocated & bit != 0 => {
            Mapping::Data(offset.plus(at.since(guest)))
        }
        Cluster::None if entry.sub.zero & bit != 0 => Mapping::Zero(None),
        Cluster::Host(offset) => Mapping::Unallocated(Some(offset.plus(at.since(guest)))),
        Cluster::None => Mapping::Unallocated(None),
    }
}
