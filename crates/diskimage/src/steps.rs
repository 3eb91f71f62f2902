//! The steps in which an operation reports its progress.
//!
//! Workers process segments at any time and in any order, and take runs that need no work along. qemu-img walks over the
//! disk run by run, in pieces of 2 MiB at most, and reports each one. [`Steps`] restores that walk:
//!
//! ```text
//!   segments    [  0   ][  1   ][  2   ]      done in any order, each with the parts of runs in it
//!   runs        [ a    ....  ]     [ b ]      parts that continue each other are joined
//!   steps       [ 2 MiB ][   ]     [   ]      reported in guest order
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{ByteRange, Extent, ExtentKind, align_down, align_up};

/// The longest step in bytes; the size of the buffers of qemu-img.
pub(crate) const STEP: u64 = 2 << 20;

/// Where the bytes of a part of a run come from. Parts of one run have the same origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin {
    depth: u32,
    kind: Option<ExtentKind>,
    /// The address of the device and the distance of the host offset from the guest offset.
    host: Option<(usize, u64)>,
    /// The number of the table that describes the extent, or the offset of a sector whose status cannot be read: a run ends
    /// where its table or this sector does.
    table: u64,
}

impl Origin {
    /// The origin of the extent at the guest offset `at`.
    pub(crate) fn of(extent: &Extent, at: u64) -> Self {
        Self {
            depth: extent.depth,
            kind: Some(extent.kind),
            host: extent
                .host
                .as_ref()
                .map(|(device, offset)| (Arc::as_ptr(device).addr(), offset.wrapping_sub(at))),
            table: 0,
        }
    }

    /// The same in the table with this number.
    pub(crate) fn within(self, table: u64) -> Self {
        Self { table, ..self }
    }
}

/// A part of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) range: ByteRange,
    pub(crate) origins: [Origin; 2],
    /// The longest step in this run.
    pub(crate) longest: u64,
}

/// The steps of an operation.
pub(crate) struct Steps<'a> {
    /// Steps begin and end at multiples of this.
    unit: u64,
    /// Takes the range of each step, in guest order.
    report: Box<dyn Fn(ByteRange) + Send + Sync + 'a>,
    state: Mutex<State>,
}

/// The parts that are not reported yet.
#[derive(Default)]
struct State {
    /// The number of the segment to continue with.
    next: u64,
    /// Segments after it that are done.
    early: BTreeMap<u64, Vec<Part>>,
    /// The run that the next part may continue.
    run: Option<Part>,
    /// The end of the last step.
    reported: u64,
    /// Where the operation has failed: the step with this offset is not reported, nor any after it.
    failed_at: Option<u64>,
}

impl<'a> Steps<'a> {
    /// Steps of multiples of `unit` bytes, which `report` takes.
    pub(crate) fn new(unit: u64, report: impl Fn(ByteRange) + Send + Sync + 'a) -> Self {
        Self {
            unit,
            report: Box::new(report),
            state: Mutex::default(),
        }
    }

    /// Segment `number` is done; `parts` are the parts of runs in it, in guest order.
    pub(crate) fn segment(&self, number: u64, parts: Vec<Part>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.early.insert(number, parts);
        let state = &mut *state;
        while let Some(parts) = state.early.remove(&state.next) {
            state.next += 1;
            for part in parts {
                self.add(state, part);
            }
        }
    }

    /// Everything is done: the last run does not continue.
    pub(crate) fn finish(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(run) = state.run.take() {
            self.emit(&mut state, run);
        }
    }

    /// The operation has failed at this offset.
    pub(crate) fn fail(&self, at: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.failed_at.unwrap_or(u64::MAX);
        state.failed_at = Some(before.min(at));
    }

    fn add(&self, state: &mut State, part: Part) {
        let run = match state.run.take() {
            Some(run)
                if run.range.end() == part.range.start()
                    && run.origins == part.origins
                    && run.longest == part.longest =>
            {
                Part {
                    range: ByteRange::new(run.range.start(), part.range.end()),
                    ..run
                }
            }
            before => {
                if let Some(run) = before {
                    self.emit(state, run);
                }
                part
            }
        };
        state.run = Some(self.emit_whole(state, run));
    }

    /// Reports the whole steps of `run`, and returns what is left.
    fn emit_whole(&self, state: &mut State, run: Part) -> Part {
        let mut rest = run.range;
        while rest.len() > run.longest {
            let step = rest.first(run.longest);
            rest = rest.skip(step.len());
            self.step(state, step, run.longest);
        }
        Part { range: rest, ..run }
    }

    fn emit(&self, state: &mut State, run: Part) {
        let rest = self.emit_whole(state, run).range;
        self.step(state, rest, run.longest);
    }

    fn step(&self, state: &mut State, step: ByteRange, longest: u64) {
        let start = align_down(step.start(), self.unit).max(state.reported);
        let mut rest = ByteRange::new(start, align_up(step.end(), self.unit).max(start));
        while !rest.is_empty() {
            let step = rest.first(longest);
            rest = rest.skip(step.len());
            state.reported = step.end();
            if state.failed_at.is_none_or(|at| step.end() <= at) {
                (self.report)(step);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_reported_in_guest_order_whatever_the_order_of_segments() {
        let found = Mutex::new(Vec::new());
        let steps = Steps::new(1, |step: ByteRange| {
            found.lock().expect("unpoisoned").push((step.start(), step.end()));
        });
        let part = |start, end, longest| Part {
            range: ByteRange::new(start, end),
            origins: [Origin::default(); 2],
            longest,
        };
        steps.segment(1, vec![part(100, 130, 50), part(140, 150, 50)]);
        steps.segment(2, vec![part(150, 170, 1000)]);
        steps.segment(0, vec![part(20, 100, 50)]);
        steps.finish();
        assert_eq!(
            *found.lock().expect("unpoisoned"),
            [(20, 70), (70, 120), (120, 130), (140, 150), (150, 170)]
        );
    }

    #[test]
    fn the_step_that_fails_is_not_reported() {
        let found = Mutex::new(Vec::new());
        let steps = Steps::new(1, |step: ByteRange| {
            found.lock().expect("unpoisoned").push((step.start(), step.end()));
        });
        let part = |start, end| Part {
            range: ByteRange::new(start, end),
            origins: [Origin::default(); 2],
            longest: 20,
        };
        steps.segment(1, vec![part(30, 60)]);
        steps.fail(25);
        steps.segment(0, vec![part(0, 30)]);
        steps.finish();
        assert_eq!(*found.lock().expect("unpoisoned"), [(0, 20)]);
    }

    #[test]
    fn steps_of_units_do_not_overlap() {
        let found = Mutex::new(Vec::new());
        let steps = Steps::new(10, |step: ByteRange| {
            found.lock().expect("unpoisoned").push((step.start(), step.end()));
        });
        let part = |start, end| Part {
            range: ByteRange::new(start, end),
            origins: [Origin::default(); 2],
            longest: 10,
        };
        steps.segment(0, vec![part(5, 12), part(13, 15), part(32, 33)]);
        steps.finish();
        assert_eq!(*found.lock().expect("unpoisoned"), [(0, 10), (10, 20), (30, 40)]);
    }
}
