//! Groups of nodes that share limits of bytes and requests per second.
//!
//! Each limit is a leaky bucket. A request adds its cost to the level of the bucket. It starts at once if the level is
//! below the capacity, else it waits until the level has sunk to the capacity.
//!
//! ```text
//!    request ── + cost ──► │        │
//!                          │~~~~~~~~│ capacity: `max` for `max-length` seconds, or a tenth of a second's `average`
//!                          │ level  │
//!                          └───┬────┘
//!                              ▼ `average` per second
//! ```

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// The direction of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A read.
    Read,
    /// A write.
    Write,
}

/// The leaky bucket of one limit: of bytes or requests, in total or in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BucketConfig {
    /// The rate per second; 0 for no limit.
    pub average: u64,
    /// The rate per second of a burst; 0 for no bursts.
    pub max: u64,
    /// The length of a burst in seconds.
    pub max_length: u64,
}

impl BucketConfig {
    fn capacity(&self) -> f64 {
        if self.max == 0 {
            number(self.average) / 10.0
        } else {
            number(self.max) * number(self.max_length.max(1))
        }
    }
}

/// The limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Bytes: in total, read, written.
    pub bytes: [BucketConfig; 3],
    /// Requests: in total, reads, writes.
    pub requests: [BucketConfig; 3],
    /// A request of more bytes than this counts as several; 0 if each counts as one.
    pub request_size: u64,
}

/// The largest rate.
const MAX_RATE: u64 = 1_000_000_000_000_000;

impl ThrottleLimits {
    /// Refuses limits that contradict each other.
    ///
    /// # Errors
    /// The rule that the limits violate.
    pub fn check(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::invalid(why));
        for [total, reading, writing] in [self.bytes, self.requests] {
            let clash =
                |of: fn(&BucketConfig) -> u64| of(&total) != 0 && (of(&reading) != 0 || of(&writing) != 0);
            if clash(|rate| rate.average) || clash(|rate| rate.max) {
                return refuse(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                );
            }
        }
        if self.request_size != 0 && self.requests.iter().all(|rate| rate.average == 0) {
            return refuse("iops size requires an iops value to be set");
        }
        for rate in self.bytes.iter().chain(&self.requests) {
            if rate.average > MAX_RATE || rate.max > MAX_RATE {
                return Err(Error::invalid(format!(
                    "bps/iops/max values must be within [0, {MAX_RATE}]"
                )));
            }
            if rate.max_length == 0 {
                return refuse("the burst length cannot be 0");
            }
            if rate.max_length > 1 && rate.max == 0 {
                return refuse("burst length set without burst rate");
            }
            if rate.max != 0 && rate.average == 0 {
                return refuse("bps_max/iops_max require corresponding bps/iops values");
            }
            if rate.max != 0 && rate.max < rate.average {
                return refuse("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }
}

/// A group of nodes that share limits.
#[derive(Debug)]
pub struct ThrottleGroup {
    limits: ThrottleLimits,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    /// The time for which the levels were computed.
    at: Instant,
    bytes: [f64; 3],
    requests: [f64; 3],
}

impl ThrottleGroup {
    /// A group with these limits.
    ///
    /// # Errors
    /// As [`ThrottleLimits::check`].
    pub fn new(limits: ThrottleLimits) -> Result<Self> {
        limits.check()?;
        Ok(Self {
            limits,
            buckets: Mutex::new(Buckets {
                at: Instant::now(),
                bytes: [0.0; 3],
                requests: [0.0; 3],
            }),
        })
    }

    /// Waits until a request of `bytes` bytes may start.
    pub fn wait(&self, direction: Direction, bytes: u64) {
        let delay = self.admit(direction, bytes, Instant::now());
        if !delay.is_zero() {
            thread::sleep(delay);
        }
    }

    /// Accounts for a request that arrives at `now` and returns how long it has to wait.
    fn admit(&self, direction: Direction, bytes: u64, now: Instant) -> Duration {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(buckets.at).as_secs_f64();
        buckets.at = buckets.at.max(now);
        let requests = match self.limits.request_size {
            0 => 1,
            size => bytes.div_ceil(size).max(1),
        };
        let own = match direction {
            Direction::Read => 1,
            Direction::Write => 2,
        };
        let mut delay: f64 = 0.0;
        let Buckets {
            bytes: byte_levels,
            requests: request_levels,
            ..
        } = &mut *buckets;
        for (rates, levels, cost) in [
            (&self.limits.bytes, byte_levels, bytes),
            (&self.limits.requests, request_levels, requests),
        ] {
            for (i, (rate, level)) in rates.iter().zip(levels).enumerate() {
                if rate.average == 0 {
                    continue;
                }
                let leak = number(rate.average);
                *level = (*level - leak * passed).max(0.0);
                if i == 0 || i == own {
                    delay = delay.max((*level - rate.capacity()) / leak);
                    *level += number(cost);
                }
            }
        }
        Duration::try_from_secs_f64(delay.max(0.0)).unwrap_or(Duration::ZERO)
    }
}

/// Exact below 2^53, which is enough for limits.
#[expect(clippy::cast_precision_loss, reason = "limits are not exact to the byte")]
fn number(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(average: u64) -> BucketConfig {
        BucketConfig {
            average,
            max: 0,
            max_length: 1,
        }
    }

    fn none() -> [BucketConfig; 3] {
        [rate(0); 3]
    }

    #[test]
    fn requests_wait_for_earlier_ones() {
        let limits = ThrottleLimits {
            bytes: [rate(1000), rate(0), rate(0)],
            requests: none(),
            request_size: 0,
        };
        let group = ThrottleGroup::new(limits).expect("right");
        let start = Instant::now();
        assert_eq!(group.admit(Direction::Read, 1100, start), Duration::ZERO);
        assert_eq!(group.admit(Direction::Write, 500, start), Duration::from_secs(1));
        let later = start + Duration::from_secs(1);
        assert_eq!(group.admit(Direction::Read, 1, later), Duration::from_millis(500));
        let much_later = start + Duration::from_secs(100);
        assert_eq!(group.admit(Direction::Read, 1, much_later), Duration::ZERO);
    }

    #[test]
    fn directions_are_separate_and_large_requests_count_as_several() {
        let limits = ThrottleLimits {
            bytes: none(),
            requests: [rate(0), rate(10), rate(0)],
            request_size: 100,
        };
        let group = ThrottleGroup::new(limits).expect("right");
        let start = Instant::now();
        assert_eq!(group.admit(Direction::Read, 1001, start), Duration::ZERO);
        assert_eq!(group.admit(Direction::Write, 1 << 40, start), Duration::ZERO);
        assert_eq!(group.admit(Direction::Read, 1, start), Duration::from_secs(1));
    }

    #[test]
    fn bursts_do_not_wait() {
        let limits = ThrottleLimits {
            bytes: [
                BucketConfig {
                    average: 100,
                    max: 1000,
                    max_length: 2,
                },
                rate(0),
                rate(0),
            ],
            requests: none(),
            request_size: 0,
        };
        let group = ThrottleGroup::new(limits).expect("right");
        let start = Instant::now();
        assert_eq!(group.admit(Direction::Read, 2000, start), Duration::ZERO);
        assert_eq!(group.admit(Direction::Read, 100, start), Duration::ZERO);
        assert_eq!(group.admit(Direction::Read, 1, start), Duration::from_secs(1));
    }
}
