//! The kernel interfaces by which a file is read and written.
//!
//! Requests are synchronous: each request in flight has its own thread. A thread acquires a ring or context from a pool
//! for the time of a request, so that no thread waits for another one.

use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use crate::sys::native::Context;
use crate::sys::uring::Ring;

/// The kernel's interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Aio {
    /// `pread` and `pwrite`, each from a thread of its own.
    #[default]
    Threads,
    /// Linux's `io_submit`; only with `O_DIRECT`, since it blocks otherwise.
    Native,
    /// `io_uring`.
    Uring,
}

impl Aio {
    /// The interface with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "threads" => Self::Threads,
            "native" => Self::Native,
            "io_uring" => Self::Uring,
            _ => return None,
        })
    }
}

/// The interface that one file uses.
#[derive(Debug)]
pub(crate) enum Engine {
    Threads,
    Native(Pool<Context>),
    Uring(Pool<Ring>),
}

impl Engine {
    /// The engine for `aio`. If the kernel does not support that, the engine for threads and a message for the user.
    pub(crate) fn new(aio: Aio) -> (Self, Option<String>) {
        let refused = |what: &str, object: &str, error: io::Error| {
            let error = diskimage_core::Error::from(error);
            let message =
                format!("Unable to use {what}, falling back to thread pool: failed to {object}: {error}");
            (Self::Threads, Some(message))
        };
        match aio {
            Aio::Threads => (Self::Threads, None),
            Aio::Native => match Context::new() {
                Ok(context) => (Self::Native(Pool::with(context)), None),
                Err(error) => refused("Linux AIO", "create linux AIO context", error),
            },
            Aio::Uring => match Ring::new() {
                Ok(ring) => (Self::Uring(Pool::with(ring)), None),
                Err(error) => refused("linux io_uring", "init linux io_uring ring", error),
            },
        }
    }

    /// Reads with one request to the kernel, which may return fewer bytes than `buf` has.
    pub(crate) fn read(&self, file: &fs::File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::Native(pool) => match pool.acquire(Context::new) {
                Some(mut context) => pool.release(context.read(file, buf, offset), context),
                None => plain_read(file, buf, offset),
            },
            Self::Uring(pool) => match pool.acquire(Ring::new) {
                Some(mut ring) => pool.release(ring.read(file, buf, offset), ring),
                None => plain_read(file, buf, offset),
            },
            Self::Threads => plain_read(file, buf, offset),
        }
    }

    /// Writes with one request to the kernel, which may take fewer bytes than `buf` has.
    pub(crate) fn write(&self, file: &fs::File, buf: &[u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::Native(pool) => match pool.acquire(Context::new) {
                Some(mut context) => pool.release(context.write(file, buf, offset), context),
                None => plain_write(file, buf, offset),
            },
            Self::Uring(pool) => match pool.acquire(Ring::new) {
                Some(mut ring) => pool.release(ring.write(file, buf, offset), ring),
                None => plain_write(file, buf, offset),
            },
            Self::Threads => plain_write(file, buf, offset),
        }
    }

    /// Makes completed writes durable.
    pub(crate) fn sync(&self, file: &fs::File) -> io::Result<()> {
        match self {
            Self::Uring(pool) => match pool.acquire(Ring::new) {
                Some(mut ring) => pool.release(ring.sync(file), ring),
                None => plain_sync(file),
            },
            Self::Native(pool) => match pool.acquire(Context::new) {
                Some(mut context) => match pool.release(context.sync(file), context) {
                    // Not every file system supports this request in io_submit.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain_sync(file),
                    other => other,
                },
                None => plain_sync(file),
            },
            Self::Threads => plain_sync(file),
        }
    }
}

fn plain_read(file: &fs::File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    Ok(rustix::io::pread(file, buf, offset)?)
}

fn plain_write(file: &fs::File, buf: &[u8], offset: u64) -> io::Result<usize> {
    Ok(rustix::io::pwrite(file, buf, offset)?)
}

fn plain_sync(file: &fs::File) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(file))?)
}

/// Rings or contexts that no thread uses at the moment.
#[derive(Debug)]
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    fn with(first: T) -> Self {
        Self(Mutex::new(vec![first]))
    }

    /// A free one, or a new one; `None` if the kernel refuses to create more.
    fn acquire(&self, make: impl FnOnce() -> io::Result<T>) -> Option<T> {
        let pool = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        pool.or_else(|| make().ok())
    }

    fn release<R>(&self, outcome: R, used: T) -> R {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(used);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_interface_reads_what_it_wrote() {
        for aio in [Aio::Threads, Aio::Native, Aio::Uring] {
            // If the kernel refuses an interface, threads replace it: the bytes are the same.
            let (engine, _) = Engine::new(aio);
            let file = tempfile::tempfile().expect("a file");
            std::thread::scope(|scope| {
                for n in 0..8_u8 {
                    let (engine, file) = (&engine, &file);
                    scope.spawn(move || {
                        let at = u64::from(n) * 4096;
                        assert_eq!(engine.write(file, &[n; 4096], at).expect("writes"), 4096);
                        let mut buf = [0xff; 4096];
                        assert_eq!(engine.read(file, &mut buf, at).expect("reads"), 4096);
                        assert_eq!(buf, [n; 4096]);
                    });
                }
            });
            engine.sync(&file).expect("syncs");
            let mut buf = [1; 10];
            assert_eq!(engine.read(&file, &mut buf, 8 * 4096).expect("reads"), 0);
        }
    }

    #[test]
    fn errors_of_the_kernel_are_returned() {
        for aio in [Aio::Threads, Aio::Native, Aio::Uring] {
            let (engine, _) = Engine::new(aio);
            let file = fs::File::open("/dev/null").expect("opens");
            let error = engine.write(&file, b"x", 0).expect_err("opened for reading");
            assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{aio:?}");
        }
    }
}
