//! Compressed grains.
//!
//! ```text
//!   |sector of the disk: 8|length: 4|zlib stream|padding to a sector|
//! ```
//!
//! A grain is written once, behind all others; tables in front of the grains map it. A sector of zeroes, the
//! end-of-stream marker, comes last. New images have the directory in front and no footer. Images of other programs may
//! have it behind the grains, with its offset in a footer; the footer's fields are copied to the header before such an
//! image is written to.

use std::ops::Range;
use std::sync::Arc;

use diskimage_core::{
    ByteRange, CompressionLevel, Device, Encoded, EncodedCluster, EncodedPlan, Encoder, Error, MemoryDevice,
    Preallocation, Result, WritePlan, WriteRun, errno, is_zero, to_index,
};
use zerocopy::IntoBytes;

use super::header::{self, Geometry, SECTOR, SECTOR_BYTES};
use super::tables::{Grain, GrainTables};
use super::write::NewGrains;
use super::{Extent, State, VmdkLayer, extent};
use crate::codec::{deflate, with_buffer};
use crate::layer_kit::allocating_plan::AllocatingPlan;
use crate::layer_kit::encoded_write::{self, EncodedWrite, Piece};

/// Bytes in front of a grain.
const MARKER: usize = 12;

/// The most bytes of a compressed grain that are accepted; incompressible data grows, but by less.
pub(super) fn most_stored(geometry: &Geometry) -> u64 {
    MARKER as u64 + geometry.grain * 2
}

/// An encoder for `image`.
pub(super) fn encoder(image: &VmdkLayer, level: Option<CompressionLevel>) -> Result<Box<dyn Encoder>> {
    if image.grain == 1 {
        return Err(Error::invalid("invalid cluster size"));
    }
    Ok(if image.compressed {
        Box::new(deflate::StreamEncoder::new(level))
    } else {
        // As in qemu-img, a compressed write to an image without compressed grains stores plain grains.
        Box::new(AsItIs)
    })
}

/// Leaves clusters uncompressed.
struct AsItIs;

impl Encoder for AsItIs {
    fn encode(&mut self, _cluster: &[u8], out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        Ok(false)
    }
}

/// Bytes of the compressed grain at `offset`, with the marker in front, which has the length.
pub(super) fn stored_len(device: &dyn Device, offset: u64) -> Result<u64> {
    let mut marker = [0; MARKER];
    device.read_padded(&mut marker, offset)?;
    let [.., a, b, c, d] = marker;
    Ok(MARKER as u64 + u64::from(u32::from_le_bytes([a, b, c, d])))
}

impl VmdkLayer {
    /// Decodes one grain.
    pub(super) fn decode_grain(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        with_buffer(|bytes| self.decode_and_keep_grain(encoded, buf, bytes)).map(drop)
    }

    /// Decodes one grain and keeps its stream, if that has all of the grain.
    pub(super) fn decode_and_keep_grain(
        &self,
        encoded: &Encoded,
        buf: &mut [u8],
        bytes: &mut Vec<u8>,
    ) -> Result<bool> {
        let damaged = || Error::from_errno(errno::EINVAL);
        let extents = self.extents();
        let (_, extent) = extent::at(&extents, encoded.cluster.start())?;
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
        bytes.resize(usize::try_from(len).map_err(|_| damaged())?, 0);
        extent.device.read_at(bytes, offset)?;
        let done = deflate::decode_stream(bytes, buf).map_err(|_| damaged())?;
        // The last grain may end with the disk.
        let wanted = ByteRange::new(encoded.cluster.start(), extent.end()).len();
        let wanted = to_index(wanted)?.min(buf.len());
        if done < wanted {
            return Err(damaged());
        }
        buf[done..].fill(0);
        Ok(done == buf.len())
    }

    /// Allocates storage for the encoded form of grains, behind all others.
    pub(super) fn plan_grains(&self, clusters: &[EncodedCluster]) -> Result<EncodedWrite<'_, Self>> {
        let (first, last) = encoded_write::in_order(clusters)?;
        let cover = ByteRange::new(first, last.saturating_add(self.grain));
        let mut pieces = Vec::with_capacity(clusters.len());
        let plan = AllocatingPlan::new(self, cover, |state, plan| {
            // Only now that the range is claimed: the disk may have grown while this request waited.
            let extents = self.extents();
            let (extent, geometry) = stream_of(&extents)?;
            extent.require_writable()?;
            for cluster in clusters {
                let grain = cluster.offset / geometry.grain;
                let only = ByteRange::at(grain, 1);
                let (found, _) = state.tables.scan(&extents, 0, &geometry, only)?;
                if found != Grain::Unallocated {
                    return Err(already_there());
                }
                self.require_table(state, &extents, 0, &geometry, grain)?;
                self.require_whole(state, &extents, 0, &geometry)?;
                self.mark_changed(state)?;
                let piece = self.allocate_encoded(state, grain, &cluster.bytes)?;
                let storage = ByteRange::at(piece.offset, piece.stored);
                plan.add_change(
                    ByteRange::at(cluster.offset, geometry.grain),
                    NewGrains::encoded(grain, storage),
                );
                pieces.push(piece);
            }
            Ok(())
        })?;
        Ok(EncodedWrite {
            plan,
            device: Arc::clone(&stream_of(&self.extents())?.0.device),
            pieces,
        })
    }

    /// Stores the encoded form of the grain at `guest`.
    fn append_grain(&self, guest: u64, bytes: &[u8]) -> Result<()> {
        let cluster = EncodedCluster {
            offset: guest,
            bytes: 0..bytes.len(),
        };
        Box::new(self.plan_grains(&[cluster])?).finish(bytes)
    }

    /// Stores the last grain of a disk again, at a new offset, with zeroes behind its first `used` bytes.
    pub(super) fn encode_again(&self, state: &mut State, grain: u64, offset: u64, used: u64) -> Result<()> {
        let extents = self.extents();
        let geometry = stream_of(&extents)?.1;
        let mut bytes = vec![0; to_index(geometry.grain)?];
        let encoded = Encoded {
            offset,
            stored: most_stored(&geometry),
            cluster: ByteRange::at(grain * geometry.grain, geometry.grain),
        };
        self.decode_grain(&encoded, &mut bytes)?;
        bytes[to_index(used)?..].fill(0);
        let mut out = Vec::new();
        deflate::StreamEncoder::new(None).encode(&bytes, &mut out)?;
        self.append(state, grain, &out)
    }

    /// Stores an encoded grain behind all others, and enters it in the tables.
    fn append(&self, state: &mut State, grain: u64, bytes: &[u8]) -> Result<()> {
        let extents = self.extents();
        let (extent, geometry) = stream_of(&extents)?;
        let piece = self.allocate_encoded(state, grain, &(0..bytes.len()))?;
        encoded_write::write(&*extent.device, std::slice::from_ref(&piece), bytes)?;
        let entry = u32::try_from(piece.offset / SECTOR).map_err(|_| Error::from_errno(errno::EFBIG))?;
        state.tables.set(&extents, 0, &geometry, grain, entry)
    }

    /// Allocates storage for an encoded grain, whose bytes are `bytes` of a buffer.
    fn allocate_encoded(&self, state: &mut State, grain: u64, bytes: &Range<usize>) -> Result<Piece> {
        let extents = self.extents();
        let (_, geometry) = stream_of(&extents)?;
        let no_room = || Error::from_errno(errno::EFBIG);
        let offset = *state.free.first().ok_or_else(no_room)?;
        u32::try_from(offset / SECTOR).map_err(|_| no_room())?;
        let len = u32::try_from(bytes.len()).map_err(|_| no_room())?;
        let mut head = (grain * geometry.grain / SECTOR).to_le_bytes().to_vec();
        head.extend_from_slice(&len.to_le_bytes());
        let stored = (MARKER as u64 + u64::from(len)).next_multiple_of(SECTOR);
        let storage = ByteRange::at(offset, stored);
        self.require_grains(state, &extents, 0, &geometry, storage)?;
        if let Some(free) = state.free.first_mut() {
            *free = storage.end();
        }
        Ok(Piece {
            offset,
            head,
            bytes: bytes.clone(),
            stored,
        })
    }

    /// Zeroes grains. Without a backing image, unallocated grains read as zero already.
    pub(super) fn zero_grains_encoded(&self, range: ByteRange) -> Result<()> {
        let extents = self.extents();
        let (extent, geometry) = stream_of(&extents)?;
        let grains = Self::grains(extent, &geometry, range);
        let (found, count) = self.lock().tables.scan(&extents, 0, &geometry, grains)?;
        let nothing_below = self.descriptor.parent.is_none();
        if nothing_below && found == Grain::Unallocated && count == grains.len() {
            return Ok(());
        }
        require_writable(self, extent, &geometry, range)?;
        let zeroes = vec![0; to_index(geometry.grain)?];
        let mut bytes = Vec::new();
        deflate::StreamEncoder::new(None).encode(&zeroes, &mut bytes)?;
        for grain in grains.start()..grains.end() {
            self.append_grain(grain * geometry.grain, &bytes)?;
        }
        Ok(())
    }

    /// Finds the offset of the next grain before the first write: that of the end-of-stream marker or the footer.
    ///
    /// New grains overwrite the footer, so the directory's offset is copied from it to the header first.
    pub(super) fn continue_stream(&self, state: &mut State) -> Result<()> {
        let extents = self.extents();
        let (extent, geometry) = stream_of(&extents)?;
        let (file, len) = (&*extent.device, extent.device.len());
        let header = header::read_at(file, 0)?;
        let end = if header.gd_offset.get() == header::GD_AT_END {
            let footer = header::read_footer(file, &header)?;
            file.write_at(footer.header.as_bytes(), 0)?;
            file.flush()?;
            file.resize(footer.start, Preallocation::Off)?;
            footer.start
        } else {
            let over_head = header.over_head.get().saturating_mul(SECTOR);
            let end = end_of_contents(&mut state.tables, &extents, 0, &geometry)?.max(over_head);
            // The end-of-stream marker, and padding behind it; on a device anything can follow.
            let rest = ByteRange::new(end, len);
            let is_end = (SECTOR..=header::MAX_PADDING).contains(&rest.len()) && reads_as_zero(file, rest)?;
            if !is_end && !extent.is_on_device() {
                return Ok(());
            }
            end
        };
        if let Some(free) = state.free.first_mut() {
            *free = end;
        }
        Ok(())
    }
}

/// Whether a range, which may be long, is zero.
fn reads_as_zero(file: &dyn Device, range: ByteRange) -> Result<bool> {
    let mut rest = range;
    let mut chunk = [0; 4096];
    while !rest.is_empty() {
        let part = rest.first(chunk.len() as u64);
        let bytes = &mut chunk[..to_index(part.len())?];
        file.read_at(bytes, part.start())?;
        if !is_zero(bytes) {
            return Ok(false);
        }
        rest = rest.skip(part.len());
    }
    Ok(true)
}

/// Whether a stream lacks the end-of-stream marker, which is a sector of zeroes.
pub(super) fn lacks_end(file: &dyn Device) -> Result<bool> {
    let mut tail = [0; SECTOR_BYTES];
    let start = file.len().saturating_sub(1) / SECTOR * SECTOR;
    file.read_padded(&mut tail, start)?;
    Ok(!is_zero(&tail))
}

/// The end of the last grain, table or descriptor in the file of a sparse extent, rounded up to whole sectors.
pub(super) fn end_of_contents(
    cache: &mut GrainTables,
    extents: &[Extent],
    index: usize,
    geometry: &Geometry,
) -> Result<u64> {
    let tables = geometry.tables();
    let mut end = geometry.descriptor.end().max(SECTOR);
    for directory in geometry.directories() {
        end = end.max(directory.saturating_add(tables * 4));
        for nth in 0..tables {
            let table = u64::from(cache.entry(extents, index, directory.saturating_add(nth * 4))?) * SECTOR;
            if table > 0 {
                end = end.max(table.saturating_add(geometry.entries * 4));
            }
        }
    }
    // Of compressed grains, only the last one's length is needed.
    let mut last = 0;
    let mut grains = ByteRange::new(0, geometry.capacity.div_ceil(geometry.grain));
    while !grains.is_empty() {
        let (found, count) = cache.scan(extents, index, geometry, grains)?;
        match found {
            Grain::At(offset) if geometry.compressed => last = last.max(offset),
            Grain::At(offset) => end = end.max(offset.saturating_add(count.saturating_mul(geometry.grain))),
            Grain::Unallocated | Grain::Zero => {}
        }
        grains = grains.skip(count);
    }
    if last > 0 {
        let device = super::tables::device_of(extents, index)?;
        end = end.max(last.saturating_add(stored_len(device, last)?));
    }
    Ok(end.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX))
}

/// Plans a write to `range`, which has to be whole grains. The data is staged in memory until it is encoded.
pub(super) fn plan(image: &VmdkLayer, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
    let extents = image.extents();
    let (extent, geometry) = stream_of(&extents)?;
    require_writable(image, extent, &geometry, range)?;
    let staged = Arc::new(MemoryDevice::new(vec![0; to_index(range.len())?]));
    let run = WriteRun {
        guest: range,
        device: Arc::<MemoryDevice>::clone(&staged),
        offset: 0,
    };
    Ok(Box::new(Staged {
        image,
        geometry,
        staged,
        run: [run],
    }))
}

/// Whole grains that are about to be encoded.
///
/// Not an [`AllocatingPlan`](crate::layer_kit::allocating_plan::AllocatingPlan): the storage of a grain depends on
/// encoded lengths, so it is allocated by `commit`, and nothing has to be claimed or freed before.
struct Staged<'a> {
    image: &'a VmdkLayer,
    geometry: Geometry,
    staged: Arc<MemoryDevice>,
    run: [WriteRun; 1],
}

impl WritePlan for Staged<'_> {
    fn runs(&self) -> &[WriteRun] {
        &self.run
    }

    fn commit(self: Box<Self>) -> Result<()> {
        let mut encoder = deflate::StreamEncoder::new(None);
        let mut out = Vec::new();
        let guest = self.run[0].guest;
        let mut grain = vec![0; to_index(self.geometry.grain)?];
        let mut rest = guest;
        while !rest.is_empty() {
            // The last grain may end with the disk.
            let part = rest.first(self.geometry.grain);
            grain.fill(0);
            self.staged
                .read_at(&mut grain[..to_index(part.len())?], part.start() - guest.start())?;
            encoder.encode(&grain, &mut out)?;
            self.image.append_grain(part.start(), &out)?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }
}

/// The error for a grain that is already allocated: compressed grains are written once.
fn already_there() -> Error {
    Error::invalid("Could not write to allocated cluster for streamOptimized").report_then(errno::EIO)
}

/// Refuses partial and allocated grains. The first such grain of `range` decides on the error.
fn require_writable(image: &VmdkLayer, extent: &Extent, geometry: &Geometry, range: ByteRange) -> Result<()> {
    extent.require_writable()?;
    let in_part = || Error::from_errno(errno::EINVAL);
    let whole = |at: u64| at.is_multiple_of(geometry.grain);
    let grains = VmdkLayer::grains(extent, geometry, range);
    let (found, count) = image.lock().tables.scan(&image.extents(), 0, geometry, grains)?;
    if found != Grain::Unallocated {
        return Err(already_there());
    }
    if !whole(range.start()) {
        return Err(in_part());
    }
    if count < grains.len() {
        return Err(already_there());
    }
    if !whole(range.end()) && range.end() != extent.end() {
        return Err(in_part());
    }
    Ok(())
}

/// The first extent, which has to be compressed. A compressed image that is open for writing has no other extent.
fn stream_of(extents: &[Extent]) -> Result<(&Extent, Geometry)> {
    let extent = extents.first();
    extent
        .and_then(|extent| Some((extent, extent.geometry().filter(|geometry| geometry.compressed)?)))
        .ok_or_else(|| Error::from_errno(errno::ENOTSUP))
}
