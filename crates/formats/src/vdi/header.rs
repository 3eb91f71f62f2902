//! The header, as bytes and as a type that cannot hold an illegal value.

use diskimage_core::{ByteRange, Error, ErrorKind, Result, align_up};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// Marks a VDI image, behind the text that it begins with.
const SIGNATURE: u32 = 0xbeda_107f;
/// Version 1.1, the only one in use.
const VERSION: u32 = 0x0001_0001;
/// Bytes from `header_size` to the end of the fields that have a meaning.
const HEADER_SIZE: u32 = 0x180;
/// What an image made here begins with.
const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";

/// Bytes of a sector, and what tables and data are aligned to.
pub(super) const SECTOR: u64 = 512;
/// Bytes of a block.
pub(super) const BLOCK: u64 = 1 << 20;
/// Blocks of the largest disk, as the original has it.
const MAX_BLOCKS: u32 = 0x1fff_ff80;
/// Bytes of the largest disk.
const MAX_SIZE: u64 = MAX_BLOCKS as u64 * BLOCK;

/// The whole first sector.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// What made the image, for people.
    text: [u8; 64],
    /// [`SIGNATURE`].
    signature: U32,
    /// The major version in the upper half.
    version: U32,
    /// Bytes of the header from here on.
    header_size: U32,
    /// 1 dynamic, 2 static.
    image_type: U32,
    /// Flags without a meaning here.
    image_flags: U32,
    /// A comment.
    description: [u8; 256],
    /// Where the block map starts.
    offset_bmap: U32,
    /// Where the blocks start.
    offset_data: U32,
    /// Geometry of old, which nobody reads.
    cylinders: U32,
    /// Likewise.
    heads: U32,
    /// Likewise.
    sectors: U32,
    /// 512.
    sector_size: U32,
    /// Not used.
    unused1: U32,
    /// The disk's size in bytes.
    disk_size: U64,
    /// Bytes of a block: 1 MiB.
    block_size: U32,
    /// Bytes in front of each block: none.
    block_extra: U32,
    /// Entries of the block map.
    blocks_in_image: U32,
    /// Entries that have a block.
    blocks_allocated: U32,
    /// The image.
    uuid_image: [u8; 16],
    /// Its last change.
    uuid_last_snap: [u8; 16],
    /// The image that this one depends on: none.
    uuid_link: [u8; 16],
    /// And the one below.
    uuid_parent: [u8; 16],
    /// Not used.
    unused2: [u8; 56],
}

const _: () = assert!(size_of::<RawHeader>() == 512);

/// The header of an image that can be opened.
#[derive(Clone, Debug)]
pub(super) struct Header {
    raw: RawHeader,
    /// The disk's size in bytes, whole sectors.
    pub(super) size: u64,
    /// Where the block map starts.
    pub(super) map_offset: u64,
    /// Where block 0 is stored.
    pub(super) data_offset: u64,
    /// Entries of the block map; enough for the disk.
    pub(super) blocks: u32,
}

/// Whether a file begins like an image.
pub(super) fn is_vdi(head: &[u8]) -> bool {
    head.get(64..68) == Some(&SIGNATURE.to_le_bytes())
}

impl Header {
    /// The header of a new image.
    pub(super) fn new(size: u64, is_static: bool) -> Result<Self> {
        let size = checked_size(align_up(size, SECTOR))?;
        let blocks = blocks_of(size);
        let data_offset = SECTOR + map_bytes(blocks);
        let mut raw = RawHeader::read_from_bytes(&[0; size_of::<RawHeader>()])
            .map_err(|_| Error::corrupt("The header is too short"))?;
        raw.text[..TEXT.len()].copy_from_slice(TEXT);
        raw.signature = U32::new(SIGNATURE);
        raw.version = U32::new(VERSION);
        raw.header_size = U32::new(HEADER_SIZE);
        raw.image_type = U32::new(if is_static { STATIC } else { DYNAMIC });
        raw.sector_size = U32::new(512);
        raw.block_size = U32::new(1 << 20);
        raw.uuid_image = new_uuid()?;
        raw.uuid_last_snap = new_uuid()?;
        let mut header = Self {
            raw,
            size,
            map_offset: SECTOR,
            data_offset,
            blocks,
        };
        header.set_allocated(if is_static { blocks } else { 0 });
        Ok(header)
    }

    /// Reads the first sector of an image.
    pub(super) fn parse(sector: &[u8; 512]) -> Result<Self> {
        let raw =
            RawHeader::read_from_bytes(sector).map_err(|_| Error::corrupt("The header is too short"))?;
        let unsupported = |what: String| Error::unsupported(format!("unsupported VDI image ({what})"));
        checked_size(raw.disk_size.get())?;
        if raw.signature.get() != SIGNATURE {
            return Err(Error::invalid(format!(
                "Image not in VDI format (bad signature {:08x})",
                raw.signature.get()
            )));
        }
        let version = raw.version.get();
        if version != VERSION {
            return Err(unsupported(format!(
                "version {}.{}",
                version >> 16,
                version & 0xffff
            )));
        }
        let (map_offset, data_offset) = (raw.offset_bmap.get(), raw.offset_data.get());
        if !u64::from(map_offset).is_multiple_of(SECTOR) {
            return Err(unsupported(format!("unaligned block map offset {map_offset:#x}")));
        }
        if !u64::from(data_offset).is_multiple_of(SECTOR) {
            return Err(unsupported(format!("unaligned data offset {data_offset:#x}")));
        }
        if u64::from(raw.sector_size.get()) != SECTOR {
            return Err(unsupported(format!(
                "sector size {} is not {SECTOR}",
                raw.sector_size
            )));
        }
        if u64::from(raw.block_size.get()) != BLOCK {
            return Err(unsupported(format!(
                "block size {} is not {BLOCK}",
                raw.block_size
            )));
        }
        let (size, blocks) = (align_up(raw.disk_size.get(), SECTOR), raw.blocks_in_image.get());
        let room = u64::from(blocks) * BLOCK;
        if size > room {
            return Err(unsupported(format!(
                "disk size {size}, image bitmap has room for {room}"
            )));
        }
        if raw.uuid_link != [0; 16] {
            return Err(unsupported("non-NULL link UUID".to_owned()));
        }
        if raw.uuid_parent != [0; 16] {
            return Err(unsupported("non-NULL parent UUID".to_owned()));
        }
        if blocks > MAX_BLOCKS {
            return Err(unsupported(format!(
                "too many blocks {blocks}, max is {MAX_BLOCKS}"
            )));
        }
        Ok(Self {
            raw,
            size,
            map_offset: map_offset.into(),
            data_offset: data_offset.into(),
            blocks,
        })
    }

    /// Where nothing of the disk is written.
    pub(super) fn reserved(&self) -> Reserved {
        self.with_map_of(self.blocks)
    }

    /// Where nothing of the disk can be: a damaged header may have a map that is too long, without which the disk can be
    /// read.
    pub(super) fn relied_on(&self) -> Reserved {
        self.with_map_of(blocks_of(self.size))
    }

    fn with_map_of(&self, blocks: u32) -> Reserved {
        let map = ByteRange::at(self.map_offset, u64::from(blocks) * 4);
        Reserved::new([("header", ByteRange::new(0, SECTOR)), ("block map", map)])
    }

    /// The bytes of the block that is stored at place `index`.
    pub(super) fn stored(&self, index: u32) -> ByteRange {
        ByteRange::at(self.host(index), BLOCK)
    }

    /// The same image with a disk of `size` bytes.
    pub(super) fn resized(&self, size: u64) -> Result<Self> {
        let size = checked_size(size)?;
        Ok(Self {
            size,
            // Entries that the disk does not need stay where they are.
            blocks: self.blocks.max(blocks_of(size)),
            ..self.clone()
        })
    }

    /// The first sector.
    pub(super) fn to_bytes(&self) -> Result<[u8; 512]> {
        let offset = |value: u64| {
            u32::try_from(value).map(U32::new).map_err(|_| {
                Error::new(
                    ErrorKind::Limit,
                    "The tables are too far from the start of the image",
                )
            })
        };
        let mut raw = self.raw;
        raw.disk_size = U64::new(self.size);
        raw.blocks_in_image = U32::new(self.blocks);
        raw.offset_bmap = offset(self.map_offset)?;
        raw.offset_data = offset(self.data_offset)?;
        let mut sector = [0; 512];
        sector.copy_from_slice(raw.as_bytes());
        Ok(sector)
    }

    /// Whether all blocks have their storage from the start.
    pub(super) fn is_static(&self) -> bool {
        self.raw.image_type.get() == STATIC
    }

    /// How many blocks have storage, as the header says.
    pub(super) fn allocated(&self) -> u32 {
        self.raw.blocks_allocated.get()
    }

    /// Notes how many blocks have storage.
    pub(super) fn set_allocated(&mut self, blocks: u32) {
        self.raw.blocks_allocated = U32::new(blocks);
    }

    /// Where the block stored at place `index` is.
    pub(super) fn host(&self, index: u32) -> u64 {
        self.data_offset + u64::from(index) * BLOCK
    }
}

const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;

/// Bytes of a block map of so many entries, in whole sectors.
pub(super) fn map_bytes(blocks: u32) -> u64 {
    align_up(u64::from(blocks) * 4, SECTOR)
}

/// Blocks of a disk that is not too large.
fn blocks_of(size: u64) -> u32 {
    u32::try_from(size.div_ceil(BLOCK)).unwrap_or(MAX_BLOCKS)
}

fn checked_size(size: u64) -> Result<u64> {
    if size > MAX_SIZE {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})"),
        ));
    }
    Ok(size)
}

/// A random identifier. Its first three fields are stored with the low byte first.
fn new_uuid() -> Result<[u8; 16]> {
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid)
        .map_err(|error| Error::unsupported(format!("No random bytes to be had: {error}")))?;
    uuid[7] = uuid[7] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}
