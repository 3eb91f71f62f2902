//! What images may bring about: the policies of `--untrusted` and `--deny-references`.

use std::sync::Arc;

use diskimage::{BeneathGate, ClosedGate, Objects, OpenOptions};

use crate::confinement::{Reach, confine};
use crate::words::Stop;

/// The policies that the user asks for, about the images that a command opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Images come from strangers: `--untrusted`.
    pub untrusted: bool,
    /// Images may not refer to other files: `--deny-references`.
    pub deny_references: bool,
}

/// The environment variable that has the effect of `--untrusted`.
const VARIABLE: &str = "QEMU_IMG_UNTRUSTED";

impl Policy {
    /// The policy of the environment.
    pub(crate) fn of_environment() -> Self {
        let value = std::env::var_os(VARIABLE);
        Self {
            untrusted: value.is_some_and(|value| !value.is_empty() && value != "0"),
            deny_references: false,
        }
    }

    /// Confines the process to what `reach` adds to the files of `objects`, if images come from strangers. Called before
    /// the first image is opened, and before the first thread is started.
    ///
    /// # Errors
    /// The system cannot confine a process, or the command needs another program.
    pub(crate) fn confine(self, objects: &Objects, reach: impl FnOnce(Reach) -> Reach) -> Result<(), Stop> {
        if !self.untrusted {
            return Ok(());
        }
        confine(&reach(Reach::new(objects)), objects)
    }

    /// The options to open an image with.
    pub(crate) fn opening(self) -> OpenOptions {
        let options = OpenOptions::new().unambiguous(self.untrusted);
        if self.deny_references {
            options.gate(Arc::new(ClosedGate))
        } else if self.untrusted {
            options.gate_from(Arc::new(|files| Arc::new(BeneathGate::new(files))))
        } else {
            options
        }
    }
}
