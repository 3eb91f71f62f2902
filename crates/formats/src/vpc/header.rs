//! The header of dynamic disks: the block allocation table and the size of blocks.

use diskimage_core::{ByteRange, Device, Error, Result, align_up, name, require_addressable, to_index};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{HEADER_OFFSET, NO_OFFSET, SECTOR, VERSION, checksum, too_large};
use crate::layer_kit::parent::{Locators, utf16};
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
    /// The unique ID of the parent of a differencing disk.
    parent_unique_id: [u8; 16],
    /// When the parent was modified last, in seconds since 2000; 0 if it is not known.
    parent_time_stamp: U32,
    /// Zeroes.
    reserved_1: [u8; 4],
    /// The name of the parent's file, in UTF-16.
    parent_unicode_name: [u8; 512],
    /// Where the parent is.
    parent_locators: [ParentLocator; 8],
    /// Zeroes.
    reserved: [u8; 256],
}

const _: () = assert!(size_of::<DynamicHeader>() == 1024);

/// "Parent Locator Entry".
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ParentLocator {
    /// Whose kind of path it is.
    pub(super) platform_code: [u8; 4],
    /// The room for the path, in sectors, with some programs in bytes.
    pub(super) platform_data_space: U32,
    /// Bytes of the path.
    pub(super) platform_data_length: U32,
    /// Zeroes.
    pub(super) reserved: U32,
    /// The byte offset of the path.
    pub(super) platform_data_offset: U64,
}

const _: () = assert!(size_of::<ParentLocator>() == 24);

/// Bytes of the longest path in a locator; Windows has paths of 32767 characters. A limit of this program.
const MAX_LOCATOR: u32 = 64 << 10;

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
            parent_unique_id: [0; 16],
            parent_time_stamp: U32::ZERO,
            reserved_1: [0; 4],
            parent_unicode_name: [0; 512],
            parent_locators: [ParentLocator::new_zeroed(); 8],
            reserved: [0; 256],
        };
        header.with_table(TABLE_OFFSET, size.div_ceil(BLOCK.into()))
    }

    /// Reads the header of a disk of `size` bytes.
    pub(super) fn read(file: &dyn Device, offset: u64, size: u64) -> Result<Self> {
        let mut bytes = [0; size_of::<Self>()];
        if require_addressable(offset, bytes.len() as u64).is_err() {
            return Err(Error::invalid("Error reading dynamic VHD header"));
        }
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

    /// The unique ID of the parent, and when it was modified last, in seconds since 2000; 0 if that is not known.
    pub(super) fn parent_identity(&self) -> ([u8; 16], u32) {
        (self.parent_unique_id, self.parent_time_stamp.get())
    }

    /// The ranges of the file that hold the paths of the parent, up to the end of a sector.
    pub(super) fn locator_ranges(&self) -> impl Iterator<Item = (&'static str, ByteRange)> {
        let used = self
            .parent_locators
            .iter()
            .filter(|locator| locator.platform_code != [0; 4]);
        used.map(|locator| {
            let start = locator.platform_data_offset.get();
            let len = align_up(locator.platform_data_length.get().into(), SECTOR);
            ("locator of the parent", ByteRange::at(start, len))
        })
    }

    /// Where the parent is.
    ///
    /// # Errors
    /// A locator that is too long, and failures to read the file.
    pub(super) fn parent_locators(&self, file: &dyn Device) -> Result<Locators> {
        let mut locators = Locators::default();
        for locator in &self.parent_locators {
            let (is_relative, is_utf16) = match &locator.platform_code {
                b"W2ru" => (true, true),
                b"W2ku" => (false, true),
                b"Wi2r" => (true, false),
                b"Wi2k" | b"MacX" => (false, false),
                // None, and aliases of old systems.
                _ => continue,
            };
            let len = locator.platform_data_length.get();
            if len > MAX_LOCATOR {
                return Err(Error::corrupt(format!(
                    "The locator of the parent has {len} bytes"
                )));
            }
            let mut bytes = vec![0; to_index(len.into())?];
            file.read_whole(&mut bytes, locator.platform_data_offset.get())?;
            let path = if is_utf16 {
                utf16(&bytes, false)
            } else {
                let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
                name::from_bytes(&bytes[..end]).into_owned()
            };
            let paths = if is_relative {
                &mut locators.relative
            } else {
                &mut locators.absolute
            };
            paths.push(path);
        }
        // The name is a last resort: it is that of the file alone, or its path.
        let name = utf16(&self.parent_unicode_name, true);
        if !name.is_empty() && !locators.absolute.contains(&name) {
            locators.absolute.push(name);
        }
        Ok(locators)
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
