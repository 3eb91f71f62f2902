//! Devices that inject errors, run out of space and record all changes, and images in memory, for the tests of the other
//! crates.
//!
//! * [`FaultyDevice`] fails the n-th request, or all writes beyond a limit.
//! * [`Journal`] records changes and flushes, and computes the contents that a crash can leave: [`Journal::crashes`].
//! * [`PagedFile`] is a file in memory that is cheap to copy.
//! * [`OneFile`] and [`RecordingGate`] are gates.
//! * [`VhdImage`] and [`VhdxImage`] are images made by hand.
//! * [`INSTEAD_OF_A_HANDSHAKE`] is what a TLS client may get.
//! * [`create_image`], [`open_image`] and [`contents`] create, open and read images.

mod faulty;
mod handshake;
mod images;
mod journal;
mod paged_file;
mod vhd;
mod vhdx;

pub use faulty::{Fault, FaultyDevice, Requests};
pub use handshake::INSTEAD_OF_A_HANDSHAKE;
pub use images::{OneFile, RecordingGate, contents, create_image, open_image};
pub use journal::{Crash, Journal, RecordingDevice};
pub use paged_file::PagedFile;
pub use vhd::{SparseBlock, VhdImage, VhdParent, overlay};
pub use vhdx::{FULLY_PRESENT, PARTIALLY_PRESENT, VhdxImage, guid, seal as seal_vhdx};
