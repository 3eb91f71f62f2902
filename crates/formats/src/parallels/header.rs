//! The header, as bytes and as a type that cannot hold an illegal value.

use diskimage_core::{ByteRange, Error, Result, align_down, align_up, errno};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// Bytes of a sector, in which the header counts.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the header; the table comes next.
pub(super) const HEADER_LEN: usize = 64;
/// What an image begins with whose entries count sectors.
const MAGIC_OLD: &[u8; 16] = b"WithoutFreeSpace";
/// What an image begins with whose entries count clusters.
const MAGIC_EXT: &[u8; 16] = b"WithouFreSpacExt";
/// The only version.
const VERSION: u32 = 2;
/// In `in_use`: the image is open for writing, or was not closed.
const IN_USE: u32 = 0x746f_6e59;
/// Heads of the geometry that new images have, as the original writes it.
const HEADS: u32 = 16;
/// Sectors per track of that geometry.
const SECTORS_PER_TRACK: u64 = 32;

/// Sectors of the largest cluster, as the original has it.
const MAX_CLUSTER_SECTORS: u32 = (1 << 22) - 1;
/// Entries of the largest table, as the original has it.
const MAX_ENTRIES: u32 = (1 << 29) - 1;
/// Bytes of the largest disk, as the original has it.
const MAX_SIZE: u64 = 0x7fff_ffff_c000_0000;

/// The bytes that an image begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// [`MAGIC_OLD`] or [`MAGIC_EXT`].
    magic: [u8; 16],
    /// [`VERSION`].
    version: U32,
    /// Geometry, which nobody reads.
    heads: U32,
    /// Likewise.
    cylinders: U32,
    /// Sectors of a cluster.
    tracks: U32,
    /// Entries of the table.
    bat_entries: U32,
    /// The disk's size in sectors; the upper half is not used in old images.
    nb_sectors: U64,
    /// [`IN_USE`] while it is open for writing.
    in_use: U32,
    /// Where the data starts, in sectors; 0 in old images: right behind the table.
    data_off: U32,
    /// Flags without a meaning here.
    flags: U32,
    /// Where the Format Extension is, in sectors; 0 if there is none.
    ext_off: U64,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// The header of an image that can be opened.
#[derive(Clone, Debug)]
pub(super) struct Header {
    raw: RawHeader,
    /// Bytes of a cluster: whole sectors.
    pub(super) cluster: u64,
    /// Entries of the table; not necessarily enough for the disk.
    pub(super) entries: u32,
    /// The disk's size in bytes.
    pub(super) size: u64,
    /// What an entry counts in, in bytes: clusters, or sectors in old images.
    pub(super) unit: u64,
    /// Where the Format Extension is, in bytes.
    pub(super) extension: Option<u64>,
}

/// Whether a file begins like an image.
pub(super) fn is_parallels(head: &[u8]) -> bool {
    let magic = head.starts_with(MAGIC_OLD) || head.starts_with(MAGIC_EXT);
    magic && head.len() >= HEADER_LEN && head.get(16..20) == Some(&VERSION.to_le_bytes())
}

impl Header {
    /// The header of a new image.
    pub(super) fn new(size: u64, cluster_size: u64) -> Result<Self> {
        let tracks = u32::try_from(cluster_size.div_ceil(SECTOR)).unwrap_or(u32::MAX);
        if tracks > MAX_CLUSTER_SECTORS {
            return Err(Error::invalid("Cluster size is too large"));
        }
        let too_large = || Error::invalid("Image size is too large for this cluster size");
        let cluster = u64::from(tracks) * SECTOR;
        let entries = size.checked_next_multiple_of(cluster).ok_or_else(too_large)? / cluster;
        let entries = u32::try_from(entries)
            .ok()
            .filter(|entries| *entries <= MAX_ENTRIES)
            .ok_or_else(too_large)?;
        let sectors = size.div_ceil(SECTOR);
        let cylinders = sectors / u64::from(HEADS) / SECTORS_PER_TRACK;
        let raw = RawHeader {
            magic: *MAGIC_EXT,
            version: U32::new(VERSION),
            heads: U32::new(HEADS),
            // What does not fit is cut off in the original, too.
            cylinders: U32::new(u32::try_from(cylinders & u64::from(u32::MAX)).unwrap_or(0)),
            tracks: U32::new(tracks),
            bat_entries: U32::new(entries),
            nb_sectors: U64::new(sectors),
            in_use: U32::new(0),
            data_off: U32::new(0),
            flags: U32::new(0),
            ext_off: U64::new(0),
        };
        let mut header = Self::of(raw)?;
        header.mend_data_off();
        Ok(header)
    }

    /// Reads the header of an image.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        if !is_parallels(bytes) {
            return Err(Error::invalid("Image not in Parallels format"));
        }
        Self::of(zerocopy::transmute!(*bytes))
    }

    fn of(raw: RawHeader) -> Result<Self> {
        let is_old = raw.magic == *MAGIC_OLD;
        let sectors = match raw.nb_sectors.get() {
            sectors if is_old => sectors & u64::from(u32::MAX),
            sectors => sectors,
        };
        let tracks = raw.tracks.get();
        if tracks == 0 {
            return Err(Error::invalid("Invalid image: Zero sectors per track"));
        }
        if tracks > MAX_CLUSTER_SECTORS {
            return Err(Error::invalid("Invalid image: Too big cluster"));
        }
        let cluster = u64::from(tracks) * SECTOR;
        let entries = raw.bat_entries.get();
        if entries > MAX_ENTRIES {
            return Err(Error::invalid("Catalog too large"));
        }
        let extension = match raw.ext_off.get() {
            0 => None,
            offset => Some(
                offset
                    .checked_mul(SECTOR)
                    .filter(|offset| *offset <= MAX_SIZE)
                    .ok_or_else(|| Error::invalid("Invalid image: Too big offset"))?,
            ),
        };
        let size = sectors
            .checked_mul(SECTOR)
            .filter(|size| *size <= MAX_SIZE)
            .ok_or_else(|| Error::from_errno(errno::EFBIG).context("Could not refresh total sector count"))?;
        Ok(Self {
            raw,
            cluster,
            entries,
            size,
            unit: if is_old { SECTOR } else { cluster },
            extension,
        })
    }

    /// Where the table ends, in bytes.
    pub(super) fn table_end(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.entries) * 4
    }

    /// Where no cluster can be: a damaged header may have a table that is too long, without which the disk can be read.
    pub(super) fn relied_on(&self) -> Reserved {
        let entries = u64::from(self.entries).min(self.size.div_ceil(self.cluster));
        Reserved::new([
            ("header", ByteRange::new(0, HEADER_LEN as u64)),
            ("table", ByteRange::at(HEADER_LEN as u64, entries * 4)),
        ])
    }

    /// Where the data starts at the earliest.
    fn least_data(&self) -> u64 {
        align_up(self.table_end(), self.unit)
    }

    /// Whether the header says where the data starts in a file of `file_len` bytes.
    pub(super) fn has_data_off(&self, file_len: u64) -> bool {
        let start = u64::from(self.raw.data_off.get()) * SECTOR;
        (start == 0 && self.unit == SECTOR)
            || (start >= self.least_data() && start <= align_up(file_len, SECTOR))
    }

    /// Where the data starts in a file of `file_len` bytes; behind the table if the header does not say it.
    pub(super) fn data_start(&self, file_len: u64) -> u64 {
        match u64::from(self.raw.data_off.get()) * SECTOR {
            start if start > 0 && self.has_data_off(file_len) => start,
            _ => self.least_data(),
        }
    }

    /// Where place 0 for a cluster is if the data starts at `data_start`: entries can say it, and it is behind the table.
    pub(super) fn first_place(&self, data_start: u64) -> u64 {
        align_down(data_start, self.unit)
    }

    /// Has the data start right behind the table.
    pub(super) fn mend_data_off(&mut self) {
        let sectors = u32::try_from(self.least_data() / SECTOR).unwrap_or(u32::MAX);
        self.raw.data_off = U32::new(sectors);
    }

    /// Whether the image was not closed.
    pub(super) fn is_in_use(&self) -> bool {
        self.raw.in_use.get() == IN_USE
    }

    /// Marks it as open for writing, or as closed.
    pub(super) fn set_in_use(&mut self, in_use: bool) {
        self.raw.in_use = U32::new(if in_use { IN_USE } else { 0 });
    }

    /// Gives up the Format Extension.
    pub(super) fn drop_extension(&mut self) {
        self.raw.ext_off = U64::new(0);
        self.extension = None;
    }

    /// The header's bytes.
    pub(super) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        zerocopy::transmute!(self.raw)
    }
}
