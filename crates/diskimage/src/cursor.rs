//! Hands out the segments of a disk to workers, and lets them take turns in guest order.
//!
//! ```text
//!   claim    [ 0 ][ 1 ][ 2 ][ 3 ]│ position          any worker, at any time
//!   turn            ▲ 1                              wait(1) returns; wait(2) blocks until the turn is passed on
//!   passed                 {2}                       needs no turn: skipped when 1 passes its turn on
//! ```
//!
//! One worker at a time may look beyond its segment. If it finds that a long range needs no read, its segment is extended, or,
//! if others have claimed segments meanwhile, the next one is as long as that.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use diskimage_core::{ByteRange, Error, saturating_index};

/// The segments of a disk and the turns of those that are claimed. `F` is the failure of a worker, `K` what it finds out
/// about a long range.
///
/// One lock guards the state. It is held for a few instructions and never across I/O.
#[derive(Debug)]
pub(crate) struct Cursor<F, K = ()> {
    end: u64,
    segment: u64,
    state: Mutex<CursorState<F, K>>,
    /// Whether a worker looks beyond its segment.
    looking: AtomicBool,
    /// Signalled when the turn is passed on and when a segment has failed: segment `number` waits for the one at `number`
    /// modulo their number, so that a turn wakes its own worker only.
    turn_or_failure: [Condvar; CONDITIONS],
}

#[derive(Debug)]
struct CursorState<F, K> {
    /// The guest offset of the next segment.
    position: u64,
    /// What was found out about a range that ends behind the next segment.
    known: Option<(ByteRange, K)>,
    /// The number of the next segment.
    next: u64,
    /// The segment whose turn it is.
    turn: u64,
    /// Segments after the turn that need none.
    passed: BTreeSet<u64>,
    /// The first segment in guest order that failed, with its failure.
    failure: Option<(u64, F)>,
}

/// At least the largest number of workers: the segments of all of them usually have conditions of their own.
const CONDITIONS: usize = 16;

/// The number of segments that may pass before their turn; bounds the memory for `passed`.
const MAX_PASSED: usize = 1024;

/// A claimed segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<K = ()> {
    pub(crate) number: u64,
    pub(crate) range: ByteRange,
    /// What is known about it, and about what follows up to this offset, which is claimed as well.
    pub(crate) known: Option<(u64, K)>,
}

/// The right to look beyond the own segment.
#[must_use = "another worker gets it when it is dropped"]
pub(crate) struct Outlook<'a, F, K>(&'a Cursor<F, K>);

impl<F, K> Drop for Outlook<'_, F, K> {
    fn drop(&mut self) {
        self.0.looking.store(false, Ordering::Release);
    }
}

/// The worker stops since an earlier segment has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopped;

/// The reason why a worker ends before all segments are claimed.
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

impl<F, K: Copy> Cursor<F, K> {
    /// A cursor over `range` in segments that end at multiples of `segment` bytes.
    pub(crate) fn new(range: ByteRange, segment: u64) -> Self {
        Self {
            end: range.end(),
            segment,
            state: Mutex::new(CursorState {
                position: range.start(),
                known: None,
                next: 0,
                turn: 0,
                passed: BTreeSet::new(),
                failure: None,
            }),
            looking: AtomicBool::new(false),
            turn_or_failure: Default::default(),
        }
    }

    /// Goes on in `range`, after all segments so far are done.
    pub(crate) fn go_on_in(&mut self, range: ByteRange) {
        self.end = range.end();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.position = range.start();
        state.known = None;
    }

    fn lock(&self) -> MutexGuard<'_, CursorState<F, K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the next segment. `None` if all are claimed or one has failed.
    pub(crate) fn claim(&self) -> Option<Segment<K>> {
        let mut state = self.lock();
        if state.failure.is_some() || state.position >= self.end {
            return None;
        }
        let left = self.segment - state.position % self.segment;
        let range = ByteRange::at(state.position, left).intersect(ByteRange::new(0, self.end));
        let number = state.next;
        let known = state.known.filter(|(known, _)| known.intersect(range) == range);
        let known = known.map(|(known, what)| (known.end(), what));
        state.position = known.map_or(range.end(), |(end, _)| end);
        state.next += 1;
        Some(Segment { number, range, known })
    }

    /// The right to look beyond the own segment, unless another worker has it.
    pub(crate) fn outlook(&self) -> Option<Outlook<'_, F, K>> {
        let is_free = !self.looking.swap(true, Ordering::Acquire);
        is_free.then_some(Outlook(self))
    }

    /// Extends a segment that ends at `from` by whole segments, up to `to` at most, unless the next one is claimed
    /// already. Returns its new end.
    pub(crate) fn extend(&self, from: u64, to: u64) -> u64 {
        self.extend_in(&mut self.lock(), from, self.whole_segments(to))
    }

    /// As [`Cursor::extend`]; if the next segment is claimed already, one of those after it is as long as possible, and `what`
    /// is known about it.
    pub(crate) fn extend_or_tell(&self, from: u64, to: u64, what: K) -> u64 {
        let to = self.whole_segments(to);
        let mut state = self.lock();
        let end = self.extend_in(&mut state, from, to);
        if end == from && state.position < to {
            state.known = Some((ByteRange::new(state.position, to), what));
        }
        end
    }

    /// The end of the last segment that ends at `to` or before.
    fn whole_segments(&self, to: u64) -> u64 {
        if to >= self.end {
            self.end
        } else {
            to - to % self.segment
        }
    }

    fn extend_in(&self, state: &mut CursorState<F, K>, from: u64, to: u64) -> u64 {
        if state.position != from || to <= from {
            return from;
        }
        state.position = to;
        to
    }

    /// Waits for the turn of segment `number`.
    pub(crate) fn wait(&self, number: u64) -> Result<Turn<'_, F, K>, Stopped> {
        let mut state = self.lock();
        loop {
            if state.failure.as_ref().is_some_and(|(failed, _)| *failed < number) {
                return Err(Stopped);
            }
            if state.turn == number {
                return Ok(Turn { cursor: self, number });
            }
            state = self
                .condition(number)
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives up the turn of segment `number`, which does not allocate.
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
        let turn = state.turn;
        drop(state);
        self.condition(turn).notify_all();
    }

    /// What segment `number` waits for.
    fn condition(&self, number: u64) -> &Condvar {
        &self.turn_or_failure[saturating_index(number % CONDITIONS as u64)]
    }

    /// Records the failure of segment `number`: no segment is claimed any more, and no segment after `number` gets a
    /// turn. Earlier segments go on, so that the failure that [`Cursor::finish`] returns is the first in guest order.
    pub(crate) fn fail(&self, number: u64, failure: F) {
        let mut state = self.lock();
        if state.failure.as_ref().is_none_or(|(failed, _)| number < *failed) {
            state.failure = Some((number, failure));
        }
        drop(state);
        for condition in &self.turn_or_failure {
            condition.notify_all();
        }
    }

    /// The first failure in guest order, once all workers are done.
    pub(crate) fn finish(&self) -> Option<F> {
        self.lock().failure.take().map(|(_, failure)| failure)
    }
}

/// The turn of a segment, in which it allocates clusters. A drop passes the turn on to the next segment.
#[derive(Debug)]
#[must_use]
pub(crate) struct Turn<'a, F, K: Copy = ()> {
    cursor: &'a Cursor<F, K>,
    number: u64,
}

impl<F, K: Copy> Drop for Turn<'_, F, K> {
    fn drop(&mut self) {
        self.cursor.advance(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_that_pass_early_are_skipped_in_turn() {
        let cursor = Cursor::<&str>::new(ByteRange::new(0, 100), 10);
        let numbers: Vec<u64> = std::iter::from_fn(|| cursor.claim()).map(|s| s.number).collect();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
        cursor.pass(1).unwrap();
        cursor.pass(2).unwrap();
        drop(cursor.wait(0).unwrap());
        drop(cursor.wait(3).unwrap());
    }

    #[test]
    fn only_the_worker_of_the_last_segment_extends_it() {
        let cursor = Cursor::<&str>::new(ByteRange::new(0, 105), 10);
        assert_eq!(cursor.claim().map(|s| s.range), Some(ByteRange::new(0, 10)));
        assert_eq!(cursor.extend(10, 39), 30);
        assert_eq!(cursor.extend(10, 80), 10);
        assert_eq!(cursor.claim().map(|s| s.range), Some(ByteRange::new(30, 40)));
        assert_eq!(cursor.extend(40, 105), 105);
        assert!(cursor.claim().is_none());
    }

    #[test]
    fn what_was_found_out_too_late_makes_the_next_segment_long() {
        let cursor = Cursor::<&str, char>::new(ByteRange::new(0, 105), 10);
        let claim = || cursor.claim().map(|segment| (segment.range, segment.known));
        assert_eq!(claim(), Some((ByteRange::new(0, 10), None)));
        let outlook = cursor.outlook();
        assert!(outlook.is_some() && cursor.outlook().is_none());
        assert_eq!(claim(), Some((ByteRange::new(10, 20), None)));
        assert_eq!(cursor.extend_or_tell(10, 58, 'z'), 10);
        drop(outlook);
        assert!(cursor.outlook().is_some());
        assert_eq!(claim(), Some((ByteRange::new(20, 30), Some((50, 'z')))));
        assert_eq!(claim(), Some((ByteRange::new(50, 60), None)));
        assert_eq!(cursor.extend_or_tell(60, 90, 'y'), 90);
        assert_eq!(claim(), Some((ByteRange::new(90, 100), None)));
        assert_eq!(cursor.extend_or_tell(70, 95, 'x'), 70);
        assert_eq!(claim(), Some((ByteRange::new(100, 105), None)));
    }

    #[test]
    fn a_cursor_goes_on_in_another_range() {
        let mut cursor = Cursor::<&str>::new(ByteRange::new(15, 30), 10);
        let claim = |cursor: &Cursor<_>| cursor.claim().map(|segment| (segment.number, segment.range));
        assert_eq!(claim(&cursor), Some((0, ByteRange::new(15, 20))));
        assert_eq!(claim(&cursor), Some((1, ByteRange::new(20, 30))));
        assert_eq!(claim(&cursor), None);
        cursor.pass(1).unwrap();
        drop(cursor.wait(0).unwrap());
        cursor.go_on_in(ByteRange::new(0, 5));
        assert_eq!(claim(&cursor), Some((2, ByteRange::new(0, 5))));
        assert_eq!(claim(&cursor), None);
        drop(cursor.wait(2).unwrap());
    }

    #[test]
    fn the_first_failure_in_guest_order_is_reported() {
        let cursor = Cursor::<&str>::new(ByteRange::new(0, 100), 10);
        cursor.fail(5, "five");
        cursor.fail(3, "three");
        cursor.fail(4, "four");
        assert!(cursor.claim().is_none());
        assert!(cursor.wait(4).is_err());
        assert_eq!(cursor.finish(), Some("three"));
    }

    #[test]
    fn turns_are_taken_in_order_by_more_workers_than_conditions() {
        let cursor = Cursor::<&str>::new(ByteRange::new(0, 2000), 10);
        let taken = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for worker in 0..CONDITIONS + 5 {
                let (cursor, taken) = (&cursor, &taken);
                scope.spawn(move || {
                    while let Some(segment) = cursor.claim() {
                        if segment.number % 5 == 3 {
                            cursor.pass(segment.number).unwrap();
                            continue;
                        }
                        if worker % 3 == 0 {
                            std::thread::yield_now();
                        }
                        let _turn = cursor.wait(segment.number).unwrap();
                        taken.lock().unwrap().push(segment.number);
                    }
                });
            }
        });
        let expected: Vec<u64> = (0..200).filter(|number| number % 5 != 3).collect();
        assert_eq!(taken.into_inner().unwrap(), expected);
    }

    /// What the worker of a segment does with its turn.
    #[derive(Clone, Copy, PartialEq)]
    enum Deed {
        Pass,
        Take,
        TakeLate,
        Fail,
    }

    #[test]
    fn turns_come_in_order_up_to_the_first_failure_in_all_schedules_tried() {
        const SEGMENTS: u64 = 60;
        for seed in 1..300_u64 {
            let deed = |number: u64| {
                let mixed = (seed * 1000 + number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
                match mixed % 40 {
                    0 if seed % 3 > 0 => Deed::Fail,
                    1..14 => Deed::Pass,
                    14..24 => Deed::TakeLate,
                    _ => Deed::Take,
                }
            };
            let cursor = Cursor::<u64>::new(ByteRange::new(0, SEGMENTS), 1);
            let taken = Mutex::new(Vec::new());
            let work = || -> Result<(), Stopped> {
                while let Some(Segment { number, .. }) = cursor.claim() {
                    match deed(number) {
                        Deed::Pass => cursor.pass(number)?,
                        Deed::Fail => {
                            cursor.fail(number, number);
                            return Ok(());
                        }
                        deed => {
                            if deed == Deed::TakeLate {
                                std::thread::yield_now();
                            }
                            let _turn = cursor.wait(number)?;
                            taken.lock().unwrap().push(number);
                        }
                    }
                }
                Ok(())
            };
            std::thread::scope(|scope| {
                for _ in 0..2 + seed % 7 {
                    scope.spawn(work);
                }
            });
            let first = (0..SEGMENTS).find(|number| deed(*number) == Deed::Fail);
            assert_eq!(cursor.finish(), first, "seed {seed}");
            let takes = |number: &u64| matches!(deed(*number), Deed::Take | Deed::TakeLate);
            let expected: Vec<_> = (0..first.unwrap_or(SEGMENTS)).filter(takes).collect();
            assert_eq!(taken.into_inner().unwrap(), expected, "seed {seed}");
        }
    }

    #[test]
    fn a_failure_ends_the_wait_of_all_later_segments() {
        let cursor = Cursor::<&str>::new(ByteRange::new(0, 400), 10);
        std::thread::scope(|scope| {
            for number in 1..40 {
                let cursor = &cursor;
                scope.spawn(move || assert!(cursor.wait(number).is_err(), "segment {number}"));
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
            cursor.fail(0, "zero");
        });
        assert_eq!(cursor.finish(), Some("zero"));
    }
}
