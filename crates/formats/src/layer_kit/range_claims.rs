//! Claims on the guest ranges of requests in flight.
//!
//! A layer maps guest bytes to host bytes under the lock of its state, and guest data moves with no lock held. In between,
//! a claim keeps other requests off the range: from planning a write until it is committed or dropped.
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

/// How a claim gets along with another one on the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Overlaps with shared claims, never with an exclusive one.
    Shared,
    /// Overlaps with no other claim.
    Exclusive,
}

/// The claims on one layer's guest ranges.
///
/// Claims are made with the lock of the layer's state held, and no request waits with that lock held. So what a request
/// finds in the state when it has its claim stays true until the claim is released, and nothing is claimed while the state
/// that [`RangeClaims::wait_idle`] returned is locked.
///
/// Lock order: the layer's state, then `held`, which is locked for a look at the list and never while any other lock is
/// taken. The list has a mutex of its own, rather than being part of the state, so that a claim can be dropped
/// anywhere, with the state locked or not, and so that one type serves layers whatever their state is.
#[derive(Debug, Default)]
pub(crate) struct RangeClaims {
    held: Mutex<Held>,
    /// Notified when a claim is released.
    released: Condvar,
}

impl RangeClaims {
    /// Claims `range`, once no other claim on it forbids that, and returns with what `lock` locked. An empty range
    /// conflicts with nothing.
    ///
    /// `lock` locks the layer's state, which the caller must not have locked. It may be called several times.
    pub(crate) fn claim<G>(&self, range: ByteRange, access: Access, lock: impl Fn() -> G) -> (Claim<'_>, G) {
        let (guard, mut held) = self.wait_while(|held| held.conflict(range, access), lock);
        let id = held.next_id;
        held.next_id += 1;
        held.ranges.push(HeldRange { id, range, access });
        drop(held);
        (Claim { claims: self, id }, guard)
    }

    /// Returns with what `lock` locked, once nothing is claimed. `lock` is as for [`RangeClaims::claim`].
    pub(crate) fn wait_idle<G>(&self, lock: impl Fn() -> G) -> G {
        self.wait_while(|held| !held.ranges.is_empty(), lock).0
    }

    /// Whether nothing is claimed. With the layer's state locked, that stays so until it is unlocked.
    pub(crate) fn is_idle(&self) -> bool {
        self.held().ranges.is_empty()
    }

    /// Locks the state and the list, once `is_busy` is no longer true of the list.
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
            // A request in flight needs the state to end.
            drop(guard);
            let waited = self.released.wait_while(held, |held| is_busy(held));
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range in flight. Dropping it releases the range.
#[derive(Debug)]
#[must_use]
pub(crate) struct Claim<'a> {
    claims: &'a RangeClaims,
    id: u64,
}

impl Claim<'_> {
    /// Keeps shared claims off `part` of the claimed range as well, from now on. The layer's state is locked, and has been
    /// since the claim was made.
    ///
    /// For blocks that turn out to have no storage. No other claim overlaps them: a request finds storage for each block
    /// of its own shared claim, or makes that block exclusive, and nothing takes away the storage of a block that is
    /// claimed.
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

/// What is claimed.
#[derive(Debug, Default)]
struct Held {
    /// A claim has one range, and further ones for what it has made exclusive.
    ranges: Vec<HeldRange>,
    next_id: u64,
}

#[derive(Debug)]
struct HeldRange {
    /// Which claim it is of.
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

    /// A layer that knows which blocks have storage, and what the requests in flight do to each block.
    #[derive(Default)]
    struct Model {
        claims: RangeClaims,
        has_storage: Mutex<[bool; BLOCKS]>,
        /// How many requests write the block in place; -1 if one allocates or frees it.
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

        /// Writes as layers do: blocks that have storage in place, for others it is allocated. It may fail.
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
            // With the state locked, and in the other order as well.
            if fails {
                drop(claim);
            }
        }

        /// Frees the storage of blocks, for which it excludes all others.
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
                // Empty ones as well.
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

    /// Fails where a thread has failed, or where all of them wait for each other.
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
                // The test may be over.
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

    /// Whether a claim is made at once while another one is held.
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
        // Both have looked at the claim, and have to look again.
        for _ in 0..2 {
            waits.recv_timeout(Duration::from_secs(120)).expect("looks");
        }
        assert!(ended.try_recv().is_err(), "neither has waited");
        drop(claim);
        require_end(&ended, 2);
    }
}
