//! Where the bytes of disk images live: files, block devices, exports of servers, and filters on top of them.
//!
//! ```text
//!   parse_name: name ─► options ─► driver
//!                                    ├ PROTOCOLS   file, host_device, host_cdrom, nbd, null-co, null-aio, vvfat
//!                                    └ FILTERS     blkdebug, blklogwrites, blkverify, compress, copy-on-read, ...
//! ```
//!
//! [`File`] is an open file, and [`CacheMode`] says how its writes reach the disk.
//! [`Device::lock`](diskimage_core::Device::lock) locks the same bytes of a file as QEMU does, so that two programs do
//! not change one image at the same time.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod aio;
mod cache;
mod copy;
mod direct;
mod file;
mod filter;
mod grow;
mod holes;
mod lock;
mod name;
mod nbd;
mod new_file;
mod null;
mod protocol;
mod sys;
mod table;
mod vvfat;
mod zero;

pub use aio::Aio;
pub use cache::{CacheMode, Flush};
pub use file::{
    Directory, File, FileKind, LocalFileDriver, identity_of_path, new_file, path_in_any_case, place_of_path,
};
pub use filter::{ChildKind, Filter, FilterChild, FilterRequest, OpenedChild, ParseName};
pub use name::{ProtocolKind, Target};
pub use nbd::check_tls_creds;
#[cfg(feature = "fuzzing")]
pub use nbd::fuzzing;
#[cfg(feature = "tls")]
pub use nbd::tls_helper;
pub use new_file::{CREATE_OPTIONS, EXISTING_CREATE_OPTIONS, FileCreation, NewFile};
pub use protocol::{Protocol, ProtocolRequest};
pub use sys::allocator::LastWordsAllocator;
pub use table::{FILTERS, PROTOCOLS, filter_by_name, parse_name, protocol_by_name, protocol_of_name};
