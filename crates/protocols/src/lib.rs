//! Where the bytes of disk images live: files, block devices, exports of servers, and filters on top of them.
//!
//! [`parse_name`] reads a name as a user writes it, [`PROTOCOLS`] and [`FILTERS`] are the drivers that options name,
//! [`File`] is an open file, and [`CacheMode`] says how its writes reach the disk. Locks are taken with [`lock`](File), in the bytes that every other user of disk images on
//! the machine looks at, so that two of them do not change one image at the same time.

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
mod null;
mod protocol;
mod sys;
mod vvfat;
mod zero;

pub use aio::Aio;
pub use cache::CacheMode;
pub use file::{File, LocalFileDriver, identity_of_path};
pub use filter::{ChildKind, FILTERS, Filter, FilterChild, FilterRequest, OpenedChild, filter_by_name};
pub use grow::{CREATE_OPTIONS, FileCreation};
pub use name::{ProtocolKind, Target};
pub use nbd::check_tls_creds;
#[cfg(feature = "fuzzing")]
pub use nbd::fuzzing;
pub use protocol::{PROTOCOLS, Protocol, ProtocolRequest, parse_name, protocol_by_name, protocol_of_name};
