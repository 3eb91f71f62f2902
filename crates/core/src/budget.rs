//! A budget for memory whose size is read from an image: such memory is reserved before it is allocated.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, ErrorKind, Result, to_index, zeroed};

/// How much memory may be allocated for sizes read from images, shared by all images of one operation.
#[derive(Clone, Debug)]
pub struct Budget {
    left: Arc<AtomicU64>,
    total: u64,
}

impl Budget {
    /// A budget of `bytes`.
    pub fn new(bytes: u64) -> Self {
        Self {
            left: Arc::new(AtomicU64::new(bytes)),
            total: bytes,
        }
    }

    /// Reserves `bytes` until the reservation is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] if less is left.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation> {
        self.reserve_down_to(0, bytes)
            .ok_or_else(|| Error::new(ErrorKind::Limit, "Cannot allocate memory"))
    }

    /// Reserves `bytes` for what makes the program faster and is not needed, such as a cache: three quarters of the
    /// budget stay for what is.
    pub fn reserve_spare(&self, bytes: u64) -> Option<Reservation> {
        self.reserve_down_to(self.total - self.total / 4, bytes)
    }

    /// Reserves `bytes` if at least `least` are left then.
    fn reserve_down_to(&self, least: u64, bytes: u64) -> Option<Reservation> {
        let take = |left: u64| left.checked_sub(bytes).filter(|left| *left >= least);
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .ok()?;
        Some(Reservation {
            left: Arc::clone(&self.left),
            bytes,
        })
    }

    /// A buffer of `len` zeroes, whose memory is reserved until it is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] if less is left, and if the system has no memory.
    pub fn buffer(&self, len: u64) -> Result<Buffer> {
        let memory = self.reserve(len)?;
        Ok(Buffer {
            bytes: zeroed(to_index(len)?)?,
            _memory: memory,
        })
    }
}

/// Bytes whose memory is reserved from a [`Budget`].
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    _memory: Reservation,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Default for Budget {
    /// 256 MiB, a quarter of the address space that cloud services allow `qemu-img`.
    fn default() -> Self {
        Self::new(256 << 20)
    }
}

/// A part of a [`Budget`], released on drop.
#[derive(Debug)]
#[must_use]
pub struct Reservation {
    left: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.left.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_reservation_is_released() {
        let budget = Budget::new(100);
        let first = budget.reserve(60).expect("enough is left");
        assert_eq!(
            budget.reserve(41).map(drop).map_err(|e| e.kind()),
            Err(ErrorKind::Limit)
        );
        drop(first);
        assert!(budget.reserve(100).is_ok());
    }

    #[test]
    fn what_is_not_needed_takes_a_quarter() {
        let budget = Budget::new(100);
        let cache = budget.reserve_spare(25).expect("a quarter");
        assert!(budget.reserve_spare(1).is_none() && budget.reserve(75).is_ok());
        drop(cache);
        assert!(budget.reserve_spare(1).is_some());
    }

    #[test]
    fn the_memory_of_a_buffer_is_reserved_as_long_as_it_lives() {
        let budget = Budget::new(100);
        let mut buffer = budget.buffer(60).expect("enough is left");
        buffer[59] = 1;
        assert_eq!((buffer.len(), buffer[0]), (60, 0));
        assert!(budget.buffer(41).is_err() && budget.buffer(u64::MAX).is_err());
        drop(buffer);
        assert!(budget.buffer(100).is_ok());
    }
}
