//! How writes reach the disk.

use crate::aio::Aio;

/// How writes reach the disk: the names are the original's, and each means what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheMode {
    /// Requests go to the disk and not through the system's cache (`O_DIRECT`).
    pub direct: bool,
    /// Each write is on the disk before it returns.
    pub writethrough: bool,
    /// Flushing does nothing: for images that are made anew after a crash.
    pub no_flush: bool,
    /// By which of the kernel's interfaces.
    pub aio: Aio,
}

impl CacheMode {
    /// Through the system's cache; on the disk after a flush.
    pub const WRITEBACK: Self = Self {
        direct: false,
        writethrough: false,
        no_flush: false,
        aio: Aio::Threads,
    };
    /// Through the system's cache, and never waiting for the disk.
    pub const UNSAFE: Self = Self {
        no_flush: true,
        ..Self::WRITEBACK
    };
    /// Past the system's cache; on the disk after a flush.
    pub const NONE: Self = Self {
        direct: true,
        ..Self::WRITEBACK
    };
    /// Through the system's cache, and on the disk at once.
    pub const WRITETHROUGH: Self = Self {
        writethrough: true,
        ..Self::WRITEBACK
    };
    /// Past the system's cache, and on the disk at once.
    pub const DIRECTSYNC: Self = Self {
        direct: true,
        ..Self::WRITETHROUGH
    };

    /// The flags to open a file with. `O_NONBLOCK` because opening a pipe would wait for its other end.
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

    /// The mode of this name; `off` is another name of `none`.
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
