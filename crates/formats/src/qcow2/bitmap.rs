//! The directory of persistent bitmaps.
//!
//! ```text
//!   0 bitmap_table_offset   8 bitmap_table_size   12 flags   16 type   17 granularity_bits
//!  18 name_size            20 extra_data_size     24 extra data, name, padding to 8
//! ```

use diskimage_core::{Detail, DetailValue, Error, ErrorKind, Result};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Qcow2;
use super::feature::Autoclear;

/// The fixed part of a directory entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawBitmap {
    /// Where its table starts.
    pub(super) table_offset: U64,
    /// Entries of that table.
    pub(super) table_size: U32,
    /// In use, auto.
    pub(super) flags: U32,
    /// 1, a dirty bitmap.
    pub(super) kind: u8,
    /// One bit stands for 1 shifted by this bytes.
    pub(super) granularity_bits: u8,
    /// Bytes of the name.
    pub(super) name_size: U16,
    /// Bytes of extra data.
    pub(super) extra_data_size: U32,
}

const _: () = assert!(size_of::<RawBitmap>() == 24);

/// A bitmap of the directory.
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    pub(super) raw: RawBitmap,
    pub(super) name: String,
}

const FLAG_IN_USE: u32 = 1 << 0;
const FLAG_AUTO: u32 = 1 << 1;

/// Limits of the original.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_NAME: usize = 1023;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

impl Qcow2 {
    /// Whether the image has bitmaps that can be relied on.
    pub(super) fn has_bitmaps(&self) -> bool {
        let extension = self.header.extensions.bitmaps;
        extension.is_some_and(|bitmaps| bitmaps.nb_bitmaps.get() > 0)
            && self.header.features.autoclear.has(Autoclear::BITMAPS)
    }

    /// The bitmaps of the directory.
    ///
    /// # Errors
    /// A directory that is too large or does not hold together.
    pub(super) fn read_bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(extension) = self.header.extensions.bitmaps.filter(|_| self.has_bitmaps()) else {
            return Ok(Vec::new());
        };
        let len = extension.directory_size.get();
        if extension.nb_bitmaps.get() > MAX_BITMAPS || len > MAX_DIRECTORY {
            return Err(Error::new(ErrorKind::Limit, "Too many bitmaps"));
        }
        let _memory = self.budget.take(len)?;
        let offset = extension.directory_offset.get();
        self.file.require(offset, len)?;
        let mut directory = vec![0; usize::try_from(len).unwrap_or(0)];
        self.file.read_at(&mut directory, offset)?;
        let mut found = Vec::new();
        let mut rest = directory.as_slice();
        while !rest.is_empty() {
            let (bitmap, len) =
                parse_entry(rest).ok_or_else(|| Error::corrupt("Bitmap doesn't satisfy the constraints"))?;
            found.push(bitmap);
            rest = rest.get(len..).unwrap_or(&[]);
        }
        if found.len() as u64 != u64::from(extension.nb_bitmaps.get()) {
            return Err(Error::corrupt(
                "Less bitmaps found than specified in header extension",
            ));
        }
        Ok(found)
    }

    /// The bitmaps as facts to print; `None` if there are none.
    pub(super) fn bitmap_details(&self) -> Result<Option<DetailValue>> {
        let bitmaps = self.read_bitmaps()?;
        if bitmaps.is_empty() {
            return Ok(None);
        }
        let one = |bitmap: &Bitmap| {
            let flag = |bit, name: &str| {
                (bitmap.raw.flags.get() & bit != 0).then(|| DetailValue::Text(name.to_owned()))
            };
            let flags = [flag(FLAG_IN_USE, "in-use"), flag(FLAG_AUTO, "auto")]
                .into_iter()
                .flatten()
                .collect();
            DetailValue::Group(vec![
                Detail {
                    name: "flags",
                    value: DetailValue::List(flags),
                },
                Detail::text("name", bitmap.name.clone()),
                Detail::number("granularity", 1 << bitmap.raw.granularity_bits),
            ])
        };
        Ok(Some(DetailValue::List(bitmaps.iter().map(one).collect())))
    }

    /// Bytes that the bitmaps take in a copy with clusters of `cluster_size`; `None` for a version without them.
    pub(super) fn measure_bitmaps(&self, cluster_size: u64) -> Result<Option<u64>> {
        if self.header.version < 3 {
            return Ok(None);
        }
        let size = self.lock().size;
        let (mut clusters, mut directory) = (0, 0);
        for bitmap in self.read_bitmaps()? {
            let bits = size.div_ceil(1 << bitmap.raw.granularity_bits);
            let data = bits.div_ceil(8).div_ceil(cluster_size);
            clusters += data + (data * 8).div_ceil(cluster_size);
            directory += (size_of::<RawBitmap>() + bitmap.name.len()).next_multiple_of(8) as u64;
        }
        Ok(Some((clusters + directory.div_ceil(cluster_size)) * cluster_size))
    }
}

fn parse_entry(bytes: &[u8]) -> Option<(Bitmap, usize)> {
    let (raw, rest) = RawBitmap::read_from_prefix(bytes).ok()?;
    let extra = usize::try_from(raw.extra_data_size.get()).ok()?;
    let name = rest.get(extra..)?.get(..usize::from(raw.name_size.get()))?;
    if raw.kind != 1
        || !GRANULARITY_BITS.contains(&raw.granularity_bits)
        || name.is_empty()
        || name.len() > MAX_NAME
    {
        return None;
    }
    let len = (size_of::<RawBitmap>() + extra + name.len()).next_multiple_of(8);
    Some((
        Bitmap {
            raw,
            name: String::from_utf8_lossy(name).into_owned(),
        },
        len,
    ))
}
