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
    /// Damage in the bitmap directory, or a failure to read it.
    fn list(&self) -> Result<Vec<BitmapInfo>>;

    /// The bytes that the bitmaps need in a copy of the image with clusters of `cluster_size`.
    ///
    /// # Errors
    /// Damage in the bitmap directory, or a failure to read it.
    fn bytes(&self, cluster_size: u64) -> Result<u64>;

    /// Creates a bitmap in which no bit is set.
    ///
    /// # Errors
    /// A name that is in use, empty or too long, an unsupported granularity, a bitmap that would be too large.
    fn add(&self, bitmap: &NewBitmap<'_>) -> Result<()>;

    /// Deletes a bitmap, which may be inconsistent.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if no bitmap has this name.
    fn remove(&self, name: &str) -> Result<()>;

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    fn clear(&self, name: &str) -> Result<()>;

    /// Sets whether writes to the disk set bits from now on.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    fn set_enabled(&self, name: &str, enabled: bool) -> Result<()>;

    /// Sets the bit of every granule that one of `ranges` touches. Ranges beyond the end of the disk are ignored.
    ///
    /// # Errors
    /// No such bitmap, or an inconsistent one.
    fn mark(&self, name: &str, ranges: &[ByteRange]) -> Result<()>;

    /// Calls `visit` with the ranges of the disk whose bits are set, in ascending order. Adjacent ranges need not be
    /// merged.
    ///
    /// # Errors
    /// No such bitmap, an inconsistent one, damage in its table, and the first error of `visit`.
    fn marked(&self, name: &str, visit: &mut dyn FnMut(ByteRange) -> Result<()>) -> Result<()>;
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: u64,
    /// Whether writes to the disk set its bits.
    pub enabled: bool,
    /// Whether it was not saved when the image was closed, so that its bits are out of date.
    pub inconsistent: bool,
}

/// A persistent bitmap to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewBitmap<'a> {
    /// Its name.
    pub name: &'a str,
    /// Bytes of the disk for each bit; the format's default if not given.
    pub granularity: Option<u64>,
    /// Whether writes to the disk set its bits.
    pub enabled: bool,
}
