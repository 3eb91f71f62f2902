//! Local time, as whoever knows the zone tells it: nothing below the command line looks into the environment.

use std::fmt;
use std::sync::Arc;

/// How far local time is ahead of UTC; not at all unless somebody says so.
#[derive(Clone, Default)]
pub struct LocalTime(Option<Arc<Offset>>);

/// Takes seconds since 1970, gives seconds.
type Offset = dyn Fn(i64) -> i32 + Send + Sync;

impl LocalTime {
    /// The zone that has this offset at a moment, both in seconds.
    pub fn new(offset: impl Fn(i64) -> i32 + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(offset)))
    }

    /// Seconds since 1970 began where the zone is.
    pub fn at(&self, seconds: i64) -> i64 {
        let offset = self.0.as_ref().map_or(0, |offset| offset(seconds));
        seconds.saturating_add(i64::from(offset))
    }
}

impl fmt::Debug for LocalTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalTime")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_zone_it_is_utc() {
        assert_eq!(LocalTime::default().at(12), 12);
        assert_eq!(LocalTime::new(|_| -3600).at(12), -3588);
    }
}
