//! The worker threads of an operation.
//!
//! The calling thread is the first worker. More are started while threads and memory can be had, so an operation that
//! gets neither does all the work itself. Only memory for the first worker is needed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use diskimage_core::{Result, has_room, thread_builder};

/// Bytes of address space that a thread may claim when it starts: its stack and, in the C library, an arena.
const THREAD: usize = 192 << 20;

/// Runs `work` in up to `count` threads, each on a worker that `make` returns.
///
/// # Errors
/// The first worker cannot be made.
pub(crate) fn run<W: Send>(
    count: usize,
    mut make: impl FnMut() -> Result<W>,
    work: impl Fn(W) + Sync,
) -> Result<()> {
    let first = make()?;
    let (work, begun) = (&work, &AtomicUsize::new(1));
    // Threads that start at the same time take from each other what each was seen to have room for.
    let is_scarce = count > 1 && !has_room(count.saturating_mul(THREAD));
    thread::scope(|scope| {
        for started in 1..count {
            let Ok(builder) = thread_builder() else { break };
            let Ok(worker) = make() else { break };
            let begin = move || {
                // Makes the arena of the thread.
                has_room(1);
                begun.fetch_add(1, Ordering::Relaxed);
                work(worker);
            };
            let Ok(thread) = builder.spawn_scoped(scope, begin) else {
                break;
            };
            while is_scarce && begun.load(Ordering::Relaxed) <= started && !thread.is_finished() {
                thread::yield_now();
            }
        }
        work(first);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use diskimage_core::Error;

    use super::*;

    #[test]
    fn there_are_as_many_workers_as_can_be_made_and_at_least_one() {
        for (wanted, possible) in [(1, 9), (4, 9), (4, 2), (4, 1)] {
            let (made, ran) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let make = || match made.fetch_add(1, Ordering::Relaxed) {
                before if before < possible => Ok(()),
                _ => Err(Error::invalid("no more")),
            };
            let work = |()| {
                ran.fetch_add(1, Ordering::Relaxed);
            };
            run(wanted, make, work).expect("the first one can be made");
            assert_eq!(ran.into_inner(), wanted.min(possible));
        }
        let none = run(4, || Err::<(), _>(Error::invalid("none")), |()| {});
        assert!(none.is_err());
    }
}
