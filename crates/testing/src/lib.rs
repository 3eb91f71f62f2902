//! Devices that fail, run full and remember what was done to them, for the tests of the other crates.
//!
//! * [`FaultyDevice`] fails the n-th request, or those that do not fit a full disk.
//! * [`Journal`] remembers changes and flushes, and makes what a crash may leave of them: [`Journal::crashes`].

mod faulty;
mod journal;

pub use faulty::{Fault, FaultyDevice, Requests};
pub use journal::{Crash, Journal, RecordingDevice};
