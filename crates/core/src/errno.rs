//! The error numbers of Linux that are answered or looked for by name.

/// `Input/output error`: what the original answers to requests outside an image and to damaged tables.
pub const EIO: i32 = 5;
/// `Invalid argument`: what file systems answer to lengths that are no lengths.
pub const EINVAL: i32 = 22;
/// `No space left on device`: no room for what an image should say.
pub const ENOSPC: i32 = 28;
/// `Operation not supported`.
pub const ENOTSUP: i32 = 95;
/// `File too large`.
pub const EFBIG: i32 = 27;
