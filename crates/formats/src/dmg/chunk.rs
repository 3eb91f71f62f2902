//! The chunks of the disk, listed in the `mish` blocks.

use diskimage_core::{Budget, Error, Note, Reservation, Result, errno};

pub(super) const SECTOR: u64 = 512;

/// A run of sectors of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) kind: ChunkKind,
    /// The first sector of the disk.
    pub(super) sector: u64,
    /// The number of sectors, never zero.
    pub(super) sectors: u64,
    /// The host offset of the stored bytes.
    pub(super) offset: u64,
    /// The number of stored bytes.
    pub(super) stored: u64,
}

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkKind {
    Zero,
    Raw,
    Encoded(Codec),
}

/// How an encoded chunk is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Adc,
    Zlib,
    Bzip2,
    Lzfse,
    Lzma,
}

/// All chunks of an image.
#[derive(Debug)]
pub(super) struct Chunks {
    data_offset: u64,
    list: Vec<Chunk>,
    /// The first chunk type that is not known.
    unknown: Option<u32>,
    budget: Budget,
    memory: Vec<Reservation>,
}

const MISH: &[u8] = b"mish";
const HEADER: usize = 204;
const ENTRY: usize = 40;
const COMMENT: u32 = 0x7fff_fffe;
const TERMINATOR: u32 = 0xffff_ffff;
/// qemu-img's limits for chunks that have stored bytes.
const MAX_SECTORS: u64 = 131_072;
const MAX_STORED: u64 = 64 << 20;

impl Chunks {
    /// An empty list for an image whose data fork starts at `data_offset`.
    pub(super) fn new(data_offset: u64, budget: Budget) -> Self {
        Self {
            data_offset,
            list: Vec::new(),
            unknown: None,
            budget,
            memory: Vec::new(),
        }
    }

    /// Adds the chunks of a `mish` block. Any other block, such as another resource, is skipped.
    pub(super) fn add(&mut self, block: &[u8]) -> Result<()> {
        let Some((header, entries)) = block.split_at_checked(HEADER) else {
            return Ok(());
        };
        if !header.starts_with(MISH) {
            return Ok(());
        }
        let (first, data_offset) = (number(header, 8), number(header, 24));
        self.memory.push(self.budget.reserve(entries.len() as u64 * 3)?);
        // The block's length gives the number of entries, as in qemu-img; the header's count is ignored.
        for (index, entry) in entries.chunks_exact(ENTRY).enumerate() {
            let Some(kind) = self.kind(number_32(entry, 0)) else {
                continue;
            };
            let (sectors, stored) = (number(entry, 16), number(entry, 32));
            if kind != ChunkKind::Zero {
                check("sector count", sectors, MAX_SECTORS, index)?;
                check("length", stored, MAX_STORED, index)?;
            }
            let chunk = || {
                let sector = first.checked_add(number(entry, 8))?;
                let offset = self
                    .data_offset
                    .checked_add(data_offset)?
                    .checked_add(number(entry, 24))?;
                // Reading computes offsets up to both ends: neither may overflow.
                offset.checked_add(stored)?.checked_add(MAX_SECTORS * SECTOR)?;
                sector.checked_add(sectors)?;
                (sectors > 0).then_some(Chunk {
                    kind,
                    sector,
                    sectors,
                    offset: if kind == ChunkKind::Zero { 0 } else { offset },
                    stored,
                })
            };
            self.list.extend(chunk());
        }
        Ok(())
    }

    /// The kind of a chunk with the type `code`; `None` if the type is unknown or not part of the disk.
    fn kind(&mut self, code: u32) -> Option<ChunkKind> {
        match code {
            0 | 2 => Some(ChunkKind::Zero),
            1 => Some(ChunkKind::Raw),
            0x8000_0004 => Some(ChunkKind::Encoded(Codec::Adc)),
            0x8000_0005 => Some(ChunkKind::Encoded(Codec::Zlib)),
            0x8000_0006 => Some(ChunkKind::Encoded(Codec::Bzip2)),
            0x8000_0007 => Some(ChunkKind::Encoded(Codec::Lzfse)),
            0x8000_0008 => Some(ChunkKind::Encoded(Codec::Lzma)),
            COMMENT | TERMINATOR => None,
            unknown => {
                self.unknown.get_or_insert(unknown);
                None
            }
        }
    }

    /// The warning about chunks of unknown type, if the image has any.
    pub(super) fn warning(&self) -> Option<Note> {
        self.unknown.map(|code| {
            Note::Warning(format!(
                "Image contains chunks of unknown type {code:x}, accessing them will result in I/O errors"
            ))
        })
    }

    /// Sorts the chunks by sector.
    pub(super) fn sorted(mut self) -> Self {
        self.list.sort_by_key(|chunk| chunk.sector);
        self.list.shrink_to_fit();
        self
    }

    /// The chunk that contains `sector`.
    pub(super) fn at(&self, sector: u64) -> Option<&Chunk> {
        let after = self.list.partition_point(|chunk| chunk.sector <= sector);
        let chunk = self.list.get(after.checked_sub(1)?)?;
        (sector - chunk.sector < chunk.sectors).then_some(chunk)
    }

    /// The first sector of the first chunk behind `sector`, or the largest number.
    pub(super) fn next(&self, sector: u64) -> u64 {
        let after = self.list.partition_point(|chunk| chunk.sector <= sector);
        self.list.get(after).map_or(u64::MAX, |chunk| chunk.sector)
    }
}

fn check(what: &str, value: u64, max: u64, index: usize) -> Result<()> {
    if value > max {
        let what = format!("{what} {value} for chunk {index} is larger than max ({max})");
        return Err(Error::invalid(what).report_then(errno::EINVAL));
    }
    Ok(())
}

/// The number at byte `at`, which the caller keeps inside `bytes`.
fn number(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

fn number_32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |bytes| u32::from_be_bytes(*bytes))
}
