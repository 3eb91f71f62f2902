//! Looking for blocks that are not in the file, or in each other's place.

use diskimage_core::{ByteRange, CheckReport, Note, Progress, Repair, Result};

use super::VhdxLayer;
use super::bat::{Payload, entry_of};
use super::header::MIB;
use crate::layer_kit::cluster_set::ClusterSet;

/// Findings beyond these are only counted.
const MAX_LINES: u64 = 1_000_000;

impl VhdxLayer {
    /// Walks the block allocation table. What a log had was put into the file when the image was opened.
    pub(super) fn check_bat(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        if repair != Repair::No && self.was_replayed {
            report.corruptions_fixed = 1;
        }
        let mut state = self.lock();
        let len = self.file.len();
        let mut tell = |text: String| {
            if report.corruptions < MAX_LINES {
                progress.note(&Note::Error(text));
            }
            report.corruptions += 1;
        };
        // The mebibytes of the file that blocks have.
        let mut taken = ClusterSet::new(&self.budget);
        let tables = state.reserved.clone();
        for block in 0..state.metadata.disk_size.div_ceil(self.block_size) {
            let index = entry_of(block, self.block_size);
            let entry = state.bat.entry(index)?;
            let Ok(payload) = Payload::of(entry) else {
                tell(format!(
                    "VHDX BAT entry {index} has the unknown state {}",
                    entry & 7
                ));
                continue;
            };
            let Payload::At(offset) = payload else { continue };
            let place = ByteRange::at(offset, self.block_size);
            let truncated = |what: &str, at: u64| {
                format!(
                    "VHDX BAT entry {index} {what} offset {at} points after end of file ({len}). Image has probably \
                     been truncated."
                )
            };
            if offset >= len {
                tell(truncated("start", offset));
                continue;
            }
            // What lies beyond the end of the disk is padding.
            let guest = ByteRange::at(block * self.block_size, self.block_size);
            let needed = guest.intersect(ByteRange::new(0, state.metadata.disk_size)).len();
            if offset + needed > len {
                tell(truncated("end", offset + needed - 1));
                continue;
            }
            if let Some((_, table)) = tables.find(place) {
                tell(format!(
                    "VHDX region {}-{} overlaps with region {}-{}",
                    place.start(),
                    place.end(),
                    table.start(),
                    table.end()
                ));
                continue;
            }
            let in_file = place.intersect(ByteRange::new(0, len)).len().div_ceil(MIB);
            if taken.take(place.start() / MIB, in_file)? > 0 {
                tell(format!(
                    "VHDX BAT entry {index} shares its place with another one"
                ));
            }
        }
        Ok(report)
    }
}
