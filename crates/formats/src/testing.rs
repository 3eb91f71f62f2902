//! Images in memory, for tests.

use std::sync::Arc;

use diskimage_core::{
    ByteRange, Device, Format, Image, MemoryDevice, Preallocation, Result, StatusDetail, ZeroMode,
};
use diskimage_testing::{Crash, Fault, FaultyDevice, create_image, open_image};
use proptest::prelude::*;

pub(crate) use diskimage_testing::{OneFile, contents};

/// Creates an image of `format` in memory.
pub(crate) fn create(format: &dyn Format, options: &str, size: u64) -> Result<Arc<MemoryDevice>> {
    let memory = Arc::new(MemoryDevice::default());
    let file: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
    create_image(format, &file, options, size)?;
    Ok(memory)
}

/// Opens the image of `format` on `file`.
pub(crate) fn open(format: &dyn Format, file: Arc<dyn Device>, write: bool) -> Result<Image> {
    open_image(format, file, write, None)
}

/// A step of a random test of a block-based image.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64),
    /// Grows the disk by this many bytes.
    Grow(u64),
    Reopen,
}

/// A strategy for steps in the first six blocks of `block` bytes; `growth` is in bytes.
pub(crate) fn op(block: u64, growth: impl Strategy<Value = u64> + 'static) -> impl Strategy<Value = Op> {
    let range = (0..6 * block, 1..block + 5000);
    prop_oneof![
        4 => (range.clone(), 1..=255_u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        2 => range.prop_map(|(at, len)| Op::Zero(at, len)),
        1 => growth.prop_map(Op::Grow),
        1 => Just(Op::Reopen),
    ]
}

/// Applies `ops` to the new image of `format` in `file` and to a vector, and returns the vector: the expected contents
/// of the disk. `grown` maps the old and the requested length to the length that the disk is resized to.
pub(crate) fn follow(
    format: &dyn Format,
    file: &Arc<MemoryDevice>,
    ops: &[Op],
    grown: impl Fn(u64, u64) -> u64,
) -> Vec<u8> {
    let reopen = || open(format, Arc::<MemoryDevice>::clone(file), true).expect("opens");
    let mut image = reopen();
    let mut model = vec![0; usize::try_from(image.len()).expect("small")];
    for op in ops {
        let len = image.len();
        let inside = |at: u64, n: u64| ByteRange::at(at.min(len), n).intersect(ByteRange::new(0, len));
        match *op {
            Op::Write(at, n, byte) => {
                let range = index(inside(at, n));
                model[range.clone()].fill(byte);
                image
                    .write_at(&model[range.clone()], range.start as u64)
                    .expect("writes");
            }
            Op::Zero(at, n) => {
                let range = inside(at, n);
                model[index(range)].fill(0);
                if !range.is_empty() {
                    image.write_zeroes(range, ZeroMode::Unmap).expect("zeroes");
                }
            }
            Op::Grow(by) => {
                let longer = grown(len, len + by);
                if longer >= len {
                    image.resize(longer, Preallocation::Off).expect("grows");
                    model.resize(usize::try_from(longer).expect("small"), 0);
                }
            }
            Op::Reopen => {
                image.flush().expect("flushes");
                image = reopen();
                assert!(contents(&image) == model, "after reopening");
            }
        }
    }
    image.flush().expect("flushes");
    model
}

/// Reads, writes (with `write`), asks for the status and flushes, at both ends, in the middle and at `offsets`, of an
/// image that may be damaged. Every outcome but a panic is right.
pub(crate) fn use_damaged(image: &Image, write: bool, offsets: &[u64]) {
    let mut buf = vec![0; 4096];
    let end = image.len();
    for offset in [0, end / 2, end.saturating_sub(4096)].iter().chain(offsets) {
        drop(image.read_at(&mut buf, *offset));
        if write {
            drop(image.write_at(&buf, *offset));
        }
    }
    if end > 0 {
        drop(image.status(ByteRange::new(0, end), StatusDetail::Zeroes));
    }
    if write {
        drop(image.flush());
    }
}

/// Fills each of `steps`, an offset, a length and a byte, on the disk and flushes: 0 by a request for zeroes, others by
/// `write`. `seen` gets the contents of the disk after each step, before the flush.
pub(crate) fn fill_in_steps(
    image: &Image,
    steps: &[(u64, u64, u8)],
    write: impl Fn(&Image, u64, &[u8]) -> Result<()>,
    mut seen: impl FnMut(Vec<u8>),
) {
    let mut model = contents(image);
    for (at, len, byte) in steps {
        let range = ByteRange::at(*at, *len);
        model[index(range)].fill(*byte);
        match byte {
            0 => image.write_zeroes(range, ZeroMode::Unmap),
            _ => write(image, *at, &model[index(range)]),
        }
        .expect("changes");
        seen(model.clone());
        image.flush().expect("flushes");
    }
}

/// Asserts that every byte of `now` is as it was after one of the steps around a crash. `states` has the position in the
/// journal at which each step was done, and the contents of the disk after it.
pub(crate) fn require_a_state_around(states: &[(usize, Vec<u8>)], crash: &Crash<'_>, now: &[u8]) {
    let known = states.partition_point(|(position, _)| *position <= crash.position);
    let around = &states[known.saturating_sub(2)..(known + 1).min(states.len())];
    let strange = now
        .iter()
        .enumerate()
        .find(|(at, byte)| around.iter().all(|(_, state)| state[*at] != **byte));
    assert!(
        strange.is_none(),
        "{strange:?} at {} ({})",
        crash.position,
        crash.kept
    );
}

/// A test in which each request to the file of an image fails once.
pub(crate) struct FailOnce<'a> {
    pub(crate) format: &'a dyn Format,
    /// The image.
    pub(crate) before: Vec<u8>,
    pub(crate) block: u64,
    /// Blocks that are written before and after the disk grows; block 0 was written before any failure.
    pub(crate) written: [u64; 2],
    /// The length that the disk grows to.
    pub(crate) grown: u64,
}

impl FailOnce<'_> {
    /// Lets each request to the file fail once while two blocks are written and the disk grows in between: the image is
    /// as it was, or the change is done. Calls `check` with the image. Returns the number of requests.
    pub(crate) fn run(&self, check: impl Fn(&Image, u64)) -> u64 {
        let mut after = 0;
        loop {
            let file = Arc::new(MemoryDevice::new(self.before.clone()));
            let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&file)));
            let image = open(self.format, Arc::<FaultyDevice>::clone(&faulty), true).expect("opens");
            let old = image.len();
            image.write_at(&[1; 4096], 0).expect("writes");
            image.flush().expect("flushes");
            faulty.arm(Fault::once(after));
            let [first, last] = self.written;
            let outcomes = [
                image.write_at(&[2; 4096], first * self.block),
                image.resize(self.grown, Preallocation::Off),
                image.write_at(&[3; 4096], last * self.block),
            ];
            let failed = faulty.disarm();
            image.flush().expect("flushes");
            let again = open(self.format, Arc::new(MemoryDevice::new(file.contents())), true).expect("opens");
            check(&again, after);
            assert_eq!(again.len(), image.len(), "after {after}");
            assert!(image.len() > old || outcomes[1].is_err(), "after {after}");
            for (at, byte, outcome) in [(0, 1, &Ok(())), (first, 2, &outcomes[0]), (last, 3, &outcomes[2])] {
                let mut sector = [0; 512];
                again.read_at(&mut sector, at * self.block).expect("reads");
                let is_written = sector == [byte; 512];
                assert!(is_written || outcome.is_err(), "after {after}: block {at}");
            }
            if failed == 0 {
                assert!(outcomes.iter().all(Result::is_ok), "after {after}");
                return after;
            }
            after += 1;
        }
    }
}

/// A small range as the range of a slice.
pub(crate) fn index(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).expect("small")..usize::try_from(range.end()).expect("small")
}
