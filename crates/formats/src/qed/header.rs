//! The header of a qed image; all numbers are little-endian.
//!
//! ```text
//!    0 magic "QED\0"        4 cluster size         8 table size (clusters)   12 header size (clusters)
//!   16 features            24 compatible features 32 autoclear features
//!   40 L1 table offset     48 image size          56 backing file offset     60 its length
//! ```

use diskimage_core::{
    Backing, ByteRange, Device, Error, Name, Result, align_down, align_up, errno, saturating_u32, to_index,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// `QED` and a zero.
pub(super) const MAGIC: u32 = 0x0044_4551;

/// The unit of the disk's size, in bytes. A write of one sector is assumed to be atomic.
pub(super) const SECTOR: u64 = 512;

/// Bits of the features.
pub(super) mod feature {
    /// The image has a backing image.
    pub(in super::super) const BACKING_FILE: u64 = 1;
    /// The image has to be checked before it is used.
    pub(in super::super) const NEED_CHECK: u64 = 2;
    /// The backing image is raw: its format is not probed.
    pub(in super::super) const BACKING_FORMAT_NO_PROBE: u64 = 4;
    pub(super) const KNOWN: u64 = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE;
}

/// The header as it is in the file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    cluster_size: U32,
    /// Clusters of every table.
    table_size: U32,
    /// Clusters of the header.
    header_size: U32,
    /// Unknown bits here make the image unopenable.
    features: U64,
    /// Unknown bits here are ignored.
    compat_features: U64,
    /// Unknown bits here are cleared before the image is written to.
    autoclear_features: U64,
    l1_table_offset: U64,
    image_size: U64,
    /// Host offset of the backing file's name.
    backing_filename_offset: U32,
    /// Bytes of the backing file's name.
    backing_filename_size: U32,
}

const HEADER_LEN: usize = 64;
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// Host offset of the backing file's name in a new image: right behind the fields.
const NAME_OFFSET: u32 = 64;

/// The cluster size and the table size, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) cluster_size: u64,
    /// Clusters of a table.
    pub(super) table_size: u64,
}

/// Limits of the specification.
mod limit {
    pub(super) const MIN_CLUSTER_SIZE: u64 = 4 << 10;
    pub(super) const MAX_CLUSTER_SIZE: u64 = 64 << 20;
    pub(super) const MAX_TABLE_SIZE: u64 = 16;
}

impl Geometry {
    /// The sizes of a new image.
    pub(super) fn for_new(cluster_size: u64, table_size: u64) -> Result<Self> {
        if !is_cluster_size(cluster_size) {
            return Err(Error::invalid(format!(
                "QED cluster size must be within range [{}, {}] and power of 2",
                limit::MIN_CLUSTER_SIZE,
                limit::MAX_CLUSTER_SIZE
            )));
        }
        if !is_table_size(table_size) {
            return Err(Error::invalid(format!(
                "QED table size must be within range [1, {}] and power of 2",
                limit::MAX_TABLE_SIZE
            )));
        }
        Ok(Self {
            cluster_size,
            table_size,
        })
    }

    /// Bytes of a table.
    pub(super) fn table_len(self) -> u64 {
        self.cluster_size * self.table_size
    }

    /// Guest bytes that one L2 table maps.
    pub(super) fn coverage(self) -> u64 {
        self.table_len() / 8 * self.cluster_size
    }

    /// The size of the largest disk. As in qemu-img, 0 where it would not fit into 64 bits.
    pub(super) fn max_size(self) -> u64 {
        self.coverage().wrapping_mul(self.table_len() / 8)
    }

    /// Whether a disk can have `size` bytes.
    pub(super) fn fits(self, size: u64) -> bool {
        size.is_multiple_of(SECTOR) && size <= self.max_size()
    }
}

fn is_cluster_size(size: u64) -> bool {
    (limit::MIN_CLUSTER_SIZE..=limit::MAX_CLUSTER_SIZE).contains(&size) && size.is_power_of_two()
}

fn is_table_size(size: u64) -> bool {
    (1..=limit::MAX_TABLE_SIZE).contains(&size) && size.is_power_of_two()
}

/// A checked header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    /// Clusters of the header.
    header_size: u32,
    pub(super) features: u64,
    compat: u64,
    pub(super) autoclear: u64,
    pub(super) l1_offset: u64,
    pub(super) image_size: u64,
    /// Host offset and length of the backing file's name.
    name: (u32, u32),
    pub(super) backing: Option<Backing>,
}

/// Reads the header at the start of `file`.
pub(super) fn read(file: &dyn Device) -> Result<Header> {
    let mut bytes = [0; HEADER_LEN];
    file.read_padded(&mut bytes, 0)?;
    let mut header = parse(&bytes, file.len())?;
    let (offset, len) = header.name;
    if header.features & feature::BACKING_FILE != 0 {
        if u64::from(offset) + u64::from(len) > header.first_host() {
            return Err(Error::invalid("QED backing filename offset is invalid"));
        }
        // No file system has a path that is longer.
        let mut name = vec![0; to_index(len.into())?.min(MAX_NAME)];
        file.read_padded(&mut name, u64::from(offset))?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or(&[]);
        let raw = header.features & feature::BACKING_FORMAT_NO_PROBE != 0;
        header.backing = (!name.is_empty()).then(|| Backing {
            name: Name::from_bytes(name),
            format: raw.then(|| "raw".to_owned()),
        });
    }
    Ok(header)
}

/// The most bytes of the backing file's name that are read.
const MAX_NAME: usize = 4096;

/// The end of the last whole cluster of a file, whose length is rounded up to whole sectors. No table refers to bytes
/// behind.
pub(super) fn end_of(file_len: u64, cluster_size: u64) -> u64 {
    align_down(align_up(file_len, SECTOR), cluster_size)
}

/// Checks a header of a file that is `file_len` bytes long.
fn parse(bytes: &[u8; HEADER_LEN], file_len: u64) -> Result<Header> {
    let raw: RawHeader = zerocopy::transmute!(*bytes);
    if raw.magic.get() != MAGIC {
        return Err(Error::invalid("Image not in QED format"));
    }
    let unknown = raw.features.get() & !feature::KNOWN;
    if unknown != 0 {
        return Err(Error::unsupported(format!(
            "Unsupported QED features: {unknown:x}"
        )));
    }
    let cluster_size = u64::from(raw.cluster_size.get());
    if !is_cluster_size(cluster_size) {
        return Err(Error::invalid("QED cluster size is invalid"));
    }
    let table_size = u64::from(raw.table_size.get());
    if !is_table_size(table_size) {
        return Err(Error::invalid("QED table size is invalid"));
    }
    let geometry = Geometry {
        cluster_size,
        table_size,
    };
    if !geometry.fits(raw.image_size.get()) {
        return Err(Error::invalid("QED image size is invalid"));
    }
    let header = Header {
        geometry,
        header_size: raw.header_size.get(),
        features: raw.features.get(),
        compat: raw.compat_features.get(),
        autoclear: raw.autoclear_features.get(),
        l1_offset: raw.l1_table_offset.get(),
        image_size: raw.image_size.get(),
        name: (raw.backing_filename_offset.get(), raw.backing_filename_size.get()),
        backing: None,
    };
    let l1_end = header.l1_offset.checked_add(geometry.table_len());
    let l1_is_there = l1_end.is_some_and(|end| end <= end_of(file_len, cluster_size));
    if !l1_is_there
        || header.l1_offset < header.first_host()
        || !header.l1_offset.is_multiple_of(cluster_size)
    {
        return Err(Error::invalid("QED table offset is invalid"));
    }
    // With a header size of 0, the check above would accept an L1 table that overlaps the header.
    header
        .reserved()
        .require_apart()
        .map_err(|_| Error::invalid("QED table offset is invalid"))?;
    Ok(header)
}

impl Header {
    /// The header of a new image.
    pub(super) fn new(geometry: Geometry, image_size: u64) -> Self {
        Self {
            geometry,
            header_size: 1,
            features: 0,
            compat: 0,
            autoclear: 0,
            l1_offset: geometry.cluster_size,
            image_size,
            name: (0, 0),
            backing: None,
        }
    }

    /// The host offset behind the header's clusters, the first that a table or a cluster can have.
    pub(super) fn first_host(&self) -> u64 {
        u64::from(self.header_size) * self.geometry.cluster_size
    }

    /// The header and the L1 table, where no cluster and no L2 table can be.
    pub(super) fn reserved(&self) -> Reserved {
        Reserved::new([
            (
                "header",
                ByteRange::new(0, self.first_host().max(HEADER_LEN as u64)),
            ),
            (
                "L1 table",
                ByteRange::at(self.l1_offset, self.geometry.table_len()),
            ),
        ])
    }

    pub(super) fn set_feature(&mut self, bit: u64, on: bool) {
        self.features = if on {
            self.features | bit
        } else {
            self.features & !bit
        };
    }

    /// Sets or removes the backing image; its name is stored in the header's clusters.
    ///
    /// # Errors
    /// A name that does not fit there.
    pub(super) fn set_backing(&mut self, backing: Option<&Backing>) -> Result<()> {
        let len = backing.map_or(0, |backing| backing.name.to_bytes().len());
        if (HEADER_LEN + len) as u64 > self.first_host() || len > MAX_NAME {
            return Err(Error::from_errno(errno::ENOSPC));
        }
        let raw = backing.is_some_and(|backing| backing.format.as_deref() == Some("raw"));
        self.set_feature(feature::BACKING_FILE, backing.is_some());
        self.set_feature(feature::BACKING_FORMAT_NO_PROBE, raw);
        // As in qemu-img, removing the name keeps its offset.
        let offset = if len > 0 { self.room_for(len) } else { self.name.0 };
        // The length is at most `MAX_NAME`.
        self.name = (offset, saturating_u32(len));
        self.backing = backing.cloned();
        Ok(())
    }

    /// The host offset for a new name of `len` bytes. It goes right behind the fields if there is no name yet, or if it
    /// does not overlap the present one or can be written in one sector with the fields. Otherwise it goes behind the
    /// present name, if there is room, so that a crash leaves one of the two names; without room, over it.
    fn room_for(&self, len: usize) -> u32 {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        let (old, old_len) = (u64::from(self.name.0), u64::from(self.name.1));
        // In a damaged header, the name's offset may lie in the fields.
        let start = u64::from(NAME_OFFSET);
        let behind = (old + old_len).max(start);
        let fits_behind = behind.saturating_add(len) <= self.first_host();
        if old_len == 0 || start + len <= SECTOR || start + len <= old || !fits_behind {
            NAME_OFFSET
        } else {
            // A name beyond 4 GiB is not possible: the field has 32 bits.
            u32::try_from(behind).unwrap_or(NAME_OFFSET)
        }
    }

    /// Writes the fields, and with `with_name` the backing file's name, durably. A name outside of the first sector is
    /// durable before the fields refer to it.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn write(&self, file: &dyn Device, with_name: bool) -> Result<()> {
        let mut bytes = self.to_bytes().to_vec();
        if let Some(backing) = self.backing.as_ref().filter(|_| with_name) {
            let (name, offset) = (backing.name.to_bytes(), u64::from(self.name.0));
            if self.name.0 == NAME_OFFSET && offset + name.len() as u64 <= SECTOR {
                bytes.extend_from_slice(&name);
            } else {
                file.write_at(&name, offset)?;
                file.flush()?;
            }
        }
        file.write_at(&bytes, 0)?;
        file.flush()
    }

    /// The fields as they are stored.
    fn to_bytes(&self) -> [u8; HEADER_LEN] {
        // Both sizes were checked against limits that fit into 32 bits.
        let field = |number: u64| U32::new(saturating_u32(number));
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            cluster_size: field(self.geometry.cluster_size),
            table_size: field(self.geometry.table_size),
            header_size: U32::new(self.header_size),
            features: U64::new(self.features),
            compat_features: U64::new(self.compat),
            autoclear_features: U64::new(self.autoclear),
            l1_table_offset: U64::new(self.l1_offset),
            image_size: U64::new(self.image_size),
            backing_filename_offset: U32::new(self.name.0),
            backing_filename_size: U32::new(self.name.1),
        };
        zerocopy::transmute!(raw)
    }
}
