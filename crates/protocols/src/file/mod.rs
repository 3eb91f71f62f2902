//! An open file or block device.

mod ahead;
mod beneath;
mod direct_requests;
mod driver;
mod extents;
mod kind;
mod place;

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, Info, Limits, Node, NodeOptions, Permissions, Preallocation,
    Result, ResultExt, StatusDetail, ZeroMode, name,
};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use crate::aio::{Aio, Engine};
use crate::cache::{CacheMode, Flush};
use crate::direct::DirectIo;
use crate::holes::HoleCache;
use crate::lock::HeldLocks;
use crate::name::{ProtocolKind, Target};

use ahead::AllocateAhead;
pub use beneath::Directory;
pub(crate) use driver::{FILE, HOST_CDROM, HOST_DEVICE};
pub use driver::{LocalFileDriver, new_file};
pub use kind::FileKind;
pub use place::place_of_path;

/// An open file or block device.
#[derive(Debug)]
pub struct File {
    pub(crate) file: fs::File,
    pub(crate) name: String,
    pub(crate) kind: FileKind,
    protocol: ProtocolKind,
    pub(crate) cache: CacheMode,
    engine: Engine,
    /// The message that the kernel does not support the requested interface, if it does not.
    aio_fallback: Option<String>,
    pub(crate) write: bool,
    pub(crate) direct: Option<DirectIo>,
    ahead: AllocateAhead,
    pub(crate) holes: HoleCache,
    /// The length as known to this object; other processes may extend the file.
    pub(crate) known_len: AtomicU64,
    /// Held shared by writes beyond the known length and exclusively by changes of the length, so that none truncates
    /// bytes that another thread has just written.
    pub(crate) growth: RwLock<()>,
    /// [`Device::as_file`] was called: the file may be written without this object.
    pub(crate) lent: AtomicBool,
    /// A flush has failed. The kernel reports a failed write-back only once, so all later flushes fail, too.
    flush_failed: AtomicBool,
    /// Whether the file is locked at all.
    locking: bool,
    locks: Mutex<HeldLocks>,
    limits: Limits,
    /// Device and inode of a file, or device number of a block device.
    identity: (u64, u64),
}

/// The identity of a file. That of a block device is its device number, which all its nodes in the file system share.
fn identity_of(metadata: &fs::Metadata) -> (u64, u64) {
    match FileKind::of(metadata) {
        // No regular file has inode 0.
        Some(FileKind::Block) => (metadata.rdev(), 0),
        _ => (metadata.dev(), metadata.ino()),
    }
}

/// The [`Device::identity`] of the file at `path`, if it exists.
pub fn identity_of_path(path: &str) -> Option<(u64, u64)> {
    name::to_path(path)
        .metadata()
        .ok()
        .map(|metadata| identity_of(&metadata))
}

/// The most entries of a directory that are compared with a name of other case. A limit of this program.
const MAX_LISTED: usize = 65_536;

/// The path `path` as it exists below the directory `base`, which ends with a slash or is empty: the same, or one that
/// differs in the case of letters. Of several such names the first in alphabetical order is taken.
pub fn path_in_any_case(base: &str, path: &str) -> Option<String> {
    let mut found = String::new();
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        let so_far = format!("{base}{found}{part}");
        let is_step = part.is_empty() || part == "." || part == "..";
        if is_step || identity_of_path(&so_far).is_some() {
            found.push_str(part);
        } else {
            found.push_str(&entry_in_any_case(&format!("{base}{found}"), part)?);
        }
        if parts.peek().is_some() {
            found.push('/');
        }
    }
    identity_of_path(&format!("{base}{found}")).map(|_| found)
}

fn entry_in_any_case(directory: &str, name: &str) -> Option<String> {
    let wanted = name.to_lowercase();
    let directory = if directory.is_empty() { "." } else { directory };
    let entries = name::to_path(directory).read_dir().ok()?;
    let names = entries
        .take(MAX_LISTED)
        .filter_map(|entry| Some(name::from_os(&entry.ok()?.file_name())));
    names.filter(|name| name.to_lowercase() == wanted).min()
}

impl File {
    /// Opens the file that `target` names. It is not locked yet: see [`Device::lock`].
    ///
    /// # Errors
    /// `Could not open 'NAME': REASON`, and types of files that the driver does not support.
    pub fn open(target: &Target, write: bool, cache: CacheMode) -> Result<Self> {
        let name = &target.path;
        let path = name::to_path(name);
        if cache.aio == Aio::Native && !cache.direct {
            return Err(Error::invalid(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        if let Ok(metadata) = path.metadata() {
            // Checked before opening, which has side effects for some types of files.
            kind_of(&metadata, target)?;
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(write).custom_flags(cache.open_flags());
        let file = match name::open_with(&path, &options) {
            Err(error) if cache.direct && error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(Error::unsupported("filesystem does not support O_DIRECT"))
                    .context(|| format!("Could not open '{name}'"));
            }
            other => other.context(|| format!("Could not open '{name}'"))?,
        };
        Self::from_open(file, target, write, cache)
    }

    /// Makes all earlier writes durable, whatever the cache mode says of flushes.
    pub(crate) fn sync(&self) -> Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(Error::from_errno(libc::EIO));
        }
        match self.engine.sync(&self.file) {
            Ok(()) => Ok(()),
            // Some character devices do not support flushes.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && self.kind == FileKind::Character => {
                Ok(())
            }
            Err(error) => {
                self.flush_failed.store(true, Ordering::Release);
                Err(error.into())
            }
        }
    }

    /// Wraps a file that was opened with the flags of `cache`.
    pub(crate) fn from_open(file: fs::File, target: &Target, write: bool, cache: CacheMode) -> Result<Self> {
        let name = &target.path;
        let metadata = file.metadata().context(|| format!("Could not open '{name}'"))?;
        let kind = kind_of(&metadata, target)?;
        // O_NONBLOCK was set only for files whose opening may block.
        let flags = rustix::fs::fcntl_getfl(&file).map_err(std::io::Error::from)?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(std::io::Error::from)?;
        let direct = cache.direct.then(|| DirectIo::of(&file, kind));
        let limits = Limits {
            alignment: direct.as_ref().map_or(1, DirectIo::alignment),
            ..Limits::default()
        };
        let (engine, aio_fallback) = Engine::new(cache.aio);
        let ahead = AllocateAhead::of(&file, kind, write, &cache);
        let this = Self {
            file,
            name: name.clone(),
            kind,
            protocol: target.protocol.unwrap_or(match kind {
                FileKind::Regular => ProtocolKind::File,
                FileKind::Block | FileKind::Character => ProtocolKind::HostDevice,
            }),
            cache,
            engine,
            aio_fallback,
            write,
            direct,
            ahead,
            holes: HoleCache::default(),
            known_len: AtomicU64::new(0),
            growth: RwLock::new(()),
            lent: AtomicBool::new(false),
            flush_failed: AtomicBool::new(false),
            locking: true,
            locks: Mutex::default(),
            limits,
            identity: identity_of(&metadata),
        };
        this.refresh_len()?;
        Ok(this)
    }

    /// The same file, which takes no locks.
    #[must_use]
    pub(crate) fn without_locks(mut self) -> Self {
        self.locking = false;
        self
    }

    /// The message that the kernel does not support the requested interface, if it does not.
    pub(crate) fn aio_fallback(&self) -> Option<&str> {
        self.aio_fallback.as_deref()
    }

    /// The driver of the file.
    pub fn protocol(&self) -> ProtocolKind {
        self.protocol
    }

    /// Whether it is a device, whose length is fixed.
    pub fn is_device(&self) -> bool {
        self.kind.is_device()
    }

    /// Asks the kernel for the length.
    pub(crate) fn refresh_len(&self) -> Result<u64> {
        let len = match self.kind {
            FileKind::Regular => self.file.metadata()?.len(),
            FileKind::Block => {
                rustix::fs::seek(&self.file, SeekFrom::End(0)).map_err(std::io::Error::from)?
            }
            // Character devices that cannot seek, such as terminals, have length 0.
            FileKind::Character => rustix::fs::seek(&self.file, SeekFrom::End(0)).unwrap_or(0),
        };
        self.known_len.store(len, Ordering::Release);
        Ok(len)
    }

    /// Reads until `buf` is full or the file ends. Returns the number of bytes read.
    pub(crate) fn read_until_end(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            match self.engine.read(&self.file, &mut buf[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            if self
                .direct
                .as_ref()
                .is_some_and(|direct| !direct.is_aligned(done as u64))
            {
                // A partial block is read only at the end of the file.
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `buf`.
    pub(crate) fn write_out(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.allocate_ahead(offset, buf.len());
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            match self.engine.write(&self.file, &buf[done..], at) {
                Ok(0) => return Err(Error::from_errno(libc::ENOSPC)),
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(crate) fn require_writable(&self) -> Result<()> {
        if self.write {
            Ok(())
        } else {
            Err(Error::from_errno(libc::EBADF))
        }
    }

    /// Notes that the file reaches at least to `end`, and invalidates the cached hole.
    pub(crate) fn note_change(&self, end: u64) {
        // The length of a device is fixed, even if writes beyond it succeed.
        if !self.kind.is_device() {
            self.known_len.fetch_max(end, Ordering::AcqRel);
        }
        self.holes.invalidate();
    }

    /// Notes the outcome of a change that reaches to `end`. A failed one may be done in part.
    pub(crate) fn note_outcome(&self, outcome: &Result<()>, end: u64) {
        self.note_change(match outcome {
            Ok(()) => end,
            Err(_) => self.file.metadata().map_or(0, |metadata| metadata.len()),
        });
    }

    pub(crate) fn fallocate(&self, flags: FallocateFlags, range: ByteRange) -> rustix::io::Result<()> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, range.start(), range.len()) {
                Err(rustix::io::Errno::INTR) => {}
                other => return other,
            }
        }
    }

    fn beyond_end(&self, offset: u64) -> Error {
        Error::corrupt(format!(
            "Read beyond the end of '{}' at offset {offset:#x}",
            self.name
        ))
    }
}

impl Device for File {
    fn len(&self) -> u64 {
        if self.lent.load(Ordering::Acquire)
            && let Ok(len) = self.refresh_len()
        {
            return len;
        }
        self.known_len.load(Ordering::Acquire)
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = match &self.direct {
            Some(direct) => self.read_direct(direct, buf, offset)?,
            None => self.read_until_end(buf, offset)?,
        };
        if len == buf.len() {
            Ok(())
        } else {
            Err(self.beyond_end(offset.saturating_add(len as u64)))
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.require_writable()?;
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| Error::from_errno(libc::EFBIG))?;
        let outcome = if let Some(direct) = &self.direct {
            self.write_direct(direct, buf, offset)
        } else if end > self.known_len.load(Ordering::Acquire) {
            let _growing = self.growth.read().unwrap_or_else(PoisonError::into_inner);
            self.write_out(buf, offset)
        } else {
            self.write_out(buf, offset)
        };
        self.note_outcome(&outcome, end);
        outcome
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_writable()?;
        self.zero(range, mode)?;
        self.after_layout_change()
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.require_writable()?;
        self.discard_range(range)?;
        self.after_layout_change()
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        self.extent(range, detail)
    }

    fn flush(&self) -> Result<()> {
        if self.cache.flush != Flush::Always || !self.write {
            return Ok(());
        }
        self.sync()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.require_writable()?;
        self.set_len(len, preallocation)?;
        self.after_layout_change()
    }

    fn copy_to(&self, range: ByteRange, target: &dyn Device, target_offset: u64) -> Result<bool> {
        self.copy_range(range, target, target_offset)
    }

    fn as_file(&self) -> Option<&fs::File> {
        // Copies inside the kernel ignore O_DSYNC on some file systems, and do not work for devices.
        if self.cache.writethrough || self.kind.is_device() {
            return None;
        }
        self.lent.store(true, Ordering::Release);
        Some(&self.file)
    }

    fn lock(&self, permissions: Permissions) -> Result<()> {
        if !self.locking {
            return Ok(());
        }
        let mut held = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = HeldLocks::from(permissions);
        held.change_to(wanted, &self.file, &self.name)?;
        *held = wanted;
        Ok(())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        Some(self.identity)
    }

    fn is_zero_when_new(&self) -> bool {
        !self.kind.is_device()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.file.metadata().ok()?.blocks().saturating_mul(512))
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn info(&self) -> Result<Info> {
        // An empty list: qemu-img prints the heading all the same.
        Ok(Info {
            specific: Some(Vec::new()),
            ..Info::default()
        })
    }

    fn node(&self) -> Node {
        let mut options = NodeOptions::new();
        options.set("filename", self.name.as_str());
        Node {
            driver: self.protocol().name(),
            options,
            name: Some(self.name.clone()),
            ..Node::default()
        }
    }
}

impl File {
    /// `O_DSYNC` only covers writes: changes by other system calls need a flush.
    fn after_layout_change(&self) -> Result<()> {
        if self.cache.writethrough {
            self.flush()
        } else {
            Ok(())
        }
    }
}

/// The type of the file, if the driver of `target` supports it.
fn kind_of(metadata: &fs::Metadata, target: &Target) -> Result<FileKind> {
    let path = &target.path;
    match (target.protocol, FileKind::of(metadata)) {
        (None | Some(ProtocolKind::File), Some(FileKind::Regular)) => Ok(FileKind::Regular),
        (None | Some(ProtocolKind::HostDevice | ProtocolKind::HostCdrom), Some(kind)) if kind.is_device() => {
            Ok(kind)
        }
        (Some(protocol @ (ProtocolKind::HostDevice | ProtocolKind::HostCdrom)), _) => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "'{}' driver requires '{path}' to be either a character or block device",
                protocol.name()
            ),
        )),
        _ => Err(Error::new(
            ErrorKind::Invalid,
            format!("'file' driver requires '{path}' to be a regular file"),
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests;
