//! What images may bring about: what the policies of `--untrusted` and `--deny-references` mean for a command.

use std::sync::Arc;

use diskimage::{BeneathGate, ClosedGate, Objects, OpenOptions};

use crate::confinement::{Confinement, Reach, confine};
use crate::words::{Policy, Stop};

impl Policy {
    /// Confines the process to what `reach` adds to the files of `objects`, if images come from strangers. Called before
    /// the first image is opened, and before the first thread is started.
    ///
    /// # Errors
    /// The system cannot confine a process, or the command needs another program.
    pub(crate) fn confine(
        self,
        objects: &Objects,
        reach: impl FnOnce(Reach) -> Reach,
    ) -> Result<Confinement, Stop> {
        if !self.untrusted {
            return Ok(Confinement::default());
        }
        confine(reach(Reach::new(objects)), objects)
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
