//! Compressed loop images, version 2.0, read only.
//!
//! ```text
//!   file     |shell script, 128 bytes|block size|number of blocks|offsets|-- block 0 --|-- block 1 --|...
//! ```
//!
//! Numbers are big-endian. Each block is a zlib stream. It reaches from its own offset to the next, so the table has
//! one offset more than the image has blocks.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, Format, FormatProperties, Layer, OpenRequest, Probe, Result, Score, errno,
    resize, to_index, zeroed,
};

use crate::codec::deflate;
use crate::layer_kit::decoded_blocks::DecodedBlocks;
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::read_only_layer::{self, Disk};

/// The format's entry in the table.
#[derive(Debug)]
pub struct Cloop;

const NAME: &str = "cloop";
const MAGIC: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
const BLOCK_SIZE_AT: u64 = 128;
const OFFSETS_AT: u64 = 136;
const SECTOR: u32 = 512;
/// qemu-img's limits for the bytes of a block, of a compressed block and of all offsets.
const MAX_BLOCK: u32 = 64 << 20;
const MAX_STORED: u64 = 2 * MAX_BLOCK as u64;
const MAX_BLOCKS: u32 = u32::MAX / 8;
const MAX_OFFSETS: u64 = 512 << 20;

impl Format for Cloop {
    fn name(&self) -> &'static str {
        NAME
    }

    fn properties(&self) -> &'static FormatProperties {
        &FormatProperties::READ_ONLY
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if probe.head.starts_with(MAGIC) { 2 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        read_only_layer::refuse_writing(&request)?;
        let mut numbers = [0; 8];
        request.file.read_padded(&mut numbers, BLOCK_SIZE_AT)?;
        let [block_size, blocks] = [0, 4].map(|at| {
            let bytes = numbers.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
        });
        check_sizes(block_size, blocks)?;
        let disk = Compressed {
            offsets: Mutex::new(
                PagedTable::new(Arc::clone(&request.file), OFFSETS_AT, u64::MAX).zero_beyond_eof(),
            ),
            file: request.file,
            block_size: u64::from(block_size),
            blocks: u64::from(blocks),
            decoded: DecodedBlocks::new(request.context.budget.clone()),
        };
        disk.check_offsets()?;
        Ok(read_only_layer::layer(disk))
    }
}

fn check_sizes(block_size: u32, blocks: u32) -> Result<()> {
    if block_size == 0 {
        return Err(Error::invalid("block_size cannot be zero"));
    }
    if !block_size.is_multiple_of(SECTOR) {
        return Err(Error::invalid(format!(
            "block_size {block_size} must be a multiple of 512"
        )));
    }
    if block_size > MAX_BLOCK {
        return Err(Error::invalid(format!(
            "block_size {block_size} must be 64 MB or less"
        )));
    }
    if blocks > MAX_BLOCKS {
        return Err(Error::invalid(format!(
            "n_blocks {blocks} must be {MAX_BLOCKS} or less"
        )));
    }
    if (u64::from(blocks) + 1) * 8 > MAX_OFFSETS {
        return Err(Error::invalid(
            "image requires too many offsets, try increasing block size",
        ));
    }
    Ok(())
}

#[derive(Debug)]
struct Compressed {
    file: Arc<dyn Device>,
    block_size: u64,
    blocks: u64,
    offsets: Mutex<PagedTable<8>>,
    /// By the offset of the stored bytes.
    decoded: DecodedBlocks,
}

impl Compressed {
    fn offset(&self, index: u64) -> Result<u64> {
        let mut offsets = self.offsets.lock().unwrap_or_else(PoisonError::into_inner);
        offsets.entry(index).map(u64::from_be_bytes)
    }

    /// Checks the offsets when the image is opened, as qemu-img does.
    fn check_offsets(&self) -> Result<()> {
        // Offsets beyond the end of the file read as zeroes: checking the first two of them checks all.
        let stored = self.file.len().saturating_sub(OFFSETS_AT) / 8;
        let last = self.blocks.min(stored + 2);
        let mut offsets = self.offsets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = offsets.entry(0).map(u64::from_be_bytes)?;
        let mut index = 0;
        loop {
            // Equal offsets, and holes among them, are those of blocks without bytes.
            index += offsets.count_equal(index)?;
            if index > last {
                return Ok(());
            }
            let offset = offsets.entry(index).map(u64::from_be_bytes)?;
            let corrupt =
                |what: &str| Error::invalid(format!("{what} at index {index}, image file is corrupt"));
            let stored = offset
                .checked_sub(before)
                .ok_or_else(|| corrupt("offsets not monotonically increasing"))?;
            if stored > MAX_STORED {
                return Err(corrupt("invalid compressed block size"));
            }
            before = offset;
        }
    }

    /// Where the stored bytes of a block are.
    fn stored(&self, index: u64) -> Result<ByteRange> {
        let damaged = || Error::from_errno(errno::EIO);
        let start = self.offset(index)?;
        let stored = self.offset(index + 1)?.checked_sub(start).ok_or_else(damaged)?;
        // The file may have changed since it was opened, so the length is checked again before memory is allocated.
        if stored > MAX_STORED || self.file.require(start, stored).is_err() {
            return Err(damaged());
        }
        Ok(ByteRange::at(start, stored))
    }

    fn decode(&self, stored: ByteRange, block: &mut Vec<u8>) -> Result<()> {
        let damaged = || Error::from_errno(errno::EIO);
        let mut bytes = zeroed(to_index(stored.len())?)?;
        self.file.read_at(&mut bytes, stored.start())?;
        resize(block, to_index(self.block_size)?)?;
        deflate::decode_zlib(&bytes, block).map_err(|_| damaged())
    }
}

impl Disk for Compressed {
    const FORMAT: &'static str = NAME;

    fn len(&self) -> u64 {
        self.block_size * self.blocks
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (index, at) = (offset / self.block_size, offset % self.block_size);
            let len = to_index((self.block_size - at).min(buf.len() as u64))?;
            let (head, tail) = buf.split_at_mut(len);
            let stored = self.stored(index)?;
            let room = self.block_size + stored.len();
            let decode = |block: &mut Vec<u8>| self.decode(stored, block);
            self.decoded
                .read(stored.start(), room, head, to_index(at)?, decode)?;
            (buf, offset) = (tail, offset + len as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::{Image, MemoryDevice};

    use super::*;
    use crate::testing::open;

    const BLOCK: usize = 1024;

    fn content() -> Vec<u8> {
        (0..5 * BLOCK).map(|at| (at * at / 97).to_le_bytes()[0]).collect()
    }

    fn image() -> Vec<u8> {
        let blocks: Vec<Vec<u8>> = content().chunks(BLOCK).map(deflate::encode_zlib).collect();
        let mut bytes = MAGIC.to_vec();
        bytes.resize(128, 0);
        bytes.extend(1024_u32.to_be_bytes());
        bytes.extend(5_u32.to_be_bytes());
        let mut offset = bytes.len() + 8 * (blocks.len() + 1);
        bytes.extend((offset as u64).to_be_bytes());
        for block in &blocks {
            offset += block.len();
            bytes.extend((offset as u64).to_be_bytes());
        }
        bytes.extend(blocks.concat());
        bytes
    }

    fn opened(bytes: Vec<u8>) -> Result<Image> {
        open(&Cloop, Arc::new(MemoryDevice::new(bytes)), false)
    }

    fn message(bytes: Vec<u8>) -> String {
        opened(bytes).expect_err("refused").to_string()
    }

    #[test]
    fn reads_cross_block_boundaries() {
        let (image, expected) = (opened(image()).unwrap(), content());
        assert_eq!(image.len(), expected.len() as u64);
        for (offset, len) in [(0, 5 * BLOCK), (1000, 100), (4096, 1024), (5119, 1), (1023, 2050)] {
            let mut part = vec![0; len];
            image.read_at(&mut part, offset as u64).unwrap();
            assert_eq!(part, expected[offset..offset + len]);
        }
    }

    #[test]
    fn a_damaged_block_is_an_error_and_the_others_are_read() {
        let mut bytes = image();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let image = opened(bytes).unwrap();
        let mut block = [0; BLOCK];
        assert_eq!(
            image.read_at(&mut block, 4096).unwrap_err().errno(),
            Some(errno::EIO)
        );
        image.read_at(&mut block, 3072).unwrap();
        assert_eq!(block, content()[3072..4096]);
    }

    #[test]
    fn a_block_beyond_the_end_of_the_file_is_an_error() {
        let mut bytes = image();
        bytes.pop();
        let image = opened(bytes).unwrap();
        assert!(image.read_at(&mut [0; 1], 4096).is_err());
    }

    #[test]
    fn offsets_that_go_back_or_too_far_are_refused() {
        let at = |index: usize| 136 + 8 * index;
        let mut bytes = image();
        bytes[at(2)..at(3)].fill(0);
        assert_eq!(
            message(bytes),
            "offsets not monotonically increasing at index 2, image file is corrupt"
        );
        let mut bytes = image();
        bytes[at(5)] = 0x7f;
        assert_eq!(
            message(bytes),
            "invalid compressed block size at index 5, image file is corrupt"
        );
    }

    #[test]
    fn the_most_offsets_are_checked_quickly_if_the_file_ends_before_them() {
        let mut bytes = image();
        bytes.truncate(136);
        bytes[132..136].copy_from_slice(&0x3ff_ffff_u32.to_be_bytes());
        let image = opened(bytes).unwrap();
        assert_eq!(image.len(), 0x3ff_ffff * 1024);
        assert!(image.read_at(&mut [0; 1], 0).is_err());
    }
}
