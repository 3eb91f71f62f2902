//! The footer: the kind and the size of the disk.

use std::time::{SystemTime, UNIX_EPOCH};

use diskimage_core::{Device, DiskIdentity, Error, ErrorKind, Result, align_up};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::Geometry;
use crate::layer_kit::random;

/// The first bytes of a footer.
const COOKIE: [u8; 8] = *b"conectix";
/// Version 1.0 of the footer and of the header.
pub(super) const VERSION: u32 = 0x0001_0000;
/// The creator qemu-img, of images whose size is that of the geometry.
const QEMU: [u8; 4] = *b"qemu";
/// The creator qemu-img, of images whose size is `current_size`.
const QEM2: [u8; 4] = *b"qem2";
/// The creator Virtual PC, of images whose size is that of the geometry.
const VIRTUAL_PC: [u8; 4] = *b"vpc ";
/// Seconds from 1970 to 2000, the epoch of this format's time stamps.
pub(super) const EPOCH: u64 = 946_684_800;

/// Bytes of a sector and of a footer.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the largest disk.
const MAX_SIZE: u64 = 2040 << 30;
/// The byte offset of the header of a new dynamic disk.
pub(super) const HEADER_OFFSET: u64 = SECTOR;
/// The value of an offset field that is not used.
pub(super) const NO_OFFSET: u64 = u64::MAX;

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
    /// Likewise, on top of another disk, the parent.
    Differencing,
}

const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

/// Whether the first bytes of a file are a copy of the footer, which dynamic disks begin with.
pub(super) fn is_vpc(head: &[u8]) -> bool {
    head.starts_with(&COOKIE)
}

/// Whether `tail`, the last sector of a file of `len` bytes, is the footer of a fixed disk that fills the file. A
/// footer of any other disk is not recognised here: a guest could write one to the end of a raw disk, and have the next
/// probe open a parent of the guest's choice.
pub(super) fn ends_fixed_disk(tail: &[u8], len: u64) -> bool {
    let Ok(footer) = Footer::read_from_bytes(tail) else {
        return false;
    };
    footer.cookie == COOKIE
        && footer.kind() == Kind::Fixed
        && footer.checksum == footer.with_checksum().checksum
        && footer.current_size.get().checked_add(SECTOR) == Some(align_up(len, SECTOR))
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
        let unique_id = random::uuid()?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        let footer = Self {
            cookie: COOKIE,
            features: U32::new(2),
            version: U32::new(VERSION),
            data_offset: U64::new(match kind {
                Kind::Fixed => NO_OFFSET,
                Kind::Dynamic | Kind::Differencing => HEADER_OFFSET,
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
                Kind::Differencing => DIFFERENCING,
            }),
            checksum: U32::ZERO,
            unique_id,
            saved_state: 0,
            reserved: [0; 427],
        };
        Ok(footer.with_checksum())
    }

    /// Reads the footer of an image: the copy at the start of the file, or else the last sector, where fixed disks have
    /// their only one, as have other disks that lost the copy. Returns true with it if it is the copy.
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
            if footer.cookie != COOKIE {
                return Err(invalid());
            }
        }
        if footer.checksum != footer.with_checksum().checksum {
            return Err(Error::invalid("Incorrect header checksum"));
        }
        if is_copy && footer.kind() == Kind::Differencing {
            // A guest could write such a copy into the first sector of its fixed disk, and choose a parent.
            let last = Self::read_at(file, len - SECTOR)?;
            if ends_fixed_disk(last.as_bytes(), file.len()) {
                return Ok((last, false));
            }
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
            DIFFERENCING => Kind::Differencing,
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

    /// What identifies the disk.
    pub(super) fn identity(&self) -> DiskIdentity {
        DiskIdentity {
            id: self.unique_id,
            time_stamp: Some(self.time_stamp.get()),
        }
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

fn checked_size(size: u64) -> Result<u64> {
    if size > MAX_SIZE {
        Err(too_large())
    } else {
        Ok(size)
    }
}

pub(super) fn too_large() -> Error {
    Error::new(
        ErrorKind::Limit,
        "The image size is too large for file format 'vpc'",
    )
}

/// The ones' complement of the sum of `bytes`.
pub(super) fn checksum(bytes: &[u8]) -> U32 {
    U32::new(!bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>())
}
