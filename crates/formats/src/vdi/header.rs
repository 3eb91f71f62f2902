//! The header: its bytes, and [`Header`], which holds valid values only.

use diskimage_core::{ByteRange, Error, ErrorKind, Result, align_up};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::random;
use crate::layer_kit::reserved::Reserved;

/// Identifies a VDI image; stored behind the text at its start.
const SIGNATURE: u32 = 0xbeda_107f;
/// Version 1.1, the only one in use.
const VERSION: u32 = 0x0001_0001;
/// Bytes from `header_size` to the end of the last field that is used.
const HEADER_SIZE: u32 = 0x180;
/// The text at the start of a new image, the same as qemu-img's.
const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";

/// Bytes of a sector, and the alignment of the map and the data.
pub(super) const SECTOR: u64 = 512;
/// Bytes of a block.
pub(super) const BLOCK: u64 = 1 << 20;
/// Blocks of the largest disk: qemu-img's limit.
const MAX_BLOCKS: u32 = 0x1fff_ff80;
/// Bytes of the largest disk.
const MAX_SIZE: u64 = MAX_BLOCKS as u64 * BLOCK;

/// The whole first sector.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// The program that created the image, as text.
    text: [u8; 64],
    /// [`SIGNATURE`].
    signature: U32,
    /// The major version in the upper half.
    version: U32,
    /// Bytes of the header from here on.
    header_size: U32,
    /// [`DYNAMIC`] or [`STATIC`]; other types are refused.
    image_type: U32,
    /// Flags; ignored.
    image_flags: U32,
    /// A comment.
    description: [u8; 256],
    /// The byte offset of the block map.
    offset_bmap: U32,
    /// The byte offset of slot 0.
    offset_data: U32,
    /// Legacy geometry; ignored.
    cylinders: U32,
    /// Legacy geometry; ignored.
    heads: U32,
    /// Legacy geometry; ignored.
    sectors: U32,
    /// 512.
    sector_size: U32,
    /// Unused.
    unused1: U32,
    /// The disk's size in bytes.
    disk_size: U64,
    /// Bytes of a block: 1 MiB.
    block_size: U32,
    /// Extra bytes in front of each block: 0, or the image is refused.
    block_extra: U32,
    /// Entries of the block map.
    blocks_in_image: U32,
    /// Allocated blocks.
    blocks_allocated: U32,
    /// Identifies the image.
    uuid_image: [u8; 16],
    /// Identifies the last snapshot; a new random UUID in a new image.
    uuid_last_snap: [u8; 16],
    /// The image that a differencing image depends on; zero, or the image is refused.
    uuid_link: [u8; 16],
    /// The backing image; zero, or the image is refused.
    uuid_parent: [u8; 16],
    /// Unused.
    unused2: [u8; 56],
}

const _: () = assert!(size_of::<RawHeader>() == 512);

/// The header of an image that passed all checks of [`Header::parse`].
#[derive(Clone, Debug)]
pub(super) struct Header {
    raw: RawHeader,
    /// The disk's size in bytes, a multiple of [`SECTOR`].
    pub(super) size: u64,
    /// The byte offset of the block map.
    pub(super) map_offset: u64,
    /// The byte offset of slot 0.
    pub(super) data_offset: u64,
    /// Entries of the block map; at least as many as the disk has blocks.
    pub(super) blocks: u32,
}

/// Whether the first bytes of a file are those of a VDI image.
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
        raw.uuid_image = random::guid()?;
        raw.uuid_last_snap = random::guid()?;
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

    /// Parses the first sector of an image.
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
        if let Some(what) = changed_meaning(&raw) {
            return Err(unsupported(what));
        }
        Ok(Self {
            raw,
            size,
            map_offset: map_offset.into(),
            data_offset: data_offset.into(),
            blocks,
        })
    }

    /// The ranges of the file where no block is written: the header and the whole map.
    pub(super) fn reserved(&self) -> Reserved {
        self.with_map_of(self.blocks)
    }

    /// The ranges of the file where no block can be read: the header and the entries that the disk needs. The map of a
    /// damaged header may be longer and overlap blocks; the disk can still be read.
    pub(super) fn relied_on(&self) -> Reserved {
        self.with_map_of(blocks_of(self.size))
    }

    fn with_map_of(&self, blocks: u32) -> Reserved {
        let map = ByteRange::at(self.map_offset, u64::from(blocks) * 4);
        Reserved::new([("header", ByteRange::new(0, SECTOR)), ("block map", map)])
    }

    /// The bytes of slot `index` in the file.
    pub(super) fn stored(&self, index: u32) -> ByteRange {
        ByteRange::at(self.host(index), BLOCK)
    }

    /// The header of the same image with a disk of `size` bytes.
    pub(super) fn resized(&self, size: u64) -> Result<Self> {
        let size = checked_size(size)?;
        Ok(Self {
            size,
            // A map with more entries than the disk needs keeps them.
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

    /// Whether all blocks were allocated when the image was created.
    pub(super) fn is_static(&self) -> bool {
        self.raw.image_type.get() == STATIC
    }

    /// The header's count of allocated blocks.
    pub(super) fn allocated(&self) -> u32 {
        self.raw.blocks_allocated.get()
    }

    /// Sets the count of allocated blocks.
    pub(super) fn set_allocated(&mut self, blocks: u32) {
        self.raw.blocks_allocated = U32::new(blocks);
    }

    /// The byte offset of slot `index`.
    pub(super) fn host(&self, index: u32) -> u64 {
        self.data_offset + u64::from(index) * BLOCK
    }
}

const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
/// Changes of another image that can be undone, and those of a differencing image: what is unallocated in them is not zero.
const UNDO: u32 = 3;
const DIFFERENCING: u32 = 4;

/// What the header states that gives its blocks another meaning; `qemu-img` ignores these fields.
fn changed_meaning(raw: &RawHeader) -> Option<String> {
    if raw.header_size.get() < HEADER_SIZE {
        return Some(format!(
            "header of {} bytes, at least {HEADER_SIZE} are needed",
            raw.header_size
        ));
    }
    match raw.image_type.get() {
        DYNAMIC | STATIC => {}
        UNDO => return Some("undo image, its parent would be needed".to_owned()),
        DIFFERENCING => return Some("differencing image, its parent would be needed".to_owned()),
        other => return Some(format!("image type {other}")),
    }
    match raw.block_extra.get() {
        0 => None,
        extra => Some(format!("{extra} bytes of extra data per block")),
    }
}

/// Bytes of a map with `blocks` entries, rounded up to whole sectors.
pub(super) fn map_bytes(blocks: u32) -> u64 {
    align_up(u64::from(blocks) * 4, SECTOR)
}

/// The number of blocks of a disk of `size` bytes, which [`checked_size`] has accepted.
fn blocks_of(size: u64) -> u32 {
    // The fallback is not reached: `MAX_SIZE` is `MAX_BLOCKS` blocks.
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
