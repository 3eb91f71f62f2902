//! The blocks of a dynamic disk: the block allocation table (BAT), cached in pages, and the part of the file that blocks
//! occupy.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, Result, require_addressable};
use zerocopy::IntoBytes;

use super::footer::{Footer, Kind, SECTOR};
use super::header::DynamicHeader;
use crate::layer_kit::paged_table::{Entry, PagedTable};
use crate::layer_kit::reserved::{Pieces, Reserved};
use crate::layer_kit::sector_bitmaps::{BitOrder, SectorBitmaps};

/// The blocks of a dynamic disk.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) header: DynamicHeader,
    /// Sectors that were not written read from the parent.
    pub(super) is_differencing: bool,
    /// The byte offset of the header.
    pub(super) header_offset: u64,
    pub(super) table: PagedTable,
    pub(super) bitmaps: SectorBitmaps,
    /// The copy of the footer, the header and the whole table: no block is written there.
    pub(super) reserved: Reserved,
    /// The same with the entries of the table that the disk needs only: no block is read there.
    pub(super) relied_on: Reserved,
    /// The offsets of all blocks; loaded by the first write.
    pub(super) stored: Option<Pieces>,
    /// The lowest offset of a block.
    pub(super) first: u64,
    /// The end of blocks and tables: the offset of the footer.
    pub(super) end: u64,
    /// Offsets before `end` of blocks that were allocated and released again.
    pub(super) free: Vec<u64>,
    /// Whether the file has no copy of the footer at its start. It gets one before the footer at the end of the file is
    /// overwritten.
    pub(super) copy_is_missing: bool,
    /// Whether the footer has to be written at `end`.
    pub(super) footer_is_dirty: bool,
}

impl Blocks {
    /// Reads the header, and walks the table for the range of the file that blocks occupy.
    pub(super) fn open(file: &Arc<dyn Device>, footer: &Footer, has_copy: bool, size: u64) -> Result<Self> {
        let header_offset = footer.header_offset();
        let header = DynamicHeader::read(&**file, header_offset, size)?;
        if require_addressable(header.table_offset(), u64::from(header.entries()) * 4).is_err() {
            return Err(Error::invalid("Error reading pagetable"));
        }
        let is_differencing = footer.kind() == Kind::Differencing;
        let mut reserved = header.reserved(header_offset);
        let mut relied_on = header.relied_on(header_offset, size, has_copy);
        if is_differencing {
            reserved.extend(header.locator_ranges());
            relied_on.extend(header.locator_ranges());
        }
        let truncated = || {
            Error::corrupt(
                "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.",
            )
        };
        let entries = header.entries().into();
        let mut table = PagedTable::new(Arc::clone(file), header.table_offset(), entries);
        let (mut first, mut end) = (u64::MAX, reserved.end());
        let file_end = file.len().next_multiple_of(SECTOR);
        if end > file_end {
            return Err(truncated());
        }
        let mut block = 0;
        while block < entries {
            let some = table.entries(block)?;
            block += some.len() as u64;
            for offset in some.iter().filter_map(|entry| bitmap_offset(*entry)) {
                first = first.min(offset);
                end = end.max(offset + header.bitmap() + header.block());
            }
        }
        if end > file_end {
            return Err(truncated());
        }
        Ok(Self {
            header,
            is_differencing,
            header_offset,
            table,
            bitmaps: SectorBitmaps::new(file, BitOrder::HighestFirst),
            relied_on,
            reserved,
            stored: None,
            first,
            end,
            free: Vec::new(),
            copy_is_missing: !has_copy,
            footer_is_dirty: false,
        })
    }

    /// The byte offset of the data of block `block`.
    ///
    /// # Errors
    /// Tables that overlap each other or the block: the image is damaged.
    pub(super) fn host(&mut self, block: u64) -> Result<Option<u64>> {
        self.relied_on.require_apart()?;
        let entry = self.table.entries(block)?.first().copied();
        let Some(offset) = entry.and_then(bitmap_offset) else {
            return Ok(None);
        };
        self.relied_on.require_outside("block", self.whole(offset))?;
        Ok(Some(offset + self.header.bitmap()))
    }

    /// The storage of the sector at byte `start` of a block whose data is at `host`: whether the sector was written to
    /// this image, and for how many bytes of at most `most` that holds.
    pub(super) fn written(&mut self, host: u64, start: u64, most: u64) -> Result<(bool, u64)> {
        let bitmap = self.bitmap_of(host);
        let sectors = ByteRange::at(start, most).align_out(SECTOR);
        let (first, count) = (sectors.start() / SECTOR, sectors.len() / SECTOR);
        let (is_written, run) = self.bitmaps.run(bitmap, first, count)?;
        let end = sectors.start() + run * SECTOR;
        Ok((is_written, (end - start).min(most)))
    }

    /// The bitmap of the block whose data is at `host`.
    pub(super) fn bitmap_of(&self, host: u64) -> ByteRange {
        ByteRange::at(host - self.header.bitmap(), self.header.bitmap())
    }

    /// The bytes of the block at `offset`, its bitmap included.
    pub(super) fn whole(&self, offset: u64) -> ByteRange {
        ByteRange::at(offset, self.header.bitmap() + self.header.block())
    }

    /// Writes a copy of the footer to the start of the file, durably, if there is none: the first change is about to
    /// overwrite the only one.
    ///
    /// # Errors
    /// Metadata or a block at the start of the file.
    pub(super) fn restore_copy(&mut self, footer: &Footer, file: &dyn Device) -> Result<()> {
        if !self.copy_is_missing {
            return Ok(());
        }
        self.reserved.require_apart()?;
        if self.first < SECTOR {
            return Err(Error::corrupt(
                "The image has no copy of its footer, and a block where it would be",
            ));
        }
        file.write_at(footer.as_bytes(), 0)?;
        file.flush()?;
        self.copy_is_missing = false;
        Ok(())
    }

    /// Writes the footer at the end of the file, flushes, and writes back bitmaps, and after another flush the table.
    pub(super) fn publish(&mut self, footer: &Footer, file: &dyn Device) -> Result<()> {
        if self.footer_is_dirty {
            file.write_at(footer.as_bytes(), self.end)?;
            self.footer_is_dirty = false;
        }
        self.bitmaps.write_back()?;
        if self.table.is_dirty() {
            file.flush()?;
            self.table.write_back()?;
        }
        Ok(())
    }
}

/// The entry of a block that reads as zero.
pub(super) const NO_BLOCK: Entry = u32::MAX.to_be_bytes();

/// The byte offset of a block's bitmap, which comes right before its data; `None` if the block has no storage.
pub(super) fn bitmap_offset(entry: Entry) -> Option<u64> {
    (entry != NO_BLOCK).then(|| u64::from(u32::from_be_bytes(entry)) * SECTOR)
}
