//! Looking for damage in the block map.

use diskimage_core::{CheckReport, Note, Progress, Result};

use super::{State, VdiLayer, place};
use crate::layer_kit::paged_table::PagedTable;
use crate::layer_kit::slot_bitmap::SlotBitmap;

/// Findings beyond these are only counted.
const MAX_LINES: u64 = 1_000_000;

impl VdiLayer {
    /// Looks for blocks that share a place, that lie too far out, and that the header does not count.
    pub(super) fn check_map(&self, progress: &Progress<'_>) -> Result<CheckReport> {
        let mut state = self.lock();
        let (blocks, counted) = (state.header.blocks, state.header.allocated());
        let mut seen = SlotBitmap::new(blocks, &self.budget)?;
        let mut findings = Findings { progress, count: 0 };
        let mut allocated = 0;
        let State { map, header, .. } = &mut *state;
        for_each_place(map, blocks, |block, place| {
            if place < blocks && self.require_block(header, block, place).is_err() {
                findings.add(format!(
                    "ERROR: block index {block} reaches beyond the end of the file, is {place}"
                ));
            }
            if place >= blocks {
                findings.add(format!("ERROR: block index {block} too large, is {place}"));
                return;
            }
            allocated += 1;
            if seen.is_taken(place) {
                findings.add(format!("ERROR: block index {place} also used by {place}"));
            }
            seen.take(place);
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

/// Calls `visit` with every block of the disk that has a place, and the place.
pub(super) fn for_each_place(
    map: &mut PagedTable,
    blocks: u32,
    mut visit: impl FnMut(u64, u32),
) -> Result<()> {
    let mut block = 0;
    while block < u64::from(blocks) {
        let entries = map.entries(block)?;
        for entry in entries {
            if let Some(place) = place(*entry) {
                visit(block, place);
            }
            block += 1;
        }
    }
    Ok(())
}

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
