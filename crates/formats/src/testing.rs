//! Opening images in tests.

use std::sync::Arc;

use diskimage_core::{
    Budget, Device, Error, ErrorKind, Format, Gate, Image, NodeOptions, OpenRequest, Reference, Result,
};

/// Opens nothing.
pub(crate) struct Closed;

impl Gate for Closed {
    fn open(&self, _: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Err(Error::new(ErrorKind::Denied, "no files"))
    }
}

/// Opens the image of `format` on `file`.
pub(crate) fn open(format: &dyn Format, file: Arc<dyn Device>, write: bool) -> Result<Image> {
    let layer = format.open(OpenRequest {
        file,
        name: "test",
        write,
        for_check: false,
        no_data: false,
        force_share: false,
        children: Vec::new(),
        options: &mut NodeOptions::new(),
        objects: &Arc::default(),
        gate: &Closed,
        budget: Budget::default(),
    })?;
    Ok(Image::new(layer, None, "test", write))
}
