//! Files beneath a directory: the kernel resolves names, and refuses those that lead out of the directory or through links.
//!
//! Checks of a path before it is opened would tell nothing about what is opened a moment later.

use std::fs;
use std::os::fd::OwnedFd;

use diskimage_core::{Error, ErrorKind, Result, name};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::File;
use crate::cache::CacheMode;
use crate::name::Target;

/// A directory that files are opened beneath.
#[derive(Debug)]
pub struct Directory {
    handle: OwnedFd,
}

/// No way out: neither by `..` and absolute names, nor by links, nor by those of `/proc`.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

impl Directory {
    /// The directory at `path`, which may be empty for the current one. Links on the way to it are followed.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn open(path: &str) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = name::to_path(if path.is_empty() { "." } else { path });
        let handle = rustix::fs::openat(CWD, &path, flags, Mode::empty()).map_err(std::io::Error::from)?;
        Ok(Self { handle })
    }

    /// The directory at `path` beneath this one.
    ///
    /// # Errors
    /// As [`Directory::file`].
    pub fn beneath(&self, path: &str) -> Result<Self> {
        let path = if path.is_empty() { "." } else { path };
        let handle = self.resolve(path, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Self { handle })
    }

    /// Checks that a regular file is at `path` beneath this directory.
    ///
    /// # Errors
    /// As [`Directory::file`].
    pub fn require_file(&self, path: &str) -> Result<()> {
        let handle = self.resolve(path, OFlags::PATH | OFlags::NOFOLLOW)?;
        let kind = rustix::fs::fstat(&handle).map_err(std::io::Error::from)?.st_mode;
        match FileType::from_raw_mode(kind) {
            FileType::RegularFile => Ok(()),
            other => Err(denied(format!("it is {}, not a plain file", kind_name(other)))),
        }
    }

    /// Opens the regular file at `path` beneath this directory, which messages call `shown`.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] with the reason as its message if the name leads out of the directory or through a link, or
    /// if the file is none with plain bytes; else the error of opening the file.
    pub fn file(&self, path: &str, shown: &str, write: bool, cache: CacheMode) -> Result<File> {
        // Looked at first: to open a device or a pipe can have effects.
        self.require_file(path)?;
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = OFlags::from_bits_retain(cache.open_flags().cast_unsigned());
        let file = self.resolve(path, access | flags | OFlags::NOCTTY)?;
        let target = Target {
            // A device that has taken its place is refused.
            protocol: Some(crate::name::ProtocolKind::File),
            path: shown.to_owned(),
        };
        File::from_open(fs::File::from(file), &target, write, cache)
    }

    fn resolve(&self, path: &str, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.handle, name::to_path(path), flags, Mode::empty(), CONFINED);
        opened.map_err(|error| match error {
            Errno::XDEV => denied("it is not beneath the directory of the image"),
            Errno::LOOP => denied("a symbolic link is on the way"),
            Errno::NOSYS => denied("this kernel cannot confine names to a directory (openat2)"),
            other => Error::from(std::io::Error::from(other)),
        })
    }
}

fn denied(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Denied, why)
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Symlink => "a symbolic link",
        _ => "something else",
    }
}
