//! Memory that a number from an image sizes is taken from a budget first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, ErrorKind, Result};

/// How much memory the numbers found in images may claim, shared by all images of one operation.
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

    /// Takes `bytes` until the reservation is dropped.
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
    /// 256 MiB: a quarter of the address space that cloud services grant.
    fn default() -> Self {
        Self::new(256 << 20)
    }
}

/// A part of a [`Budget`], given back on drop.
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
    fn what_is_taken_comes_back_on_drop() {
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
