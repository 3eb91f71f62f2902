//! Requests by io_uring: each caller has its own ring, with one request at a time.
//!
//! The kernel reads and writes the caller's memory while a request is in flight, so no method returns before the
//! request is complete or was not accepted.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use diskimage_core::saturating_u32;
use io_uring::{IoUring, opcode, squeue, types::Fd, types::FsyncFlags};

/// A ring.
pub(crate) struct Ring(IoUring);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl Ring {
    /// Creates a ring. Old kernels do not support it, and system policies may forbid it.
    pub(crate) fn new() -> io::Result<Self> {
        IoUring::new(ENTRIES).map(Self)
    }

    /// `pread`.
    pub(crate) fn read(&mut self, fd: impl AsFd, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = opcode::Read::new(number(&fd), buf.as_mut_ptr(), len_of(buf));
        // SAFETY: `buf` is borrowed until `run` returns, and the length is its own or less.
        unsafe { self.run(&read.offset(offset).build()) }
    }

    /// `pwrite`.
    pub(crate) fn write(&mut self, fd: impl AsFd, buf: &[u8], offset: u64) -> io::Result<usize> {
        let write = opcode::Write::new(number(&fd), buf.as_ptr(), len_of(buf));
        // SAFETY: as for reading.
        unsafe { self.run(&write.offset(offset).build()) }
    }

    /// `fdatasync`.
    pub(crate) fn sync(&mut self, fd: impl AsFd) -> io::Result<()> {
        let sync = opcode::Fsync::new(number(&fd)).flags(FsyncFlags::DATASYNC);
        // SAFETY: no memory is involved.
        unsafe { self.run(&sync.build()) }.map(drop)
    }

    /// Submits one request and waits for its completion.
    ///
    /// # Safety
    /// The memory that `entry` points to is the caller's, exclusively where the kernel writes to it, until this
    /// returns.
    unsafe fn run(&mut self, entry: &squeue::Entry) -> io::Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { self.0.submission().push(entry) }.map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        loop {
            let outcome = self.0.submit_and_wait(1);
            if let Some(done) = self.0.completion().next() {
                return usize::try_from(done.result())
                    .map_err(|_| io::Error::from_raw_os_error(-done.result()));
            }
            match outcome {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => {
                    if !self.0.submission().is_empty() {
                        // Not accepted; dropping the ring makes sure that it never will be.
                        if let Ok(ring) = IoUring::new(ENTRIES) {
                            self.0 = ring;
                            return Err(error);
                        }
                    }
                    // The kernel has accepted the request and uses the memory until it reports the completion.
                    std::thread::yield_now();
                }
                _ => {}
            }
        }
    }
}

/// One request at a time needs one entry; the second one is spare.
const ENTRIES: u32 = 2;

fn number(fd: &impl AsFd) -> Fd {
    Fd(fd.as_fd().as_raw_fd())
}

/// The kernel transfers less than 2 GiB at once; callers continue after that, in whole blocks.
fn len_of(buf: &[u8]) -> u32 {
    const MOST: u32 = 1 << 30;
    saturating_u32(buf.len()).min(MOST)
}
