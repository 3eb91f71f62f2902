//! The header of a qcow image; all numbers are big-endian.
//!
//! ```text
//!    0 magic "QFI\xfb"      4 version 1            8 backing file offset    16 its length
//!   20 time                24 size                32 cluster bits          33 L2 bits
//!   36 encryption          40 L1 table offset
//! ```

use diskimage_core::{
    ByteRange, Device, Error, Name, Result, ResultExt, align_down, align_up, name, require_addressable,
    saturating_u32, to_index,
};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layer_kit::reserved::Reserved;

/// `QFI` and the byte 0xfb.
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// The version of this format; later versions are qcow2.
pub(super) const VERSION: u32 = 1;

/// The unit of the disk's size and of offsets in the file, in bytes.
pub(super) const SECTOR: u64 = 512;

/// Bytes of an entry of a table.
const ENTRY: u64 = 8;

/// The header as it is in the file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    /// Host offset of the backing file's name; 0 if there is none.
    backing_file_offset: U64,
    /// Bytes of the backing file's name.
    backing_file_size: U32,
    /// The modification time of the backing file; not used.
    mtime: U32,
    /// Bytes of the disk.
    size: U64,
    cluster_bits: u8,
    /// The binary logarithm of the number of entries of an L2 table.
    l2_bits: u8,
    padding: [u8; 2],
    /// 0 for none, 1 for AES.
    crypt_method: U32,
    l1_table_offset: U64,
}

const HEADER_LEN: usize = 48;
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// Limits of qemu-img.
mod limit {
    use std::ops::RangeInclusive;

    pub(super) const CLUSTER_BITS: RangeInclusive<u8> = 9..=16;
    /// L2 tables of 512 bytes to 64 KiB.
    pub(super) const L2_BITS: RangeInclusive<u8> = 6..=13;
    /// Entries of the L1 table, which is less than 2 GiB.
    pub(super) const L1_SIZE: u64 = (1 << 28) - 1;
    pub(super) const BACKING_NAME: usize = 1023;
}

/// A checked header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// Bytes of the disk, whole sectors.
    pub(super) size: u64,
    pub(super) cluster_bits: u8,
    l2_bits: u8,
    /// Whether guest data is encrypted.
    pub(super) is_encrypted: bool,
    pub(super) l1_offset: u64,
    l1_size: u64,
    /// The backing file's name.
    pub(super) backing: Option<Name>,
    /// Host offset of the backing file's name.
    backing_offset: u64,
    /// Bytes of the backing file's name.
    backing_len: u64,
}

/// Reads the header at the start of `file`, an image called `name`.
pub(super) fn read(file: &dyn Device, name: &str) -> Result<Header> {
    let mut bytes = [0; HEADER_LEN];
    file.read_padded(&mut bytes, 0)?;
    let (mut header, len) = parse(&bytes)?;
    for (offset, len) in [
        (header.l1_offset, header.l1_len()),
        (header.backing_offset, len as u64),
    ] {
        require_addressable(offset, len).context(|| format!("Could not open '{name}'"))?;
    }
    let mut text = vec![0; len];
    file.read_padded(&mut text, header.backing_offset)?;
    let text = text.split(|byte| *byte == 0).next().unwrap_or(&[]);
    header.backing_len = text.len() as u64;
    header.backing = (!text.is_empty()).then(|| Name::from_bytes(text));
    Ok(header)
}

/// Checks a header. Returns it without the backing file's name, and the length of that name.
fn parse(bytes: &[u8; HEADER_LEN]) -> Result<(Header, usize)> {
    let raw: RawHeader = zerocopy::transmute!(*bytes);
    if raw.magic.get() != MAGIC {
        return Err(Error::invalid("Image not in qcow format"));
    }
    let version = raw.version.get();
    if version != VERSION {
        let error = Error::unsupported(format!("qcow (v1) does not support qcow version {version}"));
        return Err(match version {
            2 | 3 => error.hint("Try the 'qcow2' driver instead."),
            _ => error,
        });
    }
    if raw.size.get() <= 1 {
        return Err(Error::invalid(
            "Image size is too small (must be at least 2 bytes)",
        ));
    }
    if !limit::CLUSTER_BITS.contains(&raw.cluster_bits) {
        return Err(Error::invalid("Cluster size must be between 512 and 64k"));
    }
    if !limit::L2_BITS.contains(&raw.l2_bits) {
        return Err(Error::invalid("L2 table size must be between 512 and 64k"));
    }
    let is_encrypted = match raw.crypt_method.get() {
        0 => false,
        1 => true,
        _ => return Err(Error::invalid("invalid encryption method in qcow header")),
    };
    let l1_size = l1_size(raw.size.get(), raw.cluster_bits, raw.l2_bits)?;
    let backing_offset = raw.backing_file_offset.get();
    let name_len = match backing_offset {
        0 => 0,
        _ => to_index(raw.backing_file_size.get().into())?,
    };
    if name_len > limit::BACKING_NAME {
        return Err(name_too_long());
    }
    let header = Header {
        size: align_down(raw.size.get(), SECTOR),
        cluster_bits: raw.cluster_bits,
        l2_bits: raw.l2_bits,
        is_encrypted,
        l1_offset: raw.l1_table_offset.get(),
        l1_size,
        backing: None,
        backing_offset,
        backing_len: 0,
    };
    Ok((header, name_len))
}

/// The number of entries of the L1 table for a disk of `size` bytes.
fn l1_size(size: u64, cluster_bits: u8, l2_bits: u8) -> Result<u64> {
    let entries = size.div_ceil(1 << (cluster_bits + l2_bits));
    if entries > limit::L1_SIZE {
        return Err(Error::invalid("Image too large"));
    }
    Ok(entries)
}

fn name_too_long() -> Error {
    Error::invalid("Backing file name too long")
}

impl Header {
    /// The header of a new image. As in qemu-img, an image with a backing image has small clusters, so that little is
    /// copied on write.
    ///
    /// # Errors
    /// A disk or a name that is too long.
    pub(super) fn new(size: u64, backing: Option<&str>, is_encrypted: bool) -> Result<Self> {
        let (cluster_bits, l2_bits) = if backing.is_some() { (9, 12) } else { (12, 9) };
        let name_len = backing.map_or(0, name::len);
        if name_len > limit::BACKING_NAME {
            return Err(name_too_long());
        }
        let size = align_up(size, SECTOR);
        Ok(Self {
            size,
            cluster_bits,
            l2_bits,
            is_encrypted,
            l1_offset: align_up((HEADER_LEN + name_len) as u64, ENTRY),
            l1_size: l1_size(size, cluster_bits, l2_bits)?,
            backing: backing.map(Name::from),
            backing_len: name_len as u64,
            backing_offset: if backing.is_some() { HEADER_LEN as u64 } else { 0 },
        })
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 table.
    pub(super) fn l2_len(&self) -> u64 {
        ENTRY << self.l2_bits
    }

    /// Guest bytes that one L2 table maps.
    pub(super) fn coverage(&self) -> u64 {
        self.cluster_size() << self.l2_bits
    }

    /// Bytes of the L1 table.
    pub(super) fn l1_len(&self) -> u64 {
        self.l1_size * ENTRY
    }

    /// The header, the backing file's name and the L1 table, where no L2 table and no cluster can be.
    pub(super) fn reserved(&self) -> Reserved {
        let name = ByteRange::at(self.backing_offset, self.backing_len);
        Reserved::new([
            ("header", ByteRange::new(0, HEADER_LEN as u64)),
            ("backing file's name", name),
            ("L1 table", ByteRange::at(self.l1_offset, self.l1_len())),
        ])
    }

    /// The end of the metadata of an empty image.
    pub(super) fn end(&self) -> u64 {
        self.reserved().end()
    }

    /// The header with the name behind it, up to the L1 table.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let name = self.backing.as_ref().map(Name::to_bytes).unwrap_or_default();
        // The name's length was checked against `BACKING_NAME`.
        let name_len = saturating_u32(name.len());
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U32::new(VERSION),
            backing_file_offset: U64::new(self.backing_offset),
            backing_file_size: U32::new(name_len),
            mtime: U32::ZERO,
            size: U64::new(self.size),
            cluster_bits: self.cluster_bits,
            l2_bits: self.l2_bits,
            padding: [0; 2],
            crypt_method: U32::new(u32::from(self.is_encrypted)),
            l1_table_offset: U64::new(self.l1_offset),
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(&name);
        bytes
    }
}
