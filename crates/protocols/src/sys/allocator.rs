//! The allocator of the executable: that of the system, with a way to end the program when memory runs out.

use std::alloc::{GlobalAlloc, Layout, System};

use diskimage_core::is_expected_to_fail;

/// The system's allocator. If memory runs out in an allocation that cannot return an error, it writes a message and ends
/// the process with status 1, instead of an abort.
#[derive(Debug)]
pub struct LastWordsAllocator {
    message: &'static str,
}

impl LastWordsAllocator {
    /// An allocator with this message for standard error.
    pub const fn new(message: &'static str) -> Self {
        Self { message }
    }

    fn checked(&self, memory: *mut u8) -> *mut u8 {
        if memory.is_null() && !is_expected_to_fail() {
            // SAFETY: `write` reads the bytes of the message, and `_exit` does not return. Neither allocates.
            unsafe {
                libc::write(
                    libc::STDERR_FILENO,
                    self.message.as_ptr().cast(),
                    self.message.len(),
                );
                libc::_exit(1);
            }
        }
        memory
    }
}

// SAFETY: all methods call those of the system's allocator with the same arguments and return what they return.
unsafe impl GlobalAlloc for LastWordsAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` needs.
        self.checked(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` needs.
        self.checked(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those that `System` needs.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` needs.
        self.checked(unsafe { System.realloc(memory, layout, new_size) })
    }
}
