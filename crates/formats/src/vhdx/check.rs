//! The check: looks for blocks that lie beyond the end of the file, or overlap each other or the metadata.

use std::collections::HashMap;

use diskimage_core::{ByteRange, CheckReport, Note, Progress, Repair, Result};

use super::VhdxLayer;
use super::bat::{Payload, bitmap_offset};
use super::header::MIB;
use crate::layer_kit::cluster_set::ClusterSet;

/// How many findings are printed; the rest are only counted.
const MAX_LINES: u64 = 1_000_000;

impl VhdxLayer {
    /// Checks the block allocation table. The log was replayed when the image was opened, which counts as a repair.
    pub(super) fn check_bat(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        if repair != Repair::No && self.was_replayed {
            report.corruptions_fixed = 1;
        }
        let mut state = self.lock();
        let len = self.file.len();
        let mut finding = |text: String| {
            if report.corruptions < MAX_LINES {
                progress.note(&Note::Error(text));
            }
            report.corruptions += 1;
        };
        // The mebibytes of the file that blocks occupy.
        let mut occupied = ClusterSet::new(&self.budget);
        // The entries of sector bitmap blocks by offset: at most 4096 for the largest disk.
        let mut bitmaps = HashMap::new();
        let tables = state.reserved.clone();
        for block in 0..state.metadata.disk_size.div_ceil(self.block_size) {
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
            let stored = ByteRange::at(offset, self.block_size);
            if let Payload::Partly(_) = payload {
                let at = self.chunks.bitmap_entry_of(block);
                let bitmap = bitmap_offset(state.bat.entry(at)?).map(|offset| ByteRange::at(offset, MIB));
                match bitmap {
                    Some(bitmap) if bitmap.end() > len => finding(format!(
                        "VHDX BAT entry {at} end offset {} points after end of file ({len}). Image has probably been \
                         truncated.",
                        bitmap.end() - 1
                    )),
                    Some(bitmap) if tables.find(bitmap).is_some() => {
                        finding(format!("VHDX BAT entry {at} lies in the metadata"));
                    }
                    // All blocks of a chunk share the bitmap.
                    Some(bitmap) if bitmaps.insert(bitmap.start(), at).is_none_or(|other| other == at) => {}
                    Some(_) => finding(format!("VHDX BAT entry {at} shares its place with another one")),
                    None => finding(format!(
                        "VHDX BAT entry {index} needs the sector bitmap of entry {at}, which is not present"
                    )),
                }
            }
            let truncated = |what: &str, at: u64| {
                format!(
                    "VHDX BAT entry {index} {what} offset {at} points after end of file ({len}). Image has probably \
                     been truncated."
                )
            };
            if offset >= len {
                finding(truncated("start", offset));
                continue;
            }
            // The part of the last block beyond the end of the disk may be missing.
            let guest = ByteRange::at(block * self.block_size, self.block_size);
            let needed = guest.intersect(ByteRange::new(0, state.metadata.disk_size)).len();
            if offset + needed > len {
                finding(truncated("end", offset + needed - 1));
                continue;
            }
            if let Some((_, table)) = tables.find(stored) {
                finding(format!(
                    "VHDX region {}-{} overlaps with region {}-{}",
                    stored.start(),
                    stored.end(),
                    table.start(),
                    table.end()
                ));
                continue;
            }
            let in_file = stored.intersect(ByteRange::new(0, len)).len().div_ceil(MIB);
            if occupied.take(stored.start() / MIB, in_file)? > 0 {
                finding(format!(
                    "VHDX BAT entry {index} shares its place with another one"
                ));
            }
        }
        Ok(report)
    }
}
