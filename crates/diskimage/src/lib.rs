//! Open, create, convert, examine and repair virtual machine disk images.
//!
//! [`open`] opens an image with its backing chain and returns an [`Image`], a [`Device`] whose bytes are the guest
//! data. [`Creation`] creates a new image. Nothing in this library prints, reads the environment or ends the process.
//!
//! ```
//! use diskimage::{Creation, Device, OpenOptions, name, open};
//!
//! let dir = tempfile::tempdir()?;
//! let name = name::of_path(&dir.path().join("disk.raw"));
//!
//! Creation::new(&name, "raw").size(1 << 20).prepare()?.create()?;
//!
//! let image = open(&name, &OpenOptions::new().format("raw").write(true))?;
//! image.write_at(b"hello", 4096)?;
//! image.flush()?;
//!
//! let mut bytes = [0; 5];
//! image.read_at(&mut bytes, 4096)?;
//! assert_eq!(&bytes, b"hello");
//! image.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Names of files are text that holds any bytes: [`name`] makes it from paths, and makes bytes from messages that
//! contain such names.
//!
//! Changes may be in memory only until [`Device::flush`] or [`Image::close`] has succeeded. An image that is dropped
//! with such changes writes them back. A drop cannot return an error: call [`Image::close`], or set
//! [`OpenOptions::on_lost`], which is called when changes are lost:
//!
//! ```
//! use std::sync::Arc;
//!
//! use diskimage::{Creation, Device, OpenOptions, name, open};
//!
//! let dir = tempfile::tempdir()?;
//! let name = name::of_path(&dir.path().join("disk.qcow2"));
//! Creation::new(&name, "qcow2").size(1 << 20).prepare()?.create()?;
//!
//! let options = OpenOptions::new()
//!     .write(true)
//!     .on_lost(Arc::new(|name, error| eprintln!("{name}: {}", error.chain())));
//! let image = open(&name, &options)?;
//! image.write_at(b"hello", 4096)?;
//! drop(image);
//!
//! let mut bytes = [0; 5];
//! open(&name, &OpenOptions::new())?.read_at(&mut bytes, 4096)?;
//! assert_eq!(&bytes, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Images are untrusted input. Files that an image refers to are opened through a [`Gate`]: [`FileGate`] is the
//! default, [`BeneathGate`] admits plain files beneath the directory of an image only, and [`ClosedGate`] none. With
//! [`OpenOptions::unambiguous`] a format is guessed only if there is no other one to guess. Numbers in an image can claim only the memory that a [`Budget`] has.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod bench;
mod bitmaps;
mod commit;
mod compare;
mod convert;
#[cfg(test)]
mod crash_tests;
mod create;
mod cursor;
mod dd;
mod file_holes;
mod files;
mod gate;
mod graph;
mod guess;
mod map;
mod open;
mod open_options;
mod probe;
mod rebase;
mod references;
mod resize;
mod snapshot;
mod steps;
#[cfg(test)]
mod testing;
mod workers;

pub use bench::{Bench, Requests};
pub use bitmaps::{cannot_add_bitmap, check_bitmaps, copy_bitmaps, merge_bitmap};
pub use commit::{Commit, depth_of};
pub use compare::{CompareError, Comparison, Difference, Failure, Verdict};
pub use convert::{Conversion, DEFAULT_SPARSE, MAX_SPARSE, OnLost, total_len};
pub use create::{Creation, Filling, NewImage, Prepared, file_options, format_of_new, protocol_options};
pub use dd::{Blocks, dd};
pub use diskimage_core::*;
pub use diskimage_formats::{FORMATS, Zeroizing, decrypt_secret, format_by_name};
pub use diskimage_protocols::{
    Aio, CREATE_OPTIONS as FILE_CREATE_OPTIONS, CacheMode, FILTERS, File, FileCreation, LastWordsAllocator,
    PROTOCOLS, Target, check_tls_creds,
};
pub use files::{flush, found_backing_name, is_encrypted, share_a_file};
pub use gate::{BeneathGate, FileGate};
pub use graph::{backing_not_found, full_backing_name, is_driver, is_relative, node_of_name};
pub use map::{MappedExtent, map};
pub use open::{open, open_backing, open_device, open_node};
pub use open_options::{MakeGate, OpenOptions};
pub use probe::probe;
pub use rebase::{Rebase, check_backing, set_backing};
pub use references::{ImageReference, references};
pub use resize::{Resize, ShrinkPolicy};
pub use snapshot::{
    MAX_SNAPSHOT_NAME, SnapshotSelector, ambiguous_snapshot, apply_snapshot, create_snapshot,
    delete_snapshot, list_readable_snapshots, list_snapshots, open_snapshot, repeated_names,
};
