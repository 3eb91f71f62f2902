//! The check: finds grains beyond the end of their file.

use diskimage_core::{ByteRange, CheckReport, Error, Note, Progress, Result, errno};

use super::extent::Storage;
use super::header::SECTOR;
use super::tables::Grain;
use super::{VmdkLayer, stream};

impl VmdkLayer {
    /// Walks all tables. As in qemu-img, the first grain beyond the end of its file ends the check.
    pub(super) fn run_check(&self, progress: &Progress<'_>) -> Result<CheckReport> {
        let extents = self.extents();
        for (index, extent) in extents.iter().enumerate() {
            let len = extent.device.len();
            let Some(geometry) = extent.geometry() else {
                if let Storage::Flat { offset } = extent.storage
                    && offset + extent.len > len
                {
                    return Err(beyond_end(progress, extent.start + len.saturating_sub(offset)));
                }
                continue;
            };
            let mut grains = ByteRange::new(0, extent.len.div_ceil(geometry.grain));
            while !grains.is_empty() {
                let (found, count) = self.lock().tables.scan(&extents, index, &geometry, grains)?;
                if let Grain::At(offset) = found {
                    let guest = ByteRange::at(grains.start() * geometry.grain, count * geometry.grain);
                    let there = len.saturating_sub(offset);
                    let (needed, unit) = if geometry.compressed {
                        let stored = stream::stored_len(&*extent.device, offset)?;
                        (stored, stored)
                    } else {
                        // The part of the last grain beyond the end of the disk is padding.
                        let needed = guest.intersect(ByteRange::new(0, extent.len)).len();
                        (needed, geometry.grain)
                    };
                    if there < needed {
                        let first = there / unit * geometry.grain;
                        return Err(beyond_end(progress, extent.start + guest.start() + first));
                    }
                }
                grains = grains.skip(count);
            }
        }
        Ok(CheckReport::default())
    }
}

/// Reports the grain at guest offset `guest`, which reaches beyond the end of its file.
fn beyond_end(progress: &Progress<'_>, guest: u64) -> Error {
    progress.note(&Note::Line(format!(
        "ERROR: cluster offset for sector {} points after EOF",
        guest / SECTOR
    )));
    Error::from_errno(errno::EINVAL)
}
