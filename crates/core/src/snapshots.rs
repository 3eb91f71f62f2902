//! Internal snapshots: earlier states of a disk that its image keeps.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{Error, Layer, Result, SnapshotInfo};

/// The internal snapshots of one image, a capability that a [`Layer`](crate::Layer) may have.
///
/// Every change is on disk when the call returns. A crash in between leaves the disk and every snapshot as they were
/// before or as they are after, with leaked clusters at worst.
pub trait Snapshots: Debug + Send + Sync {
    /// Checks whether this image can have snapshots.
    ///
    /// # Errors
    /// A feature of the image that snapshots do not support.
    fn check_support(&self) -> Result<()>;

    /// All snapshots, in the order in which they are stored.
    ///
    /// # Errors
    /// Damage in the snapshot table, or a failure to read it.
    fn list(&self) -> Result<Vec<SnapshotInfo>>;

    /// The snapshots up to the first one that cannot be read, and why that cannot be read.
    fn list_readable(&self) -> (Vec<SnapshotInfo>, Option<Error>);

    /// A snapshot as a read-only layer. If both are given, identifier and name have to match.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no such snapshot, and damage in its tables.
    fn open(&self, id: Option<&str>, name: Option<&str>) -> Result<Arc<dyn Layer>>;

    /// Creates a snapshot of the present state of the disk.
    ///
    /// # Errors
    /// Clusters whose refcount would overflow, damage, a full device.
    fn create(&self, snapshot: &NewSnapshot<'_>) -> Result<()>;

    /// Reverts the disk, including its size, to the snapshot at `index` of the list. All snapshots stay.
    ///
    /// # Errors
    /// No such snapshot, and as for [`Snapshots::create`].
    fn apply(&self, index: usize) -> Result<()>;

    /// Deletes the snapshot at `index` of the list.
    ///
    /// # Errors
    /// No such snapshot, and damage in its tables.
    fn delete(&self, index: usize) -> Result<()>;
}

/// A snapshot to create. The image chooses its identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSnapshot<'a> {
    /// Its name, which need not be unique.
    pub name: &'a str,
    /// The time, seconds since 1970.
    pub date_sec: u32,
    /// The nanoseconds of that time.
    pub date_nsec: u32,
}
