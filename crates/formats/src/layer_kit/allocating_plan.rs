//! Write plans that allocate storage, for any layer that can allocate it, publish it and free it.
//!
//! ```text
//!   plan     claim the guest range ─► allocate storage, with the layer's state locked
//!   write    the caller writes guest data into the runs, with no lock held
//!   commit   enter the storage in tables ─► release the claim ─► write tables back if many pages are dirty
//!   drop     free the storage that no table refers to ─► release the claim
//! ```
//!
//! Until a commit, no table refers to the storage: a crash leaks it at worst. A commit changes tables in memory only;
//! the code that writes them back makes guest data durable before.

use std::sync::{Arc, MutexGuard};

use diskimage_core::{ByteRange, Device, Result, WritePlan, WriteRun};

use crate::layer_kit::offset::{GuestOffset, HostOffset};
use crate::layer_kit::range_claims::{Access, Claim, RangeClaims};

/// A layer that allocates storage for guest data.
pub(crate) trait Allocator: Send + Sync {
    /// The state of the open image. It is never locked during guest I/O.
    type State;
    /// Storage that was allocated, and the table entries that will refer to it.
    type Change;

    /// The access that a plan claims. Plans with shared claims write allocated storage at the same time; a claim
    /// becomes exclusive for blocks that its plan allocates.
    const ACCESS: Access;

    /// Locks the state.
    fn lock(&self) -> MutexGuard<'_, Self::State>;

    /// The guest ranges of the plans in flight.
    fn claims(&self) -> &RangeClaims;

    /// Enters storage that has been written in the tables. Removes from `changes` each one to which tables may refer
    /// now; after a failure the others are freed.
    ///
    /// # Errors
    /// A failure to read or write tables.
    fn publish(&self, state: &mut Self::State, changes: &mut Vec<Self::Change>) -> Result<()>;

    /// Writes tables back if many of their pages are dirty, after a commit.
    ///
    /// # Errors
    /// A failure to write tables.
    fn write_back_if_needed(&self, _state: &mut Self::State) -> Result<()> {
        Ok(())
    }

    /// Frees storage that no table refers to.
    fn free(&self, state: &mut Self::State, changes: Vec<Self::Change>);
}

/// Publishes changes one at a time, the last one first. If `publish` fails, no table must refer to the storage of its
/// change.
pub(crate) fn publish_each<C: Copy>(
    changes: &mut Vec<C>,
    mut publish: impl FnMut(C) -> Result<()>,
) -> Result<()> {
    while let Some(change) = changes.last() {
        publish(*change)?;
        changes.pop();
    }
    Ok(())
}

/// A write in flight.
///
/// Dropping it locks the layer's state if it has allocated storage, so the caller must not hold that lock.
#[must_use]
pub(crate) struct AllocatingPlan<'a, A: Allocator> {
    allocator: &'a A,
    runs: Vec<WriteRun>,
    changes: Vec<A::Change>,
    /// Released after the storage is freed: fields are dropped after `Drop::drop` of the plan. `None` once it is
    /// committed.
    claim: Option<Claim<'a>>,
}

impl<'a, A: Allocator> AllocatingPlan<'a, A> {
    /// Claims `cover`, whole blocks of the disk, and calls `draft` with the state locked to find or allocate their
    /// storage. If that fails, the storage that it allocated is freed.
    ///
    /// # Errors
    /// Those of `draft`.
    pub(crate) fn new(
        allocator: &'a A,
        cover: ByteRange,
        draft: impl FnOnce(&mut A::State, &mut Self) -> Result<()>,
    ) -> Result<Self> {
        let (claim, mut state) = allocator.claims().claim(cover, A::ACCESS, || allocator.lock());
        let mut plan = Self {
            allocator,
            runs: Vec::new(),
            changes: Vec::new(),
            claim: Some(claim),
        };
        let drafted = draft(&mut state, &mut plan);
        // Dropping the plan locks the state.
        drop(state);
        drafted.map(|()| plan)
    }

    /// Adds the next run of the write, in guest order.
    pub(crate) fn add_run(&mut self, run: WriteRun) {
        run.push_to(&mut self.runs);
    }

    /// Replaces the device of each run by `view` of its guest and host offsets. All runs must have been added.
    pub(crate) fn view_runs(&mut self, view: impl Fn(GuestOffset, HostOffset) -> Arc<dyn Device>) {
        for run in &mut self.runs {
            run.device = view(GuestOffset::new(run.guest.start()), HostOffset::new(run.offset));
        }
    }

    /// Adds storage that was allocated for `guest`, and makes the claim on `guest` exclusive.
    pub(crate) fn add_change(&mut self, guest: ByteRange, change: A::Change) {
        self.changes.push(change);
        if A::ACCESS == Access::Shared
            && let Some(claim) = &mut self.claim
        {
            claim.make_exclusive(guest);
        }
    }

    /// The allocated storage.
    pub(crate) fn changes_mut(&mut self) -> &mut [A::Change] {
        &mut self.changes
    }
}

impl<A: Allocator> WritePlan for AllocatingPlan<'_, A> {
    fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let allocator = self.allocator;
        // As a local it is unlocked before the plan is dropped, which locks the state again after a failure.
        let mut state = allocator.lock();
        allocator.publish(&mut state, &mut self.changes)?;
        self.claim = None;
        allocator.write_back_if_needed(&mut state)
    }
}

impl<A: Allocator> Drop for AllocatingPlan<'_, A> {
    fn drop(&mut self) {
        if !self.changes.is_empty() {
            let mut state = self.allocator.lock();
            self.allocator.free(&mut state, std::mem::take(&mut self.changes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use diskimage_core::{Error, MemoryDevice};

    use super::*;

    const BLOCK: u64 = 100;

    /// Blocks with slots in a file, a table that maps them, and a log of the calls.
    #[derive(Default)]
    struct Toy {
        state: Mutex<State>,
        claims: RangeClaims,
        file: Arc<MemoryDevice>,
    }

    #[derive(Default)]
    struct State {
        table: [Option<u64>; 8],
        next: u64,
        freed: Vec<u64>,
        /// A block that cannot be published.
        bad: Option<usize>,
        idle_at_write_back: Vec<bool>,
    }

    impl Allocator for Toy {
        type State = State;
        type Change = (usize, u64);
        const ACCESS: Access = Access::Shared;

        fn lock(&self) -> MutexGuard<'_, State> {
            self.state.lock().expect("is not poisoned")
        }

        fn claims(&self) -> &RangeClaims {
            &self.claims
        }

        fn publish(&self, state: &mut State, changes: &mut Vec<(usize, u64)>) -> Result<()> {
            publish_each(changes, |(block, slot)| {
                if state.bad == Some(block) {
                    return Err(Error::corrupt("bad block"));
                }
                state.table[block] = Some(slot);
                Ok(())
            })
        }

        fn write_back_if_needed(&self, state: &mut State) -> Result<()> {
            state.idle_at_write_back.push(self.claims.is_idle());
            Ok(())
        }

        fn free(&self, state: &mut State, changes: Vec<(usize, u64)>) {
            state.freed.extend(changes.into_iter().map(|(_, slot)| slot));
        }
    }

    impl Toy {
        fn plan(&self, blocks: std::ops::Range<u64>, full: bool) -> Result<Box<AllocatingPlan<'_, Self>>> {
            let cover = ByteRange::new(blocks.start * BLOCK, blocks.end * BLOCK);
            let plan = AllocatingPlan::new(self, cover, |state, plan| {
                for block in blocks {
                    let guest = ByteRange::at(block * BLOCK, BLOCK);
                    let index = usize::try_from(block).expect("is small");
                    let slot = state.table[index].unwrap_or_else(|| {
                        state.next += 1;
                        plan.add_change(guest, (index, state.next - 1));
                        state.next - 1
                    });
                    plan.add_run(WriteRun {
                        guest,
                        device: Arc::clone(&self.file) as Arc<dyn Device>,
                        offset: slot * BLOCK,
                    });
                }
                if full {
                    return Err(Error::corrupt("no slot"));
                }
                Ok(())
            })?;
            Ok(Box::new(plan))
        }
    }

    #[test]
    fn a_commit_publishes_and_releases_the_claim_first() {
        let toy = Toy::default();
        let plan = toy.plan(1..3, false).expect("has slots");
        let runs: Vec<_> = plan.runs().iter().map(|run| (run.guest, run.offset)).collect();
        assert_eq!(runs, [(ByteRange::new(100, 300), 0)], "neighbours are one run");
        assert_eq!(toy.lock().table, [None; 8], "nothing leads there yet");
        plan.commit().expect("is published");
        let state = toy.lock();
        assert_eq!(state.table[..4], [None, Some(0), Some(1), None]);
        assert_eq!(state.freed, []);
        assert_eq!(state.idle_at_write_back, [true]);
    }

    #[test]
    fn a_dropped_plan_frees_what_it_allocated() {
        let toy = Toy::default();
        toy.plan(1..2, false)
            .expect("has slots")
            .commit()
            .expect("is published");
        drop(toy.plan(0..3, false).expect("has slots"));
        let state = toy.lock();
        assert_eq!(state.freed, [1, 2]);
        assert_eq!(state.table[..3], [None, Some(0), None]);
        assert!(toy.claims.is_idle());
    }

    #[test]
    fn a_failed_draft_frees_what_it_allocated() {
        let toy = Toy::default();
        assert!(toy.plan(0..2, true).is_err());
        assert_eq!(toy.lock().freed, [0, 1]);
        assert!(toy.claims.is_idle());
    }

    #[test]
    fn a_failed_commit_frees_what_is_not_published() {
        let toy = Toy::default();
        let plan = toy.plan(0..4, false).expect("has slots");
        toy.lock().bad = Some(1);
        assert!(plan.commit().is_err());
        let state = toy.lock();
        assert_eq!(state.table[..4], [None, None, Some(2), Some(3)]);
        assert_eq!(state.freed, [0, 1]);
        assert_eq!(state.idle_at_write_back, []);
        assert!(toy.claims.is_idle());
    }

    #[test]
    fn plans_share_what_has_storage() {
        let toy = Toy::default();
        toy.plan(0..2, false)
            .expect("has slots")
            .commit()
            .expect("is published");
        // With exclusive claims the second plan would wait forever.
        let one = toy.plan(0..3, false).expect("has slots");
        let other = toy.plan(0..2, false).expect("has slots");
        one.commit().expect("is published");
        assert!(!toy.claims.is_idle());
        other.commit().expect("is published");
        assert!(toy.claims.is_idle());
    }
}
