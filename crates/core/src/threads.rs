//! Threads as far as they can be had.

use std::io;
use std::thread::Builder;

use crate::{errno, has_room};

/// Bytes of the stack of a thread. The deepest stack is that of a read through a chain of backing images.
const STACK: usize = 2 << 20;

/// Bytes that have to be free besides the stack before a thread is started: what the C library and the standard library
/// allocate for it, where a failure would end the program.
const HEADROOM: usize = 8 << 20;

/// Starts the making of a thread.
///
/// # Errors
/// There is too little memory for another thread. Starting one may fail all the same, if too many are running.
pub fn thread_builder() -> io::Result<Builder> {
    if has_room(STACK + HEADROOM) {
        Ok(Builder::new().stack_size(STACK))
    } else {
        Err(io::Error::from_raw_os_error(errno::ENOMEM))
    }
}
