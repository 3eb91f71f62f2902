//! A decrypted view of a device: a read decrypts, a write encrypts.
//!
//! Each format numbers sectors by a rule of its own; it passes the number of the view's first sector. A write that
//! covers part of a sector reads the rest of the sector first. Such writes run one at a time.

use std::sync::{Arc, Mutex, PoisonError};

use crate::encryption::{SECTOR, SectorCipher};
use diskimage_core::{
    ByteRange, Device, Error, Extent, Limits, Preallocation, Result, StatusDetail, ZeroMode, align_down,
    align_up, is_zero, to_index,
};

/// The view.
#[derive(Debug)]
pub(crate) struct EncryptedDevice {
    below: Arc<dyn Device>,
    /// The offset on the device at which the view starts.
    start: u64,
    /// The number of the view's first sector.
    first_sector: u64,
    cipher: Arc<SectorCipher>,
    /// Whether an incomplete last sector reads as zeroes if the bytes that exist are zeroes.
    padded: bool,
    /// Held by writes that cover part of a sector.
    partial_write: Mutex<()>,
}

/// How many bytes are encrypted at once: it bounds the memory that a large request needs for its encrypted copy.
const CHUNK: usize = 1 << 20;

const UNIT: u64 = SECTOR as u64;

impl EncryptedDevice {
    /// Makes a view of `below` from byte `start` on, where the sector with number `first_sector` is. Sector numbers
    /// wrap around: if a caller uses only a later part of the view, its first number may be negative.
    pub(crate) fn new(
        below: Arc<dyn Device>,
        start: u64,
        first_sector: u64,
        cipher: Arc<SectorCipher>,
    ) -> Self {
        Self {
            below,
            start,
            first_sector,
            cipher,
            padded: false,
            partial_write: Mutex::new(()),
        }
    }

    /// Makes the length of `below` decide the view's length. An incomplete last sector was then never written, because
    /// a written sector is complete and never all zeroes once it is encrypted.
    pub(crate) fn padded(mut self) -> Self {
        self.padded = true;
        self
    }

    /// The offset in `below` of a byte of the view.
    fn offset_below(&self, offset: u64) -> Result<u64> {
        self.start
            .checked_add(offset)
            .ok_or_else(|| Error::from_errno(diskimage_core::errno::EFBIG))
    }

    /// The number of the sector at `offset`.
    fn sector(&self, offset: u64) -> u64 {
        self.first_sector.wrapping_add(offset / UNIT)
    }

    /// Reads whole sectors.
    fn read_sectors(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let at = self.offset_below(offset)?;
        if let Err(error) = self.below.require(at, buf.len() as u64) {
            // A part of a sector cannot be decrypted.
            let whole = align_down(self.below.len(), UNIT);
            let missing = len_of(whole, at.saturating_add(buf.len() as u64))?;
            if !self.padded || at > whole || missing > SECTOR {
                return Err(error);
            }
            self.below.read_padded(buf, at)?;
            if !is_zero(&buf[buf.len() - SECTOR..]) {
                return Err(error);
            }
        } else {
            self.below.read_at(buf, at)?;
        }
        self.cipher.decrypt(self.sector(offset), buf);
        Ok(())
    }

    /// Encrypts the whole sectors in `buf` and writes them.
    fn write_sectors(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.cipher.encrypt(self.sector(offset), buf);
        self.below.write_at(buf, self.offset_below(offset)?)
    }

    /// Writes `buf` over part of the sectors that it touches.
    fn write_part(&self, buf: &[u8], offset: u64) -> Result<()> {
        let _serialized = self.partial_write.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = whole_sectors(offset, buf.len());
        let mut sectors = vec![0; len_of(start, end)?];
        // Sectors beyond the end of the file have no old bytes to read.
        if self.offset_below(start)? < self.below.len() {
            self.read_sectors(&mut sectors, start)?;
        }
        let skip = len_of(start, offset)?;
        sectors[skip..skip + buf.len()].copy_from_slice(buf);
        self.write_sectors(&mut sectors, start)
    }
}

/// Start and end of the whole sectors around `len` bytes at `offset`.
fn whole_sectors(offset: u64, len: usize) -> (u64, u64) {
    (align_down(offset, UNIT), align_up(offset + len as u64, UNIT))
}

fn len_of(start: u64, end: u64) -> Result<usize> {
    to_index(end - start)
}

impl Device for EncryptedDevice {
    fn len(&self) -> u64 {
        let len = match self.padded {
            true => align_up(self.below.len(), UNIT),
            false => self.below.len(),
        };
        len.saturating_sub(self.start)
    }

    fn limits(&self) -> &Limits {
        self.below.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (start, end) = whole_sectors(offset, buf.len());
        if (start, end) == (offset, offset + buf.len() as u64) {
            return self.read_sectors(buf, offset);
        }
        let mut at = offset;
        for part in buf.chunks_mut(CHUNK) {
            let (start, end) = whole_sectors(at, part.len());
            let mut sectors = vec![0; len_of(start, end)?];
            self.read_sectors(&mut sectors, start)?;
            let skip = len_of(start, at)?;
            part.copy_from_slice(&sectors[skip..skip + part.len()]);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        // The partial sectors at both ends are written apart from the whole sectors between them.
        let head = len_of(offset, align_up(offset, UNIT))?.min(buf.len());
        let (head, rest) = buf.split_at(head);
        let (middle, tail) = rest.split_at(rest.len() - rest.len() % SECTOR);
        if !head.is_empty() {
            self.write_part(head, offset)?;
        }
        let mut at = offset + head.len() as u64;
        let mut space = vec![0; middle.len().min(CHUNK)];
        for part in middle.chunks(CHUNK) {
            let space = &mut space[..part.len()];
            space.copy_from_slice(part);
            self.write_sectors(space, at)?;
            at += part.len() as u64;
        }
        if !tail.is_empty() {
            self.write_part(tail, at)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if mode == ZeroMode::FastOnly {
            return Err(Error::unsupported("Zeroes have to be encrypted"));
        }
        (self as &dyn Device).write_zero_bytes(range)
    }

    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn status(&self, range: ByteRange, _detail: StatusDetail) -> Result<Extent> {
        Ok(Extent::data(range.len()))
    }

    fn flush(&self) -> Result<()> {
        self.below.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.below.resize(self.offset_below(len)?, preallocation)
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }

    fn is_view(&self) -> bool {
        true
    }
}
