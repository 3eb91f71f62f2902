//! Makes newly allocated storage read as zero without writing it.

use diskimage_core::{ByteRange, Device, Preallocation, Result, ZeroMode};

/// Makes `range` of `file` read as zero: bytes that the file has become a hole, and the file grows to the end of
/// `range`.
///
/// # Errors
/// Failures to zero or to grow the file.
pub(crate) fn clear(file: &dyn Device, range: ByteRange) -> Result<()> {
    let stale = range.intersect(ByteRange::new(0, file.len()));
    if !stale.is_empty() {
        file.write_zeroes(stale, ZeroMode::Unmap)?;
    }
    if file.len() < range.end() {
        file.resize(range.end(), Preallocation::Off)?;
    }
    Ok(())
}
