//! The gate of a new image: its files are the user's, not references of an image, whatever the policy is.

use std::sync::Arc;

use diskimage_core::{Device, Gate, NodeOptions, Reference, Result, Role};
use diskimage_protocols::{Target, new_file};

/// Hands out the files of the new image, and leaves others to another gate.
pub(crate) struct NewImageGate(pub(crate) Arc<dyn Gate>);

impl Gate for NewImageGate {
    fn admit(&self, from: &str, name: &str, node: &NodeOptions) -> Result<()> {
        self.0.admit(from, name, node)
    }

    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        let is_written = reference.role == Role::Data && reference.permissions.write;
        match new_file(&Target::plain(name).path, reference.context).filter(|_| is_written) {
            Some(device) => {
                device.lock(reference.permissions)?;
                Ok(device)
            }
            None => self.0.open(reference),
        }
    }

    fn locate(&self, image: &str, name: &str) -> Option<String> {
        self.0.locate(image, name)
    }
}
