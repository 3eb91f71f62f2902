//! How far a table goes on with the same entry, found without a look at each entry: tables of crafted images have billions
//! of them, most of them in holes of the file or equal to each other.

use diskimage_core::{ByteRange, Device, ExtentKind, Result, StatusDetail};

/// The number of leading entries of `size` bytes that are equal to the first; those that are there in part do not count.
pub(crate) fn leading_equal(bytes: &[u8], size: usize) -> usize {
    let whole = bytes.len() / size;
    let Some(last) = whole.checked_sub(1) else {
        return 0;
    };
    // Each entry is compared with the next one, many at a time.
    let (entries, next) = (&bytes[..last * size], &bytes[size..whole * size]);
    let step = STEP / size * size;
    let mut equal = 0;
    for (one, other) in entries.chunks(step).zip(next.chunks(step)) {
        if one == other {
            equal += one.len() / size;
            continue;
        }
        let pairs = one.chunks_exact(size).zip(other.chunks_exact(size));
        equal += pairs.take_while(|(one, other)| one == other).count();
        break;
    }
    equal + 1
}

/// How many bytes are compared at once.
const STEP: usize = 1024;

/// How many bytes at the start of `range`, which is not empty, are a hole of the file. `is_sparse` says whether `device` has
/// holes to speak of: others are not asked for.
///
/// # Errors
/// Those of the device.
pub(crate) fn hole(device: &dyn Device, is_sparse: bool, range: ByteRange) -> Result<u64> {
    let inside = range.intersect(ByteRange::new(0, device.len()));
    if !is_sparse || inside.is_empty() || inside.start() != range.start() {
        return Ok(0);
    }
    let extent = device.status(inside, StatusDetail::Zeroes)?;
    match extent.kind {
        ExtentKind::FileHole | ExtentKind::Zero => Ok(extent.len.min(inside.len())),
        _ => Ok(0),
    }
}

/// Whether more than half of a file are holes. Files whose holes only a server knows count as having none.
pub(crate) fn is_sparse(device: &dyn Device) -> bool {
    device
        .allocated_bytes()
        .is_some_and(|bytes| bytes < device.len() / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_entries_are_counted_up_to_the_first_other_one() {
        for size in [4, 8, 16] {
            for count in [1, 2, 3, 63, 64, 65, 127, 128, 129, 1000] {
                let mut bytes = vec![7; size * count];
                assert_eq!(leading_equal(&bytes, size), count);
                bytes.push(7);
                assert_eq!(leading_equal(&bytes, size), count, "a part of an entry");
                for other in [1, 2, count / 2, count - 1] {
                    if other == 0 || other >= count {
                        continue;
                    }
                    let mut bytes = vec![7; size * count];
                    bytes[other * size + size - 1] = 8;
                    assert_eq!(leading_equal(&bytes, size), other, "{size} {count}");
                }
            }
        }
        assert_eq!(leading_equal(&[1; 7], 8), 0);
    }
}
