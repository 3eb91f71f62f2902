//! Makes newly allocated storage read as zero without writing it.

use diskimage_core::{ByteRange, Device, Preallocation, Result, ZeroMode};

/// Makes `range` of `file` read as zero: bytes that the file has become a hole, and the file grows to the end of
/// `range`.
///
/// # Errors
/// Failures to zero or to grow the file.
pub(crate) fn clear(file: &dyn Device, range: ByteRange) -> Result<()> {
    clear_stale(file, range)?;
    if file.len() < range.end() {
        file.resize(range.end(), Preallocation::Off)?;
    }
    Ok(())
}

/// Makes the bytes of `range` that `file` has read as zero. For storage that the file grows over later.
///
/// # Errors
/// Failures to zero.
pub(crate) fn clear_stale(file: &dyn Device, range: ByteRange) -> Result<()> {
    let stale = range.intersect(ByteRange::new(0, file.len()));
    if stale.is_empty() {
        return Ok(());
    }
    file.write_zeroes(stale, ZeroMode::Unmap)
}
