//! The headers and region tables, which hold the offsets of the log, the block allocation table and the metadata.
//!
//! All numbers of the format are little-endian. The file has two of each structure: the valid header with the higher
//! sequence number is current, and the first valid region table.

use diskimage_core::{ByteRange, Device, Error, Result, errno, to_index};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// A GUID as it is stored.
pub(super) type Guid = [u8; 16];

/// Offsets and lengths of regions are multiples of 1 MiB.
pub(super) const MIB: u64 = 1 << 20;

/// The first bytes of a file.
pub(super) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";

/// The offsets of the two headers.
pub(super) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// The offsets of the two region tables.
pub(super) const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a region table.
pub(super) const REGION_TABLE_LEN: usize = 64 << 10;

/// A header in the file; the rest of its 4 KiB is zero.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 4],
    /// CRC-32C of all 4 KiB with this field zero.
    checksum: U32,
    sequence: U64,
    file_write: Guid,
    data_write: Guid,
    log: Guid,
    log_version: U16,
    version: U16,
    log_len: U32,
    log_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 80);

const HEADER_LEN: usize = 4096;
const HEADER_SIGNATURE: [u8; 4] = *b"head";

/// The fields of a valid header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The header with the higher number is current.
    pub(super) sequence: u64,
    /// `FileWriteGuid`: new whenever the file is about to change.
    pub(super) file_write: Guid,
    /// `DataWriteGuid`: new whenever guest data is about to change.
    pub(super) data_write: Guid,
    /// `LogGuid`: log entries with this GUID are to be replayed; none if it is zero.
    pub(super) log_guid: Guid,
    pub(super) log: ByteRange,
}

impl Header {
    /// Reads the two headers: the current one, and its index in [`HEADERS`].
    ///
    /// # Errors
    /// Neither header is valid.
    pub(super) fn read(file: &dyn Device) -> Result<(Self, usize)> {
        let mut found: Option<(Self, usize)> = None;
        for (slot, offset) in HEADERS.into_iter().enumerate() {
            let mut bytes = [0; HEADER_LEN];
            file.read_padded(&mut bytes, offset)?;
            if let Some(header) = Self::parse(&bytes)
                && found
                    .as_ref()
                    .is_none_or(|(other, _)| other.sequence < header.sequence)
            {
                found = Some((header, slot));
            }
        }
        found.ok_or_else(|| Error::corrupt("No valid VHDX header found"))
    }

    fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
        let is_whole = raw.signature == HEADER_SIGNATURE && checksum_fits(bytes, raw.checksum);
        let is_known = raw.version.get() == 1 && raw.log_version.get() == 0;
        let (offset, len) = (raw.log_offset.get(), u64::from(raw.log_len.get()));
        let log = ByteRange::at(offset, len);
        let is_aligned = offset >= MIB && is_in_mib(offset) && is_in_mib(len) && log.len() == len;
        (is_whole && is_known && is_aligned).then_some(Self {
            sequence: raw.sequence.get(),
            file_write: raw.file_write,
            data_write: raw.data_write,
            log_guid: raw.log,
            log,
        })
    }

    /// Makes this the current header, durably, instead of the one in `slot`: writes it to the other slot, which is
    /// returned.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(super) fn replace(&mut self, file: &dyn Device, slot: usize) -> Result<usize> {
        let other = 1 - slot.min(1);
        self.sequence = self.sequence.wrapping_add(1);
        self.write(file, other)?;
        file.flush()?;
        Ok(other)
    }

    /// Writes the header to slot `slot`.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(super) fn write(&self, file: &dyn Device, slot: usize) -> Result<()> {
        let len = u32::try_from(self.log.len()).map_err(|_| Error::from_errno(errno::EFBIG))?;
        let raw = RawHeader {
            signature: HEADER_SIGNATURE,
            checksum: U32::new(0),
            sequence: U64::new(self.sequence),
            file_write: self.file_write,
            data_write: self.data_write,
            log: self.log_guid,
            log_version: U16::new(0),
            version: U16::new(1),
            log_len: U32::new(len),
            log_offset: U64::new(self.log.start()),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[..size_of::<RawHeader>()].copy_from_slice(raw.as_bytes());
        set_checksum(&mut bytes);
        file.write_at(&bytes, HEADERS[slot])
    }
}

/// An entry of a region table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRegion {
    guid: Guid,
    offset: U64,
    len: U32,
    /// Bit 0: if the region is unknown, the file must not be opened.
    flags: U32,
}

const REGION_SIGNATURE: [u8; 4] = *b"regi";
const MAX_REGIONS: usize = 2047;
const REQUIRED: u32 = 1;

/// 2DC27766-F623-4200-9D64-115E9BFD4A08
const BAT: Guid = [
    0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08,
];
/// 8B7CA206-4790-4B9A-B8FE-575F050F886E
const METADATA: Guid = [
    0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e,
];

/// The regions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Regions {
    pub(super) bat: ByteRange,
    pub(super) metadata: ByteRange,
    /// Unknown regions that are not required, with their entries as stored.
    pub(super) others: Vec<(ByteRange, [u8; REGION_LEN])>,
}

/// Bytes of an entry of a region table.
const REGION_LEN: usize = size_of::<RawRegion>();

impl Regions {
    /// Reads the first valid region table.
    ///
    /// # Errors
    /// No valid table, regions that overlap or are missing, or an unknown region that is required.
    pub(super) fn read(file: &dyn Device, log: ByteRange) -> Result<Self> {
        let invalid = || Error::from_errno(errno::EINVAL);
        let mut bytes = vec![0; REGION_TABLE_LEN];
        for offset in REGION_TABLES {
            file.read_padded(&mut bytes, offset)?;
            let checksum = U32::read_from_bytes(&bytes[4..8]).map_err(|_| invalid())?;
            if bytes[..4] == REGION_SIGNATURE && checksum_fits(&bytes, checksum) {
                return Self::parse(&bytes, log);
            }
        }
        Err(invalid())
    }

    fn parse(bytes: &[u8], log: ByteRange) -> Result<Self> {
        let invalid = || Error::from_errno(errno::EINVAL);
        let count = U32::read_from_bytes(&bytes[8..12]).map_err(|_| invalid())?;
        let count = to_index(count.get().into())?;
        if count > MAX_REGIONS {
            return Err(invalid());
        }
        let (mut bat, mut metadata, mut others) = (None, None, Vec::new());
        let mut ranges = vec![ByteRange::new(0, MIB), log];
        for entry in bytes[16..].chunks_exact(size_of::<RawRegion>()).take(count) {
            let raw = RawRegion::read_from_bytes(entry).map_err(|_| invalid())?;
            let (offset, len) = (raw.offset.get(), u64::from(raw.len.get()));
            let range = ByteRange::at(offset, len);
            let is_valid = is_in_mib(offset) && is_in_mib(len) && len > 0 && range.len() == len;
            if !is_valid || ranges.iter().any(|other| other.overlaps(range)) {
                return Err(invalid());
            }
            ranges.push(range);
            let region = match raw.guid {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if raw.flags.get() & REQUIRED != 0 => return Err(Error::from_errno(errno::ENOTSUP)),
                _ => {
                    others.push((range, zerocopy::transmute!(raw)));
                    continue;
                }
            };
            if region.replace(range).is_some() {
                return Err(invalid());
            }
        }
        Ok(Self {
            bat: bat.ok_or_else(invalid)?,
            metadata: metadata.ok_or_else(invalid)?,
            others,
        })
    }

    /// The ranges of the file that no block may overlap, if the log is at `log`.
    pub(super) fn reserved(&self, log: ByteRange) -> Reserved {
        let others = self.others.iter().map(|(range, _)| ("region", *range));
        let known = [
            ("headers", ByteRange::new(0, MIB)),
            ("log", log),
            ("metadata", self.metadata),
            ("block allocation table", self.bat),
        ];
        Reserved::new(known.into_iter().chain(others))
    }

    /// Writes both tables, with a flush in between: one of them is valid at any moment. All bytes that change in a
    /// table are in its first sector.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(super) fn write(&self, file: &dyn Device) -> Result<()> {
        let mut bytes = vec![0; REGION_TABLE_LEN];
        bytes[..4].copy_from_slice(&REGION_SIGNATURE);
        let mut entries = Vec::new();
        for (guid, range) in [(BAT, self.bat), (METADATA, self.metadata)] {
            let len = u32::try_from(range.len()).map_err(|_| Error::from_errno(errno::EFBIG))?;
            entries.push(zerocopy::transmute!(RawRegion {
                guid,
                offset: U64::new(range.start()),
                len: U32::new(len),
                flags: U32::new(REQUIRED),
            }));
        }
        entries.extend(self.others.iter().map(|(_, entry)| *entry));
        let count = u32::try_from(entries.len()).map_err(|_| Error::from_errno(errno::EFBIG))?;
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        for (target, entry) in bytes[16..].chunks_exact_mut(REGION_LEN).zip(entries) {
            target.copy_from_slice(&entry);
        }
        set_checksum(&mut bytes);
        for offset in REGION_TABLES {
            file.write_at(&bytes, offset)?;
            file.flush()?;
        }
        Ok(())
    }
}

/// Whether `number` is a multiple of a mebibyte.
pub(super) fn is_in_mib(number: u64) -> bool {
    number.is_multiple_of(MIB)
}

/// The bytes of a checksum in a structure.
pub(super) const CHECKSUM: std::ops::Range<usize> = 4..8;

/// Whether `checksum`, read from byte 4 of the structure `bytes`, is right.
pub(super) fn checksum_fits(bytes: &[u8], checksum: U32) -> bool {
    checksum_of(bytes) == checksum.get()
}

/// Computes the checksum of a structure, and stores it at byte 4.
pub(super) fn set_checksum(bytes: &mut [u8]) {
    let checksum = checksum_of(bytes);
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
}

/// The CRC-32C of a structure, whose bytes 4 to 7 count as zero.
fn checksum_of(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(8));
    let mut start = [0; 8];
    start[..head.len().min(4)].copy_from_slice(&head[..head.len().min(4)]);
    crc32c::crc32c_append(crc32c::crc32c(&start), rest)
}
