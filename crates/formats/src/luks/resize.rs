//! Changes the length of the payload, which is that of the file.

use diskimage_core::{Error, ErrorKind, Preallocation, ResizeRequest, Result};

use super::LuksLayer;

impl LuksLayer {
    /// Changes the length of the file.
    pub(super) fn resize_payload(&self, request: &ResizeRequest) -> Result<()> {
        let len = self
            .volume
            .payload_offset()
            .checked_add(request.len)
            .filter(|len| i64::try_from(*len).is_ok())
            .ok_or_else(|| Error::new(ErrorKind::Limit, "The requested file size is too large"))?;
        if request.preallocation == Preallocation::Metadata {
            return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
        }
        self.file.resize(len, request.preallocation)
    }
}
