//! Internal snapshots of an image.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use diskimage_core::{
    Error, ErrorKind, Image, NewSnapshot, Result, ResultExt, SnapshotInfo, Snapshots, errno, name,
    saturating_u32,
};

/// Selects an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSelector {
    /// The first snapshot with this name, or else the one with this identifier.
    Either(String),
    /// The snapshot with this identifier and this name, as far as they are given.
    Exact {
        /// Its identifier.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

/// Opens the disk of a snapshot of `image` as a read-only image with the same backing chain.
///
/// # Errors
/// `Failed to load snapshot` if the snapshot does not exist or its tables are corrupt.
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
        SnapshotSelector::Either(word) => match snapshots.open(None, Some(word)) {
            Err(error) if error.kind() == ErrorKind::NotFound => snapshots.open(Some(word), None),
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

/// The internal snapshots of an image in the order of the snapshot table; none if the format has no snapshots.
///
/// # Errors
/// The snapshot table is unreadable or corrupt.
pub fn list_snapshots(image: &Image) -> Result<Vec<SnapshotInfo>> {
    image
        .layer()
        .snapshots()
        .map_or(Ok(Vec::new()), |snapshots| snapshots.list())
}

/// The internal snapshots of an image up to the first one that cannot be read, and why that cannot be read.
pub fn list_readable_snapshots(image: &Image) -> (Vec<SnapshotInfo>, Option<Error>) {
    image
        .layer()
        .snapshots()
        .map_or((Vec::new(), None), |snapshots| snapshots.list_readable())
}

/// The warning about a selector that fits several snapshots of `image`, with the one that is meant.
pub fn ambiguous_snapshot(image: &Image, selector: &SnapshotSelector) -> Option<String> {
    let (list, _) = list_readable_snapshots(image);
    let (word, may_be_id) = match selector {
        SnapshotSelector::Either(word) => (word, true),
        SnapshotSelector::Exact {
            id: None,
            name: Some(name),
        } => (name, false),
        SnapshotSelector::Exact { .. } => return None,
    };
    let mut named = list.iter().filter(|snapshot| snapshot.name == *word);
    let first = named.next()?;
    let others = named.count();
    if others > 0 {
        return Some(format!(
            "{} snapshots are named '{word}': the one with ID {} is meant",
            others + 1,
            first.id
        ));
    }
    let with_id = list.iter().find(|snapshot| snapshot.id == *word && may_be_id)?;
    (with_id.id != first.id).then(|| {
        format!(
            "Snapshot '{word}' is ambiguous: the one named so is meant, which has ID {}, not '{}', which has ID {word}",
            first.id, with_id.name
        )
    })
}

/// The warnings about names that several snapshots have, one for each name.
pub fn repeated_names(list: &[SnapshotInfo]) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for snapshot in list {
        *counts.entry(&snapshot.name).or_default() += 1;
    }
    let repeated = counts.into_iter().filter(|(_, count)| *count > 1);
    repeated
        .map(|(name, count)| format!("{count} snapshots are named '{name}'"))
        .collect()
}

/// Takes a snapshot of `image` called `name`, which other snapshots may be called too. `now` is stored as its date. A
/// name is cut to [`MAX_SNAPSHOT_NAME`] bytes.
///
/// # Errors
/// The format has no snapshots, or changing the image fails.
pub fn create_snapshot(image: &Image, name: &str, now: SystemTime) -> Result<()> {
    let snapshots = image.layer().snapshots();
    let snapshots = snapshots.ok_or_else(|| Error::from_errno(errno::ENOTSUP))?;
    let age = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let snapshot = NewSnapshot {
        name: name::prefix(name, MAX_SNAPSHOT_NAME),
        // qcow2 stores the seconds in 32 bits, which end in 2106.
        date_sec: saturating_u32(age.as_secs()),
        date_nsec: age.subsec_nanos(),
    };
    image.durable_change(|| snapshots.create(&snapshot))
}

/// Reverts the disk of `image` to the first snapshot called `word`, or else to the one with identifier `word`.
/// [`delete_snapshot`] means the same one.
///
/// # Errors
/// The snapshot does not exist, the image has bitmaps, which a snapshot does not record, or changing the image fails.
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
        .position(|snapshot| snapshot.name == word)
        .or_else(|| list.iter().position(|snapshot| snapshot.id == word))
        .ok_or_else(|| Error::from_errno(errno::ENOENT))?;
    snapshots.apply(index)
}

/// Deletes the first snapshot called `name`.
///
/// # Errors
/// The snapshot does not exist, or changing the image fails.
pub fn delete_snapshot(image: &Image, name: &str) -> Result<()> {
    let not_found = || Error::new(ErrorKind::NotFound, "snapshot not found");
    let snapshots = image.layer().snapshots().ok_or_else(not_found)?;
    let list = snapshots.list()?;
    let index = list.iter().position(|snapshot| snapshot.name == name);
    let index = index.ok_or_else(not_found)?;
    image.durable_change(|| snapshots.delete(index))
}

/// The largest length of a snapshot's name in bytes; a limit of `qemu-img`.
pub const MAX_SNAPSHOT_NAME: usize = 255;
