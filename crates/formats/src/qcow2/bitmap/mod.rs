//! Persistent bitmaps: each records which parts of the disk were written since some point in time.
//!
//! ```text
//!   header extension ──► directory ──► bitmap tables ──► clusters of bits
//! ```
//!
//! Before guest data is written, the bitmaps that record writes are marked as in use in the file, so they count as
//! inconsistent after a crash. Written ranges are collected in memory; a flush stores them as bits. Nothing that a
//! directory refers to is changed in place, except its flags. Clusters of bits, then tables, then the directory are
//! written to newly allocated clusters, and then the header extension points to the new directory: at any moment the
//! file has either the old bitmaps or the new ones. One exception: if the extension crosses a sector boundary and the
//! first cluster has no room for the intermediate state of a rewrite, the image has no valid bitmaps during the
//! rewrite.
//!
//! * `directory`, `table`: the structures, as bytes and as types;
//! * `written`: the ranges written since the last store;
//! * `store`: marks bitmaps as in use, stores them and resizes them;
//! * `manage`: adding, removing and reading bitmaps.

mod directory;
mod manage;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod written;

use diskimage_core::{ByteRange, Detail, DetailValue, Note, Result};

use self::directory::{Directory, flag};
use super::header::extension::BitmapsExtension;
use super::{ImageState, Qcow2};

pub(super) use self::directory::{Bitmap, is_damage};
pub(super) use self::store::Tracker;

/// The most bitmaps whose damage is reported when the image is opened. A limit of this program.
const MAX_WARNINGS: usize = 100;

impl Qcow2 {
    /// Reads the directory that `extension` locates, damaged or not; an empty one for `None`.
    ///
    /// # Errors
    /// As [`Directory::read`].
    pub(super) fn read_directory(&self, extension: Option<BitmapsExtension>) -> Result<Directory> {
        match extension {
            Some(extension) => Directory::read(&*self.file, &extension, self.header.geometry, &self.budget),
            None => Ok(Directory::empty()),
        }
    }

    /// Reads the directory of the image.
    ///
    /// # Errors
    /// A directory that is too large or damaged.
    fn directory(&self, state: &ImageState) -> Result<Directory> {
        let directory = self.read_directory(state.bitmaps.extension())?;
        directory.require_valid().map(|()| directory)
    }

    /// The host range of the directory that `extension` locates; `None` if it cannot be that of a directory.
    pub(super) fn directory_range(&self, extension: &BitmapsExtension) -> Option<ByteRange> {
        let (offset, len) = (extension.directory_offset.get(), extension.directory_size.get());
        let end = offset.checked_add(len)?;
        let is_valid = offset >= self.header.geometry.cluster_size()
            && offset.is_multiple_of(self.header.geometry.cluster_size())
            && end <= self.file.len();
        is_valid.then(|| ByteRange::new(offset, end))
    }

    /// What is wrong with the bitmaps, one warning each for the first [`MAX_WARNINGS`]. Bits are not read.
    ///
    /// # Errors
    /// As [`Directory::read`].
    pub(super) fn bitmap_warnings(&self) -> Result<Vec<Note>> {
        let state = self.lock();
        let directory = self.read_directory(state.bitmaps.extension())?;
        let shape = |bitmap: &Bitmap| bitmap.shape(self.header.geometry, state.size);
        let found = directory.bitmaps.iter().filter_map(|bitmap| {
            let damage = bitmap.damage(self, shape(bitmap)).err()?;
            Some(format!(
                "Bitmap '{}' cannot be used: {}",
                bitmap.shown_name(),
                damage.chain()
            ))
        });
        let mut found = found.take(MAX_WARNINGS + 1);
        let mut warnings: Vec<String> = found.by_ref().take(MAX_WARNINGS).collect();
        if found.next().is_some() {
            warnings.push("More bitmaps cannot be used".to_owned());
        }
        let broken = directory.require_whole().err();
        warnings.extend(broken.map(|error| format!("Bitmaps cannot be read: {}", error.chain())));
        Ok(warnings.into_iter().map(Note::Warning).collect())
    }

    /// The facts about the bitmaps that `info` prints; `None` for an image without bitmaps.
    pub(super) fn bitmap_details(&self) -> Result<Option<DetailValue>> {
        let directory = self.read_directory(self.lock().bitmaps.extension())?;
        if directory.bitmaps.is_empty() {
            return Ok(None);
        }
        let one = |bitmap: &Bitmap| {
            let shown = |flag, name: &str| bitmap.has(flag).then(|| DetailValue::Text(name.to_owned()));
            let flags = [shown(flag::IN_USE, "in-use"), shown(flag::AUTO, "auto")];
            DetailValue::Group(vec![
                Detail {
                    name: "flags",
                    value: DetailValue::List(flags.into_iter().flatten().collect()),
                },
                Detail::text("name", bitmap.name()),
                Detail::number(
                    "granularity",
                    1_u64.checked_shl(bitmap.raw.granularity_bits.into()).unwrap_or(0),
                ),
            ])
        };
        Ok(Some(DetailValue::List(
            directory.bitmaps.iter().map(one).collect(),
        )))
    }

    /// The bytes that the bitmaps need in a copy with clusters of `cluster_size`.
    pub(super) fn bytes_impl(&self, cluster_size: u64) -> Result<u64> {
        let state = self.lock();
        let size = state.size;
        let (mut clusters, mut entries) = (0, 0);
        // Damaged bitmaps are not copied.
        let directory = self.read_directory(state.bitmaps.extension())?;
        let valid = directory
            .bitmaps
            .iter()
            .filter(|bitmap| bitmap.require_valid().is_ok());
        for bitmap in valid {
            let bits = size.div_ceil(1 << bitmap.raw.granularity_bits);
            let data = bits.div_ceil(8).div_ceil(cluster_size);
            clusters += data + (data * 8).div_ceil(cluster_size);
            entries += bitmap.entry_len() as u64;
        }
        Ok((clusters + entries.div_ceil(cluster_size)) * cluster_size)
    }
}
