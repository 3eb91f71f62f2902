//! The header: its bytes, and [`Header`], which holds valid values only.

use diskimage_core::{ByteRange, Error, Result, align_down, align_up, errno, saturating_u32};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// Bytes of a sector, the unit of most numbers in the header.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the header, and the offset of the table.
pub(super) const HEADER_LEN: usize = 64;
/// The magic of images whose entries are in sectors.
const MAGIC_OLD: &[u8; 16] = b"WithoutFreeSpace";
/// The magic of images whose entries are in clusters.
const MAGIC_EXT: &[u8; 16] = b"WithouFreSpacExt";
/// The only version.
const VERSION: u32 = 2;
/// The value of `in_use` while the image is open for writing, or if it was not closed.
const IN_USE: u32 = 0x746f_6e59;
/// Heads in the geometry of new images, as in qemu-img.
const HEADS: u32 = 16;
/// Sectors per track of that geometry.
const SECTORS_PER_TRACK: u64 = 32;

/// Sectors of the largest cluster: qemu-img's limit.
const MAX_CLUSTER_SECTORS: u32 = (1 << 22) - 1;
/// Entries of the largest table: qemu-img's limit.
const MAX_ENTRIES: u32 = (1 << 29) - 1;
/// Bytes of the largest disk: qemu-img's limit.
const MAX_SIZE: u64 = 0x7fff_ffff_c000_0000;

/// The header in the file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// [`MAGIC_OLD`] or [`MAGIC_EXT`].
    magic: [u8; 16],
    /// [`VERSION`].
    version: U32,
    /// Geometry; ignored.
    heads: U32,
    /// Geometry; ignored.
    cylinders: U32,
    /// Sectors of a cluster.
    tracks: U32,
    /// Entries of the table.
    bat_entries: U32,
    /// The disk's size in sectors; the upper half is not used in old images.
    nb_sectors: U64,
    /// [`IN_USE`] while the image is open for writing.
    in_use: U32,
    /// The start of the data, in sectors; 0 in old images: right behind the table.
    data_off: U32,
    /// Flags; ignored.
    flags: U32,
    /// The offset of the Format Extension, in sectors; 0 if there is none.
    ext_off: U64,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// The header of an image that passed all checks of [`Header::parse`].
#[derive(Clone, Debug)]
pub(super) struct Header {
    raw: RawHeader,
    /// Bytes of a cluster, a multiple of [`SECTOR`].
    pub(super) cluster: u64,
    /// Entries of the table; may be less than the disk has clusters.
    pub(super) entries: u32,
    /// The disk's size in bytes.
    pub(super) size: u64,
    /// The unit of entries in bytes: a cluster, or a sector in old images.
    pub(super) unit: u64,
    /// The byte offset of the Format Extension.
    pub(super) extension: Option<u64>,
}

/// Whether the first bytes of a file are those of a Parallels image.
pub(super) fn is_parallels(head: &[u8]) -> bool {
    let magic = head.starts_with(MAGIC_OLD) || head.starts_with(MAGIC_EXT);
    magic && head.len() >= HEADER_LEN && head.get(16..20) == Some(&VERSION.to_le_bytes())
}

impl Header {
    /// The header of a new image.
    pub(super) fn new(size: u64, cluster_size: u64) -> Result<Self> {
        // The largest number exceeds the limit, too.
        let tracks = saturating_u32(cluster_size.div_ceil(SECTOR));
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
            // As in qemu-img, bits that do not fit into the field are dropped..
            cylinders: U32::new(saturating_u32(cylinders & u64::from(u32::MAX))),
            tracks: U32::new(tracks),
            bat_entries: U32::new(entries),
            nb_sectors: U64::new(sectors),
            in_use: U32::new(0),
            data_off: U32::new(0),
            flags: U32::new(0),
            ext_off: U64::new(0),
        };
        let mut header = Self::of(raw)?;
        header.set_data_off();
        Ok(header)
    }

    /// Parses the header of an image.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        if !is_parallels(bytes) {
            return Err(Error::invalid("Image not in Parallels format"));
        }
        Self::of(zerocopy::transmute!(*bytes))
    }

    /// Checks the fields of `raw`.
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

    /// The byte offset of the table's end.
    pub(super) fn table_end(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.entries) * 4
    }

    /// The ranges of the file where no cluster can be read. The table of a damaged header may be longer than the disk
    /// needs and overlap clusters; the disk can still be read.
    pub(super) fn relied_on(&self) -> Reserved {
        let entries = u64::from(self.entries).min(self.size.div_ceil(self.cluster));
        Reserved::new([
            ("header", ByteRange::new(0, HEADER_LEN as u64)),
            ("table", ByteRange::at(HEADER_LEN as u64, entries * 4)),
        ])
    }

    /// The lowest valid offset of the data.
    fn least_data(&self) -> u64 {
        align_up(self.table_end(), self.unit)
    }

    /// Whether `data_off` is valid in a file of `file_len` bytes.
    pub(super) fn has_data_off(&self, file_len: u64) -> bool {
        let start = u64::from(self.raw.data_off.get()) * SECTOR;
        (start == 0 && self.unit == SECTOR)
            || (start >= self.least_data() && start <= align_up(file_len, SECTOR))
    }

    /// The byte offset of the data in a file of `file_len` bytes; right behind the table if `data_off` is not valid.
    pub(super) fn data_start(&self, file_len: u64) -> u64 {
        match u64::from(self.raw.data_off.get()) * SECTOR {
            start if start > 0 && self.has_data_off(file_len) => start,
            _ => self.least_data(),
        }
    }

    /// The byte offset of slot 0 if the data starts at `data_start`: the unit of entries divides it, and it is behind
    /// the table.
    pub(super) fn first_slot(&self, data_start: u64) -> u64 {
        align_down(data_start, self.unit)
    }

    /// Sets `data_off` to right behind the table.
    pub(super) fn set_data_off(&mut self) {
        // The table and a cluster have less than 2^24 sectors together.
        let sectors = saturating_u32(self.least_data() / SECTOR);
        self.raw.data_off = U32::new(sectors);
    }

    /// Whether the image was not closed.
    pub(super) fn is_in_use(&self) -> bool {
        self.raw.in_use.get() == IN_USE
    }

    /// Marks the image as open for writing, or as closed.
    pub(super) fn set_in_use(&mut self, in_use: bool) {
        self.raw.in_use = U32::new(if in_use { IN_USE } else { 0 });
    }

    /// Removes the Format Extension.
    pub(super) fn drop_extension(&mut self) {
        self.raw.ext_off = U64::new(0);
        self.extension = None;
    }

    /// The header's bytes.
    pub(super) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        zerocopy::transmute!(self.raw)
    }
}
