//! Makes storage read as zero, as far as the file has it: bytes beyond its end read as zero already.

use diskimage_core::{ByteRange, Device, Preallocation, Result, ZeroMode};

/// Makes newly allocated `range` of `file` read as zero without writing it: bytes that the file has become a hole, and
/// the file grows to the end of `range`.
///
/// # Errors
/// Failures to zero or to grow the file.
pub(crate) fn clear(file: &dyn Device, range: ByteRange) -> Result<()> {
    zero_existing(file, range, ZeroMode::Unmap)?;
    if file.len() < range.end() {
        file.resize(range.end(), Preallocation::Off)?;
    }
    Ok(())
}

/// Makes the bytes of `range` that `file` has read as zero.
///
/// # Errors
/// Failures to zero.
pub(crate) fn zero_existing(file: &dyn Device, range: ByteRange, mode: ZeroMode) -> Result<()> {
    let existing = range.intersect(ByteRange::new(0, file.len()));
    if existing.is_empty() {
        return Ok(());
    }
    file.write_zeroes(existing, mode)
}
