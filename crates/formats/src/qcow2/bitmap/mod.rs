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

use diskimage_core::{Detail, DetailValue, Result};

use self::directory::{Directory, flag};
use super::header::extension::BitmapsExtension;
use super::{ImageState, Qcow2};

pub(super) use self::directory::Bitmap;
pub(super) use self::store::Tracker;

impl Qcow2 {
    /// Reads the directory that `extension` locates; an empty one for `None`.
    ///
    /// # Errors
    /// A directory that is too large or damaged.
    pub(super) fn read_directory(&self, extension: Option<BitmapsExtension>) -> Result<Directory> {
        match extension {
            Some(extension) => Directory::read(&*self.file, &extension, self.header.geometry, &self.budget),
            None => Directory::empty(&self.budget),
        }
    }

    /// Reads the directory of the image.
    fn directory(&self, state: &ImageState) -> Result<Directory> {
        self.read_directory(state.bitmaps.extension())
    }

    /// The facts about the bitmaps that `info` prints; `None` for an image without bitmaps.
    pub(super) fn bitmap_details(&self) -> Result<Option<DetailValue>> {
        let directory = self.directory(&self.lock())?;
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
                Detail::number("granularity", 1 << bitmap.raw.granularity_bits),
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
        for bitmap in &self.directory(&state)?.bitmaps {
            let bits = size.div_ceil(1 << bitmap.raw.granularity_bits);
            let data = bits.div_ceil(8).div_ceil(cluster_size);
            clusters += data + (data * 8).div_ceil(cluster_size);
            entries += bitmap.entry_len() as u64;
        }
        Ok((clusters + entries.div_ceil(cluster_size)) * cluster_size)
    }
}
