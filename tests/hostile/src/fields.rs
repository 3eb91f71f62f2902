//! Structures that are bytes in memory first, since they end with a checksum.

/// Writes `field` at `at`.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// `number` as an index.
pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).expect("fits")
}
