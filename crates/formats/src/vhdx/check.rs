//! The check: looks for blocks that lie beyond the end of the file, or overlap each other or the metadata.

use std::collections::HashMap;

use diskimage_core::{ByteRange, CheckReport, Note, Progress, Repair, Result};

use super::VhdxLayer;
use super::bat::{Payload, bitmap_offset};
use super::header::MIB;
use crate::layer_kit::cluster_set::ClusterSet;
use crate::layer_kit::reserved::Reserved;

/// How many findings are printed; the rest are only counted.
const MAX_LINES: u64 = 10_000;

impl VhdxLayer {
    /// Checks the block allocation table. The log was replayed when the image was opened, which counts as a repair.
    pub(super) fn check_bat(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        if repair != Repair::No && self.was_replayed {
            report.corruptions_fixed = 1;
        }
        let mut state = self.lock();
        let mut check = BatCheck {
            len: self.file.len(),
            metadata: state.reserved.clone(),
            blocks: ClusterSet::new(&self.budget),
            bitmaps: HashMap::new(),
        };
        for block in 0..state.metadata.disk_size.div_ceil(self.block_size) {
            let mut finding = |text: String| {
                if report.corruptions < MAX_LINES {
                    progress.note(&Note::Error(text));
                }
                report.corruptions += 1;
            };
            let index = self.chunks.entry_of(block);
            let entry = state.bat.entry(index)?;
            let Ok(payload) = Payload::of(entry, self.is_differencing()) else {
                finding(format!(
                    "VHDX BAT entry {index} has the unknown state {}",
                    entry & 7
                ));
                continue;
            };
            let Some(offset) = payload.offset() else { continue };
            if let Payload::Partly(_) = payload {
                let at = self.chunks.bitmap_entry_of(block);
                let bitmap = bitmap_offset(state.bat.entry(at)?);
                if let Some(what) = check.bitmap(index, at, bitmap) {
                    finding(what);
                }
            }
            // The part of the last block beyond the end of the disk may be missing.
            let guest = ByteRange::at(block * self.block_size, self.block_size);
            let needed = guest.intersect(ByteRange::new(0, state.metadata.disk_size)).len();
            let stored = ByteRange::at(offset, self.block_size);
            if let Some(what) = check.block(index, stored, needed)? {
                finding(what);
            }
        }
        Ok(report)
    }
}

/// What a check of the table has come to.
struct BatCheck<'a> {
    /// The length of the file in bytes.
    len: u64,
    /// The ranges of the file where no block may be.
    metadata: Reserved,
    /// The mebibytes of the file that blocks occupy.
    blocks: ClusterSet<'a>,
    /// The entries of sector bitmap blocks by offset: at most 4096 for the largest disk.
    bitmaps: HashMap<u64, u64>,
}

impl BatCheck<'_> {
    /// What is wrong with the sector bitmap at `offset`, from entry `at`, of the block in entry `index`.
    fn bitmap(&mut self, index: u64, at: u64, offset: Option<u64>) -> Option<String> {
        let Some(bitmap) = offset.map(|offset| ByteRange::at(offset, MIB)) else {
            return Some(format!(
                "VHDX BAT entry {index} needs the sector bitmap of entry {at}, which is not present"
            ));
        };
        if bitmap.end() > self.len {
            return Some(self.truncated(at, "end", bitmap.end() - 1));
        }
        if self.metadata.find(bitmap).is_some() {
            return Some(format!("VHDX BAT entry {at} lies in the metadata"));
        }
        // All blocks of a chunk share the bitmap.
        let known = self.bitmaps.insert(bitmap.start(), at);
        known
            .is_some_and(|other| other != at)
            .then(|| format!("VHDX BAT entry {at} shares its place with another one"))
    }

    /// What is wrong with the block `stored`, from entry `index`, of which the disk has `needed` bytes.
    fn block(&mut self, index: u64, stored: ByteRange, needed: u64) -> Result<Option<String>> {
        let offset = stored.start();
        if offset >= self.len {
            return Ok(Some(self.truncated(index, "start", offset)));
        }
        if offset + needed > self.len {
            return Ok(Some(self.truncated(index, "end", offset + needed - 1)));
        }
        if let Some((_, table)) = self.metadata.find(stored) {
            return Ok(Some(format!(
                "VHDX region {}-{} overlaps with region {}-{}",
                stored.start(),
                stored.end(),
                table.start(),
                table.end()
            )));
        }
        let in_file = stored.intersect(ByteRange::new(0, self.len));
        let shared = self.blocks.take(offset / MIB, in_file.len().div_ceil(MIB))?;
        Ok((shared > 0).then(|| format!("VHDX BAT entry {index} shares its place with another one")))
    }

    fn truncated(&self, index: u64, what: &str, offset: u64) -> String {
        format!(
            "VHDX BAT entry {index} {what} offset {offset} points after end of file ({}). Image has probably been \
             truncated.",
            self.len
        )
    }
}
