//! Existing storage that a new image is written to: a device, an export, a file that cannot be replaced.
//!
//! ```text
//!   storage   [ old    ][ old                                ]    as long as only the head is written
//!   storage   [ zeroes ][ image, in any order                ]    until it is complete
//!   memory    [ head   ]
//!   storage   [ head   ][ image                              ]    published
//! ```
//!
//! Without its head an image has no header, and a raw disk no partition table: nothing takes the storage for a complete
//! image before it is one. A format whose header is not at the start, as that of a fixed VHD, lacks the first sectors of
//! its disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, Extent, FilterDevice, Preallocation, Result, StatusDetail, ZeroMode,
    saturating_index, status_below, to_index, zeroed,
};

/// Storage whose first bytes are kept in memory until the image is complete.
#[derive(Debug)]
pub(super) struct WithheldHead {
    below: Arc<dyn Device>,
    /// The bytes of the head, at most; a multiple of the alignment of the storage.
    len: u64,
    head: Mutex<Head>,
}

#[derive(Debug)]
struct Head {
    bytes: Vec<u8>,
    /// How many of them the image has, where the storage has none yet.
    end: usize,
    state: State,
}

/// What is in the place of the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// What was there before.
    Old,
    /// Zeroes.
    Zero,
    /// The head.
    Published,
}

/// The length of the head in bytes: the header of every format with one at the start begins in it.
const HEAD: u64 = 4096;

impl WithheldHead {
    /// Withholds the head of `below`.
    ///
    /// # Errors
    /// The head cannot be read.
    pub(super) fn new(below: Arc<dyn Device>) -> Result<Self> {
        let len = HEAD.max(below.limits().alignment.into());
        let mut bytes = zeroed(to_index(len)?)?;
        below.read_padded(&mut bytes, 0)?;
        let end = saturating_index(len.min(below.len()));
        Ok(Self {
            below,
            len,
            head: Mutex::new(Head {
                bytes,
                end,
                state: State::Old,
            }),
        })
    }

    /// The device below, for a change of what is not the head: from now on the old head is gone.
    fn change(&self) -> Result<&Arc<dyn Device>> {
        let mut head = self.lock();
        if head.state == State::Old {
            let there = ByteRange::new(0, self.len.min(self.below.len()));
            if !there.is_empty() {
                self.below.write_zeroes(there, ZeroMode::KeepAllocated)?;
                self.below.flush()?;
            }
            head.state = State::Zero;
        }
        Ok(&self.below)
    }

    /// Makes everything else durable, then writes the head and makes it durable as well.
    ///
    /// # Errors
    /// The head cannot be written, or the storage not flushed.
    pub(super) fn publish(&self) -> Result<()> {
        self.below.flush()?;
        let mut head = self.lock();
        self.below.write_at(&head.bytes[..head.end], 0)?;
        head.state = State::Published;
        drop(head);
        self.below.flush()
    }

    fn lock(&self) -> MutexGuard<'_, Head> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The head, where `range` has a part in it that is in memory; and the rest of `range`.
    fn split(&self, range: ByteRange) -> (Option<MutexGuard<'_, Head>>, ByteRange) {
        if range.start() >= self.len {
            return (None, range);
        }
        let head = self.lock();
        match head.state {
            State::Published => (None, range),
            State::Old | State::Zero => (Some(head), range.skip(self.len - range.start())),
        }
    }
}

impl Head {
    /// The bytes from `offset` on, `len` at most.
    fn part(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let start = saturating_index(offset).min(self.bytes.len());
        let end = start.saturating_add(len).min(self.bytes.len());
        &mut self.bytes[start..end]
    }

    /// Notes that the image has the bytes up to the end of `range`.
    fn reach(&mut self, range: ByteRange) {
        let end = saturating_index(range.end()).min(self.bytes.len());
        self.end = self.end.max(end);
    }
}

impl FilterDevice for WithheldHead {
    fn below(&self) -> &Arc<dyn Device> {
        &self.below
    }

    fn len(&self) -> u64 {
        self.below.len().max(self.lock().end as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (head, rest) = self.split(ByteRange::at(offset, buf.len() as u64));
        let Some(mut head) = head else {
            return self.below.read_at(buf, offset);
        };
        let part = head.part(offset, buf.len());
        let (first, others) = buf.split_at_mut(part.len());
        first.copy_from_slice(part);
        drop(head);
        match others.is_empty() {
            true if offset + first.len() as u64 > self.len() => {
                Err(Error::corrupt(format!("Read beyond the end at {offset:#x}")))
            }
            true => Ok(()),
            false => self.below.read_at(others, rest.start()),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        let (head, rest) = self.split(range);
        let Some(mut head) = head else {
            return self.change()?.write_at(buf, offset);
        };
        let part = head.part(offset, buf.len());
        let (first, others) = buf.split_at(part.len());
        part.copy_from_slice(first);
        head.reach(range);
        drop(head);
        match others.is_empty() {
            true => Ok(()),
            false => self.change()?.write_at(others, rest.start()),
        }
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let (head, rest) = self.split(range);
        if let Some(mut head) = head {
            head.part(range.start(), saturating_index(range.len())).fill(0);
            head.reach(range);
        }
        match rest.is_empty() {
            true => Ok(()),
            false => self.change()?.write_zeroes(rest, mode),
        }
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        // What is discarded may keep its contents.
        let (_, rest) = self.split(range);
        match rest.is_empty() {
            true => Ok(()),
            false => self.change()?.discard(rest),
        }
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        match self.split(range) {
            (Some(_), rest) => Ok(Extent::data(range.len() - rest.len())),
            (None, _) => status_below(&self.below, range, detail),
        }
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.change()?.resize(len, preallocation)?;
        let mut head = self.lock();
        let end = saturating_index(len).min(head.bytes.len());
        let old = head.end.max(end);
        head.bytes[end..old].fill(0);
        head.end = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::{Filtered, MemoryDevice};

    use super::*;

    fn contents(device: &Arc<dyn Device>) -> Vec<u8> {
        let mut bytes = vec![0; saturating_index(device.len())];
        device.read_at(&mut bytes, 0).expect("reads");
        bytes
    }

    #[test]
    fn the_head_is_zero_in_the_storage_until_it_is_published() {
        let below: Arc<dyn Device> = Arc::new(MemoryDevice::new(vec![7; 10_000]));
        let withheld = Filtered(WithheldHead::new(Arc::clone(&below)).expect("is withheld"));
        withheld.write_at(&[1; 50], 100).expect("writes");
        assert_eq!(contents(&below), [7; 10_000]);
        withheld.write_at(&[1; 5000], 100).expect("writes");
        withheld
            .write_zeroes(ByteRange::new(200, 300), ZeroMode::Unmap)
            .expect("zeroes");
        let mut expected = vec![7; 10_000];
        expected[100..5100].fill(1);
        expected[200..300].fill(0);
        let mut seen = vec![0; 10_000];
        withheld.read_at(&mut seen, 0).expect("reads");
        assert_eq!(seen, expected);

        let stored = contents(&below);
        assert!(stored[..4096].iter().all(|byte| *byte == 0));
        assert_eq!(stored[4096..], expected[4096..]);
        withheld.0.publish().expect("is published");
        assert_eq!(contents(&below), expected);
        withheld.write_at(&[9; 10], 0).expect("writes");
        assert_eq!(contents(&below)[..11], [&[9; 10][..], &[7]].concat());
    }

    #[test]
    fn a_file_that_grows_has_the_length_of_what_was_written() {
        let below: Arc<dyn Device> = Arc::new(MemoryDevice::new(Vec::new()));
        let withheld = Filtered(WithheldHead::new(Arc::clone(&below)).expect("is withheld"));
        withheld.write_at(&[1; 100], 50).expect("writes");
        assert_eq!((withheld.len(), below.len()), (150, 0));
        assert!(withheld.read_at(&mut [0; 10], 145).is_err());
        withheld.resize(120, Preallocation::Off).expect("shrinks");
        withheld.resize(200, Preallocation::Off).expect("grows");
        withheld.0.publish().expect("is published");
        let expected = [vec![0; 50], vec![1; 70], vec![0; 80]].concat();
        assert_eq!(contents(&below), expected);
    }
}
