//! A budget for memory whose size is read from an image: such memory is reserved before it is allocated.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, ErrorKind, Result};

/// How much memory may be allocated for sizes read from images, shared by all images of one operation.
#[derive(Clone, Debug)]
pub struct Budget {
    left: Arc<AtomicU64>,
}

impl Budget {
    /// A budget of `bytes`.
    pub fn new(bytes: u64) -> Self {
        Self {
            left: Arc::new(AtomicU64::new(bytes)),
        }
    }

    /// Reserves `bytes` until the reservation is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] if less is left.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation> {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            })
            .map_err(|_| Error::new(ErrorKind::Limit, "Cannot allocate memory"))?;
        Ok(Reservation {
            left: Arc::clone(&self.left),
            bytes,
        })
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
}
