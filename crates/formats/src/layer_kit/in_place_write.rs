//! Writes of formats that allocate nothing: all guest data has storage.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Result, WritePlan, WriteRun};

/// A write to one run that is allocated already. Committing it changes no metadata.
#[derive(Debug)]
pub(crate) struct InPlaceWrite([WriteRun; 1]);

impl InPlaceWrite {
    /// Writes `guest` to `offset` of `device`.
    pub(crate) fn new(guest: ByteRange, device: Arc<dyn Device>, offset: u64) -> Self {
        Self([WriteRun {
            guest,
            device,
            offset,
        }])
    }
}

impl WritePlan for InPlaceWrite {
    fn runs(&self) -> &[WriteRun] {
        &self.0
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
