//! The check: looks for damage in the block map.

use std::collections::HashMap;
use std::ops::Range;

use diskimage_core::{CheckReport, Note, Progress, Result};

use super::{State, VdiLayer, slot};
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::slot_bitmap::SlotBitmap;

/// How many findings are printed; the rest are only counted.
const MAX_LINES: u64 = 10_000;

/// How many slots that several blocks share are reported. The limit is ours.
const MAX_SHARED: usize = 1 << 20;

impl VdiLayer {
    /// Looks for blocks that share a slot or have a slot out of bounds, and for a wrong count of blocks in the header.
    pub(super) fn check_map(&self, progress: &Progress<'_>) -> Result<CheckReport> {
        let mut state = self.lock();
        let (blocks, counted) = (state.header.blocks, state.header.allocated());
        let mut findings = Findings { progress, count: 0 };
        let (mut allocated, mut others_allocated) = (0, 0);
        let State { map, header, .. } = &mut *state;
        let mut first_blocks = self.first_blocks_of_shared_slots(map, blocks)?;
        let mut check = |block: u64, slot: u32, findings: &mut Findings<'_>| {
            if slot < blocks && self.require_block(header, block, slot).is_err() {
                findings.add(|| {
                    format!("ERROR: block index {block} reaches beyond the end of the file, is {slot}")
                });
            }
            if slot >= blocks {
                return findings.add(|| format!("ERROR: block index {block} too large, is {slot}"));
            }
            allocated += 1;
            match first_blocks.get_mut(&slot) {
                Some(Some(first)) => {
                    let first = *first;
                    findings.add(|| format!("ERROR: block index {block} also used by {first}"));
                }
                Some(first) => *first = Some(block),
                None => {}
            }
        };
        for_each_run(map, blocks, |run, slot| {
            let looked_at = run.end.min(run.start.saturating_add(MAX_EQUAL));
            let before = findings.count;
            for block in run.start..looked_at {
                check(block, slot, &mut findings);
            }
            // The others of the run are as the last one.
            let others = run.end - looked_at;
            if others > 0 {
                let each = findings.count - before;
                findings.count += each.div_ceil(MAX_EQUAL) * others;
                others_allocated += if slot < blocks { others } else { 0 };
            }
        })?;
        let allocated = allocated + others_allocated;
        if allocated != u64::from(counted) {
            findings.add(|| format!("ERROR: allocated blocks mismatch, is {allocated}, should be {counted}"));
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
        for_each_run(map, blocks, |run, slot| {
            let is_shared = seen.is_taken(slot) || run.end - run.start > 1;
            if slot < blocks && is_shared && shared.len() < MAX_SHARED {
                shared.insert(slot, None);
            }
            seen.take(slot);
        })?;
        Ok(shared)
    }
}

/// Of a run of blocks with the same slot, so many are looked at; the rest are as the last of them.
const MAX_EQUAL: u64 = 1 << 16;

/// Calls `visit` with every run of blocks of the map that have the same slot, and that slot.
fn for_each_run(map: &mut PagedTable, blocks: u32, mut visit: impl FnMut(Range<u64>, u32)) -> Result<()> {
    let (mut block, end) = (0, u64::from(blocks));
    while block < end {
        let run = block..end.min(block + map.count_equal(block)?);
        if let Some(slot) = slot(map.entry(block)?) {
            visit(run.clone(), slot);
        }
        block = run.end;
    }
    Ok(())
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
    fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.count <= MAX_LINES {
            self.progress.note(&Note::Line(text()));
        }
    }
}
