//! The states that an image keeps.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use diskimage_core::{
    Error, ErrorKind, Image, NewSnapshot, Result, ResultExt, SnapshotInfo, Snapshots, errno, name,
};

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
    let snapshots = layer.snapshots().ok_or_else(|| {
        Error::unsupported(format!(
            "Failed to load snapshot: Block format '{}' used by device '' does not support temporarily loading internal snapshots",
            layer.format()
        ))
    })?;
    let found = match selector {
        SnapshotSelector::Exact { id, name } => snapshots.open(id.as_deref(), name.as_deref()),
        SnapshotSelector::Either(word) => match snapshots.open(Some(word), None) {
            Err(error) if error.kind() == ErrorKind::NotFound => snapshots.open(None, Some(word)),
            other => other,
        },
    };
    let found = found.context(|| "Failed to load snapshot")?;
    Ok(Arc::new(Image::new(
        found,
        image.backing().cloned(),
        diskimage_core::Device::name(image),
        false,
    )))
}

/// The internal snapshots of an image, in the order in which they are stored; none if its format has none.
///
/// # Errors
/// Damage in their table.
pub fn list_snapshots(image: &Image) -> Result<Vec<SnapshotInfo>> {
    image
        .layer()
        .snapshots()
        .map_or(Ok(Vec::new()), |snapshots| snapshots.list())
}

/// Keeps the disk of `image` as it is now under `name`, which need not be the only one of that name. `now` is the time
/// noted with it. Of a longer name the first [`MAX_SNAPSHOT_NAME`] bytes count.
///
/// # Errors
/// An image that has no snapshots, and failures to change it.
pub fn create_snapshot(image: &Image, name: &str, now: SystemTime) -> Result<()> {
    let snapshots = image.layer().snapshots();
    let snapshots = snapshots.ok_or_else(|| Error::from_errno(errno::ENOTSUP))?;
    let age = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let snapshot = NewSnapshot {
        name: name::prefix(name, MAX_SNAPSHOT_NAME),
        // The format's clock ends in 2106.
        date_sec: u32::try_from(age.as_secs()).unwrap_or(u32::MAX),
        date_nsec: age.subsec_nanos(),
    };
    image.durable_change(|| snapshots.create(&snapshot))
}

/// Makes the disk of `image` what it was when the snapshot with identifier `word` was taken, or else the first one called
/// so.
///
/// # Errors
/// No such snapshot, an image with bitmaps, which could not follow, and failures to change it.
pub fn apply_snapshot(image: &Image, word: &str) -> Result<()> {
    let layer = image.layer();
    if let Some(bitmaps) = layer.bitmaps()
        && !bitmaps.list()?.is_empty()
    {
        return Err(Error::unsupported("Device has active dirty bitmaps"));
    }
    let snapshots = layer
        .snapshots()
        .ok_or_else(|| Error::unsupported("Block driver does not support snapshots"))?;
    image
        .durable_change(|| apply_found(snapshots, word))
        .context(|| "Failed to load snapshot")
}

fn apply_found(snapshots: &dyn Snapshots, word: &str) -> Result<()> {
    snapshots.check_support()?;
    let list = snapshots.list()?;
    let index = list
        .iter()
        .position(|snapshot| snapshot.id == word)
        .or_else(|| list.iter().position(|snapshot| snapshot.name == word))
        .ok_or_else(|| Error::from_errno(errno::ENOENT))?;
    snapshots.apply(index)
}

/// Takes the first snapshot called `name` away.
///
/// # Errors
/// No such snapshot, and failures to change the image.
pub fn delete_snapshot(image: &Image, name: &str) -> Result<()> {
    let not_found = || Error::new(ErrorKind::NotFound, "snapshot not found");
    let snapshots = image.layer().snapshots().ok_or_else(not_found)?;
    let list = snapshots.list()?;
    let index = list.iter().position(|snapshot| snapshot.name == name);
    let index = index.ok_or_else(not_found)?;
    image.durable_change(|| snapshots.delete(index))
}

/// Bytes of a snapshot's name, as with the original.
pub const MAX_SNAPSHOT_NAME: usize = 255;
