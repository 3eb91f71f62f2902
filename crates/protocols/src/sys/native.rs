//! Requests by Linux's asynchronous interface (`io_submit`): each caller has its own context, with one request at a
//! time.
//!
//! The kernel reads and writes the caller's memory while a request is in flight, so no method returns before the
//! request is complete or was not accepted.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// A context.
#[derive(Debug)]
pub(crate) struct Context(libc::c_ulong);

impl Context {
    /// Creates a context. The kernel limits their number.
    pub(crate) fn new() -> io::Result<Self> {
        let mut context: libc::c_ulong = 0;
        let requests: libc::c_uint = 1;
        // SAFETY: io_setup writes one context, which `context` has room for and which is 0 before, as it demands.
        check(unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut context) })?;
        Ok(Self(context))
    }

    /// `pread`.
    pub(crate) fn read(&mut self, fd: impl AsFd, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let control = Control::new(
            PREAD,
            &fd,
            buf.as_mut_ptr().expose_provenance(),
            buf.len(),
            offset,
        );
        // SAFETY: `buf` is borrowed until `run` returns, and the length is its own.
        unsafe { self.run(&control) }
    }

    /// `pwrite`.
    pub(crate) fn write(&mut self, fd: impl AsFd, buf: &[u8], offset: u64) -> io::Result<usize> {
        let control = Control::new(PWRITE, &fd, buf.as_ptr().expose_provenance(), buf.len(), offset);
        // SAFETY: as for reading.
        unsafe { self.run(&control) }
    }

    /// `fdatasync`.
    pub(crate) fn sync(&mut self, fd: impl AsFd) -> io::Result<()> {
        // SAFETY: no memory is involved.
        unsafe { self.run(&Control::new(FDSYNC, &fd, 0, 0, 0)) }.map(drop)
    }

    /// Submits one request and waits for its completion.
    ///
    /// # Safety
    /// The memory that `control` points to is the caller's, exclusively where the kernel writes to it, until this
    /// returns.
    unsafe fn run(&mut self, control: &Control) -> io::Result<usize> {
        let list = [&raw const *control];
        // SAFETY: the context is this one's, and the list has one block, alive during the call; the kernel copies it.
        check(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1_i64, list.as_ptr()) })?;
        loop {
            let mut event = Event::default();
            let none = std::ptr::null::<libc::timespec>();
            // SAFETY: io_getevents writes at most one event, which `event` has room for.
            let count =
                unsafe { libc::syscall(libc::SYS_io_getevents, self.0, 1_i64, 1_i64, &raw mut event, none) };
            if count == 1 {
                return usize::try_from(event.result).map_err(|_| {
                    // The kernel's error numbers are small: another number is no answer of a known kernel.
                    io::Error::from_raw_os_error(i32::try_from(-event.result).unwrap_or(libc::EIO))
                });
            }
            // The kernel has accepted the request and uses the memory until it reports the completion.
            std::thread::yield_now();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is this one's and not shared; no request is in flight.
        let _ = unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// `struct iocb` of `linux/aio_abi.h`, whose second and third fields are swapped on big-endian machines.
#[repr(C)]
struct Control {
    data: u64,
    key_and_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    file: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    signal_file: u32,
}

const _: () = assert!(size_of::<Control>() == 64, "iocb is 64 bytes");

impl Control {
    fn new(opcode: u16, fd: &impl AsFd, buf: usize, len: usize, offset: u64) -> Self {
        Self {
            data: 0,
            key_and_flags: [0; 2],
            opcode,
            priority: 0,
            file: fd.as_fd().as_raw_fd().unsigned_abs(),
            buf: buf as u64,
            len: len as u64,
            // The kernel refuses a negative offset.
            offset: i64::try_from(offset).unwrap_or(-1),
            reserved: 0,
            flags: 0,
            signal_file: 0,
        }
    }
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Default)]
struct Event {
    data: u64,
    control: u64,
    result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<Event>() == 32, "io_event is 32 bytes");

const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const FDSYNC: u16 = 3;

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
