//! The error numbers of Linux that this crate and its users return or test.

/// `No such file or directory`.
pub const ENOENT: i32 = 2;
/// `Input/output error`: the error of `qemu-img` for requests outside an image and for damaged tables.
pub const EIO: i32 = 5;
/// `Resource temporarily unavailable`.
pub const EAGAIN: i32 = 11;
/// `Cannot allocate memory`.
pub const ENOMEM: i32 = 12;
/// `Permission denied`.
pub const EACCES: i32 = 13;
/// `Invalid argument`: the error of file systems for invalid lengths.
pub const EINVAL: i32 = 22;
/// `File too large`.
pub const EFBIG: i32 = 27;
/// `No space left on device`: also for an image header without room for a new field.
pub const ENOSPC: i32 = 28;
/// `Numerical result out of range`: the error of `qemu-img` for counts that their fields cannot hold.
pub const ERANGE: i32 = 34;
/// `Operation not supported`.
pub const ENOTSUP: i32 = 95;
