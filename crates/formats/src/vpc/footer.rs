//! The footer, the header of dynamic disks, and the geometry with the disk size that it stands for.

use std::time::{SystemTime, UNIX_EPOCH};

use diskimage_core::{ByteRange, Device, Error, ErrorKind, Result, align_up};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// The first bytes of a footer.
const COOKIE: [u8; 8] = *b"conectix";
/// The first bytes of the header of a dynamic disk.
const DYNAMIC_COOKIE: [u8; 8] = *b"cxsparse";
/// Version 1.0 of the footer and of the header.
const VERSION: u32 = 0x0001_0000;
/// The creator qemu-img, of images whose size is that of the geometry.
const QEMU: [u8; 4] = *b"qemu";
/// The creator qemu-img, of images whose size is `current_size`.
const QEM2: [u8; 4] = *b"qem2";
/// The creator Virtual PC, of images whose size is that of the geometry.
const VIRTUAL_PC: [u8; 4] = *b"vpc ";
/// Seconds from 1970 to 2000, the epoch of this format's time stamps.
const EPOCH: u64 = 946_684_800;

/// Bytes of a sector and of a footer.
pub(super) const SECTOR: u64 = 512;
/// Bytes of a block of new disks.
pub(super) const BLOCK: u32 = 2 << 20;
/// Bytes of the largest disk.
const MAX_SIZE: u64 = 2040 << 30;
/// Entries of the largest table.
const MAX_ENTRIES: u32 = u32::MAX >> 3;
/// The byte offset of the header of a new dynamic disk.
pub(super) const HEADER_OFFSET: u64 = SECTOR;
/// The byte offset of its block allocation table.
pub(super) const TABLE_OFFSET: u64 = HEADER_OFFSET + 1024;
/// The value of an offset field that is not used.
const NO_OFFSET: u64 = u64::MAX;

/// "Hard Disk Footer Format".
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Footer {
    /// [`COOKIE`].
    cookie: [u8; 8],
    /// 2: the reserved bit, always set.
    features: U32,
    /// [`VERSION`].
    version: U32,
    /// The byte offset of the header of a dynamic disk.
    data_offset: U64,
    /// When the disk was created, in seconds since 2000.
    time_stamp: U32,
    /// The program that created the disk.
    creator_application: [u8; 4],
    /// The version of that program.
    creator_version: U32,
    /// The operating system it ran on.
    creator_host_os: [u8; 4],
    /// The disk's size in bytes when it was created.
    original_size: U64,
    /// The disk's size in bytes.
    current_size: U64,
    /// The disk's geometry.
    geometry: Geometry,
    /// 2 fixed, 3 dynamic, 4 differencing.
    disk_type: U32,
    /// The ones' complement of the sum of all other bytes.
    checksum: U32,
    /// Identifies the disk.
    unique_id: [u8; 16],
    /// 1 if a saved state of a virtual machine uses the disk.
    saved_state: u8,
    /// Zeroes.
    reserved: [u8; 427],
}

const _: () = assert!(size_of::<Footer>() == 512);

/// "Dynamic Disk Header Format".
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct DynamicHeader {
    /// [`DYNAMIC_COOKIE`].
    cookie: [u8; 8],
    /// Unused.
    data_offset: U64,
    /// The byte offset of the block allocation table.
    table_offset: U64,
    /// [`VERSION`].
    header_version: U32,
    /// Entries of the block allocation table.
    max_table_entries: U32,
    /// Bytes of a block, without its bitmap.
    block_size: U32,
    /// The ones' complement of the sum of all other bytes of the header.
    checksum: U32,
    /// The backing image of a differencing disk: identifier, time stamp, name and locators.
    parent: [u8; 24 + 512 + 8 * 24],
    /// Zeroes.
    reserved: [u8; 256],
}

const _: () = assert!(size_of::<DynamicHeader>() == 1024);

/// Cylinders, heads and sectors per track.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Geometry {
    cylinders: U16,
    heads: u8,
    sectors: u8,
}

/// Which fields of the footer the size of the disk is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SizeBy {
    /// The geometry or `current_size`, by the creator of the disk.
    Creator,
    /// The field `current_size`.
    CurrentSize,
    /// The geometry.
    Geometry,
}

/// How a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Contiguously.
    Fixed,
    /// In blocks that are allocated when they are written.
    Dynamic,
}

const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

/// Whether the first bytes of a file are a copy of the footer, which dynamic disks begin with.
pub(super) fn is_vpc(head: &[u8]) -> bool {
    head.starts_with(&COOKIE)
}

impl Footer {
    /// The footer of a new disk of `size` bytes, rounded up to sectors with `exact`, else to the size of a geometry if
    /// one is large enough.
    pub(super) fn new(size: u64, kind: Kind, exact: bool) -> Result<Self> {
        let sectors = checked_size(size)?.div_ceil(SECTOR);
        let (sectors, geometry) = match Geometry::holding(sectors) {
            _ if exact => (sectors, Geometry::LARGEST),
            Some(geometry) => (geometry.len(), geometry),
            None => (sectors, Geometry::LARGEST),
        };
        let mut unique_id = [0; 16];
        getrandom::fill(&mut unique_id)
            .map_err(|error| Error::unsupported(format!("No random bytes to be had: {error}")))?;
        unique_id[6] = unique_id[6] & 0x0f | 0x40;
        unique_id[8] = unique_id[8] & 0x3f | 0x80;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        let footer = Self {
            cookie: COOKIE,
            features: U32::new(2),
            version: U32::new(VERSION),
            data_offset: U64::new(match kind {
                Kind::Fixed => NO_OFFSET,
                Kind::Dynamic => HEADER_OFFSET,
            }),
            // Saturates: later times do not fit into the field.
            time_stamp: U32::new(u32::try_from(now.saturating_sub(EPOCH)).unwrap_or(u32::MAX)),
            creator_application: if exact { QEM2 } else { QEMU },
            creator_version: U32::new(0x0005_0003),
            creator_host_os: *b"Wi2k",
            original_size: U64::new(sectors * SECTOR),
            current_size: U64::new(sectors * SECTOR),
            geometry,
            disk_type: U32::new(match kind {
                Kind::Fixed => FIXED,
                Kind::Dynamic => DYNAMIC,
            }),
            checksum: U32::ZERO,
            unique_id,
            saved_state: 0,
            reserved: [0; 427],
        };
        Ok(footer.with_checksum())
    }

    /// Reads the footer of an image: the copy at the start of the file, or else the last sector, where fixed disks have
    /// their only one. Returns true with it if it is the copy.
    pub(super) fn read(file: &dyn Device) -> Result<(Self, bool)> {
        let invalid = || Error::invalid("invalid VPC image");
        let len = align_up(file.len(), SECTOR);
        if len < SECTOR {
            return Err(Error::invalid("File too small for a VHD header"));
        }
        let mut footer = Self::read_at(file, 0)?;
        let is_copy = footer.cookie == COOKIE;
        if !is_copy {
            footer = Self::read_at(file, len - SECTOR)?;
            if footer.cookie != COOKIE || footer.disk_type.get() != FIXED {
                return Err(invalid());
            }
        }
        if footer.checksum != footer.with_checksum().checksum {
            return Err(Error::invalid("Incorrect header checksum"));
        }
        if footer.disk_type.get() == DIFFERENCING {
            return Err(Error::unsupported(
                "Differencing VHD images, which need the image below them, are not supported",
            ));
        }
        Ok((footer, is_copy))
    }

    fn read_at(file: &dyn Device, offset: u64) -> Result<Self> {
        let mut bytes = [0; size_of::<Self>()];
        file.read_padded(&mut bytes, offset)?;
        Self::read_from_bytes(&bytes).map_err(|_| Error::invalid("invalid VPC image"))
    }

    /// How the disk is stored.
    pub(super) fn kind(&self) -> Kind {
        match self.disk_type.get() {
            FIXED => Kind::Fixed,
            // qemu-img takes all other types for dynamic disks.
            _ => Kind::Dynamic,
        }
    }

    /// The disk's size in bytes.
    pub(super) fn size(&self, by: SizeBy) -> Result<u64> {
        let by_geometry = match by {
            SizeBy::Geometry => true,
            SizeBy::CurrentSize => false,
            SizeBy::Creator => matches!(self.creator_application, QEMU | VIRTUAL_PC),
        };
        // The size of a disk with the largest geometry may exceed it, so `current_size` is used.
        let by_geometry = by_geometry && self.geometry != Geometry::LARGEST;
        let sectors = if by_geometry {
            self.geometry.len()
        } else {
            self.current_size.get() / SECTOR
        };
        if sectors > MAX_SIZE / SECTOR {
            return Err(Error::from_errno(diskimage_core::errno::EFBIG));
        }
        Ok(sectors * SECTOR)
    }

    /// The byte offset of the header of a dynamic disk.
    pub(super) fn header_offset(&self) -> u64 {
        self.data_offset.get()
    }

    /// The footer of the same disk with exactly `size` bytes, a multiple of [`SECTOR`].
    pub(super) fn resized(&self, size: u64) -> Result<Self> {
        let sectors = checked_size(size)? / SECTOR;
        let footer = Self {
            // No geometry has exactly this size in general, so readers have to use `current_size`.
            creator_application: QEM2,
            current_size: U64::new(size),
            geometry: Geometry::near(sectors),
            ..*self
        };
        Ok(footer.with_checksum())
    }

    /// The footer with its checksum computed.
    fn with_checksum(&self) -> Self {
        let mut footer = Self {
            checksum: U32::ZERO,
            ..*self
        };
        footer.checksum = checksum(footer.as_bytes());
        footer
    }
}

impl DynamicHeader {
    /// The header of a new disk.
    pub(super) fn new(size: u64) -> Result<Self> {
        let header = Self {
            cookie: DYNAMIC_COOKIE,
            data_offset: U64::new(NO_OFFSET),
            table_offset: U64::new(TABLE_OFFSET),
            header_version: U32::new(VERSION),
            max_table_entries: U32::ZERO,
            block_size: U32::new(BLOCK),
            checksum: U32::ZERO,
            parent: [0; 728],
            reserved: [0; 256],
        };
        header.with_table(TABLE_OFFSET, size.div_ceil(BLOCK.into()))
    }

    /// Reads the header of a disk of `size` bytes.
    pub(super) fn read(file: &dyn Device, offset: u64, size: u64) -> Result<Self> {
        if i64::try_from(offset).is_err() {
            return Err(Error::invalid("Error reading dynamic VHD header"));
        }
        let mut bytes = [0; size_of::<Self>()];
        file.read_padded(&mut bytes, offset)?;
        let header = Self::read_from_bytes(&bytes).map_err(|_| Error::invalid("Invalid header magic"))?;
        if header.cookie != DYNAMIC_COOKIE {
            return Err(Error::invalid("Invalid header magic"));
        }
        let (block, entries) = (header.block_size.get(), header.max_table_entries.get());
        if !block.is_power_of_two() || u64::from(block) < SECTOR {
            return Err(Error::invalid(format!("Invalid block size {block}")));
        }
        if entries > MAX_ENTRIES {
            return Err(Error::invalid(format!(
                "Max Table Entries too large ({})",
                entries.cast_signed()
            )));
        }
        if u64::from(entries) * u64::from(block) < size {
            return Err(Error::invalid("Page table too small"));
        }
        Ok(header)
    }

    /// The byte offset of the block allocation table.
    pub(super) fn table_offset(&self) -> u64 {
        self.table_offset.get()
    }

    /// Entries of the block allocation table.
    pub(super) fn entries(&self) -> u32 {
        self.max_table_entries.get()
    }

    /// The byte offset of the table's end, rounded up to a sector.
    pub(super) fn table_end(&self) -> u64 {
        let bytes = u64::from(self.entries()) * 4;
        align_up(self.table_offset().saturating_add(bytes), SECTOR)
    }

    /// The ranges of the file where no block is written, if this header is at `offset`.
    pub(super) fn reserved(&self, offset: u64) -> Reserved {
        self.reserved_up_to(offset, self.table_end())
    }

    /// The ranges of the file where no block of a disk of `size` bytes can be read. The table of a damaged header may
    /// be longer than the disk needs and overlap blocks; the disk can still be read.
    pub(super) fn relied_on(&self, offset: u64, size: u64) -> Reserved {
        let entries = size.div_ceil(self.block());
        self.reserved_up_to(offset, self.table_offset().saturating_add(entries * 4))
    }

    fn reserved_up_to(&self, offset: u64, end: u64) -> Reserved {
        let table = ByteRange::new(self.table_offset(), end);
        Reserved::new([
            ("copy of the footer", ByteRange::new(0, SECTOR)),
            ("header", ByteRange::at(offset, size_of::<Self>() as u64)),
            ("block allocation table", table),
        ])
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> u64 {
        self.block_size.get().into()
    }

    /// Bytes of the bitmap in front of each block.
    pub(super) fn bitmap(&self) -> u64 {
        align_up(self.block() / SECTOR / 8, SECTOR).max(SECTOR)
    }

    /// The same header with a table of `entries` entries at `offset`.
    pub(super) fn with_table(&self, offset: u64, entries: u64) -> Result<Self> {
        let entries = u32::try_from(entries)
            .ok()
            .filter(|entries| *entries <= MAX_ENTRIES);
        let mut header = Self {
            table_offset: U64::new(offset),
            max_table_entries: U32::new(entries.ok_or_else(too_large)?),
            checksum: U32::ZERO,
            ..*self
        };
        header.checksum = checksum(header.as_bytes());
        Ok(header)
    }
}

impl Geometry {
    /// The largest geometry.
    const LARGEST: Self = Self {
        cylinders: U16::MAX_VALUE,
        heads: 16,
        sectors: 255,
    };

    /// The sectors of a disk with this geometry.
    fn len(self) -> u64 {
        u64::from(self.cylinders.get()) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry that the specification's appendix "CHS Calculation" gives for `sectors` sectors; it may hold a few
    /// less.
    fn near(sectors: u64) -> Self {
        let sectors = sectors.min(Self::LARGEST.len());
        let (track, heads) = if sectors >= 65535 * 16 * 63 {
            (255, 16)
        } else {
            let heads = (sectors / 17).div_ceil(1024).max(4);
            if sectors / 17 < heads * 1024 && heads <= 16 {
                (17, heads)
            } else if sectors / 31 < 16 * 1024 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        // The fallbacks are not reached: `sectors` is clamped to 65535 cylinders, 16 heads and tracks of 255 sectors.
        Self {
            cylinders: U16::new(u16::try_from(sectors / track / heads).unwrap_or(u16::MAX)),
            heads: u8::try_from(heads).unwrap_or(16),
            sectors: u8::try_from(track).unwrap_or(255),
        }
    }

    /// The smallest geometry of [`Geometry::near`] that holds `sectors` sectors; `None` if none does.
    fn holding(sectors: u64) -> Option<Self> {
        if sectors == 0 {
            return Some(Self::default());
        }
        let candidates = (sectors..=Self::LARGEST.len()).map(Self::near);
        candidates.into_iter().find(|geometry| geometry.len() >= sectors)
    }
}

fn checked_size(size: u64) -> Result<u64> {
    if size > MAX_SIZE {
        Err(too_large())
    } else {
        Ok(size)
    }
}

fn too_large() -> Error {
    Error::new(
        ErrorKind::Limit,
        "The image size is too large for file format 'vpc'",
    )
}

/// The ones' complement of the sum of `bytes`.
fn checksum(bytes: &[u8]) -> U32 {
    U32::new(!bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>())
}
