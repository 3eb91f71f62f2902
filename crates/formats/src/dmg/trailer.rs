//! The trailer, `koly`.

use diskimage_core::{ByteRange, Device, Error, MAX_DEVICE_LEN, Result, align_up, errno};

use super::chunk::SECTOR;
use super::invalid;

/// The ranges of the file's parts. All parts end before the trailer.
#[derive(Debug)]
pub(super) struct Trailer {
    /// The offset of the data fork.
    pub(super) data_offset: u64,
    /// The resource fork; empty if the file has none.
    pub(super) resources: ByteRange,
    /// The property list; empty if the file has none.
    pub(super) list: ByteRange,
    /// The disk's size in sectors.
    sectors: u64,
}

const MAGIC: &[u8] = b"koly";
const LEN: usize = 512;

impl Trailer {
    /// Searches for the trailer, which a raw disk does not have. It must end in the last or the last but one sector of
    /// the file.
    pub(super) fn find(file: &dyn Device, name: &str) -> Result<Option<Self>> {
        if file.is_empty() {
            return Err(Error::invalid("dmg file must be at least 512 bytes long"));
        }
        let start = align_up(file.len(), SECTOR).saturating_sub(2 * LEN as u64 - 1);
        let mut end = [0; LEN + MAGIC.len() - 1];
        file.read_padded(&mut end, start)?;
        let Some(at) = end.windows(MAGIC.len()).position(|bytes| bytes == MAGIC) else {
            return Ok(None);
        };
        let offset = start + at as u64;
        let mut trailer = [0; LEN];
        file.read_padded(&mut trailer, offset)?;
        let segments = u32::from_be_bytes([trailer[0x3c], trailer[0x3d], trailer[0x3e], trailer[0x3f]]);
        if segments > 1 {
            return Err(Error::unsupported(format!(
                "The image is in {segments} segments (.dmgpart), which is not supported: join them with `hdiutil convert`"
            )));
        }
        Self::parse(&trailer, offset)
            .map(Some)
            .ok_or_else(|| invalid(name))
    }

    fn parse(bytes: &[u8; LEN], offset: u64) -> Option<Self> {
        let number = |at: usize| {
            bytes
                .get(at..)?
                .first_chunk()
                .map(|bytes| u64::from_be_bytes(*bytes))
        };
        let part = |at: usize| {
            let (start, len) = (number(at)?, number(at + 8)?);
            let end = start.checked_add(len).filter(|end| *end <= offset)?;
            Some(ByteRange::new(start, end))
        };
        Some(Self {
            data_offset: part(0x18)?.start(),
            resources: part(0x28)?,
            list: part(0xd8)?,
            sectors: number(0x1ec).filter(|sectors| i64::try_from(*sectors).is_ok())?,
        })
    }

    /// The disk's size in bytes.
    pub(super) fn len(&self) -> Result<u64> {
        self.sectors
            .checked_mul(SECTOR)
            .filter(|len| *len <= MAX_DEVICE_LEN)
            .ok_or_else(|| Error::from_errno(errno::EFBIG).context("Could not refresh total sector count"))
    }
}
