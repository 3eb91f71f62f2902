//! The refcounts that the image has stored: its refcount table, and what the blocks say.

use diskimage_core::{Budget, Device, Error, Reservation, Result};

use crate::qcow2::header::{Geometry, Header};
use crate::qcow2::refcount::block;

/// Where a refcount block is, according to the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: every count is zero.
    None,
    /// At this offset.
    At(u64),
    /// The entry cannot be right.
    Unaligned(u64),
}

/// The refcount table in memory, and the block looked at last.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    geometry: Geometry,
    last: Option<u64>,
    bytes: Vec<u8>,
    _memory: Reservation,
}

/// Offsets in the refcount table.
pub(super) const OFFSET_MASK: u64 = !0x1ff;

impl Stored {
    /// Reads the table, whose length the header has checked. What lies beyond the end of the file reads as zero, as for
    /// the original.
    pub(super) fn read(file: &dyn Device, header: &Header, budget: &Budget) -> Result<Self> {
        let geometry = header.geometry;
        let len = u64::from(header.refcount_table_clusters) << geometry.cluster_bits;
        let memory = budget.reserve(2 * len + geometry.cluster_size())?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_padded(&mut bytes, header.refcount_table_offset)?;
        let (words, _) = bytes.as_chunks();
        Ok(Self {
            table: words.iter().map(|word| u64::from_be_bytes(*word)).collect(),
            table_offset: header.refcount_table_offset,
            geometry,
            last: None,
            bytes: Vec::new(),
            _memory: memory,
        })
    }

    /// Where block `index` is.
    pub(super) fn place(&self, index: u64) -> Place {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        match entry.map_or(0, |entry| entry & OFFSET_MASK) {
            0 => Place::None,
            offset if offset.is_multiple_of(self.geometry.cluster_size()) => Place::At(offset),
            offset => Place::Unaligned(offset),
        }
    }

    /// The bytes of block `index`, to be given back by [`Stored::give_back`] as they are in the file; `None` if every
    /// count is zero.
    pub(super) fn take_block(&mut self, file: &dyn Device, index: u64) -> Result<Option<Vec<u8>>> {
        let Place::At(offset) = self.place(index) else {
            return Ok(None);
        };
        let mut bytes = std::mem::take(&mut self.bytes);
        if self.last != Some(index) {
            bytes.resize(usize::try_from(self.geometry.cluster_size()).unwrap_or(0), 0);
            self.last = None;
            file.read_padded(&mut bytes, offset)?;
            self.last = Some(index);
        }
        Ok(Some(bytes))
    }

    pub(super) fn give_back(&mut self, bytes: Vec<u8>) {
        self.bytes = bytes;
    }

    /// The stored count of `cluster`; `None` if the table does not lead to it.
    pub(super) fn count(&mut self, file: &dyn Device, cluster: u64) -> Result<Option<u64>> {
        let per_block = self.geometry.refcount_block_entries();
        let index = cluster / per_block;
        if let Place::Unaligned(_) = self.place(index) {
            return Ok(None);
        }
        let Some(bytes) = self.take_block(file, index)? else {
            return Ok(Some(0));
        };
        let count = read(&bytes, cluster % per_block, self.geometry.refcount_order);
        self.give_back(bytes);
        count.map(Some)
    }
}

/// Entry `index` of a block.
pub(super) fn read(bytes: &[u8], index: u64, order: u32) -> Result<u64> {
    let place = block::Place::new(index, order);
    usize::try_from(place.byte)
        .ok()
        .and_then(|at| block::read(bytes.get(at..)?, place, order))
        .ok_or_else(outside)
}

/// Changes entry `index` of a block.
pub(super) fn write(bytes: &mut [u8], index: u64, order: u32, count: u64) -> Result<()> {
    let place = block::Place::new(index, order);
    usize::try_from(place.byte)
        .ok()
        .and_then(|at| block::write(bytes.get_mut(at..)?, place, order, count))
        .ok_or_else(outside)
}

fn outside() -> Error {
    Error::corrupt("Refcount block too short")
}
