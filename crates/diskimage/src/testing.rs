//! Images in memory for the tests of operations.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    CreateRequest, Device, Error, ErrorKind, Gate, Image, MemoryDevice, NodeOptions, OpenRequest, Reference,
    Result,
};
use diskimage_formats::format_by_name;
use diskimage_testing::FaultyDevice;

/// Refuses every file.
struct Closed;

impl Gate for Closed {
    fn open(&self, _: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Err(Error::new(ErrorKind::Denied, "no files"))
    }
}

/// A new image on `device`.
pub(crate) fn create(device: &Arc<dyn Device>, format: &str, options: &str, size: u64) {
    let format = format_by_name(format).expect("known");
    let mut parsed = Options::new(format.create_options());
    parsed.parse(options).expect("valid options");
    format
        .create(CreateRequest {
            file: Arc::clone(device),
            name: "test",
            size,
            options: &parsed,
            objects: &Arc::default(),
            gate: &Closed,
            backing_cid: None,
        })
        .expect("created");
}

/// Opens the image on `device`.
pub(crate) fn open(device: &Arc<dyn Device>, format: &str, backing: Option<Arc<Image>>) -> Arc<Image> {
    let layer = format_by_name(format)
        .expect("known")
        .open(OpenRequest {
            write: true,
            ..OpenRequest::new(
                Arc::clone(device),
                "test",
                &mut NodeOptions::new(),
                &Arc::default(),
                &Closed,
            )
        })
        .expect("opens");
    Arc::new(Image::new(layer, backing, "test", true))
}

/// A new image in memory, and the file it is in.
pub(crate) fn image(format: &str, options: &str, size: u64) -> (Arc<Image>, Arc<MemoryDevice>) {
    let memory = Arc::new(MemoryDevice::default());
    let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
    create(&device, format, options, size);
    (open(&device, format, None), memory)
}

/// A new image in memory on top of another.
pub(crate) fn image_on(format: &str, options: &str, size: u64, backing: Option<&Arc<Image>>) -> Arc<Image> {
    let device: Arc<dyn Device> = Arc::new(MemoryDevice::default());
    create(&device, format, options, size);
    open(&device, format, backing.cloned())
}

/// A raw image with these bytes.
pub(crate) fn raw(bytes: Vec<u8>) -> Arc<Image> {
    let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(bytes));
    open(&device, "raw", None)
}

pub(crate) fn contents(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.len()).expect("small")];
    image.read_at(&mut bytes, 0).expect("readable");
    bytes
}

/// A device that fails on demand, and the bytes it holds.
pub(crate) fn faulty(bytes: Vec<u8>) -> (Arc<FaultyDevice>, Arc<MemoryDevice>) {
    let memory = Arc::new(MemoryDevice::new(bytes));
    (
        Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory))),
        memory,
    )
}
