//! The table (BAT): the entry of each cluster, and when it is written back.

use diskimage_core::{ByteRange, Device, Error, Preallocation, Result};

use super::State;
use crate::layer_kit::paged_table::Entry;

/// The entry of a cluster that reads as zero.
pub(super) const NO_CLUSTER: Entry = [0; 4];

impl State {
    /// The entries from entry `index` on that are in the same page; `None` at the end of the table, beyond which all
    /// clusters read as zero.
    pub(super) fn entries(&mut self, index: u64) -> Result<Option<&[Entry]>> {
        if index >= u64::from(self.header.entries) {
            return Ok(None);
        }
        self.table.entries(index).map(Some)
    }

    /// The offset in the file of cluster `index` of the disk; `None` if it has no storage.
    pub(super) fn offset(&mut self, index: u64) -> Result<Option<u64>> {
        let unit = self.header.unit;
        let entry = self.entries(index)?.and_then(|entries| entries.first());
        Ok(entry.and_then(|entry| offset_of(*entry, unit)))
    }

    /// The allocated clusters of the disk with their offsets, from entry `next` to the end of its page, where `next` is
    /// moved. `None` at the end of the table.
    pub(super) fn batch(&mut self, next: &mut u64) -> Result<Option<Vec<(u64, u64)>>> {
        let end = u64::from(self.header.entries).min(self.entries_in_file);
        if *next >= end {
            return Ok(None);
        }
        let unit = self.header.unit;
        // Entries in a hole of the file have no clusters.
        let hole = self.table.hole(*next)?;
        if hole > 0 {
            *next = next.saturating_add(hole);
            return Ok(Some(Vec::new()));
        }
        let entries = self.table.entries(*next)?;
        let found = (*next..end).zip(entries);
        let batch = found.filter_map(|(index, entry)| Some((index, offset_of(*entry, unit)?)));
        let batch = batch.collect();
        *next += entries.len() as u64;
        Ok(Some(batch))
    }

    /// Marks the image as in use before anything in it changes.
    pub(super) fn mark_in_use(&mut self, file: &dyn Device) -> Result<()> {
        if self.marked {
            return Ok(());
        }
        // A truncated file without its whole table cannot be repaired by growing it.
        if file.len() < self.header.table_end() {
            return Err(Error::corrupt("The table lies beyond the end of the file"));
        }
        let mut header = self.header.clone();
        header.set_in_use(true);
        // The dirty bitmaps would miss the changes.
        header.drop_extension();
        file.write_at(&header.to_bytes(), 0)?;
        file.flush()?;
        self.header = header;
        self.marked = true;
        Ok(())
    }

    /// Writes back the table, durably, and frees the slots of released clusters.
    pub(super) fn publish(&mut self, file: &dyn Device) -> Result<()> {
        if !self.table.is_dirty() {
            return Ok(());
        }
        // Other programs take a file that ends inside its last cluster for damaged.
        if file.len() < self.data_end {
            file.resize(self.data_end, Preallocation::Off)?;
        }
        file.flush()?;
        self.table.write_back()?;
        file.flush()?;
        let cluster = self.header.cluster;
        for offset in std::mem::take(&mut self.released) {
            // A cluster that is not in a slot may overlap another one or the metadata: it is leaked.
            if !self.is_aligned || offset < self.first_slot {
                continue;
            }
            let bytes = ByteRange::at(offset, cluster).intersect(ByteRange::new(0, file.len()));
            if !bytes.is_empty() {
                file.discard(bytes)?;
            }
            if let Ok(slot) = u32::try_from((offset - self.first_slot) / cluster)
                && let Some(slots) = &mut self.slots
            {
                slots.free(slot);
            }
        }
        Ok(())
    }
}

/// Whether `offset` is that of a slot.
pub(super) fn is_aligned(offset: u64, first_slot: u64, cluster: u64) -> bool {
    offset >= first_slot && (offset - first_slot).is_multiple_of(cluster)
}

/// The offset in the file of an entry's cluster; `None` if the cluster has no storage.
pub(super) fn offset_of(entry: Entry, unit: u64) -> Option<u64> {
    match u32::from_le_bytes(entry) {
        0 => None,
        entry => Some(u64::from(entry).saturating_mul(unit)),
    }
}
