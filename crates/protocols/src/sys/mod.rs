//! The system calls that no safe crate wraps: byte locks of open file descriptions, requests to block devices, and
//! asynchronous I/O. Also the allocator of the executable.
#![expect(unsafe_code, reason = "the kernel reads and fills what pointers point to")]

pub(crate) mod allocator;
pub(crate) mod native;
pub(crate) mod uring;

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::{Opcode, opcode};

/// Tries to set a shared lock on one byte, which stays with the open file description until it is closed.
pub(crate) fn lock_shared(fd: impl AsFd, byte: i64) -> io::Result<()> {
    set_lock(fd, byte, libc::F_RDLCK)
}

/// Releases the lock on one byte.
pub(crate) fn unlock(fd: impl AsFd, byte: i64) -> io::Result<()> {
    set_lock(fd, byte, libc::F_UNLCK)
}

/// Whether another open file description holds a lock on the byte.
pub(crate) fn is_locked(fd: impl AsFd, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(byte, libc::F_WRLCK);
    // SAFETY: F_OFD_GETLK reads and writes one `flock`, which `lock` is, alive during the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    check(result)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn set_lock(fd: impl AsFd, byte: i64, kind: i32) -> io::Result<()> {
    let lock = one_byte(byte, kind);
    // SAFETY: F_OFD_SETLK reads one `flock`, which `lock` is, alive during the call.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

fn one_byte(byte: i64, kind: i32) -> libc::flock {
    // Both constants are single digits; libc declares them wider than the fields.
    let short = |value: i32| i16::try_from(value).unwrap_or(0);
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Discards a range of a block device.
pub(crate) fn block_discard(fd: impl AsFd, start: u64, len: u64) -> io::Result<()> {
    let range = [start, len];
    // SAFETY: BLKDISCARD reads two u64, which `range` holds.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request(BLKDISCARD), range.as_ptr()) })
}

/// Makes a range of a block device read as zeroes.
pub(crate) fn block_zero(fd: impl AsFd, start: u64, len: u64) -> io::Result<()> {
    let range = [start, len];
    // SAFETY: BLKZEROOUT reads two u64, which `range` holds.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request(BLKZEROOUT), range.as_ptr()) })
}

/// Asks the file system to allocate the file in extents of `bytes`.
pub(crate) fn set_extent_size_hint(fd: impl AsFd, bytes: u32) -> io::Result<()> {
    let mut attributes = FsXattr::default();
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: FS_IOC_FSGETXATTR writes one `fsxattr`, whose layout `FsXattr` has.
    check(unsafe { libc::ioctl(raw, request(FS_IOC_FSGETXATTR), &raw mut attributes) })?;
    attributes.flags |= FS_XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    // SAFETY: FS_IOC_FSSETXATTR reads one `fsxattr`, whose layout `FsXattr` has.
    check(unsafe { libc::ioctl(raw, request(FS_IOC_FSSETXATTR), &raw const attributes) })
}

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

const _: () = assert!(size_of::<FsXattr>() == 28, "fsxattr is 28 bytes");

const BLKDISCARD: Opcode = opcode::none(0x12, 119);
const BLKZEROOUT: Opcode = opcode::none(0x12, 127);
const FS_IOC_FSGETXATTR: Opcode = opcode::read::<FsXattr>(b'X', 31);
const FS_IOC_FSSETXATTR: Opcode = opcode::write::<FsXattr>(b'X', 32);
const FS_XFLAG_EXTSIZE: u32 = 0x800;

fn request(opcode: Opcode) -> libc::Ioctl {
    libc::Ioctl::from(opcode)
}

fn check(result: i32) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
