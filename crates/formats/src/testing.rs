//! Images in memory, for tests.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Format, Image, MemoryDevice, Preallocation, Result, ZeroMode};
use diskimage_testing::{create_image, open_image};
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

/// A small range as the range of a slice.
pub(crate) fn index(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).expect("small")..usize::try_from(range.end()).expect("small")
}
