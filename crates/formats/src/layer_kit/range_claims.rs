//! Claims on the guest ranges of requests in flight.
//!
//! A layer maps guest offsets to host offsets with its state locked, and does guest I/O with no lock held. A claim
//! excludes other requests from the range for that time: from planning a write until it is committed or dropped.
//!
//! ```text
//!   guest offset  ──────────────────────────────────────►
//!   A exclusive   |=======|                                 allocates, or changes table entries
//!   B shared               |-------------|                  writes blocks that have storage, in place
//!   C shared                      |------------|            overlaps B, goes ahead
//!   D exclusive       |.........|                           waits for A and B
//!   E shared       |....|                                   waits for A
//!   wait_idle     |.......................................  waits for A to E
//! ```
//!
//! | overlap | shared | exclusive |
//! |---|---|---|
//! | shared | both go ahead | the later one waits |
//! | exclusive | the later one waits | the later one waits |

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use diskimage_core::ByteRange;

/// Whether a claim may overlap another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// May overlap shared claims, never an exclusive one.
    Shared,
    /// Overlaps no other claim.
    Exclusive,
}

/// The claims on one layer's guest ranges.
///
/// Claims are made with the layer's state locked, and no request waits with the state locked. So the mapping of a
/// claimed range does not change until the claim is released, and nothing is claimed while the state that
/// [`RangeClaims::wait_idle`] returned is locked.
///
/// Lock order: the layer's state, then `held`. No other lock is taken while `held` is locked. The list has a mutex of
/// its own, rather than being part of the state, so that a claim can be dropped with the state locked or not, and so
/// that one type serves layers with any type of state.
#[derive(Debug, Default)]
pub(crate) struct RangeClaims {
    held: Mutex<Held>,
    /// Notified when a claim is released.
    released: Condvar,
}

impl RangeClaims {
    /// Waits until no other claim conflicts, claims `range`, and returns the claim and the guard that `lock` returned.
    /// An empty range conflicts with nothing.
    ///
    /// `lock` locks the layer's state, which the caller must not hold. It may be called several times.
    pub(crate) fn claim<G>(&self, range: ByteRange, access: Access, lock: impl Fn() -> G) -> (Claim<'_>, G) {
        let (guard, mut held) = self.wait_while(|held| held.conflict(range, access), lock);
        let id = held.next_id;
        held.next_id += 1;
        held.ranges.push(HeldRange { id, range, access });
        drop(held);
        (Claim { claims: self, id }, guard)
    }

    /// Waits until nothing is claimed, and returns the guard that `lock` returned. `lock` is as for
    /// [`RangeClaims::claim`].
    pub(crate) fn wait_idle<G>(&self, lock: impl Fn() -> G) -> G {
        self.wait_while(|held| !held.ranges.is_empty(), lock).0
    }

    /// Whether nothing is claimed. If the caller holds the lock of the layer's state, this stays true until it unlocks
    /// it.
    pub(crate) fn is_idle(&self) -> bool {
        self.held().ranges.is_empty()
    }

    /// Waits until `is_busy` is false for the list, and locks the state and the list.
    fn wait_while<G>(
        &self,
        is_busy: impl Fn(&Held) -> bool,
        lock: impl Fn() -> G,
    ) -> (G, MutexGuard<'_, Held>) {
        loop {
            let guard = lock();
            let held = self.held();
            if !is_busy(&held) {
                return (guard, held);
            }
            // A request in flight locks the state before it releases its claim.
            drop(guard);
            let waited = self.released.wait_while(held, |held| is_busy(held));
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A claimed range. Dropping it releases the range.
#[derive(Debug)]
#[must_use]
pub(crate) struct Claim<'a> {
    claims: &'a RangeClaims,
    id: u64,
}

impl Claim<'_> {
    /// Makes the claim on `part` of the claimed range exclusive. The layer's state must have been locked since the
    /// claim was made.
    ///
    /// This is for blocks that turn out to be unallocated. No other claim overlaps them: a request with a shared claim
    /// either finds a block allocated or makes the claim on it exclusive, and the storage of a claimed block is not
    /// freed.
    pub(crate) fn make_exclusive(&mut self, part: ByteRange) {
        let mut held = self.claims.held();
        let id = self.id;
        let before = held.ranges.iter_mut().rfind(|other| {
            other.id == id && other.access == Access::Exclusive && other.range.end() == part.start()
        });
        match before {
            Some(before) => before.range = ByteRange::new(before.range.start(), part.end()),
            None => held.ranges.push(HeldRange {
                id,
                range: part,
                access: Access::Exclusive,
            }),
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.held().ranges.retain(|range| range.id != self.id);
        self.claims.released.notify_all();
    }
}

/// The list of claimed ranges.
#[derive(Debug, Default)]
struct Held {
    /// A claim has one range, and further ones for the parts that it made exclusive.
    ranges: Vec<HeldRange>,
    next_id: u64,
}

#[derive(Debug)]
struct HeldRange {
    /// The ID of its claim.
    id: u64,
    range: ByteRange,
    access: Access,
}

impl Held {
    /// Whether a claim on `range` has to wait.
    fn conflict(&self, range: ByteRange, access: Access) -> bool {
        self.ranges.iter().any(|other| {
            let is_exclusive = access == Access::Exclusive || other.access == Access::Exclusive;
            is_exclusive && !other.range.intersect(range).is_empty()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicI32, Ordering};
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    use super::*;

    const THREADS: u64 = 6;
    const REQUESTS: u32 = 3000;
    const BLOCKS: usize = 12;

    /// A block has ten bytes.
    fn bytes(blocks: &Range<usize>) -> ByteRange {
        ByteRange::new(blocks.start as u64 * 10, blocks.end as u64 * 10)
    }

    /// A layer that records which blocks have storage, and how requests in flight use each block.
    #[derive(Default)]
    struct Model {
        claims: RangeClaims,
        has_storage: Mutex<[bool; BLOCKS]>,
        /// The number of requests that write the block in place; -1 if a request allocates or frees it.
        users: [AtomicI32; BLOCKS],
    }

    impl Model {
        fn lock(&self) -> MutexGuard<'_, [bool; BLOCKS]> {
            self.has_storage.lock().expect("no thread has failed")
        }

        fn begin_in_place(&self, block: usize) {
            let before = self.users[block].fetch_add(1, Ordering::SeqCst);
            assert!(
                before >= 0,
                "block {block} is written while it is allocated or freed"
            );
        }

        fn begin_alone(&self, block: usize) {
            let before = self.users[block].swap(-1, Ordering::SeqCst);
            assert_eq!(before, 0, "block {block} is allocated or freed while it is used");
        }

        /// Writes as layers do: in place to blocks that have storage, with allocation to others. With `fails` the write
        /// is dropped.
        fn write(&self, blocks: Range<usize>, fails: bool) {
            let (mut claim, state) = self.claims.claim(bytes(&blocks), Access::Shared, || self.lock());
            let (mut old, mut new) = (Vec::new(), Vec::new());
            for block in blocks {
                if state[block] {
                    self.begin_in_place(block);
                    old.push(block);
                } else {
                    claim.make_exclusive(bytes(&(block..block + 1)));
                    self.begin_alone(block);
                    new.push(block);
                }
            }
            drop(state);
            thread::yield_now();
            let mut state = self.lock();
            for block in old {
                self.users[block].fetch_sub(1, Ordering::SeqCst);
            }
            for block in new {
                assert!(!state[block], "block {block} is allocated twice");
                state[block] = !fails;
                self.users[block].store(0, Ordering::SeqCst);
            }
            // The claim is dropped with the state locked, and otherwise after it is unlocked.
            if fails {
                drop(claim);
            }
        }

        /// Frees the storage of blocks under an exclusive claim.
        fn free(&self, blocks: Range<usize>) {
            let (_claim, mut state) = self
                .claims
                .claim(bytes(&blocks), Access::Exclusive, || self.lock());
            for block in blocks.clone() {
                self.begin_alone(block);
                state[block] = false;
            }
            drop(state);
            thread::yield_now();
            for block in blocks {
                self.users[block].store(0, Ordering::SeqCst);
            }
        }

        fn require_idle(&self) {
            let _state = self.claims.wait_idle(|| self.lock());
            assert!(self.claims.is_idle());
            for users in &self.users {
                assert_eq!(users.load(Ordering::SeqCst), 0);
            }
        }

        fn run(&self, seed: u64) {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut below = |limit: usize| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                usize::try_from(random % limit as u64).expect("is small")
            };
            for _ in 0..REQUESTS {
                let start = below(BLOCKS);
                // The range may be empty.
                let blocks = start..start + below(BLOCKS - start + 1).min(4);
                match below(10) {
                    0..5 => self.write(blocks, false),
                    5 => self.write(blocks, true),
                    6..9 => self.free(blocks),
                    _ => self.require_idle(),
                }
            }
        }
    }

    /// Fails if a thread failed, or if all threads wait for each other.
    fn require_end(ended: &Receiver<()>, threads: u64) {
        for _ in 0..threads {
            match ended.recv_timeout(Duration::from_secs(120)) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => panic!("requests wait for each other"),
                Err(RecvTimeoutError::Disconnected) => panic!("a thread has failed"),
            }
        }
    }

    fn spawn(threads: u64, run: impl Fn(u64) + Clone + Send + 'static) -> Receiver<()> {
        let (end, ended) = mpsc::channel();
        for nth in 0..threads {
            let (run, end) = (run.clone(), end.clone());
            thread::spawn(move || {
                run(nth);
                // The receiver is gone if the test has ended.
                let _ = end.send(());
            });
        }
        ended
    }

    #[test]
    fn requests_of_many_threads_keep_to_the_model() {
        let model = Arc::new(Model::default());
        let ended = spawn(THREADS, {
            let model = Arc::clone(&model);
            move |nth| model.run(nth + 1)
        });
        require_end(&ended, THREADS);
        model.require_idle();
    }

    /// Whether the claim `wanted` does not have to wait while `held` is held.
    fn goes_ahead(held: (ByteRange, Access), wanted: (ByteRange, Access)) -> bool {
        let claims = RangeClaims::default();
        let (_claim, ()) = claims.claim(held.0, held.1, || ());
        let waits = claims.held().conflict(wanted.0, wanted.1);
        !waits
    }

    #[test]
    fn overlapping_claims_wait_unless_both_are_shared() {
        use Access::{Exclusive, Shared};
        let (one, other) = (ByteRange::new(0, 10), ByteRange::new(9, 20));
        assert!(goes_ahead((one, Shared), (other, Shared)));
        assert!(!goes_ahead((one, Shared), (other, Exclusive)));
        assert!(!goes_ahead((one, Exclusive), (other, Shared)));
        assert!(!goes_ahead((one, Exclusive), (other, Exclusive)));
        assert!(goes_ahead((one, Exclusive), (ByteRange::new(10, 20), Exclusive)));
    }

    #[test]
    fn empty_claims_conflict_with_nothing() {
        let (empty, range) = (ByteRange::new(5, 5), ByteRange::new(0, 10));
        for (held, wanted) in [(empty, range), (range, empty), (empty, empty)] {
            assert!(goes_ahead((held, Access::Exclusive), (wanted, Access::Exclusive)));
        }
    }

    #[test]
    fn what_becomes_exclusive_is_only_that_part() {
        let claims = RangeClaims::default();
        let (mut claim, ()) = claims.claim(ByteRange::new(0, 100), Access::Shared, || ());
        claim.make_exclusive(ByteRange::new(20, 30));
        claim.make_exclusive(ByteRange::new(30, 40));
        claim.make_exclusive(ByteRange::new(60, 70));
        assert_eq!(claims.held().ranges.len(), 3, "neighbours are one range");
        let conflict = |start, end| claims.held().conflict(ByteRange::new(start, end), Access::Shared);
        assert!(!conflict(0, 20) && !conflict(40, 60) && !conflict(70, 200));
        assert!(conflict(39, 41) && conflict(0, 100) && conflict(69, 70));
        drop(claim);
        assert!(claims.is_idle());
    }

    #[test]
    fn a_claim_and_a_wait_end_when_the_range_is_released() {
        let claims = Arc::new(RangeClaims::default());
        let (claim, ()) = claims.claim(ByteRange::new(0, 10), Access::Exclusive, || ());
        let (locked, waits) = channel();
        let ended = spawn(2, {
            let claims = Arc::clone(&claims);
            move |nth| {
                let lock = || locked.send(nth).expect("the test waits");
                if nth == 0 {
                    drop(claims.claim(ByteRange::new(5, 6), Access::Shared, lock));
                } else {
                    claims.wait_idle(lock);
                }
            }
        });
        // Both threads have locked the state once, and have to wait for the claim.
        for _ in 0..2 {
            waits.recv_timeout(Duration::from_secs(120)).expect("looks");
        }
        assert!(ended.try_recv().is_err(), "neither has waited");
        drop(claim);
        require_end(&ended, 2);
    }
}
