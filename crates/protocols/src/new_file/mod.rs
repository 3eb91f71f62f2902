//! Creation of files: a new image is written into a file without a name, which gets its name when it is complete.
//!
//! ```text
//!   File::create ──► file without a name (O_TMPFILE), or with one that nobody looks for ──► NewFile::publish: its name
//!                ──► where that is not possible: the file of that name, emptied           ──► NewFile::publish: nothing
//!   dropped instead: a file that was there before keeps its contents, in the second case it is emptied
//! ```

mod unnamed;

use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Device, Error, Permissions, Result, ResultExt, name};
use rustix::fs::{AtFlags, CWD, IFlags, StatxAttributes, StatxFlags};

use self::unnamed::{Unnamed, sync_directory_of};
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

impl NewFile {
    /// The file, empty at first and locked.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether the file is written in the place of one that has its name already.
    pub fn is_in_place(&self) -> bool {
        matches!(self.publication, Publication::InPlace { .. })
    }

    /// Gives the file its name. A file that had it before is replaced.
    ///
    /// # Errors
    /// Those of [`NewFile::publish_all`].
    pub fn publish(self) -> Result<()> {
        Self::publish_all(vec![self])
    }

    /// Gives the files of one image their names; the first one is that without which the image cannot be opened. Files
    /// that had these names before are replaced, or are all there as before if this fails. Unless the cache mode is
    /// [`Flush::Never`], all files are durable before one gets its name, and all other names before the first file's.
    ///
    /// ```text
    ///   no part was there        parts named ──────────────────────► first file named, in place of an old one
    ///   a part was there         old first file set aside ──► each old part set aside, new one named
    ///                                ──► first file named ──► old files removed
    /// ```
    ///
    /// So at no moment the name of an old first file leads to new parts: it stands for the old image, the new one, or,
    /// for a moment if parts are replaced, for nothing.
    ///
    /// # Errors
    /// `Could not create 'NAME': REASON`; also if a name stands for another file now than when the new one was made.
    /// `Could not flush 'NAME': REASON`.
    pub fn publish_all(files: Vec<Self>) -> Result<()> {
        Self::publish_in_steps(files, |_| Ok(()))
    }

    /// [`NewFile::publish_all`]; calls `before` with each step before it is taken.
    fn publish_in_steps(files: Vec<Self>, mut before: impl FnMut(Step) -> Result<()>) -> Result<()> {
        let mut files = Undo(files);
        let outcome = publish(&mut files.0, &mut before);
        if outcome.is_ok() {
            for file in &mut files.0 {
                file.finish();
            }
        }
        outcome
    }

    /// What the file is renamed by, if it has no name yet.
    fn unnamed(&self) -> Option<&Unnamed> {
        match &self.publication {
            Publication::Later(unnamed) => Some(unnamed),
            Publication::Done | Publication::InPlace { .. } => None,
        }
    }

    /// Takes a step of renaming, if the file has no name yet.
    fn step(&mut self, take: impl FnOnce(&mut Unnamed, &fs::File) -> io::Result<()>) -> Result<()> {
        match &mut self.publication {
            Publication::Later(unnamed) => {
                take(unnamed, &self.file.file).context(|| format!("Could not create '{}'", self.file.name))
            }
            Publication::Done | Publication::InPlace { .. } => Ok(()),
        }
    }

    fn shares_directory(&self, other: &Self) -> bool {
        let both = self.unnamed().zip(other.unnamed());
        both.is_some_and(|(one, other)| one.shares_directory(other))
    }

    fn is_durable(&self) -> bool {
        self.file.cache.flush != Flush::Never
    }

    fn flush(&self) -> Result<()> {
        match self.is_durable() {
            true => self.file.sync().context(|| self.flushing()),
            false => Ok(()),
        }
    }

    /// Makes the names in the directory durable.
    fn sync_directory(&self) -> Result<()> {
        if !self.is_durable() {
            return Ok(());
        }
        let synced = match &self.publication {
            Publication::Later(unnamed) => unnamed.sync_directory(),
            Publication::InPlace { existed: false } => sync_directory_of(&name::to_path(&self.file.name)),
            Publication::InPlace { existed: true } | Publication::Done => Ok(()),
        };
        synced.context(|| self.flushing())
    }

    fn flushing(&self) -> String {
        format!("Could not flush '{}'", self.file.name)
    }

    fn finish(&mut self) {
        if let Publication::Later(unnamed) = &mut self.publication {
            unnamed.finish();
        }
        self.publication = Publication::Done;
    }
}

/// A step of giving the files of an image their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Flush,
    SetAside,
    Name,
    SyncDirectory,
}

fn publish(files: &mut [NewFile], before: &mut dyn FnMut(Step) -> Result<()>) -> Result<()> {
    for file in &*files {
        before(Step::Flush)?;
        file.flush()?;
    }
    let Some((first, parts)) = files.split_first_mut() else {
        return Ok(());
    };
    let replaces = |part: &NewFile| part.unnamed().is_some_and(Unnamed::replaces);
    let replaces_parts = parts.iter().any(replaces);
    let sync = |file: &NewFile, before: &mut dyn FnMut(Step) -> Result<()>| {
        before(Step::SyncDirectory)?;
        file.sync_directory()
    };
    if replaces_parts {
        before(Step::SetAside)?;
        first.step(|unnamed, _| unnamed.set_aside())?;
        sync(first, before)?;
    }
    for part in &mut *parts {
        if replaces(part) {
            before(Step::SetAside)?;
            part.step(|unnamed, _| unnamed.set_aside())?;
        }
        before(Step::Name)?;
        part.step(Unnamed::give_name)?;
    }
    let mut directories: Vec<&NewFile> = Vec::new();
    for part in parts.iter() {
        if !directories.iter().any(|other| part.shares_directory(other)) {
            sync(part, before)?;
            directories.push(part);
        }
    }
    before(Step::Name)?;
    first.step(Unnamed::give_name)?;
    sync(first, before)
}

/// Files that are dropped in reverse: the first one gets its old name back when the others have theirs.
struct Undo(Vec<NewFile>);

impl Drop for Undo {
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
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
