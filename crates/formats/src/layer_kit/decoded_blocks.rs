//! Large encoded blocks of a disk that is only read, decoded by several threads at once and each block once.
//!
//! ```text
//!   wanted ──▶ decoded: take its bytes
//!          ──▶ being decoded by another thread: wait
//!          ──▶ neither: make room ──▶ decode, nothing locked ──▶ tell those that wait
//! ```
//!
//! A block is kept until all its bytes were taken, so that requests of several threads for parts of one block decode it
//! once, and the one read last is kept until another is decoded. All blocks together take [`MOST_BYTES`] at most; one block
//! is always allowed. Their memory is that of the [`Budget`]. If there is no room a thread waits for others: until a block
//! is not in use, and for a moment for bytes that were not taken, as those behind it in the disk come next.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use diskimage_core::{Budget, Reservation, Result, to_index};

/// The most memory that several blocks take, their encoded bytes included. A limit of this program: enough for some
/// blocks of a megabyte for each of sixteen threads.
const MOST_BYTES: u64 = 32 << 20;

/// The blocks of one disk. A key says where the stored bytes of a block are, so that parts of the disk that share them share
/// the block.
#[derive(Debug)]
pub(crate) struct DecodedBlocks<K = u64> {
    state: Mutex<State<K>>,
    /// A block is decoded or could not be, or its bytes were taken.
    changed: Condvar,
    budget: Budget,
}

#[derive(Debug)]
struct State<K> {
    /// The block used last is the last one.
    blocks: Vec<Block<K>>,
    /// The buffer of a block that is not kept any more, for the next one.
    spare: Vec<u8>,
}

#[derive(Debug)]
struct Block<K> {
    key: K,
    /// `None` while a thread decodes it.
    bytes: Option<Arc<Vec<u8>>>,
    /// How many bytes were taken.
    taken: u64,
    /// How long it took to decode.
    decoding: Duration,
    /// The memory for it and its encoded bytes.
    room: u64,
    _reservation: Reservation,
}

impl<K> Block<K> {
    /// Whether no thread decodes it or takes its bytes.
    fn is_idle(&self) -> bool {
        self.bytes
            .as_ref()
            .is_some_and(|bytes| Arc::strong_count(bytes) == 1)
    }

    fn is_used_up(&self) -> bool {
        self.bytes
            .as_ref()
            .is_some_and(|bytes| self.taken >= bytes.len() as u64)
    }
}

/// What there is for a further block.
enum Room {
    Made(Reservation),
    /// Other threads use too much.
    Used,
    /// A block that took so long to decode would have to go, with bytes that were not taken.
    Untaken(Duration),
}

/// The part of the time for decoding a block that a thread waits until its bytes are taken.
const PATIENCE: u32 = 8;

impl<K: Copy + PartialEq> DecodedBlocks<K> {
    /// No blocks yet. Their memory is taken from `budget`.
    pub(crate) fn new(budget: Budget) -> Self {
        Self {
            state: Mutex::new(State {
                blocks: Vec::new(),
                spare: Vec::new(),
            }),
            changed: Condvar::new(),
            budget,
        }
    }

    /// Fills `buf` with the bytes of block `key` from `at` on. `decode` puts the block, which takes `room` bytes with its
    /// encoded bytes, into a buffer with old contents, unless it is there already.
    ///
    /// # Errors
    /// Those of `decode`, which makes a block that contains the range, and a block that is too large for the budget.
    pub(crate) fn read(
        &self,
        key: K,
        room: u64,
        buf: &mut [u8],
        at: usize,
        decode: impl FnOnce(&mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let len = buf.len();
        let mut take = |bytes: &[u8]| buf.copy_from_slice(&bytes[at..at + len]);
        let mut state = self.lock();
        let mut until = None;
        loop {
            if let Some(index) = state.blocks.iter().position(|block| block.key == key) {
                if let Some(bytes) = state.blocks[index].bytes.clone() {
                    let mut block = state.blocks.remove(index);
                    block.taken += len as u64;
                    state.blocks.push(block);
                    drop(state);
                    take(&bytes);
                    // The bytes are given back before those that wait for room are woken.
                    drop(bytes);
                    drop(self.lock());
                    self.changed.notify_all();
                    return Ok(());
                }
            } else {
                let left = until.map(|until: Instant| until.saturating_duration_since(Instant::now()));
                let is_patient = left.is_none_or(|left| left > Duration::ZERO);
                match state.make_room(room, &self.budget, is_patient)? {
                    Room::Made(reservation) => {
                        state.blocks.push(Block {
                            key,
                            bytes: None,
                            taken: 0,
                            decoding: Duration::ZERO,
                            room,
                            _reservation: reservation,
                        });
                        break;
                    }
                    Room::Used => {}
                    Room::Untaken(decoding) => {
                        let left = left.unwrap_or(decoding / PATIENCE);
                        until = until.or_else(|| Instant::now().checked_add(left));
                        let waited = self.changed.wait_timeout(state, left);
                        state = waited.unwrap_or_else(PoisonError::into_inner).0;
                        continue;
                    }
                }
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut bytes = std::mem::take(&mut state.spare);
        drop(state);
        let decoding = Decoding { blocks: self, key };
        let start = Instant::now();
        decode(&mut bytes)?;
        let duration = start.elapsed();
        take(&bytes);
        decoding.finish(bytes, len as u64, duration);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K> State<K> {
    /// Makes room for a block of `room` bytes: first of blocks that were taken whole, and of others unless `is_patient`.
    ///
    /// # Errors
    /// The budget has no room although there is no other block.
    fn make_room(&mut self, room: u64, budget: &Budget, is_patient: bool) -> Result<Room> {
        while let Some(index) = self
            .blocks
            .iter()
            .position(|block| block.is_idle() && block.is_used_up())
        {
            self.remove(index);
        }
        loop {
            if self.blocks.is_empty() {
                // What the spare buffer has more than the budget knows of.
                if to_index(room).is_ok_and(|room| self.spare.capacity() > room) {
                    self.spare = Vec::new();
                }
                return budget.reserve(room).map(Room::Made);
            }
            let used = self
                .blocks
                .iter()
                .fold(room, |sum, block| sum.saturating_add(block.room));
            if used <= MOST_BYTES
                && let Ok(reservation) = budget.reserve(room)
            {
                return Ok(Room::Made(reservation));
            }
            let Some(index) = self.blocks.iter().position(Block::is_idle) else {
                return Ok(Room::Used);
            };
            if is_patient {
                return Ok(Room::Untaken(self.blocks[index].decoding));
            }
            self.remove(index);
        }
    }

    fn remove(&mut self, index: usize) {
        let bytes = self.blocks.remove(index).bytes.and_then(Arc::into_inner);
        if let Some(bytes) = bytes {
            self.spare = bytes;
        }
    }
}

/// A block that this thread decodes. A drop, after an error, lets another thread try.
struct Decoding<'a, K: Copy + PartialEq> {
    blocks: &'a DecodedBlocks<K>,
    key: K,
}

impl<K: Copy + PartialEq> Decoding<'_, K> {
    /// Offers the decoded bytes, of which this thread has taken `taken`, to other threads.
    fn finish(self, bytes: Vec<u8>, taken: u64, decoding: Duration) {
        let mut state = self.blocks.lock();
        if let Some(block) = state.blocks.iter_mut().find(|block| block.key == self.key) {
            block.taken = taken;
            block.decoding = decoding;
            block.bytes = Some(Arc::new(bytes));
        }
    }
}

impl<K: Copy + PartialEq> Drop for Decoding<'_, K> {
    fn drop(&mut self) {
        self.blocks
            .lock()
            .blocks
            .retain(|block| block.key != self.key || block.bytes.is_some());
        self.blocks.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};
    use std::thread;

    use diskimage_core::Error;

    use super::*;

    const LEN: usize = 100;
    const MIB: u64 = 1 << 20;

    fn blocks() -> DecodedBlocks {
        DecodedBlocks::new(Budget::new(256 * MIB))
    }

    fn fill(key: u64) -> impl FnOnce(&mut Vec<u8>) -> Result<()> {
        move |bytes| {
            bytes.clear();
            bytes.resize(LEN, u8::try_from(key).unwrap());
            Ok(())
        }
    }

    fn read(blocks: &DecodedBlocks, key: u64, room: u64, len: usize) {
        let mut buf = vec![0; len];
        blocks.read(key, room, &mut buf, LEN - len, fill(key)).unwrap();
        assert_eq!(buf, vec![u8::try_from(key).unwrap(); len]);
    }

    fn kept(blocks: &DecodedBlocks) -> Vec<u64> {
        blocks.lock().blocks.iter().map(|block| block.key).collect()
    }

    #[test]
    fn a_block_is_kept_until_all_of_it_was_taken() {
        let blocks = blocks();
        read(&blocks, 1, 100, 40);
        read(&blocks, 2, 100, 40);
        let none = |_: &mut Vec<u8>| unreachable!("it is there");
        blocks.read(1, 100, &mut [0; 60], 0, none).unwrap();
        assert_eq!(kept(&blocks), [2, 1]);
        read(&blocks, 3, 100, 40);
        assert_eq!(kept(&blocks), [2, 3]);
    }

    #[test]
    fn the_block_used_least_recently_gives_way() {
        let blocks = blocks();
        for key in [1, 2, 1, 3] {
            read(&blocks, key, 11 * MIB, 10);
        }
        assert_eq!(kept(&blocks), [1, 3]);
        read(&blocks, 4, 100 * MIB, 10);
        assert_eq!(kept(&blocks), [4], "one is allowed whatever its size");
    }

    #[test]
    fn with_a_small_budget_there_is_one_block_and_none_that_is_larger() {
        let blocks = DecodedBlocks::new(Budget::new(9));
        for key in [1, 2, 3] {
            read(&blocks, key, 6, 10);
            assert_eq!(kept(&blocks), [key]);
        }
        assert!(blocks.read(4, 10, &mut [0; 10], 0, fill(4)).is_err());
        read(&blocks, 5, 9, 10);
    }

    #[test]
    fn after_an_error_the_block_is_decoded_again() {
        let blocks = blocks();
        let spoil = |bytes: &mut Vec<u8>| {
            bytes.push(99);
            Err(Error::corrupt("damaged"))
        };
        assert!(blocks.read(1, 100, &mut [0; 10], 0, spoil).is_err());
        assert!(kept(&blocks).is_empty());
        read(&blocks, 1, 100, 10);
    }

    #[test]
    fn several_threads_decode_different_blocks_at_once() {
        let (blocks, barrier) = (&blocks(), &Barrier::new(3));
        thread::scope(|scope| {
            for key in 1..=3 {
                scope.spawn(move || {
                    let decode = |bytes: &mut Vec<u8>| {
                        // Passes only if three threads are here together.
                        barrier.wait();
                        fill(key)(bytes)
                    };
                    blocks.read(key, 100, &mut [0; 10], 0, decode).unwrap();
                });
            }
        });
    }

    #[test]
    fn threads_that_want_the_same_block_decode_it_once() {
        let (blocks, count) = (&blocks(), &AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(move || {
                    let decode = |bytes: &mut Vec<u8>| {
                        count.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(std::time::Duration::from_millis(30));
                        fill(7)(bytes)
                    };
                    let mut buf = [0; LEN / 4];
                    blocks.read(7, 100, &mut buf, 0, decode).unwrap();
                    assert_eq!(buf, [7; LEN / 4]);
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_thread_waits_for_room_until_another_is_done() {
        let blocks = &blocks();
        let (begun, has_begun) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                let decode = |bytes: &mut Vec<u8>| {
                    begun.send(()).unwrap();
                    ended.recv().unwrap();
                    fill(1)(bytes)
                };
                blocks.read(1, 20 * MIB, &mut [0; 10], 0, decode).unwrap();
            });
            has_begun.recv().unwrap();
            let (more, has_more) = mpsc::channel();
            scope.spawn(move || {
                read(blocks, 2, 20 * MIB, 10);
                more.send(()).unwrap();
            });
            let early = has_more.recv_timeout(std::time::Duration::from_millis(30));
            end.send(()).unwrap();
            assert!(early.is_err(), "both blocks together are too large");
            has_more.recv().unwrap();
        });
        assert_eq!(kept(blocks), [2]);
    }
}
