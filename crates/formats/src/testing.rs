//! Images in memory, for tests.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    Budget, CreateRequest, Device, Error, ErrorKind, Format, Gate, Image, MemoryDevice, NodeOptions,
    OpenRequest, Reference, Result,
};

/// Opens nothing.
pub(crate) struct Closed;

impl Gate for Closed {
    fn open(&self, _: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Err(Error::new(ErrorKind::Denied, "no files"))
    }
}

/// A new image of `format`, on nothing.
pub(crate) fn create(format: &dyn Format, options: &str, size: u64) -> Result<Arc<MemoryDevice>> {
    let file = Arc::new(MemoryDevice::default());
    let mut parsed = Options::new(format.create_options());
    parsed.parse(options).expect("valid options");
    format.create(CreateRequest {
        id_below: None,
        file: Arc::<MemoryDevice>::clone(&file),
        name: "test",
        size,
        options: &parsed,
        objects: &Arc::default(),
        gate: &Closed,
    })?;
    Ok(file)
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

/// All bytes of a small disk.
pub(crate) fn contents(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.len()).expect("small")];
    image.read_at(&mut bytes, 0).expect("readable");
    bytes
}
