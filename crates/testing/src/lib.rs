//! Devices that inject errors, run out of space and record all changes, for the tests of the other crates.
//!
//! * [`FaultyDevice`] fails the n-th request, or all writes beyond a limit.
//! * [`Journal`] records changes and flushes, and computes the contents that a crash can leave: [`Journal::crashes`].

mod faulty;
mod journal;

pub use faulty::{Fault, FaultyDevice, Requests};
pub use journal::{Crash, Journal, RecordingDevice};
