//! VHD images made by hand, field by field, from Microsoft's "Virtual Hard Disk Image Format Specification" 1.0.

use std::ops::Range;

/// A dynamic disk, or a differencing one if it has a parent.
#[derive(Clone, Debug)]
pub struct VhdImage {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// The unique ID.
    pub unique_id: [u8; 16],
    /// Seconds since 2000.
    pub time_stamp: u32,
    /// The parent of a differencing disk.
    pub parent: Option<VhdParent>,
    /// The blocks that have storage, in the order of the file.
    pub blocks: Vec<SparseBlock>,
    /// Whether the file begins with a copy of the footer.
    pub has_copy: bool,
}

/// The parent of a [`VhdImage`].
#[derive(Clone, Debug, Default)]
pub struct VhdParent {
    /// Its unique ID.
    pub unique_id: [u8; 16],
    /// When it was modified, in seconds since 2000; 0 for unknown.
    pub time_stamp: u32,
    /// The name in the header.
    pub name: String,
    /// Platform codes and paths: `W2ru` and `W2ku` in UTF-16, others as they are.
    pub locators: Vec<([u8; 4], String)>,
}

/// A block with storage, of which some sectors were written.
#[derive(Clone, Debug)]
pub struct SparseBlock {
    /// The number of the block in the disk.
    pub index: u64,
    /// Sectors of the block that were written, and the byte that they are filled with.
    pub written: Vec<(Range<u64>, u8)>,
    /// The byte of all other sectors, which must not be read.
    pub stale: u8,
}

const SECTOR: u64 = 512;

impl Default for VhdImage {
    fn default() -> Self {
        Self {
            size: 8 << 20,
            block_size: 2 << 20,
            unique_id: [1; 16],
            time_stamp: 1000,
            parent: None,
            blocks: Vec::new(),
            has_copy: true,
        }
    }
}

impl VhdImage {
    /// The bytes of the file.
    ///
    /// # Panics
    /// A field has a value that the format cannot hold.
    pub fn build(&self) -> Vec<u8> {
        const TABLE: u64 = 1536;
        let block = u64::from(self.block_size);
        let entries = self.size.div_ceil(block);
        let mut file = vec![0; index((TABLE + entries * 4).next_multiple_of(SECTOR))];
        file[index(TABLE)..].fill(0xff);
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        put(&mut header, 8, &u64::MAX.to_be_bytes());
        put(&mut header, 16, &TABLE.to_be_bytes());
        put(&mut header, 24, &0x0001_0000_u32.to_be_bytes());
        put(
            &mut header,
            28,
            &u32::try_from(entries).expect("few").to_be_bytes(),
        );
        put(&mut header, 32, &self.block_size.to_be_bytes());
        if let Some(parent) = &self.parent {
            put(&mut header, 40, &parent.unique_id);
            put(&mut header, 56, &parent.time_stamp.to_be_bytes());
            let name: Vec<u8> = parent.name.encode_utf16().flat_map(u16::to_be_bytes).collect();
            put(&mut header, 64, &name);
            for (nth, (code, path)) in parent.locators.iter().enumerate() {
                let path = match code {
                    b"W2ru" | b"W2ku" => path.encode_utf16().flat_map(u16::to_le_bytes).collect(),
                    _ => path.as_bytes().to_vec(),
                };
                let at = 576 + nth * 24;
                put(&mut header, at, code);
                put(&mut header, at + 4, &1_u32.to_be_bytes());
                let len = u32::try_from(path.len()).expect("short");
                put(&mut header, at + 8, &len.to_be_bytes());
                put(&mut header, at + 16, &(file.len() as u64).to_be_bytes());
                file.extend_from_slice(&path);
                file.resize(file.len().next_multiple_of(512), 0);
            }
        }
        seal(&mut header, 36);
        put(&mut file, 512, &header);
        for stored in &self.blocks {
            let sector = u32::try_from(file.len() as u64 / SECTOR).expect("small");
            let entry = index(TABLE + stored.index * 4);
            put(&mut file, entry, &sector.to_be_bytes());
            let sectors = block / SECTOR;
            let mut bitmap = vec![0; index((sectors / 8).next_multiple_of(SECTOR))];
            let mut data = vec![stored.stale; index(block)];
            for (written, byte) in &stored.written {
                for sector in written.clone().map(index) {
                    bitmap[sector / 8] |= 0x80 >> (sector % 8);
                    data[sector * 512..][..512].fill(*byte);
                }
            }
            file.extend_from_slice(&bitmap);
            file.extend_from_slice(&data);
        }
        let footer = self.footer();
        if self.has_copy {
            put(&mut file, 0, &footer);
        }
        file.extend_from_slice(&footer);
        file
    }

    fn footer(&self) -> Vec<u8> {
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        put(&mut footer, 8, &2_u32.to_be_bytes());
        put(&mut footer, 12, &0x0001_0000_u32.to_be_bytes());
        put(&mut footer, 16, &512_u64.to_be_bytes());
        put(&mut footer, 24, &self.time_stamp.to_be_bytes());
        put(&mut footer, 28, b"win ");
        put(&mut footer, 36, b"Wi2k");
        put(&mut footer, 40, &self.size.to_be_bytes());
        put(&mut footer, 48, &self.size.to_be_bytes());
        put(&mut footer, 56, &[0, 120, 4, 17]);
        let disk_type: u32 = if self.parent.is_some() { 4 } else { 3 };
        put(&mut footer, 60, &disk_type.to_be_bytes());
        put(&mut footer, 68, &self.unique_id);
        seal(&mut footer, 64);
        footer
    }
}

/// Writes the written sectors of `blocks` of `block_size` bytes, with sectors of `sector` bytes, over `disk`: the
/// contents of an overlay from those of its parent.
pub fn overlay(disk: &mut [u8], blocks: &[SparseBlock], block_size: u64, sector: u64) {
    for block in blocks {
        for (written, byte) in &block.written {
            let start = block.index * block_size;
            let range = index(start + written.start * sector)..index(start + written.end * sector);
            let end = range.end.min(disk.len());
            disk[range.start..end].fill(*byte);
        }
    }
}

pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).expect("fits")
}

pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Sets the checksum at `at`: the ones' complement of the sum of all other bytes.
fn seal(bytes: &mut [u8], at: usize) {
    put(bytes, at, &[0; 4]);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    put(bytes, at, &(!sum).to_be_bytes());
}
