//! Where the bytes of disk images live: files and block devices.
//!
//! [`Target`] reads a name as a user writes it, [`File`] is the open file behind it, and [`CacheMode`] says how its
//! writes reach the disk. Locks are taken with [`lock`](File), in the bytes that every other user of disk images on
//! the machine looks at, so that two of them do not change one image at the same time.

mod cache;
mod copy;
mod direct;
mod file;
mod grow;
mod holes;
mod lock;
mod name;
mod nbd;
mod sys;
mod zero;

pub use cache::CacheMode;
pub use file::File;
pub use grow::{CREATE_OPTIONS, FileCreation};
pub use name::{ProtocolKind, Target};
pub use nbd::{Nbd, parse_nbd_name};
