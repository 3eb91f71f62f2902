//! An open file or block device.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, Limits, Permissions, Preallocation, Result, ResultExt, Want,
    ZeroMode,
};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use crate::cache::CacheMode;
use crate::direct::Direct;
use crate::holes::Holes;
use crate::lock::Held;
use crate::name::{ProtocolKind, Target};

/// An open file or block device.
#[derive(Debug)]
pub struct File {
    pub(crate) file: fs::File,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) cache: CacheMode,
    pub(crate) write: bool,
    pub(crate) direct: Option<Direct>,
    pub(crate) holes: Holes,
    /// The length as far as this object knows; others may make the file longer.
    pub(crate) known_len: AtomicU64,
    /// Writers that reach beyond the known length hold it shared; whoever sets the length holds it alone. So nobody
    /// cuts off what another thread has just written.
    pub(crate) growth: RwLock<()>,
    /// [`Device::as_file`] was asked: others may write behind this object's back.
    pub(crate) lent: AtomicBool,
    /// The kernel reports a failed write-back once; what it lost stays lost.
    flush_failed: AtomicBool,
    locks: Mutex<Held>,
    limits: Limits,
    /// Device and inode.
    identity: (u64, u64),
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Regular,
    Block,
    Character,
}

impl Kind {
    pub(crate) fn is_device(self) -> bool {
        self != Self::Regular
    }
}

impl File {
    /// Opens what `target` names, without a lock yet: see [`Device::lock`].
    ///
    /// # Errors
    /// `Could not open 'NAME': REASON`, and kinds of files that the protocol is not for.
    pub fn open(target: &Target, write: bool, cache: CacheMode) -> Result<Self> {
        let name = &target.path;
        if let Ok(metadata) = fs::metadata(name) {
            // Before opening: opening some kinds of files has effects.
            kind_of(&metadata, target)?;
        }
        let mut flags = OFlags::NONBLOCK;
        flags.set(OFlags::DIRECT, cache.direct);
        flags.set(OFlags::DSYNC, cache.writethrough);
        let opened = fs::OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags.bits().cast_signed())
            .open(name);
        let file = match opened {
            Err(error) if cache.direct && error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(Error::unsupported("filesystem does not support O_DIRECT"))
                    .context(|| format!("Could not open '{name}'"));
            }
            other => other.context(|| format!("Could not open '{name}'"))?,
        };
        Self::from_open(file, target, write, cache)
    }

    /// Takes over a file that has been opened with the flags that `cache` asks for.
    pub(crate) fn from_open(file: fs::File, target: &Target, write: bool, cache: CacheMode) -> Result<Self> {
        let name = &target.path;
        let metadata = file.metadata().context(|| format!("Could not open '{name}'"))?;
        let kind = kind_of(&metadata, target)?;
        // O_NONBLOCK was only for files that opening waits for.
        let flags = rustix::fs::fcntl_getfl(&file).map_err(std::io::Error::from)?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(std::io::Error::from)?;
        let direct = cache.direct.then(|| Direct::of(&file, kind));
        let limits = Limits {
            alignment: direct.as_ref().map_or(1, Direct::alignment),
            ..Limits::default()
        };
        let this = Self {
            file,
            name: name.clone(),
            kind,
            cache,
            write,
            direct,
            holes: Holes::default(),
            known_len: AtomicU64::new(0),
            growth: RwLock::new(()),
            lent: AtomicBool::new(false),
            flush_failed: AtomicBool::new(false),
            locks: Mutex::default(),
            limits,
            identity: (metadata.dev(), metadata.ino()),
        };
        this.refresh_len()?;
        Ok(this)
    }

    /// The protocol that serves it.
    pub fn protocol(&self) -> ProtocolKind {
        if self.kind.is_device() {
            ProtocolKind::HostDevice
        } else {
            ProtocolKind::File
        }
    }

    /// Whether it is a device, which has the length that it has.
    pub fn is_device(&self) -> bool {
        self.kind.is_device()
    }

    /// Asks the system for the length.
    pub(crate) fn refresh_len(&self) -> Result<u64> {
        let len = match self.kind {
            Kind::Regular => self.file.metadata()?.len(),
            Kind::Block => rustix::fs::seek(&self.file, SeekFrom::End(0)).map_err(std::io::Error::from)?,
            // A terminal and the like; those that have a length tell it.
            Kind::Character => rustix::fs::seek(&self.file, SeekFrom::End(0)).unwrap_or(0),
        };
        self.known_len.store(len, Ordering::Release);
        Ok(len)
    }

    /// Reads until `buf` is full or the file ends; how many bytes there were.
    pub(crate) fn read_until_end(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&self.file, &mut buf[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(std::io::Error::from(error).into()),
            }
            if self
                .direct
                .as_ref()
                .is_some_and(|direct| !direct.fits(done as u64))
            {
                // Only the end of the file makes an uneven number.
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `buf`.
    pub(crate) fn write_out(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pwrite(&self.file, &buf[done..], offset.saturating_add(done as u64)) {
                Ok(0) => return Err(Error::from_errno(libc::ENOSPC)),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(std::io::Error::from(error).into()),
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

    /// Notes that bytes up to `end` are there now, and that holes may have gone.
    pub(crate) fn note_change(&self, end: u64) {
        self.known_len.fetch_max(end, Ordering::AcqRel);
        self.holes.forget();
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
        let there = match &self.direct {
            Some(direct) => direct.read(self, buf, offset)?,
            None => self.read_until_end(buf, offset)?,
        };
        if there == buf.len() {
            Ok(())
        } else {
            Err(self.beyond_end(offset.saturating_add(there as u64)))
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.require_writable()?;
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| Error::from_errno(libc::EFBIG))?;
        let outcome = if let Some(direct) = &self.direct {
            direct.write(self, buf, offset)
        } else if end > self.known_len.load(Ordering::Acquire) {
            let _growing = self.growth.read().unwrap_or_else(PoisonError::into_inner);
            self.write_out(buf, offset)
        } else {
            self.write_out(buf, offset)
        };
        // After a failure part of it may be there.
        self.note_change(if outcome.is_ok() { end } else { 0 });
        outcome
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_writable()?;
        self.zero(range, mode)?;
        self.after_layout_change()
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.require_writable()?;
        self.give_back(range)?;
        self.after_layout_change()
    }

    fn status(&self, range: ByteRange, want: Want) -> Result<Extent> {
        self.extent(range, want)
    }

    fn flush(&self) -> Result<()> {
        if self.cache.no_flush || !self.write {
            return Ok(());
        }
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(Error::from_errno(libc::EIO));
        }
        match rustix::fs::fdatasync(&self.file) {
            Ok(()) => Ok(()),
            // Pipes and some devices have nothing to flush.
            Err(rustix::io::Errno::INVAL) if self.kind == Kind::Character => Ok(()),
            Err(error) => {
                self.flush_failed.store(true, Ordering::Release);
                Err(std::io::Error::from(error).into())
            }
        }
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
        // A copy inside the kernel neither keeps the promise of O_DSYNC on every file system nor suits a device.
        if self.cache.writethrough || self.kind.is_device() {
            return None;
        }
        self.lent.store(true, Ordering::Release);
        Some(&self.file)
    }

    fn lock(&self, permissions: Permissions) -> Result<()> {
        let mut held = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Held::from(permissions);
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
}

impl File {
    /// `O_DSYNC` is about writes; changes by other calls have to be pushed.
    fn after_layout_change(&self) -> Result<()> {
        if self.cache.writethrough {
            self.flush()
        } else {
            Ok(())
        }
    }
}

/// Which kind of file it is, if the protocol takes that kind.
fn kind_of(metadata: &fs::Metadata, target: &Target) -> Result<Kind> {
    let file_type = metadata.file_type();
    let path = &target.path;
    let kind = if file_type.is_file() {
        Some(Kind::Regular)
    } else if file_type.is_block_device() {
        Some(Kind::Block)
    } else if file_type.is_char_device() {
        Some(Kind::Character)
    } else {
        None
    };
    match (target.protocol, kind) {
        (None | Some(ProtocolKind::File), Some(Kind::Regular)) => Ok(Kind::Regular),
        (None | Some(ProtocolKind::HostDevice), Some(kind)) if kind.is_device() => Ok(kind),
        (Some(ProtocolKind::HostDevice), _) => Err(Error::new(
            ErrorKind::Invalid,
            format!("'host_device' driver requires '{path}' to be either a character or block device"),
        )),
        _ => Err(Error::new(
            ErrorKind::Invalid,
            format!("'file' driver requires '{path}' to be a regular file"),
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::grow::FileCreation;

    /// A file of one's own, opened for writing if so wanted.
    pub(crate) fn scratch(write: bool) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().expect("there is a temporary directory");
        let target = target(&dir);
        drop(File::create(&target, &FileCreation::default(), CacheMode::UNSAFE).expect("is made"));
        let file = File::open(&target, write, CacheMode::UNSAFE).expect("opens");
        (dir, file)
    }

    pub(crate) fn target(dir: &tempfile::TempDir) -> Target {
        Target::plain(dir.path().join("a").to_str().expect("is text"))
    }

    fn message(result: Result<impl Sized>) -> String {
        result.map(drop).expect_err("fails").chain()
    }

    #[test]
    fn it_reads_what_was_written_and_not_more() {
        let (_dir, file) = scratch(true);
        file.write_at(b"abc", 5).expect("grows");
        assert_eq!(file.len(), 8);
        let mut buf = [1; 8];
        file.read_at(&mut buf, 0).expect("reads");
        assert_eq!(&buf, b"\0\0\0\0\0abc");
        assert_eq!(
            file.read_at(&mut buf, 1).map_err(|e| e.kind()),
            Err(ErrorKind::Corrupt)
        );
        assert_eq!(
            file.write_at(b"x", u64::MAX - 2).map_err(|e| e.errno()),
            Err(Some(libc::EFBIG))
        );
    }

    #[test]
    fn kinds_of_files_that_the_protocols_are_not_for_are_refused() {
        let dir = tempfile::tempdir().expect("there is a temporary directory");
        let path = dir.path().to_str().expect("is text");
        let open = |name: &str| {
            File::open(
                &Target::parse(name).expect("is a path"),
                false,
                CacheMode::default(),
            )
        };
        assert_eq!(
            message(open(path)),
            format!("'file' driver requires '{path}' to be a regular file")
        );
        assert_eq!(
            message(open(&format!("host_device:{path}"))),
            format!("'host_device' driver requires '{path}' to be either a character or block device")
        );
        assert_eq!(
            message(open(&format!("{path}/x"))),
            format!("Could not open '{path}/x': No such file or directory")
        );
        let pipe = format!("{path}/pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &*pipe, rustix::fs::FileType::Fifo, mode, 0).expect("is made");
        assert_eq!(
            message(open(&pipe)),
            format!("'file' driver requires '{pipe}' to be a regular file")
        );
        let null = open("/dev/null").expect("opens");
        assert_eq!((null.len(), null.protocol()), (0, ProtocolKind::HostDevice));
    }

    #[test]
    fn writers_and_readers_of_tables_exclude_each_other() {
        let (dir, first) = scratch(true);
        let second = File::open(&target(&dir), true, CacheMode::UNSAFE).expect("opens");
        let name = first.name();
        let hint = format!("Is another process using the image [{name}]?");
        let lock = |file: &File, permissions| {
            file.lock(permissions)
                .map_err(|e| (e.kind(), e.chain(), e.hint_line().map(str::to_owned)))
        };
        let refused = |words: &str| Err((ErrorKind::Locked, words.to_owned(), Some(hint.clone())));

        assert_eq!(lock(&first, Permissions::READ), Ok(()));
        assert_eq!(lock(&second, Permissions::READ), Ok(()));
        assert_eq!(
            lock(&second, Permissions::WRITE),
            refused("Failed to get \"write\" lock")
        );
        assert_eq!(lock(&second, Permissions::READ_SHARED), Ok(()));
        assert_eq!(
            lock(&first, Permissions::WRITE),
            Ok(()),
            "a reader that shares everything is in nobody's way"
        );
        assert_eq!(
            lock(&second, Permissions::READ),
            refused("Failed to get shared \"write\" lock")
        );
        assert_eq!(lock(&second, Permissions::FORCE_SHARE), Ok(()));
        drop(first);
        assert_eq!(lock(&second, Permissions::WRITE), Ok(()));
    }

    #[test]
    fn preallocation_sets_storage_aside() {
        let (_dir, file) = scratch(true);
        file.resize(1 << 20, Preallocation::Falloc).expect("grows");
        assert!(file.allocated_bytes() >= Some(1 << 20));
        file.resize(2 << 20, Preallocation::Full).expect("grows");
        assert!(file.allocated_bytes() >= Some(2 << 20));
        assert_eq!(
            message(file.resize(3 << 20, Preallocation::Metadata)),
            "Unsupported preallocation mode: metadata"
        );
        assert_eq!(
            message(file.resize(u64::MAX, Preallocation::Off)),
            "Could not resize file: Invalid argument"
        );
        assert_eq!(file.len(), 2 << 20);
    }

    #[test]
    fn zeroes_beyond_the_end_lengthen_the_file() {
        for mode in [ZeroMode::Unmap, ZeroMode::KeepAllocated] {
            let (_dir, file) = scratch(true);
            file.write_at(&[7; 5000], 0).expect("writes");
            file.write_zeroes(ByteRange::new(3000, 9000), mode)
                .expect("zeroes");
            assert_eq!(file.len(), 9000);
            let mut buf = vec![1; 9000];
            file.read_at(&mut buf, 0).expect("reads");
            assert!(buf[..3000].iter().all(|b| *b == 7) && diskimage_core::is_zero(&buf[3000..]));
        }
    }

    #[test]
    fn direct_requests_of_any_shape_do_what_they_say() {
        let (dir, plain) = scratch(true);
        let direct = match File::open(&target(&dir), true, CacheMode::NONE) {
            Ok(file) => file,
            Err(error) => {
                eprintln!("skipped: {}", error.chain());
                return;
            }
        };
        let mut model = Vec::new();
        // Offsets and lengths on, before and after block boundaries, growing as they go.
        for (step, (offset, len)) in [
            (0, 1000),
            (1000, 24),
            (511, 2),
            (4096, 4096),
            (8191, 70_000),
            (100, 3_000_000),
        ]
        .into_iter()
        .enumerate()
        {
            let bytes: Vec<u8> = (0..len)
                .map(|i| u8::try_from((i * 7 + step) % 251).unwrap_or(0))
                .collect();
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].copy_from_slice(&bytes);
            direct.write_at(&bytes, offset as u64).expect("writes");
            assert_eq!(direct.len(), model.len() as u64, "after step {step}");
            for device in [&direct, &plain] {
                let mut back = vec![0; model.len() - 1];
                device.read_at(&mut back, 1).expect("reads");
                assert!(back == model[1..], "after step {step}");
            }
        }
        let mut buf = [0; 10];
        assert!(direct.read_at(&mut buf, model.len() as u64 - 5).is_err());
    }

    #[test]
    fn copies_inside_the_kernel_arrive() {
        let ((_d1, from), (_d2, to)) = (scratch(true), scratch(true));
        from.write_at(&[9; 100_000], 0).expect("writes");
        if !from
            .copy_to(ByteRange::new(1000, 90_000), &to, 500)
            .expect("copies")
        {
            eprintln!("skipped: the file system does not copy");
            return;
        }
        assert_eq!(to.len(), 89_500);
        let mut buf = [0; 2];
        to.read_at(&mut buf, 499).expect("reads");
        assert_eq!(buf, [0, 9]);
    }
}
