//! The check: looks for damage in the block map.

use std::collections::HashMap;

use diskimage_core::{CheckReport, Note, Progress, Result};

use super::{State, VdiLayer, slot};
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::slot_bitmap::SlotBitmap;

/// How many findings are printed; the rest are only counted.
const MAX_LINES: u64 = 1_000_000;

/// How many slots that several blocks share are reported. The limit is ours.
const MAX_SHARED: usize = 1 << 20;

impl VdiLayer {
    /// Looks for blocks that share a slot or have a slot out of bounds, and for a wrong count of blocks in the header.
    pub(super) fn check_map(&self, progress: &Progress<'_>) -> Result<CheckReport> {
        let mut state = self.lock();
        let (blocks, counted) = (state.header.blocks, state.header.allocated());
        let mut findings = Findings { progress, count: 0 };
        let mut allocated = 0;
        let State { map, header, .. } = &mut *state;
        let mut first_blocks = self.first_blocks_of_shared_slots(map, blocks)?;
        for_each_slot(map, blocks, |block, slot| {
            if slot < blocks && self.require_block(header, block, slot).is_err() {
                findings.add(format!(
                    "ERROR: block index {block} reaches beyond the end of the file, is {slot}"
                ));
            }
            if slot >= blocks {
                findings.add(format!("ERROR: block index {block} too large, is {slot}"));
                return;
            }
            allocated += 1;
            match first_blocks.get_mut(&slot) {
                Some(Some(first)) => {
                    findings.add(format!("ERROR: block index {block} also used by {first}"));
                }
                Some(first) => *first = Some(block),
                None => {}
            }
        })?;
        if allocated != u64::from(counted) {
            findings.add(format!(
                "ERROR: allocated blocks mismatch, is {allocated}, should be {counted}"
            ));
        }
        Ok(CheckReport {
            corruptions: findings.count,
            ..CheckReport::default()
        })
    }
}

impl VdiLayer {
    /// The slots that several blocks share, at most [`MAX_SHARED`] of them, with a place for the first of the blocks.
    fn first_blocks_of_shared_slots(
        &self,
        map: &mut PagedTable,
        blocks: u32,
    ) -> Result<HashMap<u32, Option<u64>>> {
        let mut seen = SlotBitmap::new(blocks, &self.budget)?;
        let mut shared = HashMap::new();
        for_each_slot(map, blocks, |_, slot| {
            if slot < blocks && seen.is_taken(slot) && shared.len() < MAX_SHARED {
                shared.insert(slot, None);
            }
            seen.take(slot);
        })?;
        Ok(shared)
    }
}

/// Calls `visit` with every block of the map that has a slot, and that slot.
pub(super) fn for_each_slot(
    map: &mut PagedTable,
    blocks: u32,
    mut visit: impl FnMut(u64, u32),
) -> Result<()> {
    let mut block = 0;
    while block < u64::from(blocks) {
        let entries = map.entries(block)?;
        for entry in entries {
            if let Some(slot) = slot(*entry) {
                visit(block, slot);
            }
            block += 1;
        }
    }
    Ok(())
}

/// Prints and counts the findings of a check.
struct Findings<'a> {
    progress: &'a Progress<'a>,
    count: u64,
}

impl Findings<'_> {
    fn add(&mut self, text: String) {
        self.count += 1;
        if self.count <= MAX_LINES {
            self.progress.note(&Note::Line(text));
        }
    }
}
