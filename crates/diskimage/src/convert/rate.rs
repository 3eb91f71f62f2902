//! A limit on the bytes written per second: a leaky bucket without burst.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Delays writes so that they stay below a rate.
#[derive(Debug)]
pub(super) struct RateLimit {
    bytes_per_second: Option<u64>,
    /// When the bytes admitted so far have taken their time at this rate.
    free_at: Mutex<Option<Instant>>,
}

impl RateLimit {
    /// At most this many bytes per second; `None` and 0 are no limit.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|rate| *rate > 0),
            free_at: Mutex::new(None),
        }
    }

    /// Waits until the bytes admitted before have taken their time, then admits `bytes`.
    pub(super) fn admit(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second.filter(|_| bytes > 0) else {
            return;
        };
        #[expect(clippy::cast_precision_loss, reason = "a delay need not be exact")]
        let seconds = bytes as f64 / rate as f64;
        // A quotient beyond the range of `Duration` is a wait of years: `LONGEST` is as good.
        let cost = Duration::try_from_secs_f64(seconds)
            .unwrap_or(Duration::MAX)
            .min(LONGEST);
        let now = Instant::now();
        let start = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let start = free_at.map_or(now, |at| at.max(now));
            *free_at = start.checked_add(cost);
            start
        };
        thread::sleep(start.saturating_duration_since(now));
    }
}

/// The longest delay of one write; keeps the sum of delays within the range of `Instant`.
const LONGEST: Duration = Duration::from_secs(1 << 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_spread_over_time() {
        let limit = RateLimit::new(Some(1 << 20));
        let start = Instant::now();
        for _ in 0..3 {
            limit.admit(50 << 10);
        }
        assert!(start.elapsed() >= Duration::from_millis(90));
        RateLimit::new(Some(1)).admit(u64::MAX);
        RateLimit::new(Some(0)).admit(u64::MAX);
    }
}
