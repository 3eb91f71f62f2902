//! Bochs "growing" redologs, read only.
//!
//! ```text
//!   file     |header|catalog|---- extent 0 ----|---- extent 1 ----|...
//!   extent   |bitmap|---------- sectors ----------|       both in whole sectors
//! ```
//!
//! Entry *n* of the catalog is the number of the extent that holds the *n*-th extent-sized part of the disk. The
//! extent's bitmap has a bit for each sector that was written. All other sectors read as zeroes.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, Format, FormatProperties, Layer, OpenRequest, Probe, Result, Score, align_down,
    errno, is_zero, to_index,
};

use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::read_only_layer::{self, Disk};

/// The format's entry in the table.
#[derive(Debug)]
pub struct Bochs;

const NAME: &str = "bochs";
const SECTOR: u64 = 512;
/// The length of the header's fields in bytes.
const HEADER: usize = 96;
/// qemu-img's limits.
const MAX_CATALOG: u32 = 0x10_0000;
const MAX_EXTENT: u32 = 0x80_0000;
/// The catalog's entry for a part of the disk that was never written.
const UNALLOCATED: u32 = u32::MAX;

impl Format for Bochs {
    fn name(&self) -> &'static str {
        NAME
    }

    fn properties(&self) -> &'static FormatProperties {
        &FormatProperties::READ_ONLY
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if is_growing(probe.head) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        read_only_layer::refuse_writing(&request)?;
        let mut header = [0; HEADER];
        request.file.read_padded(&mut header, 0)?;
        let geometry = Geometry::parse(&header)?;
        Ok(read_only_layer::layer(Growing {
            catalog: Mutex::new(PagedTable::new(
                Arc::clone(&request.file),
                geometry.catalog,
                u64::MAX,
            )),
            file: request.file,
            geometry,
        }))
    }
}

/// Whether the file starts with the header of a growing redolog of a known version.
fn is_growing(head: &[u8]) -> bool {
    let has_name = |at: usize, name: &[u8]| {
        head.get(at..)
            .and_then(|rest| rest.strip_prefix(name))
            .is_some_and(|rest| rest.first() == Some(&0))
    };
    has_name(0, b"Bochs Virtual HD Image")
        && has_name(32, b"Redolog")
        && has_name(48, b"Growing")
        && version(head).is_some()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

fn version(head: &[u8]) -> Option<Version> {
    match u32_at(head, 64)? {
        0x1_0000 => Some(Version::V1),
        0x2_0000 => Some(Version::V2),
        _ => None,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u64::from_le_bytes(*bytes))
}

/// The sizes and host offsets of the file's structures.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    /// The disk's size in bytes.
    len: u64,
    /// The host offset of the catalog.
    catalog: u64,
    /// The host offset of the first extent.
    extents: u64,
    /// Guest bytes in an extent, a power of two.
    extent_size: u64,
    /// Bytes of an extent's bitmap, rounded up to sectors.
    bitmap_size: u64,
}

impl Geometry {
    fn parse(header: &[u8; HEADER]) -> Result<Self> {
        if !is_growing(header) {
            return Err(not_bochs());
        }
        let size_at = match version(header) {
            Some(Version::V1) => 84,
            Some(Version::V2) => 88,
            None => return Err(not_bochs()),
        };
        let number = |at| u32_at(header, at).ok_or_else(not_bochs);
        let (header_size, entries, bitmap, extent) = (number(68)?, number(72)?, number(76)?, number(80)?);
        let sectors = u64_at(header, size_at).ok_or_else(not_bochs)? / SECTOR;
        if entries > MAX_CATALOG {
            return Err(Error::invalid("Catalog size is too large"));
        }
        if u64::from(extent) < SECTOR {
            return Err(Error::invalid("Extent size must be at least 512"));
        }
        if !extent.is_power_of_two() {
            return Err(Error::invalid(format!(
                "Extent size {extent} is not a power of two"
            )));
        }
        if extent > MAX_EXTENT {
            return Err(Error::invalid(format!("Extent size {extent} is too large")));
        }
        let extent_size = u64::from(extent);
        if u64::from(entries) < sectors.div_ceil(extent_size / SECTOR) {
            return Err(Error::invalid("Catalog size is too small for this disk size"));
        }
        let catalog = u64::from(header_size);
        Ok(Self {
            len: sectors * SECTOR,
            catalog,
            extents: catalog + u64::from(entries) * 4,
            extent_size,
            // A bitmap size of 0 wraps around, as in qemu-img.
            bitmap_size: (u64::from(bitmap.wrapping_sub(1)) / SECTOR + 1) * SECTOR,
        })
    }

    /// Bytes of an extent's bitmap that have bits.
    fn bitmap_len(self) -> u64 {
        self.extent_size.div_ceil(SECTOR * 8).min(MAX_BITMAP)
    }

    /// The host offset of extent `number`.
    fn extent(self, number: u32) -> u64 {
        // Both factors are below 2^33, so the product overflows only with the largest bitmap. A saturated offset lies
        // beyond the end of every file.
        u64::from(number)
            .saturating_mul(self.bitmap_size + self.extent_size)
            .saturating_add(self.extents)
    }
}

fn not_bochs() -> Error {
    Error::invalid("Image not in Bochs format")
}

#[derive(Debug)]
struct Growing {
    file: Arc<dyn Device>,
    geometry: Geometry,
    catalog: Mutex<PagedTable>,
}

impl Growing {
    /// The catalog's entry for an extent of the disk.
    fn number(&self, extent: u64) -> Result<u32> {
        let mut catalog = self.catalog.lock().unwrap_or_else(PoisonError::into_inner);
        catalog.entry(extent).map(u32::from_le_bytes)
    }

    /// The offsets of the bitmap and of the sectors of extent `number`.
    fn extent(&self, number: u32) -> Result<(u64, u64)> {
        let start = self.geometry.extent(number);
        let data = start
            .checked_add(self.geometry.bitmap_size)
            .filter(|data| data.checked_add(self.geometry.extent_size).is_some())
            .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
        Ok((start, data))
    }

    /// Reads from extent `number`, from offset `at` inside it.
    fn read_extent(&self, number: u32, buf: &mut [u8], at: u64) -> Result<()> {
        let (start, data) = self.extent(number)?;
        let end = at + buf.len() as u64;
        let first = at / SECTOR / 8;
        let bytes = (end.div_ceil(SECTOR).div_ceil(8) - first).min(MAX_BITMAP);
        let mut bitmap = vec![0; to_index(bytes)?];
        self.file.read_whole(&mut bitmap, start + first)?;
        let written = |sector: u64| {
            let byte = usize::try_from(sector / 8 - first)
                .ok()
                .and_then(|byte| bitmap.get(byte));
            byte.is_some_and(|byte| byte >> (sector % 8) & 1 != 0)
        };
        // Consecutive sectors with the same bit are read together.
        let (mut buf, mut at) = (buf, at);
        while at < end {
            let is_data = written(at / SECTOR);
            let mut stop = align_down(at, SECTOR) + SECTOR;
            while stop < end && written(stop / SECTOR) == is_data {
                stop += SECTOR;
            }
            let len = to_index(stop.min(end) - at)?;
            let (head, tail) = buf.split_at_mut(len);
            if is_data {
                self.file.read_whole(head, data + at)?;
            } else {
                head.fill(0);
            }
            (buf, at) = (tail, stop);
        }
        Ok(())
    }
}

/// The bytes of the largest extent's bitmap.
const MAX_BITMAP: u64 = MAX_EXTENT as u64 / SECTOR / 8;

impl Disk for Growing {
    const FORMAT: &'static str = NAME;

    fn len(&self) -> u64 {
        self.geometry.len
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn status(&self, range: ByteRange) -> Result<(bool, u64)> {
        let unit = self.geometry.extent_size;
        let (extent, at) = (range.start() / unit, range.start() % unit);
        let mut catalog = self.catalog.lock().unwrap_or_else(PoisonError::into_inner);
        let number = catalog.entry(extent).map(u32::from_le_bytes)?;
        // Equal entries are the same part of the file, so what holds for one holds for all.
        let equal = catalog.count_equal(extent)?;
        drop(catalog);
        let all = equal.saturating_mul(unit) - at;
        if number == UNALLOCATED {
            return Ok((true, all));
        }
        let (bitmap, _) = self.extent(number)?;
        let mut bits = vec![0; to_index(self.geometry.bitmap_len())?];
        self.file.read_whole(&mut bits, bitmap)?;
        match is_zero(&bits) {
            true => Ok((true, all)),
            false => Ok((false, unit - at)),
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let unit = self.geometry.extent_size;
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let at = offset % unit;
            let len = to_index((unit - at).min(buf.len() as u64))?;
            let (head, tail) = buf.split_at_mut(len);
            match self.number(offset / unit)? {
                UNALLOCATED => head.fill(0),
                number => self.read_extent(number, head, at)?,
            }
            (buf, offset) = (tail, offset + len as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::{ErrorKind, Image, MemoryDevice};

    use super::*;
    use crate::testing::open;

    /// A disk of 16 KiB in extents of 2 KiB: its second part is in extent 1, its last part in extent 0.
    fn image(version: Version) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..22].copy_from_slice(b"Bochs Virtual HD Image");
        bytes[32..39].copy_from_slice(b"Redolog");
        bytes[48..55].copy_from_slice(b"Growing");
        let (number, size_at) = match version {
            Version::V1 => (0x1_0000_u32, 84),
            Version::V2 => (0x2_0000, 88),
        };
        for (at, value) in [(64, number), (68, 512), (72, 8), (76, 1), (80, 2048)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[size_at..size_at + 8].copy_from_slice(&16384_u64.to_le_bytes());
        for index in 0..8 {
            let entry = match index {
                1 => 1,
                7 => 0,
                _ => UNALLOCATED,
            };
            bytes.extend(entry.to_le_bytes());
        }
        for (bits, fill) in [(0b1111, 0x11), (0b0110, 0x22)] {
            let mut bitmap = [0; 512];
            bitmap[0] = bits;
            bytes.extend(bitmap);
            bytes.extend([fill; 2048]);
        }
        bytes
    }

    fn opened(bytes: Vec<u8>) -> Result<Image> {
        open(&Bochs, Arc::new(MemoryDevice::new(bytes)), false)
    }

    #[test]
    fn written_sectors_are_data_and_all_others_read_as_zeroes() {
        for version in [Version::V1, Version::V2] {
            let image = opened(image(version)).unwrap();
            let mut expected = vec![0; 16384];
            expected[2048 + 512..2048 + 1536].fill(0x22);
            expected[14336..].fill(0x11);
            let mut disk = vec![0xff; 16384];
            image.read_at(&mut disk, 0).unwrap();
            assert_eq!(disk, expected);
            for (offset, len) in [(2047, 600), (2560 + 1, 510), (3583, 2), (14000, 2384), (0, 1)] {
                let mut part = vec![0xff; len];
                image.read_at(&mut part, offset as u64).unwrap();
                assert_eq!(part, expected[offset..offset + len], "{offset} {len}");
            }
        }
    }

    #[test]
    fn data_beyond_the_end_of_the_file_is_an_error() {
        let mut bytes = image(Version::V2);
        bytes[512 + 4 * 2..512 + 4 * 3].copy_from_slice(&77_u32.to_le_bytes());
        let image = opened(bytes).unwrap();
        let mut sector = [0; 512];
        assert_eq!(
            image.read_at(&mut sector, 4096).unwrap_err().kind(),
            ErrorKind::CutOff
        );
        image.read_at(&mut sector, 2048).unwrap();
    }

    #[test]
    fn a_last_sector_that_is_cut_off_is_an_error() {
        let mut bytes = image(Version::V2);
        // The last sector of the last extent was never written: the file ends inside the third sector.
        bytes.truncate(bytes.len() - 700);
        let image = opened(bytes).unwrap();
        let mut sector = [0xff; 512];
        image.read_at(&mut sector, 2560).unwrap();
        assert_eq!(sector, [0x22; 512]);
        let error = image.read_at(&mut sector, 3072).unwrap_err();
        assert!(error.chain().contains("looks cut off"), "{error}");
    }

    #[test]
    fn any_header_opens_or_is_refused_and_reads_without_a_panic() {
        let intact = image(Version::V2);
        for at in 64..96 {
            for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
                let mut bytes = intact.clone();
                bytes[at] = value;
                if let Ok(image) = opened(bytes) {
                    let len = image.len();
                    let mut sector = [0; 512];
                    for offset in [0, len / 2, len.saturating_sub(512)] {
                        // An error is fine, a panic is not.
                        drop(image.read_at(&mut sector, offset));
                    }
                }
            }
        }
    }

    #[test]
    fn opening_for_writing_is_refused() {
        let device = Arc::new(MemoryDevice::new(image(Version::V2)));
        let error = open(&Bochs, device, true).unwrap_err();
        assert_eq!(error.to_string(), "Image is read-only");
    }
}
