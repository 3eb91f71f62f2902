//! The log, which makes changes of the tables atomic.
//!
//! ```text
//!   entry   |header, 126 descriptors|128 descriptors| ... |data| |data| ...      sectors of 4 KiB
//! ```
//!
//! A data sector describes 4 KiB of the file. Its signature and sequence number replace their first eight and last four
//! bytes, which the data descriptor holds. Entries follow one another in a ring; the active sequence, from the tail of
//! the newest entry to that entry, is replayed. This implementation writes one entry at a time, at the start of the
//! ring.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use diskimage_core::{
    Budget, ByteRange, Device, Error, ErrorKind, Limits, Node, Preallocation, Reservation, Result, View,
    ZeroMode, errno, saturating_index, to_index,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bat::UNIT;
use super::header::{CHECKSUM, Guid, REGION_TABLES, set_checksum};
use crate::layer_kit::reserved::Reserved;
use crate::layer_kit::table_scan;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    signature: [u8; 4],
    /// CRC-32C of the whole entry with this field zero.
    checksum: U32,
    len: U32,
    /// The offset in the log of the first entry of the sequence that this one ends.
    tail: U32,
    sequence: U64,
    descriptors: U32,
    reserved: U32,
    guid: Guid,
    /// `FlushedFileOffset`: the length of the file that was durable when the entry was written.
    flushed_len: U64,
    /// `LastFileOffset`: a length of the file that all of its structures fit into.
    last_len: U64,
}

/// A data descriptor, for 4 KiB at `offset`, or a zero descriptor, for a range of zeroes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    signature: [u8; 4],
    /// Data: the last four bytes of the 4 KiB.
    trailing: [u8; 4],
    /// Data: the first eight bytes of the 4 KiB. Zeroes: the length of the range.
    leading: [u8; 8],
    offset: U64,
    sequence: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawData {
    signature: [u8; 4],
    sequence_high: U32,
    data: [u8; UNIT - 12],
    sequence_low: U32,
}

const _: () =
    assert!(size_of::<RawEntry>() == 64 && size_of::<RawDescriptor>() == 32 && size_of::<RawData>() == UNIT);

const ENTRY: [u8; 4] = *b"loge";
const DATA_DESCRIPTOR: [u8; 4] = *b"desc";
const ZERO_DESCRIPTOR: [u8; 4] = *b"zero";
const DATA: [u8; 4] = *b"data";

/// A limit of this implementation: the search for entries reads at most this multiple of the log's length. Entries of
/// an intact log do not overlap, those of a crafted log may.
const MAX_READS: u64 = 4;

/// A limit of this implementation: the bytes that the search for entries reads, whatever the log's length. Logs have a
/// mebibyte as a rule.
const MAX_READ_BYTES: u64 = 256 << 20;

/// A limit of this implementation: the bytes of an entry, all of which are in memory.
const MAX_ENTRY: u64 = 64 << 20;

/// Bytes of an entry that are read at once for its checksum.
const CHUNK: usize = 64 << 10;

/// A valid entry of the log.
struct Found {
    sequence: u64,
    len: u64,
    tail: u64,
    flushed_len: u64,
    last_len: u64,
}

/// The changes that the log's active sequence makes to the file.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Units of 4 KiB, by their offset in the file.
    data: BTreeMap<u64, Box<[u8; UNIT]>>,
    /// Ranges of zeroes, except where `data` has a unit: sorted, with gaps between them.
    zeroes: Vec<ByteRange>,
    /// The least length of the file after the replay.
    len: u64,
    /// The memory of `data` and `zeroes`.
    memory: Vec<Reservation>,
}

impl Changes {
    /// Reads the changes of the log in `ring`, whose entries have the GUID `guid`; `None` if it has no entry.
    ///
    /// A log without an entry is not damaged: qemu-img writes its GUID to the header before it writes the first entry,
    /// and a crash in between has changed no table.
    ///
    /// # Errors
    /// A log beyond the end of the file, no complete sequence of entries, or a file shorter than an entry demands.
    pub(super) fn read(
        file: &dyn Device,
        ring: ByteRange,
        guid: Guid,
        budget: &Budget,
    ) -> Result<Option<Self>> {
        let log = Ring { file, ring };
        file.require(ring.start(), ring.len())?;
        let entries = log.entries(guid)?;
        if entries.is_empty() {
            return Ok(None);
        }
        let sequence = active(&entries, ring.len()).ok_or_else(|| Error::from_errno(errno::EINVAL))?;
        let mut changes = Self::default();
        // The headers hold the log's offset, so changes of them never go through the log.
        let protected = Reserved::new([("headers", ByteRange::new(0, REGION_TABLES[0])), ("log", ring)]);
        for (at, entry) in sequence {
            if entry.flushed_len > file.len() {
                return Err(Error::corrupt("The file is shorter than its log says"));
            }
            changes.len = changes.len.max(entry.last_len);
            let mut bytes = budget.buffer(entry.len)?;
            log.read(at, &mut bytes)?;
            changes.add(&bytes, entry.sequence, &protected, budget)?;
        }
        changes.merge_zeroes();
        Ok(Some(changes))
    }

    /// Adds the changes of an entry's descriptors, none of which may overlap `protected`.
    fn add(&mut self, entry: &[u8], sequence: u64, protected: &Reserved, budget: &Budget) -> Result<()> {
        let invalid = || Error::from_errno(errno::EINVAL);
        let (header, _) = RawEntry::read_from_prefix(entry).map_err(|_| invalid())?;
        let count = usize::try_from(header.descriptors.get()).map_err(|_| invalid())?;
        let start = descriptor_sectors(count) * UNIT;
        self.memory.push(budget.reserve(start as u64)?);
        let mut sectors = entry.get(start..).ok_or_else(invalid)?.chunks_exact(UNIT);
        for descriptor in entry[size_of::<RawEntry>()..start]
            .chunks_exact(size_of::<RawDescriptor>())
            .take(count)
        {
            let descriptor = RawDescriptor::read_from_bytes(descriptor).map_err(|_| invalid())?;
            let offset = descriptor.offset.get();
            if descriptor.sequence.get() != sequence || !offset.is_multiple_of(UNIT as u64) {
                return Err(invalid());
            }
            match descriptor.signature {
                DATA_DESCRIPTOR => {
                    protected.require_outside("change", ByteRange::at(offset, UNIT as u64))?;
                    let sector = sectors.next().ok_or_else(invalid)?;
                    let sector = RawData::read_from_bytes(sector).map_err(|_| invalid())?;
                    let number =
                        u64::from(sector.sequence_high.get()) << 32 | u64::from(sector.sequence_low.get());
                    if sector.signature != DATA || number != sequence {
                        return Err(invalid());
                    }
                    let mut bytes = Box::new([0; UNIT]);
                    bytes[..8].copy_from_slice(&descriptor.leading);
                    bytes[8..UNIT - 4].copy_from_slice(&sector.data);
                    bytes[UNIT - 4..].copy_from_slice(&descriptor.trailing);
                    if self.data.insert(offset, bytes).is_none() {
                        self.memory.push(budget.reserve(UNIT as u64 + 64)?);
                    }
                }
                ZERO_DESCRIPTOR => {
                    let len = u64::from_le_bytes(descriptor.leading);
                    if !len.is_multiple_of(UNIT as u64) {
                        return Err(invalid());
                    }
                    let range = ByteRange::at(offset, len);
                    protected.require_outside("change", range)?;
                    let overwritten: Vec<u64> = self
                        .data
                        .range(range.start()..range.end())
                        .map(|(at, _)| *at)
                        .collect();
                    for at in overwritten {
                        self.data.remove(&at);
                    }
                    // Descriptors are longer than ranges, and their memory is reserved.
                    self.zeroes.push(range);
                }
                _ => return Err(invalid()),
            }
        }
        Ok(())
    }

    /// Sorts the ranges of zeroes, and joins those without a gap.
    fn merge_zeroes(&mut self) {
        self.zeroes.sort_unstable_by_key(|range| range.start());
        let mut merged: Vec<ByteRange> = Vec::new();
        for range in self.zeroes.drain(..) {
            match merged.last_mut() {
                Some(last) if range.start() <= last.end() => {
                    *last = ByteRange::new(last.start(), last.end().max(range.end()));
                }
                _ => merged.push(range),
            }
        }
        self.zeroes = merged;
    }

    /// The ranges of zeroes that overlap `range`, in order.
    fn zeroes_in(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        let first = self
            .zeroes
            .partition_point(|zeroes| zeroes.end() <= range.start());
        let behind = self.zeroes[first..].iter();
        behind
            .take_while(move |zeroes| zeroes.start() < range.end())
            .map(move |zeroes| zeroes.intersect(range))
    }

    /// Makes the changes in the file, durably. It becomes as long as the log says, but not longer than `needed`.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(super) fn apply(&self, file: &dyn Device, needed: u64) -> Result<()> {
        let len = self.len.min(needed);
        if file.len() < len {
            file.resize(len, Preallocation::Off)?;
        }
        for range in self.zeroes_in(ByteRange::new(0, file.len())) {
            file.write_zeroes(range, ZeroMode::KeepAllocated)?;
        }
        for (offset, bytes) in &self.data {
            file.write_at(&bytes[..], *offset)?;
        }
        file.flush()
    }
}

/// The active sequence: its entries in order, with their offsets in the ring. It is the complete sequence, from an
/// entry's tail to that entry, whose last entry is newest.
fn active(entries: &HashMap<u64, Found>, ring: u64) -> Option<Vec<(u64, &Found)>> {
    let mut heads: Vec<(&u64, &Found)> = entries.iter().collect();
    heads.sort_unstable_by_key(|(at, entry)| std::cmp::Reverse((entry.sequence, **at)));
    // Newer entries may belong to sequences that were torn. The limit on steps keeps a crafted log from quadratic work.
    let mut steps = entries.len() * 4 + 64;
    for (head, newest) in heads {
        let mut found = Vec::new();
        let mut at = newest.tail;
        while let Some(entry) = entries.get(&at) {
            steps = steps.checked_sub(1)?;
            let follows = found
                .last()
                .is_none_or(|(_, before): &(u64, &Found)| before.sequence.wrapping_add(1) == entry.sequence);
            if !follows {
                break;
            }
            found.push((at, entry));
            if at == *head {
                return Some(found);
            }
            at = (at + entry.len) % ring;
        }
    }
    None
}

/// The log of a file, a ring of entries.
struct Ring<'a> {
    file: &'a dyn Device,
    ring: ByteRange,
}

impl Ring<'_> {
    /// All valid entries with `guid`, by their offset in the ring.
    fn entries(&self, guid: Guid) -> Result<HashMap<u64, Found>> {
        let mut found = HashMap::new();
        let mut reads = self.ring.len().saturating_mul(MAX_READS).min(MAX_READ_BYTES);
        let is_sparse = table_scan::is_sparse(self.file);
        let mut at = 0;
        while at < self.ring.len() {
            // No entry begins in a hole.
            let hole = table_scan::hole(self.file, is_sparse, self.ring.skip(at))?;
            if hole >= UNIT as u64 {
                at += hole / UNIT as u64 * UNIT as u64;
                continue;
            }
            let entry = self.entry(at, guid, &mut reads)?;
            at += entry.as_ref().map_or(UNIT as u64, |entry| entry.len);
            if let Some(entry) = entry {
                found.insert(at - entry.len, entry);
            }
        }
        Ok(found)
    }

    /// The valid entry at offset `at` of the ring, if there is one. Subtracts its length from `reads`.
    fn entry(&self, at: u64, guid: Guid, reads: &mut u64) -> Result<Option<Found>> {
        let mut start = [0; UNIT];
        self.read(at, &mut start)?;
        let Ok((raw, _)) = RawEntry::read_from_prefix(&start) else {
            return Ok(None);
        };
        let len = u64::from(raw.len.get());
        let tail = u64::from(raw.tail.get());
        let descriptors = to_index(raw.descriptors.get().into())?;
        let aligned = |number: u64| number.is_multiple_of(UNIT as u64);
        let plausible = raw.signature == ENTRY
            && raw.guid == guid
            && raw.sequence.get() > 0
            && (aligned(len) && len > 0 && len <= self.ring.len())
            && (aligned(tail) && tail < self.ring.len())
            && (descriptor_sectors(descriptors) as u64).saturating_mul(UNIT as u64) <= len;
        if !plausible {
            return Ok(None);
        }
        *reads = reads
            .checked_sub(len)
            .ok_or_else(|| Error::corrupt("The entries of the log overlap"))?;
        if self.checksum(at, len)? != raw.checksum.get() {
            return Ok(None);
        }
        if len > MAX_ENTRY {
            let text = format!("An entry of the log has {len} bytes, more than {MAX_ENTRY}");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        Ok(Some(Found {
            sequence: raw.sequence.get(),
            len,
            tail,
            flushed_len: raw.flushed_len.get(),
            last_len: raw.last_len.get(),
        }))
    }

    /// The checksum of the entry of `len` bytes at offset `at` of the ring, which is not all in memory.
    fn checksum(&self, at: u64, len: u64) -> Result<u32> {
        let mut chunk = vec![0; CHUNK];
        let (mut sum, mut done) = (0, 0);
        while done < len {
            let part = to_index((len - done).min(CHUNK as u64))?;
            let chunk = &mut chunk[..part];
            self.read((at + done) % self.ring.len(), chunk)?;
            if done == 0
                && let Some(field) = chunk.get_mut(CHECKSUM)
            {
                field.fill(0);
            }
            sum = crc32c::crc32c_append(sum, chunk);
            done += part as u64;
        }
        Ok(sum)
    }

    /// Fills `bytes` from offset `at` of the ring on, across its end if necessary.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let before_end = saturating_index(self.ring.len() - at).min(bytes.len());
        let (first, second) = bytes.split_at_mut(before_end);
        self.file.read_at(first, self.ring.start() + at)?;
        if !second.is_empty() {
            self.file.read_at(second, self.ring.start())?;
        }
        Ok(())
    }
}

/// How many sectors of 4 KiB an entry's header and descriptors occupy.
fn descriptor_sectors(descriptors: usize) -> usize {
    descriptors
        .saturating_mul(size_of::<RawDescriptor>())
        .saturating_add(size_of::<RawEntry>())
        .div_ceil(UNIT)
}

/// How many units of 4 KiB an entry can have in a log of `len` bytes.
pub(super) fn room(len: u64) -> Result<usize> {
    // A descriptor sector holds 126 descriptors or more: one sector in 64 is enough for them.
    let sectors = to_index(len)? / UNIT;
    Ok((sectors - sectors.div_ceil(64)).min(MAX_UNITS))
}

/// How many units an entry has at most, as it is in memory as a whole; more units become several entries.
const MAX_UNITS: usize = 1024;

/// The bytes of an entry that is a sequence by itself, at the start of the ring, with `units` of 4 KiB and their
/// offsets. `file_len` is the length of the file.
pub(super) fn entry(
    guid: Guid,
    sequence: u64,
    units: &[(u64, Box<[u8; UNIT]>)],
    file_len: u64,
) -> Result<Vec<u8>> {
    let too_large = || Error::from_errno(errno::EFBIG);
    let start = descriptor_sectors(units.len()) * UNIT;
    let len = start + units.len() * UNIT;
    let header = RawEntry {
        signature: ENTRY,
        checksum: U32::new(0),
        len: U32::new(u32::try_from(len).map_err(|_| too_large())?),
        tail: U32::new(0),
        sequence: U64::new(sequence),
        descriptors: U32::new(u32::try_from(units.len()).map_err(|_| too_large())?),
        reserved: U32::new(0),
        guid,
        flushed_len: U64::new(file_len),
        last_len: U64::new(file_len),
    };
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(header.as_bytes());
    for (offset, unit) in units {
        let (mut leading, mut trailing) = ([0; 8], [0; 4]);
        leading.copy_from_slice(&unit[..8]);
        trailing.copy_from_slice(&unit[UNIT - 4..]);
        let descriptor = RawDescriptor {
            signature: DATA_DESCRIPTOR,
            trailing,
            leading,
            offset: U64::new(*offset),
            sequence: U64::new(sequence),
        };
        bytes.extend_from_slice(descriptor.as_bytes());
    }
    bytes.resize(start, 0);
    // The fallback is not reached: the mask leaves 32 bits.
    let low = |number: u64| u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    for (_, unit) in units {
        bytes.extend_from_slice(&DATA);
        bytes.extend_from_slice(&low(sequence >> 32).to_le_bytes());
        bytes.extend_from_slice(&unit[8..UNIT - 4]);
        bytes.extend_from_slice(&low(sequence).to_le_bytes());
    }
    set_checksum(&mut bytes);
    Ok(bytes)
}

/// A view of a file as it will be after the replay of its log, for when the file must not be written to.
#[derive(Debug)]
pub(super) struct Replayed {
    file: Arc<dyn Device>,
    changes: Changes,
}

impl Replayed {
    pub(super) fn new(file: Arc<dyn Device>, changes: Changes) -> Self {
        Self { file, changes }
    }

    /// Replays the log in the file, durably: see [`Changes::apply`].
    ///
    /// # Errors
    /// Those of writing the file.
    pub(super) fn apply(&self, needed: u64) -> Result<()> {
        self.changes.apply(&*self.file, needed)
    }
}

impl View for Replayed {
    fn len(&self) -> u64 {
        self.file.len().max(self.changes.len)
    }

    fn limits(&self) -> &Limits {
        self.file.limits()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let wanted = ByteRange::at(offset, buf.len() as u64);
        self.file.read_padded(buf, offset)?;
        let within = |part: ByteRange| {
            let at = |offset: u64| to_index(offset - wanted.start());
            Ok::<_, Error>(at(part.start())?..at(part.end())?)
        };
        for range in self.changes.zeroes_in(wanted) {
            buf[within(range)?].fill(0);
        }
        let first = wanted.start().saturating_sub(UNIT as u64 - 1);
        for (at, bytes) in self.changes.data.range(first..wanted.end()) {
            let part = ByteRange::at(*at, UNIT as u64).intersect(wanted);
            let from = to_index(part.start() - at)?;
            let target = within(part)?;
            let len = target.len();
            buf[target].copy_from_slice(&bytes[from..from + len]);
        }
        Ok(())
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.file.allocated_bytes()
    }

    fn node(&self) -> Node {
        self.file.node()
    }
}
