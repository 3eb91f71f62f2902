//! Who does what, and in which order.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Error, Result};

/// Hands out segments, and turns in the order of the segments.
#[derive(Debug)]
pub(super) struct Cursor {
    len: u64,
    segment: u64,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Where the next segment starts.
    position: u64,
    /// The number of the next segment.
    next: u64,
    /// The segment whose turn it is.
    turn: u64,
    /// Later segments that need no turn.
    passed: BTreeSet<u64>,
    /// The first segment in guest order that failed, and why.
    failure: Option<(u64, Error)>,
}

/// How many segments may have passed before their turn came; what bounds the memory for them.
const MAX_PASSED: usize = 1024;

/// A segment to work on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) range: ByteRange,
}

/// What a worker ends with when another has failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped;

impl Cursor {
    /// Hands out `len` bytes in segments of `segment`.
    pub(super) fn new(len: u64, segment: u64) -> Self {
        Self {
            len,
            segment,
            state: Mutex::default(),
            moved: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next segment, if there is one and nothing has failed.
    pub(super) fn claim(&self) -> Option<Segment> {
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
    pub(super) fn extend(&self, from: u64, to: u64) -> u64 {
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
    pub(super) fn wait(&self, number: u64) -> std::result::Result<Turn<'_>, Stopped> {
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
    pub(super) fn pass(&self, number: u64) -> std::result::Result<(), Stopped> {
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

    /// Ends the conversion: no more segments, and no turn for any after `number`. Those before go on, so that the
    /// error that is reported in the end is the first in guest order.
    pub(super) fn fail(&self, number: u64, error: Error) {
        let mut state = self.lock();
        if state.failure.as_ref().is_none_or(|(failed, _)| number < *failed) {
            state.failure = Some((number, error));
        }
        drop(state);
        self.moved.notify_all();
    }

    /// The outcome, once all workers are done.
    pub(super) fn finish(self: &Cursor) -> Result<()> {
        match self.lock().failure.take() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

/// The time in which a segment's places are given out; the next one's begins when it is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Turn<'a> {
    cursor: &'a Cursor,
    number: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.cursor.advance(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_that_pass_early_are_skipped_in_turn() {
        let cursor = Cursor::new(100, 10);
        let numbers: Vec<u64> = std::iter::from_fn(|| cursor.claim()).map(|s| s.number).collect();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
        cursor.pass(1).unwrap();
        cursor.pass(2).unwrap();
        drop(cursor.wait(0).unwrap());
        drop(cursor.wait(3).unwrap());
    }

    #[test]
    fn only_the_worker_before_a_gap_extends_over_it() {
        let cursor = Cursor::new(105, 10);
        assert_eq!(cursor.claim().map(|s| s.range), Some(ByteRange::new(0, 10)));
        assert_eq!(cursor.extend(10, 39), 30);
        assert_eq!(cursor.extend(10, 80), 10);
        assert_eq!(cursor.claim().map(|s| s.range), Some(ByteRange::new(30, 40)));
        assert_eq!(cursor.extend(40, 105), 105);
        assert!(cursor.claim().is_none());
    }

    #[test]
    fn the_first_failure_in_guest_order_wins() {
        let cursor = Cursor::new(100, 10);
        cursor.fail(5, Error::invalid("five"));
        cursor.fail(3, Error::invalid("three"));
        cursor.fail(4, Error::invalid("four"));
        assert!(cursor.claim().is_none());
        assert!(cursor.wait(4).is_err());
        assert_eq!(cursor.finish().map_err(|e| e.chain()), Err("three".to_owned()));
    }
}
