//! Creation of files: a new image is written into a file without a name, which gets its name when it is complete.
//!
//! ```text
//!   File::create ──► file without a name (O_TMPFILE), or with one that nobody looks for ──► NewFile::publish: its name
//!                ──► where that is not possible: the file of that name, emptied           ──► NewFile::publish: nothing
//!   dropped instead: a file that was there before keeps its contents, in the second case it is emptied
//! ```

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Device, Error, Permissions, Result, ResultExt, name};
use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, StatxAttributes, StatxFlags};

use crate::cache::{CacheMode, Flush};
use crate::file::{File, identity_of_path};
use crate::name::Target;
use crate::sys;

/// The creation options of the protocol, in addition to those of a format.
pub const CREATE_OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::new(
        "nocow",
        OptionKind::Flag,
        "Turn off copy-on-write (valid only on btrfs)",
    ),
    OptionDef::new(
        "preallocation",
        OptionKind::Text,
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    OptionDef::new(
        "extent_size_hint",
        OptionKind::Size,
        "Extent size hint for the image file, 0 to disable",
    ),
];

/// The creation options of protocols that cannot create files: the image is written into existing storage.
pub const EXISTING_CREATE_OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::new(
        "preallocation",
        OptionKind::Text,
        "Preallocation mode (allowed values: off)",
    ),
];

/// How a file is created.
#[derive(Clone, Copy, Debug)]
pub struct FileCreation {
    /// Turns off copy-on-write for this file, on file systems that support it.
    pub nocow: bool,
    /// The extent size that the file system should allocate, if it supports the hint; 0 sets none.
    pub extent_size_hint: u32,
}

impl Default for FileCreation {
    fn default() -> Self {
        Self {
            nocow: false,
            // As in qemu-img: large extents keep the extent tree of the file system small.
            extent_size_hint: 1 << 20,
        }
    }
}

impl FileCreation {
    fn apply(&self, file: &fs::File) {
        if self.nocow
            && let Ok(flags) = rustix::fs::ioctl_getflags(file)
        {
            // Only some file systems support it; failures are ignored.
            let _ = rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW);
        }
        if self.extent_size_hint != 0 {
            // A hint: failures of file systems without extents are ignored.
            let _ = sys::set_extent_size_hint(file, self.extent_size_hint);
        }
    }

    /// The values in `options`.
    ///
    /// # Errors
    /// A hint that is too large.
    pub fn from_options(options: &Options) -> Result<Self> {
        let default = Self::default();
        let hint = options.size("extent_size_hint");
        Ok(Self {
            nocow: options.flag("nocow").unwrap_or(default.nocow),
            extent_size_hint: match hint {
                None => default.extent_size_hint,
                Some(hint) => {
                    u32::try_from(hint).map_err(|_| Error::invalid("Extent size hint is too large"))?
                }
            },
        })
    }
}

/// A file that is written for a new image. Dropped before it is published, it is gone, or at least empty.
#[derive(Debug)]
pub struct NewFile {
    file: Arc<File>,
    publication: Publication,
}

/// How a new file gets its name.
#[derive(Debug)]
enum Publication {
    /// It has it.
    Done,
    /// It has it, but is not complete.
    InPlace {
        /// There was a file of this name before.
        existed: bool,
    },
    /// It gets it when it is complete.
    Later(Box<Unnamed>),
}

/// The name that a new file will get.
#[derive(Debug)]
struct Unnamed {
    directory: OwnedFd,
    name: OsString,
    /// The name until then, where the file system has no files without one.
    temporary: Option<OsString>,
    /// The file that has the name so far, locked like the new one.
    old: Option<File>,
}

impl NewFile {
    /// The file, empty at first and locked.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether the file is written in the place of one that has its name already.
    pub fn is_in_place(&self) -> bool {
        matches!(self.publication, Publication::InPlace { .. })
    }

    /// Gives the file its name. A file that had it before is replaced. Unless the cache mode is [`Flush::Never`], the
    /// contents are durable before, and the name is after.
    ///
    /// # Errors
    /// `Could not create 'NAME': REASON`; also if the name stands for another file now than when this one was made.
    /// `Could not flush 'NAME': REASON`.
    pub fn publish(mut self) -> Result<()> {
        let durable = self.file.cache.flush != Flush::Never;
        let flushing = || format!("Could not flush '{}'", self.file.name);
        if durable {
            self.file.sync().context(flushing)?;
        }
        let directory = match &mut self.publication {
            Publication::Later(unnamed) => {
                unnamed
                    .publish(&self.file.file)
                    .context(|| format!("Could not create '{}'", self.file.name))?;
                rustix::fs::openat(&unnamed.directory, ".", TO_FLUSH, Mode::empty()).ok()
            }
            Publication::InPlace { existed: false } => {
                let path = name::to_path(&self.file.name);
                rustix::fs::open(directory_of(&path), TO_FLUSH, Mode::empty()).ok()
            }
            Publication::InPlace { existed: true } | Publication::Done => None,
        };
        self.publication = Publication::Done;
        // Without the right to list the directory it cannot be flushed.
        if let Some(directory) = directory.filter(|_| durable) {
            flush_directory(&directory).context(flushing)?;
        }
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Errors are not reported: that is done with the reason why the file is not wanted.
        match &self.publication {
            Publication::Done | Publication::Later(_) => {}
            Publication::InPlace { existed: true } => drop(self.file.file.set_len(0)),
            Publication::InPlace { existed: false } => {
                if identity_of_path(&self.file.name) == self.file.identity() {
                    let _ = name::remove(&name::to_path(&self.file.name));
                }
            }
        }
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = rustix::fs::unlinkat(&self.directory, &**temporary, AtFlags::empty());
        }
    }
}

impl Unnamed {
    /// The file to replace `old`, if there is one at `path`; `None` where that is not possible.
    fn for_path(path: &Path, old: Option<File>) -> Option<Self> {
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
        })
    }

    /// Makes the file; `None` where that is not possible.
    fn make(&mut self, cache: CacheMode) -> Option<fs::File> {
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

    fn make_temporary(&mut self, cache: CacheMode) -> Option<fs::File> {
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

    /// Gives `file` its name.
    fn publish(&mut self, file: &fs::File) -> io::Result<()> {
        let directory = self.directory.as_fd();
        let Some(old) = &self.old else {
            // Fails if there is a file of that name by now: it is somebody else's.
            match &self.temporary {
                None => {
                    let flags = AtFlags::SYMLINK_FOLLOW;
                    rustix::fs::linkat(CWD, link_of(file), directory, &*self.name, flags)?;
                }
                Some(temporary) => {
                    let flags = rustix::fs::RenameFlags::NOREPLACE;
                    rustix::fs::renameat_with(directory, &**temporary, directory, &*self.name, flags)?;
                }
            }
            self.temporary = None;
            return Ok(());
        };
        let there = rustix::fs::statat(directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        if Some((there.st_dev, there.st_ino)) != old.identity() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        if self.temporary.is_none() {
            let temporary = temporary_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
            let flags = AtFlags::SYMLINK_FOLLOW;
            rustix::fs::linkat(CWD, link_of(file), directory, &*temporary, flags)?;
            self.temporary = Some(temporary);
        }
        if let Some(temporary) = &self.temporary {
            rustix::fs::renameat(directory, &**temporary, directory, &*self.name)?;
        }
        self.temporary = None;
        Ok(())
    }
}

/// The directory that `path` is in.
fn directory_of(path: &Path) -> &OsStr {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.as_os_str(),
        _ => OsStr::new("."),
    }
}

/// How a directory is opened to be flushed.
const TO_FLUSH: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Makes the names in a directory durable.
fn flush_directory(directory: &OwnedFd) -> io::Result<()> {
    match rustix::fs::fsync(directory) {
        // Some file systems have nothing to flush there.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP | rustix::io::Errno::ROFS) => {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
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

/// Whether another file can take the place of `old`, and nothing but the contents differs then.
fn is_replaceable(path: &Path, old: &fs::File) -> bool {
    let is_alone = old
        .metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.nlink() == 1);
    // A file that is mounted by itself, as into a container.
    let is_mounted = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    let mut names = [0; 1024];
    let has_attributes = match rustix::fs::flistxattr(old, &mut names) {
        Ok(len) => names[..len]
            .split(|byte| *byte == 0)
            .any(|name| !name.is_empty() && name != b"security.selinux"),
        Err(rustix::io::Errno::NOTSUP) => false,
        Err(_) => true,
    };
    is_alone && !is_mounted && !has_attributes
}

impl File {
    /// Fails as [`File::create`] would if another process has locked the file, and leaves the file unchanged.
    ///
    /// # Errors
    /// As [`File::create`].
    pub fn require_unlocked(target: &Target, permissions: Permissions, cache: CacheMode) -> Result<()> {
        Self::open(target, true, cache)?.lock_new(permissions)
    }

    /// Makes an empty file, locks it for `permissions` and keeps it open. An existing file is locked as well; it keeps its
    /// contents until the new one is published. Where no other file can replace it (a file with several names,
    /// without rights in its directory), it is emptied instead. Devices cannot be created: they are opened.
    ///
    /// # Errors
    /// `Could not create 'NAME': REASON`, locks of other processes, and a failed truncation. An existing file has its
    /// old contents then.
    pub fn create(
        target: &Target,
        permissions: Permissions,
        creation: &FileCreation,
        cache: CacheMode,
    ) -> Result<NewFile> {
        let (file, publication) = match Self::create_unnamed(target, permissions, cache)? {
            Some((file, unnamed)) => (file, Publication::Later(Box::new(unnamed))),
            None => Self::create_in_place(target, permissions, cache)?,
        };
        creation.apply(&file.file);
        Ok(NewFile {
            file: Arc::new(file),
            publication,
        })
    }

    /// Makes a file without a name; `None` where that is not possible.
    fn create_unnamed(
        target: &Target,
        permissions: Permissions,
        cache: CacheMode,
    ) -> Result<Option<(Self, Unnamed)>> {
        let path = name::to_path(&target.path);
        // There, names stand for open files and devices.
        if path.starts_with("/dev") || path.starts_with("/proc") {
            return Ok(None);
        }
        let old = match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => return Ok(None),
            Ok(_) => {
                let Ok(old) = Self::open(target, true, cache) else {
                    return Ok(None);
                };
                if !is_replaceable(&path, &old.file) {
                    return Ok(None);
                }
                old.lock_new(permissions)?;
                Some(old)
            }
        };
        let Some(mut unnamed) = Unnamed::for_path(&path, old) else {
            return Ok(None);
        };
        let Some(file) = unnamed.make(cache) else {
            return Ok(None);
        };
        let file = Self::from_open(file, target, true, cache)?;
        file.lock_new(permissions)?;
        Ok(Some((file, unnamed)))
    }

    /// Creates an empty file, or truncates an existing one once it is locked.
    fn create_in_place(
        target: &Target,
        permissions: Permissions,
        cache: CacheMode,
    ) -> Result<(Self, Publication)> {
        let name = &target.path;
        // Truncated after it is locked.
        let mut options = fs::OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .custom_flags(cache.open_flags());
        let path = name::to_path(name);
        let (file, existed) = match name::open_with(&path, &options) {
            // A symbolic link that leads nowhere exists as well; its target is created.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                options.create_new(false).create(true).truncate(false);
                (name::open_with(&path, &options), true)
            }
            opened => (opened, false),
        };
        let file = file.context(|| format!("Could not create '{name}'"))?;
        let metadata = file.metadata().context(|| format!("Could not create '{name}'"))?;
        if !metadata.is_file() {
            // The error of ftruncate for a pipe, socket or device.
            return Err(Error::from_errno(libc::EINVAL).context("Could not resize file"));
        }
        let this = Self::from_open(file, target, true, cache.for_existing())?;
        this.lock_new(permissions)?;
        this.file.set_len(0).context(|| "Could not resize file")?;
        this.refresh_len()?;
        this.holes.invalidate();
        Ok((this, Publication::InPlace { existed }))
    }

    /// Locks a file that is about to be truncated: as qemu-img does for the creation, then for `permissions`.
    fn lock_new(&self, permissions: Permissions) -> Result<()> {
        self.lock(CREATING)?;
        self.lock(permissions)
    }
}

/// The permissions of `qemu-img` for a file that it creates: no other process may change the length meanwhile.
const CREATING: Permissions = Permissions {
    read: false,
    write: true,
    resize: true,
    share_write: true,
    share_resize: false,
};

#[cfg(test)]
mod tests;
