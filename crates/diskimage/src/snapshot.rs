//! The states that an image kept.

use std::sync::Arc;

use diskimage_core::{Error, ErrorKind, Image, Result};

/// Which internal snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSelector {
    /// The one with this identifier, or else the one with this name.
    Either(String),
    /// The one with this identifier and this name, as far as they are given.
    Exact {
        /// Its identifier.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

/// The disk that a snapshot of `image` kept, as an image of its own with the same backing chain, read-only.
///
/// # Errors
/// `Failed to load snapshot` if there is no such snapshot or its tables cannot be right.
pub fn open_snapshot(image: &Image, selector: &SnapshotSelector) -> Result<Arc<Image>> {
    let layer = image.layer();
    let found = match selector {
        SnapshotSelector::Exact { id, name } => layer.snapshot(id.as_deref(), name.as_deref()),
        SnapshotSelector::Either(word) => match layer.snapshot(Some(word), None) {
            Err(error) if error.kind() == ErrorKind::NotFound => layer.snapshot(None, Some(word)),
            other => other,
        },
    };
    let found = match found {
        Ok(Some(layer)) => layer,
        Ok(None) => {
            return Err(Error::unsupported(format!(
                "Failed to load snapshot: Block format '{}' used by device '' does not support temporarily loading internal snapshots",
                layer.format()
            )));
        }
        Err(error) => return Err(error.context("Failed to load snapshot")),
    };
    Ok(Arc::new(Image::new(
        found,
        image.backing().cloned(),
        diskimage_core::Device::name(image),
        false,
    )))
}
