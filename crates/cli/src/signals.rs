//! Signals that do not end the program: SIGUSR1 requests the progress, SIGALRM and SIGIO are ignored.
//!
//! As in qemu-img they are blocked in all threads, so that they interrupt no system call. A command that reports
//! progress starts a thread that waits for SIGUSR1:
//!
//! ```text
//!   SIGUSR1 ──▶ thread: sigwait ──▶ REQUESTED = true ──▶ Progress::set prints a line and clears it
//! ```

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use diskimage::thread_builder;

use nix::sys::signal::{SigSet, Signal};

/// Blocks the signals in this thread and in all threads that it starts later. Called before the first one is started.
pub(crate) fn block() {
    let mut signals = SigSet::empty();
    signals.extend([Signal::SIGUSR1, Signal::SIGALRM, Signal::SIGIO]);
    // Blocking fails only for an invalid set of signals.
    let _ = signals.thread_block();
}

/// The flag that SIGUSR1 sets from now on. [`Progress`](crate::progress::Progress) clears it.
pub(crate) fn progress_requested() -> &'static AtomicBool {
    static REQUESTED: AtomicBool = AtomicBool::new(false);
    static WAITING: Once = Once::new();
    WAITING.call_once(|| {
        let wait = || {
            while SigSet::from(Signal::SIGUSR1).wait().is_ok() {
                REQUESTED.store(true, Ordering::Relaxed);
            }
        };
        // If the thread cannot be started, SIGUSR1 prints nothing; the operation runs all the same.
        let _ = thread_builder().and_then(|builder| builder.spawn(wait));
    });
    &REQUESTED
}
