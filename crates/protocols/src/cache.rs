//! How writes reach the disk.

use crate::aio::Aio;

/// How writes reach the disk. The names of the modes are those of `qemu-img`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheMode {
    /// Requests bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Each write is durable when it returns (`O_DSYNC`).
    pub writethrough: bool,
    /// What a flush does.
    pub flush: Flush,
    /// The kernel interface for requests.
    pub aio: Aio,
}

/// What a flush does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flush {
    /// What was written before is durable after it.
    Always,
    /// Nothing, but a new file is durable when it gets its name. Storage that exists before is flushed always.
    WhenPublished,
    /// Nothing.
    Never,
}

impl CacheMode {
    /// Through the page cache; durable after a flush.
    pub const WRITEBACK: Self = Self {
        direct: false,
        writethrough: false,
        flush: Flush::Always,
        aio: Aio::Threads,
    };
    /// Through the page cache; flushes are ignored, also the last one: for images that are not needed after a crash.
    pub const UNSAFE: Self = Self {
        flush: Flush::Never,
        ..Self::WRITEBACK
    };
    /// Through the page cache; a new file is durable when it gets its name, and not before. It has no name among those
    /// of `qemu-img`.
    pub const NEW: Self = Self {
        flush: Flush::WhenPublished,
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

    /// The same mode for storage that exists already: what it held is overwritten, so flushes keep their order.
    #[must_use]
    pub fn for_existing(self) -> Self {
        match self.flush {
            Flush::WhenPublished => Self {
                flush: Flush::Always,
                ..self
            },
            Flush::Always | Flush::Never => self,
        }
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
