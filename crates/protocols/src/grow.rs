//! Creation of files, and changes of their length.

use std::os::unix::fs::OpenOptionsExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::{fs, io};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Permissions, Preallocation, Result, ResultExt, name,
};
use rustix::fs::{FallocateFlags, IFlags};

use crate::cache::CacheMode;
use crate::file::{File, FileKind};
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

/// A file that was created or truncated.
#[derive(Debug)]
pub struct CreatedFile {
    /// The file, empty and locked.
    pub file: File,
    /// There was a file of this name before.
    pub existed: bool,
}

impl File {
    /// Fails as [`File::create`] would if another process has locked the file, and leaves the file unchanged.
    ///
    /// # Errors
    /// As [`File::create`].
    pub fn require_unlocked(target: &Target, permissions: Permissions, cache: CacheMode) -> Result<()> {
        Self::open(target, true, cache)?.lock_new(permissions)
    }

    /// Creates an empty file, or truncates an existing one once it is locked for `permissions`, and keeps it open and
    /// locked. Devices cannot be created: they are opened.
    ///
    /// # Errors
    /// `Could not create 'NAME': REASON`, locks of other processes, and a failed truncation. An existing file has its
    /// old contents then.
    pub fn create(
        target: &Target,
        permissions: Permissions,
        creation: &FileCreation,
        cache: CacheMode,
    ) -> Result<CreatedFile> {
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
        let this = Self::from_open(file, target, true, cache)?;
        this.lock_new(permissions)?;
        this.file.set_len(0).context(|| "Could not resize file")?;
        this.refresh_len()?;
        this.holes.invalidate();
        if creation.nocow
            && let Ok(flags) = rustix::fs::ioctl_getflags(&this.file)
        {
            // Only some file systems support it; failures are ignored.
            let _ = rustix::fs::ioctl_setflags(&this.file, flags | IFlags::NOCOW);
        }
        if creation.extent_size_hint != 0 {
            // A hint: failures of file systems without extents are ignored.
            let _ = sys::set_extent_size_hint(&this.file, creation.extent_size_hint);
        }
        Ok(CreatedFile { file: this, existed })
    }

    /// Locks a file that is about to be truncated: as qemu-img does for the creation, then for `permissions`.
    fn lock_new(&self, permissions: Permissions) -> Result<()> {
        self.lock(CREATING)?;
        self.lock(permissions)
    }

    /// Changes the length.
    pub(crate) fn set_len(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if self.kind != FileKind::Regular {
            return self.set_device_len(len, preallocation);
        }
        if i64::try_from(len).is_err() {
            return Err(Error::from_errno(libc::EINVAL).context("Could not resize file"));
        }
        let old = {
            let _alone = self.growth.write().unwrap_or_else(PoisonError::into_inner);
            let old = self.refresh_len()?;
            if preallocation != Preallocation::Off && len < old {
                return Err(Error::invalid("Preallocation can't be used for shrinking files"));
            }
            let outcome = self.change_len(old, len, preallocation);
            self.holes.invalidate();
            if outcome.is_err() && preallocation != Preallocation::Off {
                // Undo a partial preallocation.
                let _ = self.file.set_len(old);
            }
            self.refresh_len()?;
            outcome?;
            old
        };
        if preallocation == Preallocation::Full {
            if let Err(error) = self.write_zero_bytes(ByteRange::new(old, len)) {
                let _alone = self.growth.write().unwrap_or_else(PoisonError::into_inner);
                let _ = self.file.set_len(old);
                self.refresh_len()?;
                self.holes.invalidate();
                return Err(error.context("Could not write zeros for preallocation"));
            }
            rustix::io::retry_on_intr(|| rustix::fs::fsync(&self.file))
                .map_err(std::io::Error::from)
                .context(|| "Could not flush file to disk")?;
        } else if old == 0 && len > 0 {
            // Allocates the first block: programs that probe the alignment for O_DIRECT need an allocated block. A
            // failure is ignored.
            let _ = self.write_zero_bytes(ByteRange::new(0, len.min(FIRST_BLOCK)));
        }
        Ok(())
    }

    fn change_len(&self, old: u64, len: u64, preallocation: Preallocation) -> Result<()> {
        match preallocation {
            Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
            Preallocation::Falloc if len > old => self
                .fallocate(FallocateFlags::empty(), ByteRange::new(old, len))
                .map_err(std::io::Error::from)
                .context(|| "Could not preallocate new data"),
            _ => self.file.set_len(len).context(|| "Could not resize file"),
        }
    }

    fn set_device_len(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation != Preallocation::Off {
            return Err(Error::unsupported(format!(
                "Preallocation mode '{}' unsupported for this non-regular file",
                preallocation.name()
            )));
        }
        if len == self.known_len.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Unsupported, "Cannot resize device files"))
        }
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

const FIRST_BLOCK: u64 = 4096;
