//! How writes reach the disk.

use crate::aio::Aio;

/// How writes reach the disk. The names of the modes are those of `qemu-img`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheMode {
    /// Requests bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Each write is durable when it returns (`O_DSYNC`).
    pub writethrough: bool,
    /// Flushes do nothing: for images that are created again after a crash.
    pub no_flush: bool,
    /// The kernel interface for requests.
    pub aio: Aio,
}

impl CacheMode {
    /// Through the page cache; durable after a flush.
    pub const WRITEBACK: Self = Self {
        direct: false,
        writethrough: false,
        no_flush: false,
        aio: Aio::Threads,
    };
    /// Through the page cache; flushes are ignored.
    pub const UNSAFE: Self = Self {
        no_flush: true,
        ..Self::WRITEBACK
    };
    /// Bypasses the page cache; durable after a flush.
    pub const NONE: Self = Self {
        direct: true,
        ..Self::WRITEBACK
    };
    /// Through the page cache; each write is durable.
    pub const WRITETHROUGH: Self = Self {
        writethrough: true,
        ..Self::WRITEBACK
    };
    /// Bypasses the page cache; each write is durable.
    pub const DIRECTSYNC: Self = Self {
        direct: true,
        ..Self::WRITETHROUGH
    };

    /// The flags to open a file with. `O_NONBLOCK`, because opening a pipe would block until its other end is opened.
    pub(crate) fn open_flags(self) -> i32 {
        let mut flags = libc::O_NONBLOCK;
        if self.direct {
            flags |= libc::O_DIRECT;
        }
        if self.writethrough {
            flags |= libc::O_DSYNC;
        }
        flags
    }

    /// The mode with this name; `off` is another name for `none`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "none" | "off" => Self::NONE,
            "directsync" => Self::DIRECTSYNC,
            "writeback" => Self::WRITEBACK,
            "unsafe" => Self::UNSAFE,
            "writethrough" => Self::WRITETHROUGH,
            _ => return None,
        })
    }
}

impl Default for CacheMode {
    fn default() -> Self {
        Self::WRITEBACK
    }
}
