//! Images without a trailer: a read/write image (`UDRW`) is the disk itself.
//!
//! A compressed image that was cut off has no trailer either, and reading it as a disk would give wrong data. So what
//! cannot be a whole disk is refused: a part of a sector, compressed data at the start, and a disk whose own tables say
//! that it is longer than the file.

use std::sync::Arc;

use diskimage_core::{Device, Error, Info, Result, to_index};

use super::chunk::SECTOR;
use super::{Contents, NAME};
use crate::layer_kit::read_only_layer::Disk;

/// A disk whose bytes are those of the image.
#[derive(Debug)]
pub(super) struct RawDisk(Contents);

/// How many bytes at the start are examined.
const HEAD: usize = 2048;

impl RawDisk {
    /// The disk in `contents`.
    ///
    /// # Errors
    /// The contents are not a whole disk.
    pub(super) fn new(contents: Contents) -> Result<Self> {
        let len = contents.data.len();
        let mut head = vec![0; to_index(len.min(HEAD as u64))?];
        contents.data.read_at(&mut head, 0)?;
        if head.starts_with(b"sprs") {
            return Err(Error::unsupported(
                "Sparse disk images of macOS (.sparseimage) are not supported: convert the image with `hdiutil convert \
                 -format UDZO`",
            ));
        }
        if !len.is_multiple_of(SECTOR) || is_encoded(&head) {
            return Err(Error::invalid("Could not locate UDIF trailer in dmg file"));
        }
        match recorded_len(&head) {
            Some(recorded) if recorded > len => Err(Error::corrupt(format!(
                "The image has no UDIF trailer, and as a raw disk of {recorded:#x} bytes it is longer than its file of \
                 {len:#x} bytes, which looks truncated"
            ))),
            _ => Ok(Self(contents)),
        }
    }
}

impl Disk for RawDisk {
    const FORMAT: &'static str = NAME;

    fn len(&self) -> u64 {
        self.0.data.len()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.0.file
    }

    fn info(&self) -> Info {
        self.0.info()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.data.read_at(buf, offset)
    }
}

/// Whether an image with this start is a UDIF image whose end is missing: it starts with the first compressed chunk, or
/// with a copy of the trailer.
fn is_encoded(head: &[u8]) -> bool {
    let is_zlib = matches!(head, [0x78, flags, ..] if u16::from_be_bytes([0x78, *flags]).is_multiple_of(31));
    let magics: [&[u8]; 4] = [b"koly", b"BZh", b"bvx", b"\xfd7zXZ\0"];
    is_zlib || magics.iter().any(|magic| head.starts_with(magic))
}

/// The length of the disk in bytes as the partition table or the file system at its start states it.
fn recorded_len(head: &[u8]) -> Option<u64> {
    let field = |at: usize| head.get(at..)?.first_chunk::<4>().copied();
    let be = |at: usize| field(at).map(|bytes| u64::from(u32::from_be_bytes(bytes)));
    let be_16 = |at: usize| field(at).map(|bytes| u64::from(u16::from_be_bytes([bytes[0], bytes[1]])));
    let le = |at: usize| field(at).map(|bytes| u64::from(u32::from_le_bytes(bytes)));
    let le_64 = |at: usize| Some(le(at)? | le(at + 4)? << 32);
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let product = |a: u64, b: u64| a.checked_mul(b);
    if has(512, b"EFI PART") {
        // The backup of the header is in the last sector.
        product(le_64(512 + 32)?.checked_add(1)?, SECTOR)
    } else if has(0, b"ER") {
        // The driver descriptor map of an Apple partition map.
        product(be_16(2)?, be(4)?)
    } else if has(32, b"NXSB") {
        product(le(36)?, le_64(40)?)
    } else if has(1024, b"H+") || has(1024, b"HX") {
        product(be(1024 + 40)?, be(1024 + 44)?)
    } else if has(1024, b"BD") {
        product(be_16(1024 + 18)?, be(1024 + 20)?)
    } else {
        None
    }
}
