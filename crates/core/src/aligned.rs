//! Memory that starts on a page boundary.

use std::ops::{Deref, DerefMut};

use crate::{Result, zeroed};

/// A buffer that starts on a page boundary. The kernel copies to and from such memory twice as fast as to and from
/// memory that starts 16 bytes into a page, which is where allocators put large buffers. `O_DIRECT` requires the
/// alignment.
#[derive(Debug, Default)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zero bytes.
    ///
    /// # Errors
    /// `ENOMEM` if the memory cannot be had.
    pub fn new(len: usize) -> Result<Self> {
        let bytes = zeroed(len.saturating_add(PAGE))?;
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Ok(Self { bytes, start, len })
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

const PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_on_a_page_and_has_its_length() {
        for len in [0, 1, 4096, 2 << 20] {
            let mut buf = AlignedBuf::new(len).expect("small");
            assert_eq!((buf.len(), buf.as_ptr().addr() % PAGE), (len, 0));
            buf.fill(1);
        }
        assert!(AlignedBuf::default().is_empty());
    }
}
