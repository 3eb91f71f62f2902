//! The worker threads of an operation.
//!
//! The calling thread is the first worker. More are started while threads and memory can be had, so an operation that
//! gets neither does all the work itself. Only memory for the first worker is needed.

use std::thread;

use diskimage_core::{Result, thread_builder};

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
    let work = &work;
    thread::scope(|scope| {
        for _ in 1..count {
            let Ok(builder) = thread_builder() else { break };
            let Ok(worker) = make() else { break };
            if builder.spawn_scoped(scope, move || work(worker)).is_err() {
                break;
            }
        }
        work(first);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

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
