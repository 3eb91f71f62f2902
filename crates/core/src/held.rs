//! The layer of an image, written back when the image is dropped.
//!
//! ```text
//!              a change              a flush that succeeds
//!   CLEAN ──────────────▶ CHANGED ──────────────▶ CLEAN
//!                            │
//!                            └── a change or a flush that breaks ──▶ BROKEN
//! ```
//!
//! Dropped in state `CHANGED` the layer is flushed. In state `BROKEN` nothing more is written: what is in memory may no
//! longer fit what is in the file.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use crate::errno;
use crate::{Error, ErrorKind, Event, Layer, Result};

/// Takes the error for which changes of an image were lost when it was dropped.
pub type OnLost = dyn Fn(&Error) + Send + Sync;

/// A layer, and whether there are changes that were not flushed.
pub(crate) struct Held {
    layer: Arc<dyn Layer>,
    state: AtomicU8,
    on_lost: OnceLock<Arc<OnLost>>,
}

/// All changes are durable.
const CLEAN: u8 = 0;
/// Some changes may be only in memory.
const CHANGED: u8 = 1;
/// A change was left half done.
const BROKEN: u8 = 2;

impl Held {
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

    /// Names who is told of changes that are lost, unless somebody is named already.
    pub(crate) fn set_on_lost(&self, on_lost: Arc<OnLost>) {
        let _ = self.on_lost.set(on_lost);
    }

    /// Runs `change`, after which something may be only in memory.
    pub(crate) fn change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let outcome = self.durable_change(change);
        if outcome.as_ref().err().is_none_or(has_no_room) {
            self.mark_changed();
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

    /// Runs `change`, which makes durable what was changed before as well, and after which the layer is not used any more.
    pub(crate) fn last_change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let value = self.durable_change(change)?;
        self.state.store(CLEAN, Ordering::Release);
        Ok(value)
    }

    /// Makes all changes durable.
    pub(crate) fn flush(&self) -> Result<()> {
        // What changes from now on may be left out.
        self.state.store(CLEAN, Ordering::Release);
        let outcome = self.durable_change(|| {
            self.layer.file().event(Event::FLUSH_TO_OS);
            self.layer.flush()
        });
        if outcome.is_err() {
            self.mark_changed();
        }
        outcome
    }

    /// The same, unless it would write what no longer fits the file.
    pub(crate) fn close(&self) -> Result<()> {
        if self.state.load(Ordering::Acquire) == BROKEN {
            Err(broken())
        } else {
            self.flush()
        }
    }

    /// Whatever state it is in but `BROKEN`, it is `CHANGED` now.
    fn mark_changed(&self) {
        // Many threads write: the state is only written to where it becomes another one.
        if self.state.load(Ordering::Relaxed) == CLEAN {
            let _ = self
                .state
                .compare_exchange(CLEAN, CHANGED, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    fn write_back(&self) -> Result<()> {
        if self.state.load(Ordering::Acquire) == CLEAN {
            Ok(())
        } else {
            self.close()
        }
    }
}

/// Whether a change that fails this way may be half done. One that was refused, or had no room, is not: what was changed
/// before can be written back.
fn is_breaking(error: &Error) -> bool {
    let is_refused = matches!(error.errno(), Some(errno::ENOTSUP | errno::EINVAL));
    matches!(
        error.kind(),
        ErrorKind::Corrupt | ErrorKind::CutOff | ErrorKind::Io
    ) && !is_refused
        && !has_no_room(error)
}

fn has_no_room(error: &Error) -> bool {
    error.kind() == ErrorKind::NoSpace || error.errno() == Some(errno::EFBIG)
}

fn broken() -> Error {
    Error::new(
        ErrorKind::Io,
        "Changes were not written back since an earlier one failed",
    )
}

/// Breaks what it is about if the thread panics.
struct BreakOnPanic<'a>(&'a Held);

impl Drop for BreakOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.state.store(BROKEN, Ordering::Release);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // A panic here could end the program.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            if let Err(error) = self.write_back()
                && let Some(on_lost) = self.on_lost.get()
            {
                on_lost(&error);
            }
        }));
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layer.fmt(f)
    }
}
