//! Who does what, and in which order.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Error};

/// Hands out segments, and turns in the order of the segments. `F` is what a worker can fail with.
#[derive(Debug)]
pub(crate) struct Cursor<F> {
    len: u64,
    segment: u64,
    state: Mutex<State<F>>,
    moved: Condvar,
}

#[derive(Debug)]
struct State<F> {
    /// Where the next segment starts.
    position: u64,
    /// The number of the next segment.
    next: u64,
    /// The segment whose turn it is.
    turn: u64,
    /// Later segments that need no turn.
    passed: BTreeSet<u64>,
    /// The first segment in guest order that failed, and why.
    failure: Option<(u64, F)>,
}

/// How many segments may have passed before their turn came; what bounds the memory for them.
const MAX_PASSED: usize = 1024;

/// A segment to work on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) range: ByteRange,
}

/// What a worker ends with when another has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopped;

/// Why a worker ends early.
#[derive(Debug)]
pub(crate) enum End {
    Failed(Error),
    Stopped,
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Stopped> for End {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

impl<F> Cursor<F> {
    /// Hands out `len` bytes in segments of `segment`.
    pub(crate) fn new(len: u64, segment: u64) -> Self {
        Self {
            len,
            segment,
            state: Mutex::new(State {
                position: 0,
                next: 0,
                turn: 0,
                passed: BTreeSet::new(),
                failure: None,
            }),
            moved: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next segment, if there is one and nothing has failed.
    pub(crate) fn claim(&self) -> Option<Segment> {
        let mut state = self.lock();
        if state.failure.is_some() || state.position >= self.len {
            return None;
        }
        let range = ByteRange::at(state.position, self.segment).intersect(ByteRange::new(0, self.len));
        let number = state.next;
        state.position = range.end();
        state.next += 1;
        Some(Segment { number, range })
    }

    /// Makes a segment that ends at `from` longer by whole segments, up to `to` at most, if nobody took what follows.
    /// Where it ends now.
    pub(crate) fn extend(&self, from: u64, to: u64) -> u64 {
        let mut state = self.lock();
        let to = if to >= self.len {
            self.len
        } else {
            to - to % self.segment
        };
        if state.position != from || to <= from {
            return from;
        }
        state.position = to;
        to
    }

    /// Waits until all segments before `number` are through.
    pub(crate) fn wait(&self, number: u64) -> Result<Turn<'_, F>, Stopped> {
        let mut state = self.lock();
        loop {
            if state.failure.as_ref().is_some_and(|(failed, _)| *failed < number) {
                return Err(Stopped);
            }
            if state.turn == number {
                return Ok(Turn { cursor: self, number });
            }
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that segment `number` needs no turn.
    pub(crate) fn pass(&self, number: u64) -> Result<(), Stopped> {
        let mut state = self.lock();
        if state.turn != number && state.passed.len() < MAX_PASSED {
            state.passed.insert(number);
            return Ok(());
        }
        drop(state);
        self.wait(number).map(drop)
    }

    fn advance(&self, number: u64) {
        let mut state = self.lock();
        if state.turn == number {
            state.turn += 1;
            while state.passed.first() == Some(&state.turn) {
                state.passed.pop_first();
                state.turn += 1;
            }
        }
        drop(state);
        self.moved.notify_all();
    }

    /// Ends the work: no more segments, and no turn for any after `number`. Those before go on, so that the failure
    /// that is reported in the end is the first in guest order.
    pub(crate) fn fail(&self, number: u64, failure: F) {
        let mut state = self.lock();
        if state.failure.as_ref().is_none_or(|(failed, _)| number < *failed) {
            state.failure = Some((number, failure));
        }
        drop(state);
        self.moved.notify_all();
    }

    /// The first failure in guest order, once all workers are done.
    pub(crate) fn finish(&self) -> Option<F> {
        self.lock().failure.take().map(|(_, failure)| failure)
    }
}

/// The time in which a segment's places are given out; the next one's begins when it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Turn<'a, F> {
    cursor: &'a Cursor<F>,
    number: u64,
}

impl<F> Drop for Turn<'_, F> {
    fn drop(&mut self) {
        self.cursor.advance(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_that_pass_early_are_skipped_in_turn() {
        let cursor = Cursor::<&str>::new(100, 10);
        let numbers: Vec<u64> = std::iter::from_fn(|| cursor.claim()).map(|s| s.number).collect();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
        cursor.pass(1).unwrap();
        cursor.pass(2).unwrap();
        drop(cursor.wait(0).unwrap());
        drop(cursor.wait(3).unwrap());
    }

    #[test]
    fn only_the_worker_before_a_gap_extends_over_it() {
        let cursor = Cursor::<&str>::new(105, 10);
        assert_eq!(cursor.claim().map(|s| s.range), Some(ByteRange::new(0, 10)));
        assert_eq!(cursor.extend(10, 39), 30);
        assert_eq!(cursor.extend(10, 80), 10);
        assert_eq!(cursor.claim().map(|s| s.range), Some(ByteRange::new(30, 40)));
        assert_eq!(cursor.extend(40, 105), 105);
        assert!(cursor.claim().is_none());
    }

    #[test]
    fn the_first_failure_in_guest_order_wins() {
        let cursor = Cursor::<&str>::new(100, 10);
        cursor.fail(5, "five");
        cursor.fail(3, "three");
        cursor.fail(4, "four");
        assert!(cursor.claim().is_none());
        assert!(cursor.wait(4).is_err());
        assert_eq!(cursor.finish(), Some("three"));
    }
}
