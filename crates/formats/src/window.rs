//! Tables of numbers that lie in the file one after the other, seen through a window.
//!
//! However many entries a header speaks of, one window of them is in memory. What would lie beyond the end of the file
//! reads as zero, as the original has it.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{Device, Error, Result, errno};

/// A table of entries of `N` bytes.
#[derive(Debug)]
pub(crate) struct TableWindow<const N: usize> {
    device: Arc<dyn Device>,
    start: u64,
    /// Which window is in memory, and its bytes.
    window: Mutex<Option<(u64, Box<[u8]>)>>,
}

/// Bytes of a window.
const WINDOW: usize = 64 << 10;

impl<const N: usize> TableWindow<N> {
    const ENTRIES: u64 = (WINDOW / N) as u64;

    /// The table that starts at byte `start` of `device`.
    pub(crate) fn new(device: Arc<dyn Device>, start: u64) -> Self {
        Self {
            device,
            start,
            window: Mutex::new(None),
        }
    }

    /// The bytes of entry `index`.
    pub(crate) fn entry(&self, index: u64) -> Result<[u8; N]> {
        let number = index / Self::ENTRIES;
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.as_ref().is_none_or(|(there, _)| *there != number) {
            let mut bytes = vec![0; WINDOW / N * N].into_boxed_slice();
            let offset = (number * bytes.len() as u64)
                .checked_add(self.start)
                .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
            self.device.read_padded(&mut bytes, offset)?;
            *window = Some((number, bytes));
        }
        let at = usize::try_from(index % Self::ENTRIES).unwrap_or(usize::MAX);
        window
            .as_ref()
            .and_then(|(_, bytes)| bytes.chunks_exact(N).nth(at)?.try_into().ok())
            .ok_or_else(|| Error::corrupt("Entry lies outside its table"))
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    #[test]
    fn entries_are_found_in_any_order_and_zero_beyond_the_end() {
        let mut bytes = vec![0xee; 3];
        bytes.extend((0..40_000_u32).flat_map(u32::to_le_bytes));
        let table = TableWindow::<4>::new(Arc::new(MemoryDevice::new(bytes)), 3);
        for index in [0, 39_999, 16_383, 16_384, 1, 32_768] {
            assert_eq!(u64::from(u32::from_le_bytes(table.entry(index).unwrap())), index);
        }
        assert_eq!(table.entry(40_000).unwrap(), [0; 4]);
        assert_eq!(table.entry(u64::from(u32::MAX)).unwrap(), [0; 4]);
    }
}
