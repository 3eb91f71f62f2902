//! Looking for grains beyond the end of their file.

use diskimage_core::{ByteRange, CheckReport, Error, Note, Progress, Result, errno};

use super::VmdkLayer;
use super::header::SECTOR;
use super::tables::Grain;

impl VmdkLayer {
    /// Walks all tables. The first grain that cannot be there ends it, as in the original.
    pub(super) fn run_check(&self, progress: &Progress<'_>) -> Result<CheckReport> {
        let extents = self.extents();
        for (index, extent) in extents.iter().enumerate() {
            let Some(geometry) = extent.geometry() else {
                continue;
            };
            let len = extent.device.len();
            let mut grains = ByteRange::new(0, extent.len.div_ceil(geometry.grain));
            while !grains.is_empty() {
                let (found, count) = self.lock().tables.scan(&extents, index, &geometry, grains)?;
                if let Grain::At(offset) = found {
                    // How many of the run start inside the file.
                    let inside = len.saturating_sub(offset).div_ceil(geometry.grain);
                    if inside < count {
                        let sector = (extent.start + (grains.start() + inside) * geometry.grain) / SECTOR;
                        progress.tell(&Note::Line(format!(
                            "ERROR: cluster offset for sector {sector} points after EOF"
                        )));
                        return Err(Error::from_errno(errno::EINVAL));
                    }
                }
                grains = grains.skip(count);
            }
        }
        Ok(CheckReport::default())
    }
}
