//! Growing, which qemu-img does not support for this format.
//!
//! The write of one sector, the footer that readers use, makes the disk larger. A table that cannot grow in place moves
//! to the end, and the write of the header's first sector changes its offset:
//!
//! ```text
//!   before   |copy|header|table|block|block|footer|
//!   after    |copy|header|     |block|block|  table  |footer|
//! ```

use std::sync::Arc;

use diskimage_core::{Budget, ByteRange, Device, Error, Preallocation, ResizeRequest, Result, ZeroMode};
use zerocopy::IntoBytes;

use super::bat::{Blocks, NO_BLOCK};
use super::footer::{Footer, SECTOR};
use super::{State, VpcLayer, behind_footer};
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::preallocation;

impl VpcLayer {
    /// Refuses a size that the image cannot grow to, before anything is written.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        if self.parent.is_some() {
            return Err(Error::unsupported(
                "A differencing image has the size of its parent and cannot be resized",
            ));
        }
        let state = self.lock();
        if request.len < state.size {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        if !request.len.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        preallocation::require_off(request.preallocation)?;
        state.footer.resized(request.len).map(|_| ())
    }

    /// Makes the disk `len` bytes long.
    pub(super) fn grow(&self, len: u64) -> Result<()> {
        let mut state = self.lock();
        if len == state.size {
            return Ok(());
        }
        let footer = state.footer.resized(len)?;
        let State {
            footer: old,
            size,
            blocks,
            reserved,
            ..
        } = &mut *state;
        match blocks {
            Some(blocks) => self.grow_dynamic(blocks, old, &footer, *size, len)?,
            None => {
                reserved.require_outside("disk", ByteRange::new(0, *size))?;
                self.grow_fixed(&footer, *size, len)?;
                *reserved = behind_footer(self.file.len());
            }
        }
        (state.footer, state.size) = (footer, len);
        drop(state);
        self.file.flush()
    }

    /// Writes the new footer before it zeroes the old one: a file without a footer is no image.
    fn grow_fixed(&self, footer: &Footer, size: u64, len: u64) -> Result<()> {
        // The old footer, and all other bytes behind the disk.
        let behind = ByteRange::new(size, self.file.len().min(len));
        self.file.write_at(footer.as_bytes(), len)?;
        self.file.flush()?;
        if behind.is_empty() {
            return Ok(());
        }
        self.file.write_zeroes(behind, ZeroMode::KeepAllocated)
    }

    fn grow_dynamic(
        &self,
        blocks: &mut Blocks,
        old: &Footer,
        new: &Footer,
        size: u64,
        len: u64,
    ) -> Result<()> {
        let file = &*self.file;
        blocks.reserved.require_apart()?;
        blocks.restore_copy(old, file)?;
        blocks.publish(old, file)?;
        blocks.zero_padding(file, size, &self.budget)?;
        let entries = len.div_ceil(blocks.header.block());
        if entries > u64::from(blocks.header.entries()) {
            blocks.grow_table(&self.file, entries)?;
        }
        blocks.relied_on = blocks.header.relied_on(blocks.header_offset, len, true);
        blocks.footer_is_dirty = true;
        blocks.publish(new, file)?;
        file.flush()?;
        file.write_at(new.as_bytes(), 0)
    }
}

impl Blocks {
    /// Zeroes the part of the last block beyond the old end of the disk, which becomes part of the disk.
    fn zero_padding(&mut self, file: &dyn Device, size: u64, budget: &Budget) -> Result<()> {
        let used = size % self.header.block();
        if used == 0 {
            return Ok(());
        }
        let Some(host) = self.host_to_change(size / self.header.block(), budget)? else {
            return Ok(());
        };
        let rest = ByteRange::at(host, self.header.block()).skip(used);
        file.write_zeroes(rest, ZeroMode::KeepAllocated)
    }

    /// Grows the table to `entries` entries, in place if it fits in front of the blocks, else at the end of the file.
    fn grow_table(&mut self, file: &Arc<dyn Device>, entries: u64) -> Result<()> {
        let old = u64::from(self.header.entries());
        let mut header = self.header.with_table(self.header.table_offset(), entries)?;
        let header_end = self.header_offset.saturating_add(size_of_val(&header) as u64);
        let in_place = header_end <= header.table_offset() && header.table_end() <= self.first;
        if !in_place {
            header = header.with_table(self.end, entries)?;
        }
        let end = self.end.max(header.table_end());
        // The old footer lies behind the blocks: a table shorter than a sector would not overwrite all of it.
        if file.len() < end + SECTOR {
            file.resize(end + SECTOR, Preallocation::Off)?;
        }
        let mut table = PagedTable::new(Arc::clone(file), header.table_offset(), entries);
        if !in_place {
            let mut block = 0;
            while block < old {
                for entry in self.table.entries(block)? {
                    table.set(block, *entry)?;
                    block += 1;
                }
            }
        }
        for block in old..entries {
            table.set(block, NO_BLOCK)?;
        }
        table.write_back()?;
        file.flush()?;
        file.write_at(&header.as_bytes()[..512], self.header_offset)?;
        self.reserved = header.reserved(self.header_offset);
        (self.header, self.table, self.end) = (header, table, end);
        file.flush()
    }
}
