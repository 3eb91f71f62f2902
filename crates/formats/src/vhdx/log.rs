//! The log: changes of the tables that are done as a whole or not at all.
//!
//! ```text
//!   entry   |header, 126 descriptors|128 descriptors| ... |data| |data| ...      sectors of 4 KiB
//! ```
//!
//! A descriptor of data has the first eight and the last four bytes of 4 KiB, whose place in the data sector the sector's
//! sequence number takes. Entries follow one another in a ring; those from the tail that the last one names to the last
//! one are replayed. What is written here is one entry at the start of the ring at a time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use diskimage_core::{
    Budget, ByteRange, Device, Error, Limits, Node, Preallocation, Reservation, Result, View, ZeroMode,
    errno, to_index,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bat::UNIT;
use super::header::{Guid, REGION_TABLES, checksum_fits, set_checksum};
use crate::layer_kit::reserved::Reserved;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    signature: [u8; 4],
    /// CRC-32C of the whole entry with this field zero.
    checksum: U32,
    len: U32,
    /// Where in the log the first entry is that is replayed together with this one.
    tail: U32,
    sequence: U64,
    descriptors: U32,
    reserved: U32,
    guid: Guid,
    /// How long the file is at least.
    flushed_len: U64,
    /// How long it has to be for all that entries lead to.
    last_len: U64,
}

/// The place of a descriptor's 4 KiB, or zeroes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    signature: [u8; 4],
    /// Of data.
    trailing: [u8; 4],
    /// Of data; how many bytes, of zeroes.
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

/// How many times the length of a log is read at most while its entries are looked for: those of a log that somebody
/// wrote do not overlap.
const MOST_READS: u64 = 4;

/// A whole entry of a ring.
struct Found {
    sequence: u64,
    len: u64,
    tail: u64,
    flushed_len: u64,
    last_len: u64,
}

/// What the log says has to be done.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// 4 KiB each, by their offset in the file.
    data: BTreeMap<u64, Box<[u8; UNIT]>>,
    /// What is zero where no data is.
    zeroes: Vec<ByteRange>,
    /// How long the file is then at least.
    len: u64,
    taken: Vec<Reservation>,
}

impl Changes {
    /// Reads what is to be replayed of the log in `ring`, the entries of which have `guid`.
    ///
    /// There can be no entry: the original names the log before it writes the first one, and a crash in between has
    /// changed no table.
    ///
    /// # Errors
    /// A log beyond the end of the file, entries that do not belong together, one that leads to what the file has lost.
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
        // By the headers the log is found, so no change of theirs goes through it.
        let kept = Reserved::new([("headers", ByteRange::new(0, REGION_TABLES[0])), ("log", ring)]);
        for (at, entry) in sequence {
            if entry.flushed_len > file.len() {
                return Err(Error::corrupt("The file is shorter than its log says"));
            }
            changes.len = changes.len.max(entry.last_len);
            changes.add(&log.read(at, entry.len)?, entry.sequence, &kept, budget)?;
        }
        Ok(Some(changes))
    }

    /// Adds the descriptors of an entry, none of which leads to what is `kept`.
    fn add(&mut self, entry: &[u8], sequence: u64, kept: &Reserved, budget: &Budget) -> Result<()> {
        let invalid = || Error::from_errno(errno::EINVAL);
        let (header, _) = RawEntry::read_from_prefix(entry).map_err(|_| invalid())?;
        let count = usize::try_from(header.descriptors.get()).map_err(|_| invalid())?;
        let start = descriptor_sectors(count) * UNIT;
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
                    kept.require_outside("change", ByteRange::at(offset, UNIT as u64))?;
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
                        self.taken.push(budget.reserve(UNIT as u64 + 64)?);
                    }
                }
                ZERO_DESCRIPTOR => {
                    let len = u64::from_le_bytes(descriptor.leading);
                    if !len.is_multiple_of(UNIT as u64) {
                        return Err(invalid());
                    }
                    let range = ByteRange::at(offset, len);
                    kept.require_outside("change", range)?;
                    let gone: Vec<u64> = self
                        .data
                        .range(range.start()..range.end())
                        .map(|(at, _)| *at)
                        .collect();
                    for at in gone {
                        self.data.remove(&at);
                    }
                    self.taken.push(budget.reserve(64)?);
                    self.zeroes.push(range);
                }
                _ => return Err(invalid()),
            }
        }
        Ok(())
    }

    /// Does it to the file, durably.
    ///
    /// # Errors
    /// As writing the file.
    pub(super) fn apply(&self, file: &dyn Device) -> Result<()> {
        if file.len() < self.len {
            file.resize(self.len, Preallocation::Off)?;
        }
        for range in &self.zeroes {
            let inside = range.intersect(ByteRange::new(0, file.len()));
            if !inside.is_empty() {
                file.write_zeroes(inside, ZeroMode::KeepAllocated)?;
            }
        }
        for (offset, bytes) in &self.data {
            file.write_at(&bytes[..], *offset)?;
        }
        file.flush()
    }
}

/// The entries that are replayed, in their order and with their places: those that end in the newest one which finds all
/// that it belongs to.
fn active(entries: &HashMap<u64, Found>, ring: u64) -> Option<Vec<(u64, &Found)>> {
    let mut heads: Vec<(&u64, &Found)> = entries.iter().collect();
    heads.sort_unstable_by_key(|(at, entry)| std::cmp::Reverse((entry.sequence, **at)));
    // The newest is the one; before it there can be some that were cut off. No more steps than that takes.
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

/// The log's part of a file.
struct Ring<'a> {
    file: &'a dyn Device,
    ring: ByteRange,
}

impl Ring<'_> {
    /// All whole entries with `guid`, by their place in the ring.
    fn entries(&self, guid: Guid) -> Result<HashMap<u64, Found>> {
        let mut found = HashMap::new();
        let mut reads = self.ring.len().saturating_mul(MOST_READS);
        let mut at = 0;
        while at < self.ring.len() {
            let entry = self.entry(at, guid, &mut reads)?;
            at += entry.as_ref().map_or(UNIT as u64, |entry| entry.len);
            if let Some(entry) = entry {
                found.insert(at - entry.len, entry);
            }
        }
        Ok(found)
    }

    /// The whole entry at `at`, if there is one.
    fn entry(&self, at: u64, guid: Guid, reads: &mut u64) -> Result<Option<Found>> {
        let start = self.read(at, UNIT as u64)?;
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
        if !checksum_fits(&self.read(at, len)?, raw.checksum) {
            return Ok(None);
        }
        Ok(Some(Found {
            sequence: raw.sequence.get(),
            len,
            tail,
            flushed_len: raw.flushed_len.get(),
            last_len: raw.last_len.get(),
        }))
    }

    /// `len` bytes from `at` on, around the end if need be.
    fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let too_large = || Error::from_errno(errno::EFBIG);
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| too_large())?];
        let before_end = usize::try_from(self.ring.len() - at).map_err(|_| too_large())?;
        let (first, second) =
            bytes.split_at_mut(before_end.min(usize::try_from(len).map_err(|_| too_large())?));
        self.file.read_at(first, self.ring.start() + at)?;
        if !second.is_empty() {
            self.file.read_at(second, self.ring.start())?;
        }
        Ok(bytes)
    }
}

/// How many sectors an entry's header and descriptors take.
fn descriptor_sectors(descriptors: usize) -> usize {
    descriptors
        .saturating_mul(size_of::<RawDescriptor>())
        .saturating_add(size_of::<RawEntry>())
        .div_ceil(UNIT)
}

/// How many units an entry can have in a log of `len` bytes.
pub(super) fn room(len: u64) -> Result<usize> {
    // A descriptor sector has at least 126.
    let sectors = to_index(len)? / UNIT;
    Ok((sectors - sectors.div_ceil(64)).min(MOST_UNITS))
}

/// A longer entry is made of several: it is in memory as a whole.
const MOST_UNITS: usize = 1024;

/// The bytes of an entry that stands alone, at the start of the ring: `units` are 4 KiB by their offsets, `file_len` is
/// how long the file is.
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

/// A file as it will be once its log is replayed, for whoever must not write to it, or not yet.
#[derive(Debug)]
pub(super) struct Replayed {
    file: Arc<dyn Device>,
    changes: Changes,
}

impl Replayed {
    pub(super) fn new(file: Arc<dyn Device>, changes: Changes) -> Self {
        Self { file, changes }
    }

    /// Makes the file like that, durably.
    ///
    /// # Errors
    /// As writing the file.
    pub(super) fn apply(&self) -> Result<()> {
        self.changes.apply(&*self.file)
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
        for range in &self.changes.zeroes {
            if range.overlaps(wanted) {
                buf[within(range.intersect(wanted))?].fill(0);
            }
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
