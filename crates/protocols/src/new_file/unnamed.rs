//! A file without a name, and the steps in which it gets one.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use diskimage_core::{Device, name};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};

use crate::cache::CacheMode;
use crate::file::File;

/// Device and inode number.
type Identity = (u64, u64);

/// The name that a new file will get. Dropped before [`Unnamed::finish`], everything is as it was before.
#[derive(Debug)]
pub(super) struct Unnamed {
    directory: OwnedFd,
    name: OsString,
    /// The name until then, where the file system has no files without one.
    temporary: Option<OsString>,
    /// The file that has the name so far, locked like the new one.
    old: Option<File>,
    /// The name of the old file while nothing has its own.
    aside: Option<OsString>,
    /// The new file, while it has the name and the old one can still get it back.
    named: Option<Identity>,
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        // Errors are not reported: that is done with the reason why the file is not wanted.
        if let Some(temporary) = self.temporary.take() {
            let _ = self.remove(&temporary);
        }
        if self
            .named
            .is_some_and(|new| self.identity_of(&self.name).ok() == Some(new))
        {
            let _ = self.remove(&self.name);
        }
        if let Some(aside) = self.aside.take() {
            let _ = self.rename(&aside, &self.name, RenameFlags::NOREPLACE);
        }
    }
}

impl Unnamed {
    /// The file to replace `old`, if there is one at `path`; `None` where that is not possible.
    pub(super) fn for_path(path: &Path, old: Option<File>) -> Option<Self> {
        let resolved = match &old {
            // The name of a symbolic link stays with the link.
            Some(_) => path.canonicalize().ok()?,
            None => path.to_owned(),
        };
        let name = resolved.file_name()?.to_owned();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Some(Self {
            directory: rustix::fs::open(directory_of(&resolved), flags, Mode::empty()).ok()?,
            name,
            temporary: None,
            old,
            aside: None,
            named: None,
        })
    }

    /// Makes the file; `None` where that is not possible.
    pub(super) fn make(&mut self, cache: CacheMode) -> Option<fs::File> {
        let file = self.make_nameless(cache).or_else(|| self.make_temporary(cache))?;
        match &self.old {
            Some(old) => keep_owner(&file, &old.file.metadata().ok()?).then_some(file),
            None => Some(file),
        }
    }

    fn make_nameless(&self, cache: CacheMode) -> Option<fs::File> {
        let file = self.open(".", OFlags::TMPFILE, cache)?;
        // It gets its name by the link that stands for its descriptor.
        link_of(&file).exists().then_some(file)
    }

    pub(super) fn make_temporary(&mut self, cache: CacheMode) -> Option<fs::File> {
        let temporary = temporary_name()?;
        let file = self.open(&temporary, OFlags::CREATE | OFlags::EXCL, cache)?;
        self.temporary = Some(temporary);
        Some(file)
    }

    fn open(&self, name: impl AsRef<OsStr>, how: OFlags, cache: CacheMode) -> Option<fs::File> {
        let flags = OFlags::from_bits_retain(cache.open_flags().cast_unsigned());
        let flags = OFlags::RDWR | OFlags::CLOEXEC | how | flags;
        let mode = Mode::from_raw_mode(0o644);
        let file = rustix::fs::openat(&self.directory, name.as_ref(), flags, mode);
        file.ok().map(fs::File::from)
    }

    /// Whether there is an old file.
    pub(super) fn replaces(&self) -> bool {
        self.old.is_some()
    }

    /// Takes the name from the old file, which gets another one.
    pub(super) fn set_aside(&mut self) -> io::Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        let identity = old.identity();
        self.require_old()?;
        let aside = unused_name()?;
        self.rename(&self.name, &aside, RenameFlags::NOREPLACE)?;
        let found = self.identity_of(&aside).ok();
        self.aside = Some(aside);
        match found == identity {
            true => Ok(()),
            // A drop gives it back.
            false => Err(exists()),
        }
    }

    /// Gives `file` the name; unless the old file was set aside, in its place.
    pub(super) fn give_name(&mut self, file: &fs::File) -> io::Result<()> {
        let replaces = self.old.is_some() && self.aside.is_none();
        if replaces {
            self.require_old()?;
        }
        match self.temporary.take() {
            None if replaces => {
                let temporary = unused_name()?;
                self.link(file, &temporary)?;
                self.temporary = Some(temporary);
            }
            // Fails if there is a file of that name by now: it is somebody else's.
            None => self.link(file, &self.name)?,
            Some(temporary) => {
                self.temporary = Some(temporary);
            }
        }
        if let Some(temporary) = &self.temporary {
            let flags = if replaces {
                RenameFlags::empty()
            } else {
                RenameFlags::NOREPLACE
            };
            self.rename(temporary, &self.name, flags)?;
        }
        self.temporary = None;
        if !replaces {
            let metadata = file.metadata()?;
            self.named = Some((metadata.dev(), metadata.ino()));
        }
        Ok(())
    }

    /// Whether both get their names in the same directory.
    pub(super) fn shares_directory(&self, other: &Self) -> bool {
        let identity = |unnamed: &Self| {
            let found = rustix::fs::fstat(&unnamed.directory).ok()?;
            Some((found.st_dev, found.st_ino))
        };
        identity(self).is_some_and(|this| identity(other) == Some(this))
    }

    /// Makes the names in the directory durable.
    pub(super) fn sync_directory(&self) -> io::Result<()> {
        sync_names(rustix::fs::openat(&self.directory, ".", TO_SYNC, Mode::empty()))
    }

    /// Removes the old file, which cannot get its name back from now on.
    pub(super) fn finish(&mut self) {
        self.named = None;
        if let Some(aside) = self.aside.take() {
            // It takes room at worst.
            let _ = self.remove(&aside);
        }
    }

    /// Fails if the name stands for another file than the old one.
    fn require_old(&self) -> io::Result<()> {
        let old = self.old.as_ref().and_then(Device::identity);
        match self.identity_of(&self.name)? {
            there if Some(there) == old => Ok(()),
            _ => Err(exists()),
        }
    }

    fn identity_of(&self, name: &OsStr) -> io::Result<Identity> {
        let found = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((found.st_dev, found.st_ino))
    }

    fn link(&self, file: &fs::File, name: &OsStr) -> io::Result<()> {
        let flags = AtFlags::SYMLINK_FOLLOW;
        Ok(rustix::fs::linkat(
            CWD,
            link_of(file),
            &self.directory,
            name,
            flags,
        )?)
    }

    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> io::Result<()> {
        let directory = self.directory.as_fd();
        if flags.is_empty() {
            return Ok(rustix::fs::renameat(directory, from, directory, to)?);
        }
        Ok(rustix::fs::renameat_with(directory, from, directory, to, flags)?)
    }

    fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?)
    }
}

/// How a directory is opened to be flushed.
const TO_SYNC: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Makes the names in the directory of `path` durable.
pub(super) fn sync_directory_of(path: &Path) -> io::Result<()> {
    sync_names(rustix::fs::open(directory_of(path), TO_SYNC, Mode::empty()))
}

/// Makes the names in a directory durable, where that is possible.
fn sync_names(directory: rustix::io::Result<OwnedFd>) -> io::Result<()> {
    let Ok(directory) = directory else {
        // Names can be made in a directory that cannot be listed.
        return Ok(());
    };
    match rustix::fs::fsync(directory) {
        // Some file systems have nothing to flush there.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP | rustix::io::Errno::ROFS) => {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// The directory that `path` is in.
fn directory_of(path: &Path) -> &OsStr {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.as_os_str(),
        _ => OsStr::new("."),
    }
}

fn exists() -> io::Error {
    io::Error::from_raw_os_error(libc::EEXIST)
}

fn unused_name() -> io::Result<OsString> {
    temporary_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
}

/// The link by which the kernel names an open file.
fn link_of(file: &impl AsRawFd) -> PathBuf {
    name::to_path(&format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// A name that nobody else uses.
fn temporary_name() -> Option<OsString> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).ok()?;
    Some(format!(".qemu-img-{:016x}", u64::from_le_bytes(random)).into())
}

/// Gives the new `file` the owner and the permissions of the file that it replaces.
fn keep_owner(file: &fs::File, old: &fs::Metadata) -> bool {
    let Ok(new) = file.metadata() else { return false };
    let same_owner = (new.uid(), new.gid()) == (old.uid(), old.gid());
    let owner = same_owner || std::os::unix::fs::fchown(file, Some(old.uid()), Some(old.gid())).is_ok();
    owner
        && file
            .set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))
            .is_ok()
}
