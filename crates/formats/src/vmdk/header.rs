//! The headers of sparse extents, on disk and as a checked [`Geometry`].
//!
//! All numbers are little-endian; offsets and lengths are in sectors of 512 bytes.

use diskimage_core::{ByteRange, Device, Error, Result, to_index};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The unit of offsets in headers and tables, in bytes.
pub(super) const SECTOR: u64 = SECTOR_BYTES as u64;
/// The same, for slices.
pub(super) const SECTOR_BYTES: usize = 512;

/// The header of a hosted sparse extent.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct HostedHeader {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) flags: U32,
    /// Length of the extent.
    pub(super) capacity: U64,
    pub(super) grain_size: U64,
    pub(super) descriptor_offset: U64,
    pub(super) descriptor_size: U64,
    pub(super) num_gtes_per_gt: U32,
    /// The redundant grain directory.
    pub(super) rgd_offset: U64,
    /// The grain directory, or [`GD_AT_END`].
    pub(super) gd_offset: U64,
    /// Sectors of all metadata in front of the first grain.
    pub(super) over_head: U64,
    pub(super) unclean_shutdown: u8,
    /// Line ends: a transfer in text mode changes them, which reveals the damage.
    pub(super) line_ends: [u8; 4],
    pub(super) compress_algorithm: U16,
    pub(super) pad: [u8; 433],
}

const _: () = assert!(size_of::<HostedHeader>() == 512);

/// The magic of a hosted sparse extent.
pub(super) const HOSTED_MAGIC: [u8; 4] = *b"KDMV";
/// The magic of a sparse extent of ESX before 6.5.
pub(super) const COWD_MAGIC: [u8; 4] = *b"COWD";
/// See [`HostedHeader::line_ends`].
pub(super) const LINE_ENDS: [u8; 4] = *b"\n \r\n";

/// The offset of the grain directory is in the footer: it was not yet known when the header was streamed.
pub(super) const GD_AT_END: u64 = u64::MAX;

/// Bits of [`HostedHeader::flags`].
pub(super) mod flag {
    pub(in super::super) const LINE_ENDS: u32 = 1;
    /// There is a redundant grain directory.
    pub(in super::super) const REDUNDANT: u32 = 1 << 1;
    /// An entry of 1 in a grain table stands for zeroes.
    pub(in super::super) const ZEROED_GRAIN: u32 = 1 << 2;
    pub(in super::super) const COMPRESSED: u32 = 1 << 16;
    pub(in super::super) const MARKERS: u32 = 1 << 17;
}

/// Deflate, the only compression.
pub(super) const DEFLATE: u16 = 1;

/// The largest supported version.
const MAX_VERSION: u32 = 3;

/// The most entries of a grain table of a hosted extent.
const MAX_GTES: u32 = 512;

/// The most grain tables of an extent: enough for a petabyte with the default grain. Mapping a whole disk reads them
/// all.
const MAX_TABLES: u64 = 32 << 20;

/// The largest grain that is decoded or written, in bytes. A compressed grain is decoded as a whole, and a partial
/// write to an unallocated grain is filled up in memory.
const MAX_HANDLED_GRAIN: u64 = 16 << 20;

/// The form of a sparse extent's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Entries of 32 bits, sectors of the file.
    Hosted {
        /// An entry of 1 stands for zeroes.
        zeroed_grain: bool,
    },
    /// The same, in a sparse extent of ESX before 6.5.
    Cowd,
    /// Entries of 64 bits.
    SeSparse {
        /// Host offset of the first grain table.
        tables: u64,
        /// Host offset of the first grain.
        grains: u64,
    },
}

/// The layout of a sparse extent's tables; offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) form: Form,
    /// Length of the extent.
    pub(super) capacity: u64,
    /// Bytes of a grain.
    pub(super) grain: u64,
    /// Entries in a grain table.
    pub(super) entries: u64,
    pub(super) directory: u64,
    pub(super) redundant: Option<u64>,
    /// The bytes that hold the descriptor, empty if the extent has none.
    pub(super) descriptor: ByteRange,
    /// Whether grains are deflated, with a marker in front.
    pub(super) compressed: bool,
}

/// An extent's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hosted {
    pub(super) geometry: Geometry,
}

impl Geometry {
    /// Bytes of an entry of a table.
    pub(super) fn entry_size(&self) -> u64 {
        match self.form {
            Form::SeSparse { .. } => 8,
            _ => 4,
        }
    }

    /// Host offsets of the directories; the one that reads use comes last.
    pub(super) fn directories(&self) -> impl Iterator<Item = u64> + use<> {
        self.redundant.into_iter().chain([self.directory])
    }

    /// Refuses a directory with more than [`MAX_TABLES`] entries.
    pub(super) fn require_directory(&self) -> Result<()> {
        if self.capacity / self.grain / self.entries > MAX_TABLES {
            return Err(Error::corrupt("L1 size too big"));
        }
        Ok(())
    }

    /// Refuses grains that are too large to be held in memory.
    pub(super) fn require_handled(&self) -> Result<()> {
        if self.grain > MAX_HANDLED_GRAIN {
            return Err(Error::unsupported(format!(
                "Grains of more than {MAX_HANDLED_GRAIN} bytes can only be read, and not compressed"
            )));
        }
        Ok(())
    }
}

impl Hosted {
    /// Reads the header of a hosted sparse extent, or the footer if that has the directory's offset.
    ///
    /// # Errors
    /// An invalid or unsupported header.
    pub(super) fn read(file: &dyn Device) -> Result<Self> {
        let mut header = read_at(file, 0)?;
        if header.magic != HOSTED_MAGIC {
            return Err(Error::corrupt("Image not in VMDK format"));
        }
        if header.gd_offset.get() == GD_AT_END {
            header = read_footer(file, &header)?.header;
        }
        if header.version.get() > MAX_VERSION {
            return Err(Error::unsupported(format!(
                "Unsupported VMDK version {}",
                header.version
            )));
        }
        let entries = header.num_gtes_per_gt.get();
        if entries > MAX_GTES {
            return Err(Error::corrupt("L2 table size too big"));
        }
        let grain = header.grain_size.get();
        if grain > MAX_GRAIN {
            return Err(Error::corrupt("Invalid granularity, image may be corrupt"));
        }
        let covered = grain.checked_mul(entries.into()).filter(|sectors| *sectors > 0);
        if covered.is_none_or(|sectors| sectors > u64::from(u32::MAX)) {
            return Err(Error::corrupt("L1 entry size is invalid"));
        }
        let flags = header.flags.get();
        let compressed = flags & flag::COMPRESSED != 0;
        let end = bytes(header.over_head);
        // The file's length is rounded up to whole sectors.
        if file.len().next_multiple_of(SECTOR) < end && !compressed {
            return Err(Error::corrupt(format!(
                "File truncated, expecting at least {end} bytes"
            )));
        }
        if compressed && (flags & flag::MARKERS == 0 || header.compress_algorithm.get() != DEFLATE) {
            return Err(Error::unsupported("Unsupported compression of grains"));
        }
        let redundant = flags & flag::REDUNDANT != 0 && header.rgd_offset.get() > 0;
        let mut geometry = Geometry {
            form: Form::Hosted {
                zeroed_grain: flags & flag::ZEROED_GRAIN != 0,
            },
            capacity: bytes(header.capacity),
            grain: grain * SECTOR,
            entries: entries.into(),
            directory: bytes(header.gd_offset),
            redundant: Some(bytes(header.rgd_offset)).filter(|_| redundant),
            descriptor: ByteRange::new(0, 0),
            compressed,
        };
        geometry.require_directory()?;
        if compressed {
            geometry.require_handled()?;
        }
        // Two directories at the same offset are one.
        geometry.redundant = geometry.redundant.filter(|at| *at != geometry.directory);
        if header.descriptor_offset.get() > 0 {
            geometry.descriptor =
                ByteRange::at(bytes(header.descriptor_offset), bytes(header.descriptor_size));
        }
        Ok(Self { geometry })
    }
}

/// The largest grain in qemu-img, in sectors.
const MAX_GRAIN: u64 = 1 << 21;

fn bytes(sectors: U64) -> u64 {
    sectors.get().saturating_mul(SECTOR)
}

/// The header at byte `offset`.
///
/// # Errors
/// Those of reading the file.
pub(super) fn read_at(file: &dyn Device, offset: u64) -> Result<HostedHeader> {
    let mut header = HostedHeader::new_zeroed();
    file.read_padded(header.as_mut_bytes(), offset)?;
    Ok(header)
}

/// The footer of a stream: a copy of the header with the offset of the directory, behind a marker.
///
/// ```text
///   |grains, tables|marker|footer|end-of-stream marker: zeroes|padding
/// ```
pub(super) struct Footer {
    pub(super) header: HostedHeader,
    /// Host offset of its marker.
    pub(super) start: u64,
}

/// Finds the footer of the stream that begins with `header`: in front of the zeroes at the end of the file, else from
/// marker to marker.
///
/// # Errors
/// There is none.
pub(super) fn read_footer(file: &dyn Device, header: &HostedHeader) -> Result<Footer> {
    if let Some(last) = last_data_sector(file)?
        && let Some(start) = last.checked_sub(SECTOR)
        && let Some(footer) = footer_at(file, start)?
    {
        return Ok(footer);
    }
    let compressed = header.flags.get() & flag::COMPRESSED != 0;
    match walk(file, bytes(header.over_head).max(SECTOR))? {
        StreamEnd::Footer(start) if compressed => footer_at(file, start)?.ok_or_else(invalid_footer),
        StreamEnd::Cut(end) if compressed => Err(Error::corrupt(format!(
            "The stream breaks off at {end:#x} without footer and end-of-stream marker: the file was cut off"
        ))),
        _ => Err(invalid_footer()),
    }
}

fn invalid_footer() -> Error {
    Error::corrupt("Invalid footer")
}

/// The footer whose marker is at host offset `start`.
fn footer_at(file: &dyn Device, start: u64) -> Result<Option<Footer>> {
    let marker = StreamMarker::read(file, start)?;
    let header = read_at(file, start + SECTOR)?;
    let is_footer = marker == StreamMarker::metadata(1, MARKER_FOOTER)
        && header.magic == HOSTED_MAGIC
        && header.gd_offset.get() != GD_AT_END;
    Ok(is_footer.then_some(Footer { header, start }))
}

/// Host offset of the last sector that is not zero, with at most [`MAX_PADDING`] bytes behind it.
fn last_data_sector(file: &dyn Device) -> Result<Option<u64>> {
    let mut end = file.len();
    let first = end.saturating_sub(MAX_PADDING);
    while end > first {
        let start = (end - 1) / CHUNK * CHUNK;
        let mut chunk = vec![0; to_index(end - start)?];
        file.read_at(&mut chunk, start)?;
        if let Some(at) = chunk.iter().rposition(|byte| *byte != 0) {
            return Ok(Some((start + at as u64) / SECTOR * SECTOR));
        }
        end = start;
    }
    Ok(None)
}

/// The most padding behind a stream that is skipped. A limit of this program.
pub(super) const MAX_PADDING: u64 = 64 << 20;

/// Bytes of one read of padding.
const CHUNK: u64 = 64 << 10;

/// What ends a stream.
enum StreamEnd {
    /// The footer, whose marker is at this host offset.
    Footer(u64),
    /// An end-of-stream marker, or something that is no part of a stream.
    Other,
    /// The end of the file.
    Cut(u64),
}

/// Follows a stream from host offset `at` on, from marker to marker.
fn walk(file: &dyn Device, mut at: u64) -> Result<StreamEnd> {
    while at < file.len() {
        let marker = StreamMarker::read(file, at)?;
        let len = match (marker.len, marker.kind) {
            (0, MARKER_FOOTER) => return Ok(StreamEnd::Footer(at)),
            (0, MARKER_TABLE | MARKER_DIRECTORY) => marker.sectors.saturating_add(1).saturating_mul(SECTOR),
            (0, _) => return Ok(StreamEnd::Other),
            (len, _) => (GRAIN_MARKER + u64::from(len)).next_multiple_of(SECTOR),
        };
        at = at.saturating_add(len);
    }
    Ok(StreamEnd::Cut(file.len()))
}

/// Bytes of the marker in front of a grain.
const GRAIN_MARKER: u64 = 12;

/// A marker: of a grain if `len` is not 0, else of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StreamMarker {
    /// The sector of the disk of a grain, the sectors of metadata.
    sectors: u64,
    /// Bytes of a compressed grain.
    len: u32,
    kind: u32,
}

impl StreamMarker {
    fn metadata(sectors: u64, kind: u32) -> Self {
        Self {
            sectors,
            len: 0,
            kind,
        }
    }

    fn read(file: &dyn Device, at: u64) -> Result<Self> {
        let mut fields = [U32::ZERO; 4];
        file.read_padded(fields.as_mut_bytes(), at)?;
        let [low, high, len, kind] = fields.map(U32::get);
        Ok(Self {
            sectors: u64::from(high) << 32 | u64::from(low),
            len,
            kind,
        })
    }
}

const MARKER_TABLE: u32 = Metadata::GrainTable as u32;
const MARKER_DIRECTORY: u32 = Metadata::GrainDirectory as u32;
const MARKER_FOOTER: u32 = 3;

/// The types of metadata in a stream, as markers name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metadata {
    GrainTable = 1,
    GrainDirectory = 2,
}

impl Metadata {
    /// The marker in front of `len` bytes.
    pub(super) fn marker(self, len: u64) -> [u8; SECTOR_BYTES] {
        let mut marker = [0; SECTOR_BYTES];
        marker[..8].copy_from_slice(&len.div_ceil(SECTOR).to_le_bytes());
        marker[12..16].copy_from_slice(&(self as u32).to_le_bytes());
        marker
    }
}

/// The header of a sparse extent of ESX before 6.5, up to the last field that is used.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CowdHeader {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    num_sectors: U32,
    grain_size: U32,
    gd_offset: U32,
    num_gd_entries: U32,
    free_sector: U32,
}

/// Entries of a grain table of a COWD extent.
const COWD_GTES: u64 = 4096;

/// Reads the header of a sparse extent of ESX before 6.5.
///
/// # Errors
/// An invalid header.
pub(super) fn read_cowd(file: &dyn Device) -> Result<Geometry> {
    let mut header = CowdHeader::new_zeroed();
    file.read_padded(header.as_mut_bytes(), 0)?;
    if header.magic != COWD_MAGIC {
        return Err(Error::corrupt("Image not in VMDK format"));
    }
    let in_bytes = |sectors: U32| u64::from(sectors.get()) * SECTOR;
    if header.grain_size.get() == 0 {
        return Err(Error::corrupt("L1 entry size is invalid"));
    }
    Ok(Geometry {
        form: Form::Cowd,
        capacity: in_bytes(header.num_sectors),
        grain: in_bytes(header.grain_size),
        entries: COWD_GTES,
        directory: in_bytes(header.gd_offset),
        redundant: None,
        descriptor: ByteRange::new(0, 0),
        compressed: false,
    })
}

/// The constant header of a sparse extent of ESX 6.5 and later.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SeSparseHeader {
    magic: U64,
    version: U64,
    capacity: U64,
    grain_size: U64,
    grain_table_size: U64,
    flags: U64,
    reserved: [U64; 4],
    volatile_header_offset: U64,
    volatile_header_size: U64,
    journal_header_offset: U64,
    journal_header_size: U64,
    journal_offset: U64,
    journal_size: U64,
    grain_dir_offset: U64,
    grain_dir_size: U64,
    grain_tables_offset: U64,
    grain_tables_size: U64,
    free_bitmap_offset: U64,
    free_bitmap_size: U64,
    backmap_offset: U64,
    backmap_size: U64,
    grains_offset: U64,
    grains_size: U64,
}

/// The volatile header: the fields that change while the extent is in use.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SeSparseVolatile {
    magic: U64,
    free_gt_number: U64,
    next_txn_seq_number: U64,
    replay_journal: U64,
}

const SESPARSE_MAGIC: u64 = 0xcafe_babe;
const SESPARSE_VERSION: u64 = 0x0000_0002_0000_0001;
const SESPARSE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;

/// Reads the headers of a sparse extent of ESX 6.5 and later.
///
/// # Errors
/// Invalid or unsupported headers, and a journal that would have to be replayed.
pub(super) fn read_sesparse(file: &dyn Device) -> Result<Geometry> {
    let mut header = SeSparseHeader::new_zeroed();
    file.read_padded(header.as_mut_bytes(), 0)?;
    if header.magic.get() != SESPARSE_MAGIC {
        return Err(Error::corrupt(format!(
            "Bad const header magic: {:#018x}",
            header.magic.get()
        )));
    }
    if header.version.get() != SESPARSE_VERSION {
        return Err(Error::unsupported(format!(
            "Unsupported version: {:#018x}",
            header.version.get()
        )));
    }
    if header.grain_size.get() != SESPARSE_GRAIN {
        return Err(Error::unsupported(format!(
            "Unsupported grain size: {}",
            header.grain_size
        )));
    }
    if header.grain_table_size.get() != SESPARSE_TABLE {
        return Err(Error::unsupported(format!(
            "Unsupported grain table size: {}",
            header.grain_table_size
        )));
    }
    if header.flags.get() != 0 {
        return Err(Error::unsupported(format!(
            "Unsupported flags: {:#018x}",
            header.flags.get()
        )));
    }
    if header.reserved.iter().any(|field| field.get() != 0) {
        let fields = header.reserved.map(|field| format!(" {:#018x}", field.get()));
        return Err(Error::unsupported(format!(
            "Unsupported reserved bits:{}",
            fields.concat()
        )));
    }
    let mut volatile = SeSparseVolatile::new_zeroed();
    file.read_padded(volatile.as_mut_bytes(), bytes(header.volatile_header_offset))?;
    if volatile.magic.get() != SESPARSE_VOLATILE_MAGIC {
        return Err(Error::corrupt(format!(
            "Bad volatile header magic: {:#018x}",
            volatile.magic.get()
        )));
    }
    if volatile.replay_journal.get() != 0 {
        return Err(Error::unsupported(
            "Image is dirty, Replaying journal not supported",
        ));
    }
    let geometry = Geometry {
        form: Form::SeSparse {
            tables: bytes(header.grain_tables_offset),
            grains: bytes(header.grains_offset),
        },
        capacity: bytes(header.capacity),
        grain: SESPARSE_GRAIN * SECTOR,
        entries: SESPARSE_TABLE * SECTOR / 8,
        directory: bytes(header.grain_dir_offset),
        redundant: None,
        descriptor: ByteRange::new(0, 0),
        compressed: false,
    };
    geometry.require_directory()?;
    Ok(geometry)
}

/// The only supported lengths of grains and of grain tables, in sectors.
const SESPARSE_GRAIN: u64 = 8;
const SESPARSE_TABLE: u64 = 64;
