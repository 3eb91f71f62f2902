//! A decrypted view of a device: what is read is decrypted, what is written is encrypted on its way.
//!
//! Each format numbers sectors by a rule of its own: it says which number the view's first sector has. A write that covers part of a sector reads the rest of it first, one
//! such write at a time.

use std::sync::{Arc, Mutex, PoisonError};

use crate::encryption::{SECTOR, SectorCipher};
use diskimage_core::{
    ByteRange, Device, Error, Extent, ExtentKind, Limits, Preallocation, Result, StatusDetail, ZeroMode,
    align_down, align_up, is_zero,
};

/// The view.
#[derive(Debug)]
pub(crate) struct EncryptedDevice {
    below: Arc<dyn Device>,
    /// Where on the device the view starts.
    start: u64,
    /// The number of the sector that the view starts with.
    first_sector: u64,
    cipher: Arc<SectorCipher>,
    /// Whether a last sector that is not whole is filled up with zeroes, if what there is of it is zeroes, too.
    padded: bool,
    /// Held by writes of parts of sectors.
    partial: Mutex<()>,
}

/// How many bytes are encrypted at once, so that large requests do not take as much memory again.
const CHUNK: usize = 1 << 20;

const UNIT: u64 = SECTOR as u64;

impl EncryptedDevice {
    /// The view of what follows byte `start` of `below`, where sector `first_sector` is. Numbers wrap around: where only
    /// a part of the view is used, it may start at one below zero.
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
            partial: Mutex::new(()),
        }
    }

    /// The same, where nothing but the length of `below` says how long the view is. So a last sector that is not whole has
    /// never been written: a written one is whole, and never all zeroes.
    pub(crate) fn padded(mut self) -> Self {
        self.padded = true;
        self
    }

    fn place(&self, offset: u64) -> Result<u64> {
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
        let place = self.place(offset)?;
        if let Err(error) = self.below.require(place, buf.len() as u64) {
            // A part of a sector cannot be decrypted.
            let whole = align_down(self.below.len(), UNIT);
            let lacks = len_of(whole, place.saturating_add(buf.len() as u64));
            if !self.padded || place > whole || lacks > SECTOR {
                return Err(error);
            }
            self.below.read_padded(buf, place)?;
            if !is_zero(&buf[buf.len() - SECTOR..]) {
                return Err(error);
            }
        } else {
            self.below.read_at(buf, place)?;
        }
        self.cipher.decrypt(self.sector(offset), buf);
        Ok(())
    }

    /// Encrypts `buf`, which are whole sectors, and writes them.
    fn write_sectors(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.cipher.encrypt(self.sector(offset), buf);
        self.below.write_at(buf, self.place(offset)?)
    }

    /// Writes part of the sectors that `range` touches.
    fn write_part(&self, buf: &[u8], offset: u64) -> Result<()> {
        let _alone = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = whole_sectors(offset, buf.len());
        let mut sectors = vec![0; len_of(start, end)];
        // Sectors that a file has not got yet are about to be written.
        if self.place(start)? < self.below.len() {
            self.read_sectors(&mut sectors, start)?;
        }
        let skip = len_of(start, offset);
        sectors[skip..skip + buf.len()].copy_from_slice(buf);
        self.write_sectors(&mut sectors, start)
    }
}

/// The whole sectors around `len` bytes at `offset`.
fn whole_sectors(offset: u64, len: usize) -> (u64, u64) {
    (align_down(offset, UNIT), align_up(offset + len as u64, UNIT))
}

fn len_of(start: u64, end: u64) -> usize {
    usize::try_from(end - start).unwrap_or(usize::MAX)
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
            let mut sectors = vec![0; len_of(start, end)];
            self.read_sectors(&mut sectors, start)?;
            let skip = len_of(start, at);
            part.copy_from_slice(&sectors[skip..skip + part.len()]);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        // The parts of sectors at both ends, and what is between.
        let head = len_of(offset, align_up(offset, UNIT)).min(buf.len());
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
        Ok(Extent {
            len: range.len(),
            kind: ExtentKind::Data,
            depth: 0,
            host: None,
        })
    }

    fn flush(&self) -> Result<()> {
        self.below.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.below.resize(self.place(len)?, preallocation)
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }

    fn is_view(&self) -> bool {
        true
    }
}
