//! Local time. The caller supplies the time zone: the library does not read the environment.

use std::fmt;
use std::sync::Arc;

/// The offset of local time from UTC; 0 by default.
#[derive(Clone, Default)]
pub struct LocalTime(Option<Arc<Offset>>);

/// Takes seconds since 1970 and returns the offset from UTC in seconds.
type Offset = dyn Fn(i64) -> i32 + Send + Sync;

impl LocalTime {
    /// Local time with `offset` from UTC, which depends on the time; both in seconds.
    pub fn new(offset: impl Fn(i64) -> i32 + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(offset)))
    }

    /// Seconds since 1970-01-01 00:00 local time.
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
