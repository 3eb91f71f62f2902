//! Compressed grains.
//!
//! ```text
//!   |sector of the disk: 8|length: 4|zlib stream|padding to a sector|
//! ```
//!
//! A grain is written once, after all others; the tables in front of the grains lead to it. A sector of zeroes, the
//! end-of-stream marker, comes last. With the directory in front there is no footer; images that others made with the
//! directory behind the grains are read by their footer.

use diskimage_core::{ByteRange, Encoded, Encoder, Error, Result, errno};

use super::header::{Geometry, SECTOR, SECTOR_BYTES};
use super::tables::Grain;
use super::{Extent, VmdkLayer};
use crate::codec::deflate;

/// Bytes in front of a grain.
const MARKER: usize = 12;

/// How much a grain takes at most: what does not compress gets a little longer.
pub(super) fn most_stored(geometry: &Geometry) -> u64 {
    MARKER as u64 + geometry.grain * 2
}

/// An encoder for `image`.
pub(super) fn encoder(image: &VmdkLayer) -> Result<Box<dyn Encoder>> {
    if image.grain == 1 {
        return Err(Error::invalid("invalid cluster size"));
    }
    Ok(if image.compressed {
        Box::new(deflate::StreamEncoder::new())
    } else {
        // As the original takes it: the grains of these images are as they are.
        Box::new(AsItIs)
    })
}

/// Leaves clusters as they are.
struct AsItIs;

impl Encoder for AsItIs {
    fn encode(&mut self, _cluster: &[u8], out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        Ok(false)
    }
}

impl VmdkLayer {
    /// Decodes one grain.
    pub(super) fn decode_grain(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        let damaged = || Error::from_errno(errno::EINVAL);
        let (_, extent) = self.extent_at(encoded.cluster.start())?;
        let mut marker = [0; MARKER];
        extent.device.require(encoded.offset, MARKER as u64)?;
        extent.device.read_at(&mut marker, encoded.offset)?;
        let [.., a, b, c, d] = marker;
        let len = u32::from_le_bytes([a, b, c, d]);
        if len == 0 || u64::from(len) > encoded.stored {
            return Err(damaged());
        }
        let offset = encoded.offset + MARKER as u64;
        extent.device.require(offset, len.into()).map_err(|_| damaged())?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| damaged())?];
        extent.device.read_at(&mut bytes, offset)?;
        let done = deflate::decode_stream(&bytes, buf).map_err(|_| damaged())?;
        // The last grain may end with the disk.
        let wanted = ByteRange::new(encoded.cluster.start(), extent.end()).len();
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(buf.len());
        if done < wanted {
            return Err(damaged());
        }
        buf[done..].fill(0);
        Ok(())
    }

    /// Stores the encoded form of the grain at `guest`.
    pub(super) fn append_grain(&self, guest: u64, bytes: &[u8]) -> Result<()> {
        let (index, extent, geometry) = self.only_extent()?;
        let grain = guest / geometry.grain;
        let mut state = self.lock();
        let only = ByteRange::at(grain, 1);
        let (found, _) = state.tables.scan(&self.extents, index, &geometry, only)?;
        if found != Grain::Unallocated {
            return Err(Error::from_errno(errno::EIO)
                .context("Could not write to allocated cluster for streamOptimized"));
        }
        state
            .tables
            .require_table(&self.extents, index, &geometry, grain)?;
        self.mark_changed(&mut state)?;
        let no_room = || Error::from_errno(errno::EFBIG);
        let offset = *state.free.get(index).ok_or_else(no_room)?;
        let entry = u32::try_from(offset / SECTOR).map_err(|_| no_room())?;
        let len = u32::try_from(bytes.len()).map_err(|_| no_room())?;
        let mut stored = (guest / SECTOR).to_le_bytes().to_vec();
        stored.extend_from_slice(&len.to_le_bytes());
        stored.extend_from_slice(bytes);
        stored.resize(stored.len().next_multiple_of(SECTOR_BYTES), 0);
        extent.device.write_at(&stored, offset)?;
        if let Some(free) = state.free.get_mut(index) {
            *free = offset + stored.len() as u64;
        }
        state.tables.set(&self.extents, index, &geometry, grain, entry)
    }

    /// Makes grains zero: those that are not there read as zero if no image below has them.
    pub(super) fn zero_grains_encoded(&self, range: ByteRange) -> Result<()> {
        let (index, extent, geometry) = self.only_extent()?;
        let grains = Self::grains(extent, &geometry, range);
        let (found, count) = self.lock().tables.scan(&self.extents, index, &geometry, grains)?;
        let nothing_below = self.descriptor.parent.is_none();
        if nothing_below && found == Grain::Unallocated && count == grains.len() {
            return Ok(());
        }
        let zeroes = vec![0; usize::try_from(geometry.grain).unwrap_or(0)];
        let mut bytes = Vec::new();
        deflate::StreamEncoder::new().encode(&zeroes, &mut bytes)?;
        for grain in grains.start()..grains.end() {
            self.append_grain(grain * geometry.grain, &bytes)?;
        }
        Ok(())
    }

    /// The extent of an image with compressed grains.
    fn only_extent(&self) -> Result<(usize, &Extent, Geometry)> {
        let extent = self.extents.first();
        extent
            .and_then(|extent| {
                Some((
                    0,
                    extent,
                    extent.geometry().filter(|geometry| geometry.compressed)?,
                ))
            })
            .ok_or_else(|| Error::from_errno(errno::ENOTSUP))
    }
}
