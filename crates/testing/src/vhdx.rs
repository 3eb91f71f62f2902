//! VHDX images made by hand, field by field, from Microsoft's MS-VHDX.

use crate::vhd::{SparseBlock, index, put};

/// A VHDX image, a differencing one if it has a parent.
#[derive(Clone, Debug)]
pub struct VhdxImage {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a payload block.
    pub block_size: u64,
    /// Bytes of a logical and of a physical sector.
    pub sector: u32,
    /// `DataWriteGuid`, as stored.
    pub data_write: [u8; 16],
    /// The keys and values of the parent locator.
    pub parent: Option<Vec<(String, String)>>,
    /// The payload blocks that have storage, with their states.
    pub blocks: Vec<(u64, SparseBlock)>,
    /// The states of payload blocks that have none, apart from 0.
    pub states: Vec<(u64, u64)>,
}

/// The state of a block that is wholly in the image.
pub const FULLY_PRESENT: u64 = 6;
/// The state of a block of which a sector bitmap says what is in the image.
pub const PARTIALLY_PRESENT: u64 = 7;

const MIB: u64 = 1 << 20;
const LOG: u64 = MIB;
const BAT: u64 = 2 * MIB;
const METADATA: u64 = 4 * MIB;
const FIRST_BLOCK: u64 = 5 * MIB;
const ITEMS: u64 = 64 << 10;

impl Default for VhdxImage {
    fn default() -> Self {
        Self {
            size: 8 * MIB,
            block_size: MIB,
            sector: 512,
            data_write: [1; 16],
            parent: None,
            blocks: Vec::new(),
            states: Vec::new(),
        }
    }
}

impl VhdxImage {
    /// The bytes of the file.
    ///
    /// # Panics
    /// A field has a value that the format cannot hold.
    pub fn build(&self) -> Vec<u8> {
        let ratio = (u64::from(self.sector) << 23) / self.block_size;
        let mut file = vec![0; index(FIRST_BLOCK)];
        put(&mut file, 0, b"vhdxfile");
        for (at, sequence) in [(64 << 10, 1_u64), (128 << 10, 2)] {
            put(&mut file, at, b"head");
            put(&mut file, at + 8, &sequence.to_le_bytes());
            put(&mut file, at + 16, &[9; 16]);
            put(&mut file, at + 32, &self.data_write);
            put(&mut file, at + 66, &1_u16.to_le_bytes());
            put(
                &mut file,
                at + 68,
                &u32::try_from(MIB).expect("fits").to_le_bytes(),
            );
            put(&mut file, at + 72, &LOG.to_le_bytes());
            seal(&mut file[at..at + 4096]);
        }
        for at in [192 << 10, 256 << 10] {
            put(&mut file, at, b"regi");
            put(&mut file, at + 8, &2_u32.to_le_bytes());
            for (nth, (id, offset, len)) in [
                ("2dc27766-f623-4200-9d64-115e9bfd4a08", BAT, 2 * MIB),
                ("8b7ca206-4790-4b9a-b8fe-575f050f886e", METADATA, MIB),
            ]
            .into_iter()
            .enumerate()
            {
                let entry = at + 16 + nth * 32;
                put(&mut file, entry, &guid(id));
                put(&mut file, entry + 16, &offset.to_le_bytes());
                put(
                    &mut file,
                    entry + 24,
                    &u32::try_from(len).expect("fits").to_le_bytes(),
                );
                put(&mut file, entry + 28, &1_u32.to_le_bytes());
            }
            seal(&mut file[at..at + (64 << 10)]);
        }
        self.put_metadata(&mut file);
        let bat = |block: u64| index(BAT + (block + block / ratio) * 8);
        for (block, state) in &self.states {
            put(&mut file, bat(*block), &state.to_le_bytes());
        }
        let mut bitmaps = std::collections::BTreeMap::new();
        for (state, block) in &self.blocks {
            let offset = file.len() as u64;
            put(&mut file, bat(block.index), &(offset | state).to_le_bytes());
            let mut data = vec![block.stale; index(self.block_size)];
            let per_block = self.block_size / u64::from(self.sector);
            let bitmap: &mut Vec<u8> = bitmaps
                .entry(block.index / ratio)
                .or_insert_with(|| vec![0; index(MIB)]);
            for (written, byte) in &block.written {
                for sector in written.clone() {
                    let bit = index(block.index % ratio * per_block + sector);
                    bitmap[bit / 8] |= 1 << (bit % 8);
                    let len = index(self.sector.into());
                    data[index(sector) * len..][..len].fill(*byte);
                }
            }
            file.extend_from_slice(&data);
        }
        for (chunk, bitmap) in bitmaps.into_iter().filter(|_| self.parent.is_some()) {
            let entry = index(BAT + (chunk * (ratio + 1) + ratio) * 8);
            let offset = file.len() as u64;
            put(&mut file, entry, &(offset | 6).to_le_bytes());
            file.extend_from_slice(&bitmap);
        }
        file
    }

    fn put_metadata(&self, file: &mut [u8]) {
        let block_size = u32::try_from(self.block_size).expect("fits");
        let flags: u32 = if self.parent.is_some() { 2 } else { 0 };
        let mut items = vec![
            (
                "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
                4_u32,
                [block_size.to_le_bytes(), flags.to_le_bytes()].concat(),
            ),
            (
                "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
                6,
                self.size.to_le_bytes().to_vec(),
            ),
            ("beca12ab-b2e6-4523-93ef-c309e000c746", 6, vec![3; 16]),
            (
                "8141bf1d-a96f-4709-ba47-f233a8faab5f",
                6,
                self.sector.to_le_bytes().to_vec(),
            ),
            (
                "cda348c7-445d-4471-9cc9-e9885251c556",
                6,
                self.sector.to_le_bytes().to_vec(),
            ),
        ];
        if let Some(entries) = &self.parent {
            items.push(("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", 4, locator(entries)));
        }
        let table = index(METADATA);
        put(file, table, b"metadata");
        put(
            file,
            table + 10,
            &u16::try_from(items.len()).expect("few").to_le_bytes(),
        );
        let mut offset = ITEMS;
        for (nth, (id, flags, bytes)) in items.iter().enumerate() {
            let entry = table + 32 + nth * 32;
            put(file, entry, &guid(id));
            put(
                file,
                entry + 16,
                &u32::try_from(offset).expect("fits").to_le_bytes(),
            );
            put(
                file,
                entry + 20,
                &u32::try_from(bytes.len()).expect("fits").to_le_bytes(),
            );
            put(file, entry + 24, &flags.to_le_bytes());
            put(file, table + index(offset), bytes);
            offset += bytes.len() as u64;
        }
    }
}

/// The item "Parent Locator" with these keys and values.
fn locator(entries: &[(String, String)]) -> Vec<u8> {
    let mut item = guid("b04aefb7-d19e-4a81-b789-25b8e9445913").to_vec();
    item.extend_from_slice(&[0; 2]);
    item.extend_from_slice(&u16::try_from(entries.len()).expect("few").to_le_bytes());
    let mut texts = Vec::new();
    let texts_at = 20 + entries.len() * 12;
    let mut table = Vec::new();
    for (key, value) in entries {
        let mut place = |text: &str| {
            let at = u32::try_from(texts_at + texts.len()).expect("small");
            let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            texts.extend_from_slice(&bytes);
            (at, u16::try_from(bytes.len()).expect("short"))
        };
        let ((key_at, key_len), (value_at, value_len)) = (place(key), place(value));
        table.extend_from_slice(&key_at.to_le_bytes());
        table.extend_from_slice(&value_at.to_le_bytes());
        table.extend_from_slice(&key_len.to_le_bytes());
        table.extend_from_slice(&value_len.to_le_bytes());
    }
    item.extend_from_slice(&table);
    item.extend_from_slice(&texts);
    item
}

/// A GUID as it is stored, from its text.
///
/// # Panics
/// `text` is no GUID.
pub fn guid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).expect("a GUID");
    let mut guid = number.to_be_bytes();
    guid[..4].reverse();
    guid[4..6].reverse();
    guid[6..8].reverse();
    guid
}

/// Sets the checksum at byte 4 of a header or a region table.
pub fn seal(bytes: &mut [u8]) {
    put(bytes, 4, &[0; 4]);
    let checksum = crc32c(bytes);
    put(bytes, 4, &checksum.to_le_bytes());
}

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let divisor = if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            crc = (crc >> 1) ^ divisor;
        }
    }
    !crc
}
