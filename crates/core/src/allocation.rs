//! Large buffers: an allocation that fails is an error of the operation, not the end of the program.
//!
//! A program may install an allocator that ends it with a message of its own when memory runs out. It asks
//! [`is_expected_to_fail`] first: the allocations here return an error.

use std::cell::Cell;

use crate::{Error, Result, errno};

thread_local! {
    static FALLIBLE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in an allocation whose failure is handled.
pub fn is_expected_to_fail() -> bool {
    FALLIBLE.get()
}

/// An empty vector with room for `len` elements.
///
/// # Errors
/// `ENOMEM` if the memory cannot be had.
pub fn vec_with_room<T>(len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    FALLIBLE.set(true);
    let outcome = vec.try_reserve_exact(len);
    FALLIBLE.set(false);
    outcome.map_err(|_| Error::from_errno(errno::ENOMEM))?;
    Ok(vec)
}

/// `len` zero bytes. Pages are touched when they are used.
///
/// # Errors
/// `ENOMEM` if the memory cannot be had.
pub fn zeroed(len: usize) -> Result<Vec<u8>> {
    // The standard library has no fallible allocation of zeroed memory: this one shows that there is room.
    drop(vec_with_room::<u8>(len)?);
    Ok(vec![0; len])
}

/// Changes the length of `bytes`, whose contents are anything afterwards.
///
/// # Errors
/// `ENOMEM` if the memory cannot be had.
pub fn resize(bytes: &mut Vec<u8>, len: usize) -> Result<()> {
    if len > bytes.capacity() {
        // The old bytes are not needed while the new ones are allocated.
        *bytes = Vec::new();
        *bytes = zeroed(len)?;
    } else {
        bytes.resize(len, 0);
    }
    Ok(())
}

/// Whether `len` bytes of memory could be allocated now.
pub fn has_room(len: usize) -> bool {
    vec_with_room::<u8>(len).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        let impossible = usize::MAX / 4;
        assert!(!has_room(impossible));
        assert_eq!(zeroed(impossible).unwrap_err().errno(), Some(errno::ENOMEM));
        assert!(vec_with_room::<u64>(usize::MAX / 2).is_err());
        assert!(!is_expected_to_fail());
        assert_eq!(zeroed(10).unwrap(), [0; 10]);
    }
}
