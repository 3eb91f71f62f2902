//! Persistent bitmaps: which parts of the disk were written since some point in time.
//!
//! ```text
//!   header extension ──► directory ──► bitmap tables ──► clusters of bits
//! ```
//!
//! While guest data is being written, the bitmaps that record it are marked as in use in the file: after a crash nobody
//! relies on them. What was written is collected in memory and becomes bits when the image is flushed. Nothing that a
//! directory refers to is ever changed in place. Clusters of bits, tables and directory go to new places, first to last,
//! and then the header's extension says where: at any moment the file has either the old bitmaps or the new ones. Only where
//! the extension stands across sectors of a first cluster that is too full to move things, it has none meanwhile.
//!
//! * `directory`, `table`: structures, as bytes and as types;
//! * `written`: what was written since;
//! * `store`: marking as in use, storing, and changes of size;
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
use super::{Qcow2, State};

pub(super) use self::directory::Bitmap;
pub(super) use self::store::Tracker;

impl Qcow2 {
    /// The bitmaps that `extension` tells of.
    ///
    /// # Errors
    /// A directory that is too large or does not hold together.
    pub(super) fn read_directory(&self, extension: Option<BitmapsExtension>) -> Result<Directory> {
        match extension {
            Some(extension) => Directory::read(&*self.file, &extension, self.header.geometry, &self.budget),
            None => Directory::empty(&self.budget),
        }
    }

    /// The bitmaps of the image.
    fn directory(&self, state: &State) -> Result<Directory> {
        self.read_directory(state.bitmaps.extension())
    }

    /// The bitmaps as facts to print; `None` if there are none.
    pub(super) fn bitmap_details(&self) -> Result<Option<DetailValue>> {
        let directory = self.directory(&self.lock())?;
        if directory.bitmaps.is_empty() {
            return Ok(None);
        }
        let one = |bitmap: &Bitmap| {
            let word = |flag, name: &str| bitmap.has(flag).then(|| DetailValue::Text(name.to_owned()));
            let flags = [word(flag::IN_USE, "in-use"), word(flag::AUTO, "auto")];
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

    /// Bytes that the bitmaps take in a copy with clusters of `cluster_size`.
    pub(super) fn measure_bitmaps(&self, cluster_size: u64) -> Result<u64> {
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
