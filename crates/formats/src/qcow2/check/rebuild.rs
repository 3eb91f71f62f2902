//! Builds new refcount structures from the counted references.
//!
//! The new structures use clusters that neither data nor the old structures use, and they are durable before the header
//! points to them: a crash leaves the image with the old or the new ones. The old structures are freed afterwards like
//! any leaked cluster.
//!
//! ```text
//!   blocks   one for each block-sized range with a cluster in use; a block is not before the clusters that it counts
//!   table    in the first free run of clusters that is long enough
//! ```

use std::collections::BTreeMap;

use diskimage_core::errno;
use diskimage_core::{Error, Note, Result, to_index};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::{Check, stored};
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};
use crate::qcow2::header::{field, limit};

/// The most rounds of allocating the table. A round is repeated only if the table needs more blocks, so few are needed.
const MAX_ROUNDS: u32 = 64;

/// The clusters of the new structures.
#[derive(Debug)]
struct NewStructures {
    /// The cluster of each block, by its index in the table.
    blocks: BTreeMap<u64, ClusterIndex>,
    table: ClusterRange,
}

impl Check<'_> {
    pub(super) fn rebuild_refcounts(&mut self) -> Result<()> {
        self.report_line("Rebuilding refcount structure");
        self.protect_old_blocks()?;
        let plan = self.plan_structures()?;
        if let Err(error) = self.write_structures(&plan) {
            self.report_note(&Note::Error(format!("ERROR writing refblock: {}", error.root())));
            return Err(error);
        }
        self.file.flush()?;
        let table = plan.table.bytes(self.geometry.cluster_bits);
        let mut location = [0; 12];
        let clusters = u32::try_from(plan.table.len()).map_err(|_| Error::from_errno(errno::EFBIG))?;
        location[..8].copy_from_slice(U64::new(table.start()).as_bytes());
        location[8..].copy_from_slice(U32::new(clusters).as_bytes());
        self.file.write_at(&location, field::REFCOUNT_TABLE)?;
        self.file.flush()?;
        self.file_len = self.file.len();
        Ok(())
    }

    /// Counts old refcount blocks that are not counted yet, so that the new structures do not overwrite them: until the
    /// header changes, readers use the old blocks.
    fn protect_old_blocks(&mut self) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let end = HostOffset::new(self.file_len).cluster_end(bits);
        for index in 0..self.stored.table.len() {
            let offset = HostOffset::new(self.stored.table[index] & stored::OFFSET_MASK);
            let size = self.geometry.cluster_size();
            if offset.get() == 0 || offset.checked_plus(size - 1).is_none() {
                continue;
            }
            for cluster in ClusterRange::touched(offset.range(size), bits) {
                if cluster < end && self.counts.of(cluster) == 0 {
                    self.counts.add(cluster, 1)?;
                }
            }
        }
        Ok(())
    }

    fn plan_structures(&mut self) -> Result<NewStructures> {
        let first = ClusterIndex::new(0);
        let mut plan = NewStructures {
            blocks: BTreeMap::new(),
            table: ClusterRange::at(first, 0),
        };
        self.allocate_blocks(&mut plan)?;
        for _ in 0..MAX_ROUNDS {
            let entries = plan.blocks.last_key_value().map_or(1, |(index, _)| index + 1);
            let clusters = (entries * 8).div_ceil(self.geometry.cluster_size());
            if clusters > limit::REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits {
                return Err(Error::from_errno(errno::EFBIG));
            }
            plan.table = ClusterRange::at(self.counts.first_free(first, clusters), clusters);
            for cluster in plan.table {
                self.counts.add(cluster, 1)?;
            }
            // The table's own clusters may need another block.
            self.allocate_blocks(&mut plan)?;
            let last = plan.blocks.last_key_value().map_or(0, |(index, _)| *index);
            if last < clusters * self.geometry.cluster_size() / 8 {
                return Ok(plan);
            }
            for cluster in plan.table {
                self.counts.set(cluster, 0)?;
            }
        }
        Err(Error::from_errno(errno::EFBIG))
    }

    /// Allocates a cluster for each missing block.
    fn allocate_blocks(&mut self, plan: &mut NewStructures) -> Result<()> {
        let mut at = ClusterIndex::new(0);
        while let Some(used) = self.counts.next_used(at) {
            let index = self.geometry.block_index(used);
            let counted = self.geometry.counted_clusters(index);
            if let std::collections::btree_map::Entry::Vacant(slot) = plan.blocks.entry(index) {
                let cluster = self.counts.first_free(counted.start, 1);
                if cluster >= self.geometry.cluster_limit() {
                    return Err(Error::from_errno(errno::EFBIG));
                }
                self.counts.add(cluster, 1)?;
                slot.insert(cluster);
            }
            at = counted.end;
        }
        Ok(())
    }

    fn write_structures(&self, plan: &NewStructures) -> Result<()> {
        let len = to_index(self.geometry.cluster_size())?;
        let (geometry, bits) = (self.geometry, self.geometry.cluster_bits);
        let mut bytes = vec![0; len];
        for (index, block) in &plan.blocks {
            bytes.fill(0);
            let counted = geometry.counted_clusters(*index);
            let mut at = counted.start;
            while let Some(used) = self.counts.next_used(at).filter(|used| *used < counted.end) {
                let slot = geometry.index_in_block(used);
                stored::write(&mut bytes, slot, geometry.refcount_order, self.counts.of(used))?;
                at = used.plus(1);
            }
            self.file.write_at(&bytes, block.offset(bits).get())?;
        }
        let range = plan.table.bytes(bits);
        let mut table = vec![0; to_index(range.len())?];
        for (index, block) in &plan.blocks {
            let slot = usize::try_from(*index)
                .ok()
                .and_then(|i| table.as_chunks_mut::<8>().0.get_mut(i));
            *slot.ok_or_else(|| Error::from_errno(errno::EFBIG))? = block.offset(bits).get().to_be_bytes();
        }
        self.file.write_at(&table, range.start())
    }
}
