//! Persistent bitmaps: which parts of a disk were written since some point in time.

use std::fmt::Debug;

use crate::{ByteRange, Result};

/// The persistent bitmaps of one image, a capability that a [`Layer`](crate::Layer) may have.
///
/// Every change is on disk when the call returns, and a crash in between leaves the bitmaps as they were.
pub trait Bitmaps: Debug + Send + Sync {
    /// All bitmaps, in the order in which they are stored.
    ///
    /// # Errors
    /// Damage in their directory.
    fn list(&self) -> Result<Vec<BitmapInfo>>;

    /// How many bytes they take in a copy of the image with clusters of `cluster_size`.
    ///
    /// # Errors
    /// Damage in their directory.
    fn bytes(&self, cluster_size: u64) -> Result<u64>;

    /// Makes a bitmap in which nothing is marked.
    ///
    /// # Errors
    /// A name that is taken, empty or too long, a granularity that does not exist, a bitmap that would be too large.
    fn add(&self, bitmap: &NewBitmap<'_>) -> Result<()>;

    /// Takes a bitmap away, an inconsistent one as well.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is none of this name.
    fn remove(&self, name: &str) -> Result<()>;

    /// Unmarks everything.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    fn clear(&self, name: &str) -> Result<()>;

    /// Sets whether writes to the disk are marked from now on.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    fn set_enabled(&self, name: &str, enabled: bool) -> Result<()>;

    /// Marks every granule that one of `ranges` touches. What lies beyond the end of the disk is left out.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    fn mark(&self, name: &str, ranges: &[ByteRange]) -> Result<()>;

    /// Hands the marked parts of the disk to `visit`, in order; neighbours may come in several pieces.
    ///
    /// # Errors
    /// No such bitmap, an inconsistent one, damage in its table, and what `visit` says.
    fn marked(&self, name: &str, visit: &mut dyn FnMut(ByteRange) -> Result<()>) -> Result<()>;
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk one bit stands for.
    pub granularity: u64,
    /// Whether writes to the disk are marked in it.
    pub enabled: bool,
    /// Whether it was not stored properly, so that what it says cannot be relied on.
    pub inconsistent: bool,
}

/// A persistent bitmap to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewBitmap<'a> {
    /// Its name.
    pub name: &'a str,
    /// How many bytes of the disk one bit stands for; the format's default if not given.
    pub granularity: Option<u64>,
    /// Whether writes to the disk are to be marked in it.
    pub enabled: bool,
}
