//! Holes of files in what the tables of an image call data: they read as zeroes, so they need not be read. A crafted image
//! refers to one hole from every entry of its tables.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Image, StatusDetail};

/// The files of a chain that have holes of some length. Others are not asked for their holes.
pub(crate) struct SparseFiles(Vec<Arc<dyn Device>>);

/// The bytes of all holes of a file that is asked for them.
const LEAST: u64 = 256 << 10;

impl SparseFiles {
    /// Those of `files`.
    pub(crate) fn among(files: &[Arc<dyn Device>]) -> Self {
        let is_sparse = |file: &&Arc<dyn Device>| {
            file.allocated_bytes()
                .is_some_and(|bytes| bytes.saturating_add(LEAST) <= file.len())
        };
        Self(files.iter().filter(is_sparse).cloned().collect())
    }

    /// Those of the files of `image` and its backing images.
    pub(crate) fn of(image: &Image) -> Self {
        Self::among(&devices_of_chain(image))
    }

    /// Whether the `len` bytes at this host offset are a hole.
    pub(crate) fn is_hole(&self, host: Option<&(Arc<dyn Device>, u64)>, len: u64) -> bool {
        let Some((device, offset)) = host else {
            return false;
        };
        if len == 0 || !self.0.iter().any(|file| Arc::ptr_eq(file, device)) {
            return false;
        }
        let range = ByteRange::at(*offset, len);
        let inside = range.len() == len && range.end() <= device.len();
        // A file that does not say is read.
        inside
            && device
                .status(range, StatusDetail::Zeroes)
                .is_ok_and(|extent| extent.kind.is_zero() && extent.len >= len)
    }
}

/// The files of an image and its backing images.
pub(crate) fn devices_of_chain(image: &Image) -> Vec<Arc<dyn Device>> {
    let chain = std::iter::successors(Some(image), |image| image.backing().map(|below| &**below));
    chain
        .flat_map(|image| {
            let layer = image.layer();
            let parts = layer.parts().into_iter().map(|(_, part)| part);
            [Some(layer.file()), layer.data_file()]
                .into_iter()
                .flatten()
                .cloned()
                .chain(parts)
        })
        .collect()
}
