//! The layer of an image, which is flushed when the image is dropped.
//!
//! ```text
//!              a change              a flush that succeeds
//!   CLEAN ──────────────▶ DIRTY ────────────────▶ CLEAN
//!                            │
//!                            └── a change or a flush that fails half way ──▶ BROKEN
//! ```
//!
//! A drop flushes a layer that is `DIRTY`. It writes nothing to one that is `BROKEN`: the cached metadata may
//! contradict the file.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use crate::errno;
use crate::{Error, ErrorKind, Event, Layer, Result};

/// Called with the error of the flush when an image was dropped and changes were lost.
pub type OnLost = dyn Fn(&Error) + Send + Sync;

/// A layer, and whether it has changes that were not flushed.
pub(crate) struct FlushOnDrop {
    layer: Arc<dyn Layer>,
    state: AtomicU8,
    on_lost: OnceLock<Arc<OnLost>>,
}

/// All changes are durable.
const CLEAN: u8 = 0;
/// Some changes may not have been written back or flushed.
const DIRTY: u8 = 1;
/// A change failed half way.
const BROKEN: u8 = 2;

impl FlushOnDrop {
    pub(crate) fn new(layer: Arc<dyn Layer>) -> Self {
        Self {
            layer,
            state: AtomicU8::new(CLEAN),
            on_lost: OnceLock::new(),
        }
    }

    pub(crate) fn layer(&self) -> &Arc<dyn Layer> {
        &self.layer
    }

    /// Sets the callback for lost changes, unless one is set already.
    pub(crate) fn set_on_lost(&self, on_lost: Arc<OnLost>) {
        let _ = self.on_lost.set(on_lost);
    }

    /// Runs `change`, which may leave dirty metadata in caches.
    pub(crate) fn change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let outcome = self.durable_change(change);
        if outcome.as_ref().err().is_none_or(is_out_of_space) {
            self.mark_dirty();
        }
        outcome
    }

    /// Runs `change`, which is durable once it has succeeded.
    pub(crate) fn durable_change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let guard = BreakOnPanic(self);
        let outcome = change();
        drop(guard);
        if outcome.as_ref().is_err_and(is_breaking) {
            self.state.store(BROKEN, Ordering::Release);
        }
        outcome
    }

    /// Runs `change`, which also makes all earlier changes durable, and after which the layer is not used again.
    pub(crate) fn last_change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let value = self.durable_change(change)?;
        self.state.store(CLEAN, Ordering::Release);
        Ok(value)
    }

    /// Makes all changes durable.
    pub(crate) fn flush(&self) -> Result<()> {
        // The flush need not cover changes that begin after this.
        self.state.store(CLEAN, Ordering::Release);
        let outcome = self.durable_change(|| {
            self.layer.file().event(Event::FLUSH_TO_OS);
            self.layer.flush()
        });
        if outcome.is_err() {
            self.mark_dirty();
        }
        outcome
    }

    /// Flushes, but fails if an earlier change failed half way: cached metadata may contradict the file.
    pub(crate) fn close(&self) -> Result<()> {
        if self.state.load(Ordering::Acquire) == BROKEN {
            Err(broken())
        } else {
            self.flush()
        }
    }

    /// Sets the state to `DIRTY`, unless it is `BROKEN`.
    fn mark_dirty(&self) {
        // Many threads write: the cache line of the state stays shared unless the state changes.
        if self.state.load(Ordering::Relaxed) == CLEAN {
            let _ = self
                .state
                .compare_exchange(CLEAN, DIRTY, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    fn flush_if_dirty(&self) -> Result<()> {
        if self.state.load(Ordering::Acquire) == CLEAN {
            Ok(())
        } else {
            self.close()
        }
    }
}

/// Whether a change that failed with `error` may be half done. A request that was refused or found no space is not: the
/// changes before it can be written back.
fn is_breaking(error: &Error) -> bool {
    let is_refused = matches!(error.errno(), Some(errno::ENOTSUP | errno::EINVAL));
    matches!(
        error.kind(),
        ErrorKind::Corrupt | ErrorKind::CutOff | ErrorKind::Io
    ) && !is_refused
        && !is_out_of_space(error)
}

fn is_out_of_space(error: &Error) -> bool {
    error.kind() == ErrorKind::NoSpace || error.errno() == Some(errno::EFBIG)
}

fn broken() -> Error {
    Error::new(
        ErrorKind::Io,
        "Changes were not written back since an earlier one failed",
    )
}

/// Sets the state to `BROKEN` if the thread panics.
struct BreakOnPanic<'a>(&'a FlushOnDrop);

impl Drop for BreakOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.state.store(BROKEN, Ordering::Release);
        }
    }
}

impl Drop for FlushOnDrop {
    fn drop(&mut self) {
        // A panic in a drop could abort the program.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            if let Err(error) = self.flush_if_dirty()
                && let Some(on_lost) = self.on_lost.get()
            {
                on_lost(&error);
            }
        }));
    }
}

impl fmt::Debug for FlushOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layer.fmt(f)
    }
}
