//! The metadata region: the table of metadata items, and the items.

use diskimage_core::{ByteRange, Device, Error, Result, align_down, errno};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{Guid, MIB};
use super::parent::ParentLocator;
use crate::layer_kit::random;
use crate::layer_kit::reserved::Reserved;

/// The properties of the disk in the metadata items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Bytes of a payload block.
    pub(super) block_size: u64,
    /// Bytes of a logical sector: 512 or 4096.
    pub(super) sector: u64,
    /// The disk's size in bytes, a multiple of the sector size.
    pub(super) disk_size: u64,
    /// The offset in the file of the item with the disk's size.
    pub(super) size_at: u64,
}

/// Bytes of the largest disk.
pub(super) const MAX_DISK: u64 = 64 << 40;
/// The size of a payload block is a power of two between [`MIN_BLOCK`] and [`MAX_BLOCK`].
pub(super) const MIN_BLOCK: u64 = MIB;
pub(super) const MAX_BLOCK: u64 = 256 * MIB;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTable {
    signature: [u8; 8],
    reserved: U16,
    count: U16,
    rest: [u8; 20],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawItem {
    id: Guid,
    /// From the start of the region.
    offset: U32,
    len: U32,
    flags: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawTable>() == 32 && size_of::<RawItem>() == 32);

/// Bytes of the required items, in the order of [`Metadata::read`].
const LENGTHS: [u64; 4] = [8, 8, 4, 4];

const SIGNATURE: &[u8; 8] = b"metadata";
const MAX_ITEMS: u16 = 2047;
const TABLE_LEN: usize = 64 << 10;

/// Flags of items: the item describes the disk, not the file; if it is unknown, the file must not be opened.
const VIRTUAL_DISK: u32 = 2;
const REQUIRED: u32 = 4;

/// CAA16737-FA36-4D43-B3B6-33F0AA44E76B
const FILE_PARAMETERS: Guid = [
    0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b,
];
/// 2FA54224-CD1B-4876-B211-5DBED83BF4B8
const DISK_SIZE: Guid = [
    0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8,
];
/// BECA12AB-B2E6-4523-93EF-C309E000C746
const DISK_ID: Guid = [
    0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46,
];
/// 8141BF1D-A96F-4709-BA47-F233A8FAAB5F
const LOGICAL_SECTOR: Guid = [
    0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f,
];
/// CDA348C7-445D-4471-9CC9-E9885251C556
const PHYSICAL_SECTOR: Guid = [
    0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56,
];
/// A8D35F2D-B30B-454D-ABF7-D3D84834AB0C
const PARENT_LOCATOR: Guid = [
    0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c,
];

/// Flag of [`FILE_PARAMETERS`]: a differencing disk.
const HAS_PARENT: u32 = 2;

/// Where the items of a metadata region are.
struct Items {
    /// The offsets of the items in the file: file parameters, disk size, logical and physical sector size.
    offsets: [Option<u64>; 4],
    /// The bytes of the parent locator.
    locator: Option<ByteRange>,
}

impl Items {
    /// Reads the table of the region at `region`.
    ///
    /// # Errors
    /// Items outside of the region, items that overlap, and unknown ones that are required.
    fn read(file: &dyn Device, region: ByteRange) -> Result<Self> {
        let mut bytes = vec![0; TABLE_LEN];
        file.read_padded(&mut bytes, region.start())?;
        let (table, items) = RawTable::read_from_prefix(&bytes).map_err(|_| invalid())?;
        if table.signature != *SIGNATURE || table.count.get() > MAX_ITEMS {
            return Err(invalid());
        }
        let mut offsets = [None; 4];
        let mut locator = None;
        for item in items
            .chunks_exact(size_of::<RawItem>())
            .take(table.count.get().into())
        {
            let item = RawItem::read_from_bytes(item).map_err(|_| invalid())?;
            let nth = match item.id {
                FILE_PARAMETERS => 0,
                DISK_SIZE => 1,
                LOGICAL_SECTOR => 2,
                PHYSICAL_SECTOR => 3,
                DISK_ID => continue,
                PARENT_LOCATOR => {
                    let range = ByteRange::at(item.offset.get().into(), item.len.get().into());
                    if range.start() < TABLE_LEN as u64 || range.end() > region.len() {
                        return Err(invalid());
                    }
                    locator = Some(ByteRange::at(region.start() + range.start(), range.len()));
                    continue;
                }
                _ if item.flags.get() & REQUIRED != 0 => return Err(unsupported()),
                _ => continue,
            };
            let offset = u64::from(item.offset.get());
            if offset < TABLE_LEN as u64 || offset + 8 > region.len() {
                return Err(invalid());
            }
            offsets[nth] = Some(region.start() + offset);
        }
        // Items must not overlap: that with the disk's size is overwritten when the disk grows.
        let items = offsets.iter().zip(LENGTHS);
        Reserved::new(items.filter_map(|(at, len)| Some(("item", ByteRange::at((*at)?, len)))))
            .require_apart()
            .map_err(|_| invalid())?;
        Ok(Self { offsets, locator })
    }
}

/// The error for a region that is not as the specification says.
fn invalid() -> Error {
    Error::from_errno(errno::EINVAL)
}

/// The error for a region with items that are needed or not known.
fn unsupported() -> Error {
    Error::from_errno(errno::ENOTSUP)
}

impl Metadata {
    /// Reads the region at `region`.
    ///
    /// # Errors
    /// Items that are missing or have invalid values, and unknown items that are required.
    pub(super) fn read(file: &dyn Device, region: ByteRange) -> Result<(Self, Option<ParentLocator>)> {
        let Items { offsets, locator } = Items::read(file, region)?;
        let [Some(parameters), Some(size), Some(logical), Some(_)] = offsets else {
            return Err(unsupported());
        };
        let number = |at: u64| -> Result<U64> {
            let mut item = U64::new(0);
            file.read_padded(item.as_mut_bytes(), at)?;
            Ok(item)
        };
        let [block_size, flags] = halves(number(parameters)?);
        let [sector, _] = halves(number(logical)?);
        // qemu-img supports sectors of 512 bytes only; the specification has no others than these.
        if !matches!(sector, 512 | 4096) {
            return Err(unsupported());
        }
        let metadata = Self {
            block_size: block_size.into(),
            sector: sector.into(),
            // As in qemu-img, the rest of an incomplete last sector is not part of the disk.
            disk_size: align_down(number(size)?.get(), u64::from(sector)),
            size_at: size,
        };
        let block = metadata.block_size;
        if !block.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&block) {
            return Err(invalid());
        }
        if metadata.disk_size > MAX_DISK {
            return Err(invalid());
        }
        let parent = match (locator, flags & HAS_PARENT != 0) {
            (Some(range), true) => Some(ParentLocator::read(file, range)?),
            (None, false) => None,
            (Some(_), false) => return Err(Error::corrupt("The image has a parent locator, but no parent")),
            (None, true) => return Err(Error::corrupt("The image has a parent, but no parent locator")),
        };
        Ok((metadata, parent))
    }

    /// The bytes of a new region, up to the last item.
    ///
    /// # Errors
    /// No random bytes.
    pub(super) fn to_bytes(block_size: u64, disk_size: u64) -> Result<Vec<u8>> {
        let block_size = u32::try_from(block_size).map_err(|_| Error::from_errno(errno::EINVAL))?;
        let mut parameters = block_size.to_le_bytes().to_vec();
        parameters.extend_from_slice(&[0; 4]);
        let sector = 512_u32.to_le_bytes().to_vec();
        let items = [
            (FILE_PARAMETERS, REQUIRED, parameters),
            (
                DISK_SIZE,
                REQUIRED | VIRTUAL_DISK,
                disk_size.to_le_bytes().to_vec(),
            ),
            (DISK_ID, REQUIRED | VIRTUAL_DISK, random::guid()?.to_vec()),
            (LOGICAL_SECTOR, REQUIRED | VIRTUAL_DISK, sector.clone()),
            (PHYSICAL_SECTOR, REQUIRED | VIRTUAL_DISK, sector),
        ];
        let mut table = RawTable::new_zeroed();
        table.signature = *SIGNATURE;
        table.count = U16::new(5);
        let mut bytes = table.as_bytes().to_vec();
        let mut data = Vec::new();
        for (id, flags, item) in items {
            // The fallbacks are not reached: five items of at most 16 bytes.
            let raw = RawItem {
                id,
                offset: U32::new(u32::try_from(TABLE_LEN + data.len()).unwrap_or(u32::MAX)),
                len: U32::new(u32::try_from(item.len()).unwrap_or(u32::MAX)),
                flags: U32::new(flags),
                reserved: U32::new(0),
            };
            bytes.extend_from_slice(raw.as_bytes());
            data.extend_from_slice(&item);
        }
        bytes.resize(TABLE_LEN, 0);
        bytes.extend_from_slice(&data);
        Ok(bytes)
    }
}

/// The low and the high half of `number`.
fn halves(number: U64) -> [u32; 2] {
    let number = number.get();
    // The fallback is not reached: the mask leaves 32 bits.
    [number, number >> 32].map(|half| u32::try_from(half & u64::from(u32::MAX)).unwrap_or(u32::MAX))
}
