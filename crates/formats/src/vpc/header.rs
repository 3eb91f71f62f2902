//! The header of dynamic disks: the block allocation table and the size of blocks.

use diskimage_core::{ByteRange, Device, Error, Result, align_up};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{HEADER_OFFSET, NO_OFFSET, SECTOR, VERSION, checksum, too_large};
use crate::layer_kit::reserved::Reserved;

/// The first bytes of the header of a dynamic disk.
const DYNAMIC_COOKIE: [u8; 8] = *b"cxsparse";
/// Bytes of a block of new disks.
pub(super) const BLOCK: u32 = 2 << 20;
/// Entries of the largest table.
const MAX_ENTRIES: u32 = u32::MAX >> 3;
/// The byte offset of its block allocation table.
pub(super) const TABLE_OFFSET: u64 = HEADER_OFFSET + 1024;

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
        self.reserved_up_to(offset, self.table_end(), true)
    }

    /// The ranges of the file where no block of a disk of `size` bytes can be read. The table of a damaged header may
    /// be longer than the disk needs and overlap blocks; the disk can still be read. The file may have no copy of the
    /// footer.
    pub(super) fn relied_on(&self, offset: u64, size: u64, has_copy: bool) -> Reserved {
        let entries = size.div_ceil(self.block());
        self.reserved_up_to(offset, self.table_offset().saturating_add(entries * 4), has_copy)
    }

    fn reserved_up_to(&self, offset: u64, end: u64, has_copy: bool) -> Reserved {
        let table = ByteRange::new(self.table_offset(), end);
        let copy = if has_copy { SECTOR } else { 0 };
        Reserved::new([
            ("copy of the footer", ByteRange::new(0, copy)),
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
