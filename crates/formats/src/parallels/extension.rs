//! The Format Extension: one cluster with dirty bitmaps, which mark the parts of the disk written since a backup.
//!
//! ```text
//!   | magic | checksum | magic flags data_size | data ... | magic flags data_size | data ... | 0
//!     8 B     16 B       a feature                          another
//! ```

use std::sync::Arc;

use crate::encryption::HashAlg;
use diskimage_core::{
    BitmapInfo, Bitmaps, Budget, ByteRange, Device, Error, ErrorKind, NewBitmap, Reservation, Result, errno,
    to_index,
};

use super::header::{Header, SECTOR};

/// The first bytes of the cluster.
const MAGIC: u64 = 0xab23_4cef_23dc_ea87;
/// Bytes of the largest cluster whose bitmaps are read: it is in memory whole. A limit of this program; clusters have a
/// mebibyte as a rule.
const MAX_CLUSTER: u64 = 16 << 20;
/// Bytes of the magic and the checksum.
const HEAD: usize = 24;
/// The magic that ends the list of features.
const END: u64 = 0;
/// The magic of a feature that is a dirty bitmap.
const DIRTY_BITMAP: u64 = 0x2038_5fae_252c_b34a;
/// Bytes of a feature's header, in front of its data.
const FEATURE_HEAD: usize = 24;
/// Bytes of a bitmap's header, in front of its table.
const BITMAP_HEAD: usize = 32;
/// How many sectors a bit covers at most: qemu-img's limit, as its granularity in bytes has 32 bits.
const MAX_GRANULARITY: u32 = 1 << 22;
/// The buffer size when a bitmap is read.
const CHUNK: usize = 64 << 10;

/// The dirty bitmaps of an image that is open for reading.
#[derive(Debug)]
pub(super) struct Extension {
    file: Arc<dyn Device>,
    /// Bytes of the disk.
    size: u64,
    cluster: u64,
    bitmaps: Vec<DirtyBitmap>,
    _memory: Reservation,
}

#[derive(Debug)]
struct DirtyBitmap {
    name: String,
    /// Bytes of the disk that a bit covers.
    granularity: u64,
    /// An entry for each cluster of the bitmap: 0 no bit is set, 1 all are set, else its offset in sectors.
    table: Vec<u64>,
}

impl Extension {
    /// Reads the Format Extension in the cluster at `offset`.
    pub(super) fn read(
        file: &Arc<dyn Device>,
        header: &Header,
        offset: u64,
        budget: &Budget,
    ) -> Result<Self> {
        if header.cluster > MAX_CLUSTER {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("Bitmaps in clusters of more than {MAX_CLUSTER} bytes are not supported"),
            ));
        }
        // The bytes of the cluster, and the tables parsed from them, which are no longer.
        let memory = budget.reserve(header.cluster.saturating_mul(2))?;
        let mut bytes = vec![0; to_index(header.cluster)?];
        file.read_padded(&mut bytes, offset)?;
        Ok(Self {
            bitmaps: parse(&bytes, header)?,
            file: Arc::clone(file),
            size: header.size,
            cluster: header.cluster,
            _memory: memory,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bitmaps.is_empty()
    }

    fn bitmap(&self, name: &str) -> Result<&DirtyBitmap> {
        let found = self.bitmaps.iter().find(|bitmap| bitmap.name == name);
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found")))
    }
}

/// Parses the features.
fn parse(bytes: &[u8], header: &Header) -> Result<Vec<DirtyBitmap>> {
    let magic = u64_at(bytes, 0)?;
    if magic != MAGIC {
        return Err(Error::invalid(format!(
            "Wrong parallels Format Extension magic: {magic:#x}, expected: {MAGIC:#x}"
        )));
    }
    let (head, mut rest) = bytes.split_at(HEAD);
    if HashAlg::Md5.digest(&[rest])[..] != head[8..] {
        return Err(Error::invalid(
            "Wrong checksum in Format Extension header. Format extension is corrupted.",
        ));
    }
    let mut bitmaps = Vec::new();
    loop {
        let Some((head, data)) = rest.split_at_checked(FEATURE_HEAD) else {
            return Err(Error::invalid("Can't load feature header from Format Extension"));
        };
        let (magic, flags) = (u64_at(head, 0)?, u64_at(head, 8)?);
        if magic == END {
            return Ok(bitmaps);
        }
        if flags != 0 {
            return Err(Error::invalid("Flags for extension feature are unsupported"));
        }
        let size = to_index(u32_at(head, 16)?.into())?;
        let Some((data, behind)) = data.split_at_checked(size) else {
            return Err(Error::invalid(
                "Feature data_size exceedes Format Extension cluster",
            ));
        };
        if magic != DIRTY_BITMAP {
            return Err(Error::invalid(format!("Unknown feature: {magic:#x}")));
        }
        bitmaps.push(dirty_bitmap(data, header)?);
        let padding = size.next_multiple_of(8) - size;
        // Without room for the padding there is no next header: an error above.
        rest = behind.get(padding..).unwrap_or_default();
    }
}

/// Parses the data of a dirty bitmap feature.
fn dirty_bitmap(data: &[u8], header: &Header) -> Result<DirtyBitmap> {
    let Some((head, table)) = data.split_at_checked(BITMAP_HEAD) else {
        return Err(Error::invalid(format!(
            "Too small Bitmap Feature area in Parallels Format Extension: {} bytes, expected at least \
             {BITMAP_HEAD} bytes",
            data.len()
        )));
    };
    let (size, sectors) = (u64_at(head, 0)?, header.size / SECTOR);
    if size != sectors {
        return Err(Error::invalid(format!(
            "Bitmap size (in sectors) {size} differs from disk size in sectors {sectors}"
        )));
    }
    let granularity = u32_at(head, 24)?;
    if !granularity.is_power_of_two() || granularity > MAX_GRANULARITY {
        return Err(Error::invalid(format!(
            "Bitmap granularity (in sectors) {granularity} is no power of two up to {MAX_GRANULARITY}"
        )));
    }
    let granularity = u64::from(granularity) * SECTOR;
    let len = to_index(u32_at(head, 28)?.into())?;
    let (table, _) = table.as_chunks();
    let Some(table) = table.get(..len) else {
        return Err(Error::invalid(
            "Bitmaps feature corrupted: l1 table exceeds extension data_size",
        ));
    };
    let needed = header
        .size
        .div_ceil(granularity)
        .div_ceil(8)
        .div_ceil(header.cluster);
    if len as u64 != needed {
        return Err(Error::invalid(format!(
            "Bitmap table size {len} does not correspond to bitmap size and cluster size. Expected {needed}"
        )));
    }
    Ok(DirtyBitmap {
        name: uuid(&head[8..24]),
        granularity,
        table: table.iter().map(|entry| u64::from_le_bytes(*entry)).collect(),
    })
}

/// The text form of a UUID.
fn uuid(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The little-endian `u64` at `at`.
fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    let found = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    found
        .map(|bytes| u64::from_le_bytes(*bytes))
        .ok_or_else(|| Error::invalid("Can't load feature header from Format Extension"))
}

/// The little-endian `u32` at `at`.
fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    let found = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    found
        .map(|bytes| u32::from_le_bytes(*bytes))
        .ok_or_else(|| Error::invalid("Can't load feature header from Format Extension"))
}

/// The bitmaps are read only: an image that is open for writing has no extension.
impl Bitmaps for Extension {
    fn list(&self) -> Result<Vec<BitmapInfo>> {
        let info = |bitmap: &DirtyBitmap| BitmapInfo {
            name: bitmap.name.clone(),
            granularity: bitmap.granularity,
            enabled: false,
            inconsistent: false,
        };
        Ok(self.bitmaps.iter().map(info).collect())
    }

    fn bytes(&self, _cluster_size: u64) -> Result<u64> {
        // qemu-img does not count them.
        Ok(0)
    }

    fn add(&self, _bitmap: &NewBitmap<'_>) -> Result<()> {
        Err(Error::read_only())
    }

    fn remove(&self, _name: &str) -> Result<()> {
        Err(Error::read_only())
    }

    fn clear(&self, _name: &str) -> Result<()> {
        Err(Error::read_only())
    }

    fn set_enabled(&self, _name: &str, _enabled: bool) -> Result<()> {
        Err(Error::read_only())
    }

    fn mark(&self, _name: &str, _ranges: &[ByteRange]) -> Result<()> {
        Err(Error::read_only())
    }

    fn marked(&self, name: &str, visit: &mut dyn FnMut(ByteRange) -> Result<()>) -> Result<()> {
        let bitmap = self.bitmap(name)?;
        let disk = ByteRange::new(0, self.size);
        let granules = self.size.div_ceil(bitmap.granularity);
        let mut marked = |from: u64, to: u64| {
            let start = from.saturating_mul(bitmap.granularity);
            let range =
                ByteRange::new(start, to.saturating_mul(bitmap.granularity).max(start)).intersect(disk);
            if range.is_empty() { Ok(()) } else { visit(range) }
        };
        // The bits in a cluster of the bitmap.
        let bits = self.cluster.saturating_mul(8);
        for (index, entry) in (0_u64..).zip(&bitmap.table) {
            let first = index.saturating_mul(bits);
            let end = first.saturating_add(bits).min(granules);
            let offset = match entry {
                0 => continue,
                1 => {
                    marked(first, end)?;
                    continue;
                }
                sector => sector
                    .checked_mul(SECTOR)
                    .ok_or_else(|| Error::from_errno(errno::EINVAL))?,
            };
            let mut bytes = [0; CHUNK];
            let mut at = first;
            while at < end {
                let len = to_index((end - at).div_ceil(8))?.min(CHUNK);
                let chunk = &mut bytes[..len];
                let from = offset
                    .checked_add((at - first) / 8)
                    .ok_or_else(|| Error::from_errno(errno::EINVAL))?;
                self.file.read_at(chunk, from)?;
                let mut run = None;
                let chunk_end = at.saturating_add(len as u64 * 8).min(end);
                for bit in at..chunk_end {
                    let of_chunk = bit - at;
                    let byte = chunk[to_index(of_chunk / 8)?];
                    match (byte >> (of_chunk % 8) & 1, run) {
                        (1, None) => run = Some(bit),
                        (0, Some(start)) => {
                            marked(start, bit)?;
                            run = None;
                        }
                        _ => {}
                    }
                }
                if let Some(start) = run {
                    marked(start, chunk_end)?;
                }
                at = chunk_end;
            }
        }
        Ok(())
    }
}
