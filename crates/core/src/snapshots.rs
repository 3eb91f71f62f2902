//! Internal snapshots: earlier states of a disk that its image keeps.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{Layer, Result, SnapshotInfo};

/// The internal snapshots of one image, a capability that a [`Layer`](crate::Layer) may have.
///
/// Every change is on disk when the call returns. A crash in between leaves the disk and every snapshot as they were before
/// or as they are after, with leaked clusters at worst.
pub trait Snapshots: Debug + Send + Sync {
    /// Whether this very image can keep snapshots.
    ///
    /// # Errors
    /// What it has that cannot be shared between states.
    fn check_support(&self) -> Result<()>;

    /// All snapshots, in the order in which they are stored.
    ///
    /// # Errors
    /// Damage in their table.
    fn list(&self) -> Result<Vec<SnapshotInfo>>;

    /// The disk that a snapshot kept, as a read-only layer. Where both are given, identifier and name have to fit.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no such snapshot, and damage in its tables.
    fn open(&self, id: Option<&str>, name: Option<&str>) -> Result<Arc<dyn Layer>>;

    /// Keeps the disk as it is now.
    ///
    /// # Errors
    /// Clusters that cannot be shared once more, damage, a full device.
    fn create(&self, snapshot: &NewSnapshot<'_>) -> Result<()>;

    /// Makes the disk what it was when the snapshot at `index` of the list was taken, its size as well. Snapshots stay.
    ///
    /// # Errors
    /// No such snapshot, and as for [`Snapshots::create`].
    fn apply(&self, index: usize) -> Result<()>;

    /// Takes the snapshot at `index` of the list away.
    ///
    /// # Errors
    /// No such snapshot, and damage in its tables.
    fn delete(&self, index: usize) -> Result<()>;
}

/// A snapshot to be made. Its identifier is the image's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSnapshot<'a> {
    /// Its name, which others may have as well.
    pub name: &'a str,
    /// The time, seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
}
