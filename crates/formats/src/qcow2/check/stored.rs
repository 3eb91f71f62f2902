//! The stored refcounts: the refcount table and its blocks.

use diskimage_core::{Budget, Device, Error, Reservation, Result, to_index};

use crate::layer_kit::offset::{ClusterIndex, HostOffset};
use crate::qcow2::header::{Geometry, Header};
use crate::qcow2::refcount::block;

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockEntry {
    /// No block: every refcount is zero.
    None,
    /// The offset of the block.
    At(HostOffset),
    /// An invalid offset.
    Unaligned(u64),
}

/// The refcount table in memory, and the block that was read last.
#[derive(Debug)]
pub(super) struct StoredRefcounts {
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    geometry: Geometry,
    last: Option<u64>,
    bytes: Vec<u8>,
    _memory: Reservation,
}

/// The bits of a refcount table entry that hold an offset.
pub(super) const OFFSET_MASK: u64 = !0x1ff;

impl StoredRefcounts {
    /// Reads the table. Parsing the header has checked its length. Bytes beyond the end of the file read as zeroes, as
    /// in qemu-img.
    pub(super) fn read(file: &dyn Device, header: &Header, budget: &Budget) -> Result<Self> {
        let geometry = header.geometry;
        let len = u64::from(header.refcount_table_clusters) << geometry.cluster_bits;
        let memory = budget.reserve(2 * len + geometry.cluster_size())?;
        let mut bytes = vec![0; to_index(len)?];
        file.read_padded(&mut bytes, header.refcount_table_offset)?;
        let (entries, _) = bytes.as_chunks();
        Ok(Self {
            table: entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect(),
            table_offset: header.refcount_table_offset,
            geometry,
            last: None,
            bytes: Vec::new(),
            _memory: memory,
        })
    }

    /// Entry `index` of the refcount table.
    pub(super) fn block_entry(&self, index: u64) -> BlockEntry {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        match entry.map_or(0, |entry| entry & OFFSET_MASK) {
            0 => BlockEntry::None,
            offset if offset.is_multiple_of(self.geometry.cluster_size()) => {
                BlockEntry::At(HostOffset::new(offset))
            }
            offset => BlockEntry::Unaligned(offset),
        }
    }

    /// Takes the bytes of block `index` out of the buffer; the caller returns them with
    /// [`StoredRefcounts::return_block`], equal to those in the file. `None` if the image has no such block.
    pub(super) fn take_block(&mut self, file: &dyn Device, index: u64) -> Result<Option<Vec<u8>>> {
        let BlockEntry::At(offset) = self.block_entry(index) else {
            return Ok(None);
        };
        let mut bytes = std::mem::take(&mut self.bytes);
        if self.last != Some(index) {
            bytes.resize(to_index(self.geometry.cluster_size())?, 0);
            self.last = None;
            file.read_padded(&mut bytes, offset.get())?;
            self.last = Some(index);
        }
        Ok(Some(bytes))
    }

    pub(super) fn return_block(&mut self, bytes: Vec<u8>) {
        self.bytes = bytes;
    }

    /// The stored refcount of `cluster`; `None` if the entry of its block is invalid.
    pub(super) fn count(&mut self, file: &dyn Device, cluster: ClusterIndex) -> Result<Option<u64>> {
        let index = self.geometry.block_index(cluster);
        if let BlockEntry::Unaligned(_) = self.block_entry(index) {
            return Ok(None);
        }
        let Some(bytes) = self.take_block(file, index)? else {
            return Ok(Some(0));
        };
        let slot = self.geometry.index_in_block(cluster);
        let count = read(&bytes, slot, self.geometry.refcount_order);
        self.return_block(bytes);
        count.map(Some)
    }
}

/// Reads entry `index` of a block.
pub(super) fn read(bytes: &[u8], index: u64, order: u32) -> Result<u64> {
    let slot = block::Slot::new(index, order);
    usize::try_from(slot.byte)
        .ok()
        .and_then(|at| block::read(bytes.get(at..)?, slot, order))
        .ok_or_else(outside)
}

/// Changes entry `index` of a block.
pub(super) fn write(bytes: &mut [u8], index: u64, order: u32, count: u64) -> Result<()> {
    let slot = block::Slot::new(index, order);
    usize::try_from(slot.byte)
        .ok()
        .and_then(|at| block::write(bytes.get_mut(at..)?, slot, order, count))
        .ok_or_else(outside)
}

fn outside() -> Error {
    Error::corrupt("Refcount block too short")
}
