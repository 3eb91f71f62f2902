//! The error numbers of Linux that are answered or looked for by name.

/// `No such file or directory`.
pub const ENOENT: i32 = 2;
/// `Input/output error`: what the original answers to requests outside an image and to damaged tables.
pub const EIO: i32 = 5;
/// `Resource temporarily unavailable`.
pub const EAGAIN: i32 = 11;
/// `Cannot allocate memory`.
pub const ENOMEM: i32 = 12;
/// `Invalid argument`: what file systems answer to lengths that are no lengths.
pub const EINVAL: i32 = 22;
/// `File too large`.
pub const EFBIG: i32 = 27;
/// `No space left on device`: no room for what an image should say.
pub const ENOSPC: i32 = 28;
/// `Numerical result out of range`: what the original answers to counts that its fields do not hold.
pub const ERANGE: i32 = 34;
/// `Operation not supported`.
pub const ENOTSUP: i32 = 95;
