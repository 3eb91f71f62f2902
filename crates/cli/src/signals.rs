//! Signals that do not end the program: SIGUSR1 asks how far an operation is, SIGALRM and SIGIO mean nothing to it.
//!
//! They are blocked in all threads, as in the original, so that no system call is interrupted by them. Where SIGUSR1 has an
//! answer, a thread of its own waits for it.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

/// Blocks them in this thread and in those that it starts from now on. Called before the first one.
pub(crate) fn block() {
    let mut signals = SigSet::empty();
    signals.extend([Signal::SIGUSR1, Signal::SIGALRM, Signal::SIGIO]);
    // It fails only for what is no set of signals.
    let _ = signals.thread_block();
}

/// Set by each SIGUSR1 from now on, and cleared by whoever answers.
pub(crate) fn asked() -> &'static AtomicBool {
    static ASKED: AtomicBool = AtomicBool::new(false);
    static WAITING: Once = Once::new();
    WAITING.call_once(|| {
        let wait = || {
            while SigSet::from(Signal::SIGUSR1).wait().is_ok() {
                ASKED.store(true, Ordering::Relaxed);
            }
        };
        // Without a thread nobody answers, which is no reason to refuse the operation.
        let _ = thread::Builder::new().spawn(wait);
    });
    &ASKED
}
