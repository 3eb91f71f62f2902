//! The persistent bitmaps as a check sees them. Damaged ones are reported; a repair of everything drops them, as soon
//! as the refcounts are right, with a directory in newly allocated clusters.

use std::collections::BTreeSet;

use diskimage_core::{ByteRange, Error, Repair, Result, errno, to_index};

use super::Check;
use crate::qcow2::ImageState;
use crate::qcow2::bitmap::{Bitmap, is_damage};
use crate::qcow2::entry::OFFSET_MASK;

/// The bitmaps that a repair drops.
#[derive(Debug, Default)]
pub(super) struct DroppedBitmaps {
    /// Their indexes in the directory.
    indexes: BTreeSet<usize>,
    /// Whether part of the directory cannot be read.
    unreadable: bool,
    /// Whether there are bitmaps whose references cannot be counted, and which are not dropped.
    uncounted: bool,
}

/// Bytes of a bitmap table that are read at once.
const CHUNK: usize = 64 << 10;

impl Check<'_> {
    /// Counts the references of the directory, and of the tables of all bitmaps that are kept.
    pub(super) fn count_bitmaps(&mut self) -> Result<()> {
        let Some(extension) = self.header.bitmaps() else {
            return Ok(());
        };
        let fix = self.repair == Repair::All;
        let directory = self.image.read_directory(Some(extension))?;
        let mut unclaimed = self.file_len;
        for (index, bitmap) in directory.bitmaps.iter().enumerate() {
            let damage = self.bitmap_damage(bitmap, &mut unclaimed);
            match damage {
                Some(damage) if !is_damage(&damage.reason) => return Err(damage.reason),
                Some(damage) if fix => self.drop_bitmap(index, bitmap, &damage),
                Some(damage) if damage.is_uncountable => {
                    self.dropped.uncounted = true;
                    self.corruption(format!("ERROR {}", damage.reason.chain()));
                }
                Some(damage) => {
                    self.count_bitmap(bitmap)?;
                    if !damage.is_beyond_end {
                        self.corruption(format!("ERROR {}", damage.reason.chain()));
                    }
                }
                None => self.count_bitmap(bitmap)?,
            }
        }
        if let Err(error) = directory.require_whole() {
            if !fix {
                self.dropped.uncounted = true;
                self.corruption(format!("ERROR bitmaps cannot be read: {}", error.chain()));
            } else if !std::mem::replace(&mut self.dropped.unreadable, true) {
                self.report.corruptions_fixed += 1;
                self.report_line(format!("Dropping bitmaps that cannot be read: {}", error.chain()));
            }
        }
        match self.image.directory_range(&extension) {
            None if fix => Ok(()),
            _ => self.region(
                extension.directory_offset.get(),
                extension.directory_size.get(),
                1,
            ),
        }
    }

    /// What is wrong with a bitmap. `unclaimed` is the number of bytes of the file that no table before this one has.
    fn bitmap_damage(&self, bitmap: &Bitmap, unclaimed: &mut u64) -> Option<BitmapDamage> {
        let uncountable = |reason| {
            Some(BitmapDamage {
                reason,
                is_uncountable: true,
                is_beyond_end: false,
            })
        };
        if let Err(error) = bitmap.require_valid() {
            return uncountable(error);
        }
        let table = bitmap.table_range();
        let beyond_end = |reason| {
            Some(BitmapDamage {
                reason,
                is_uncountable: false,
                is_beyond_end: true,
            })
        };
        if let Err(error) = self.file.require(table.start(), table.len()) {
            return beyond_end(error);
        }
        // Non-overlapping tables fit in the file. Overlapping ones would take unbounded time.
        let Some(left) = unclaimed.checked_sub(table.len()) else {
            return uncountable(Error::corrupt(format!(
                "The table of bitmap '{}' overlaps those of others",
                bitmap.shown_name()
            )));
        };
        *unclaimed = left;
        let shape = bitmap.shape(self.geometry, self.header.size);
        match bitmap.table_damage(self.image, shape) {
            Err(reason) => Some(BitmapDamage {
                reason,
                is_uncountable: false,
                is_beyond_end: false,
            }),
            Ok(()) => bitmap.damage(self.image, shape).err().and_then(beyond_end),
        }
    }

    fn drop_bitmap(&mut self, index: usize, bitmap: &Bitmap, damage: &BitmapDamage) {
        if self.dropped.indexes.insert(index) {
            self.report.corruptions_fixed += 1;
            self.report_line(format!(
                "Dropping bitmap '{}': {}",
                bitmap.shown_name(),
                damage.reason.chain()
            ));
        }
    }

    /// Counts the references of a bitmap's table.
    fn count_bitmap(&mut self, bitmap: &Bitmap) -> Result<()> {
        let table = bitmap.table_range();
        let (offset, len) = (table.start(), table.len());
        self.require_whole("bitmap table", offset, len);
        self.region(offset, len, 1)?;
        if offset.saturating_add(len) > self.file_len {
            return Ok(());
        }
        let mut chunk = vec![0; CHUNK];
        let mut done = 0;
        while done < len {
            let hole = self.hole(ByteRange::new(offset + done, offset + len))?;
            if hole >= 8 {
                done += hole / 8 * 8;
                continue;
            }
            let part = to_index((len - done).min(CHUNK as u64))?;
            let chunk = &mut chunk[..part];
            self.file.read_at(chunk, offset + done)?;
            for entry in chunk.as_chunks().0 {
                let data = u64::from_be_bytes(*entry) & OFFSET_MASK;
                if data != 0 {
                    self.region(data, self.geometry.cluster_size(), 1)?;
                }
            }
            done += part as u64;
        }
        Ok(())
    }

    /// Refuses to free leaked clusters while clusters of bitmaps that are kept count as leaked.
    pub(super) fn require_counted_bitmaps(&mut self) -> Result<()> {
        if self.repair == Repair::Leaks && self.dropped.uncounted {
            self.report_line(
                "ERROR the clusters of damaged bitmaps would be freed: use -r all, which drops these bitmaps",
            );
            return Err(Error::from_errno(errno::EINVAL));
        }
        Ok(())
    }

    /// Writes the directory without the bitmaps that were dropped. Their clusters have been freed as leaked.
    pub(super) fn write_bitmaps(&mut self, state: &mut ImageState) -> Result<()> {
        if self.dropped.indexes.is_empty() && !self.dropped.unreadable {
            return Ok(());
        }
        let mut directory = self.image.read_directory(self.header.bitmaps())?;
        directory.keep_only(|index| !self.dropped.indexes.contains(&index));
        let references = self.image.count_references()?;
        state.metadata.refcounts.set_references(references);
        self.image.replace_directory(state, &directory, Vec::new())
    }
}

/// The damage of one bitmap.
struct BitmapDamage {
    reason: Error,
    /// The references of its table cannot be counted.
    is_uncountable: bool,
    /// Counting the references reports it.
    is_beyond_end: bool,
}
