//! Images in memory for the tests of operations.

use std::sync::Arc;

use diskimage_core::{Device, Image, MemoryDevice};
use diskimage_formats::format_by_name;
use diskimage_testing::{FaultyDevice, create_image, open_image};

pub(crate) use diskimage_testing::contents;

/// Creates an image on `device`.
pub(crate) fn create(device: &Arc<dyn Device>, format: &str, options: &str, size: u64) {
    let format = format_by_name(format).expect("known");
    create_image(format, device, options, size).expect("created");
}

/// Opens the image on `device`.
pub(crate) fn open(device: &Arc<dyn Device>, format: &str, backing: Option<Arc<Image>>) -> Arc<Image> {
    let format = format_by_name(format).expect("known");
    Arc::new(open_image(format, Arc::clone(device), true, backing).expect("opens"))
}

/// A new image in memory, and its file.
pub(crate) fn image(format: &str, options: &str, size: u64) -> (Arc<Image>, Arc<MemoryDevice>) {
    let memory = Arc::new(MemoryDevice::default());
    let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
    create(&device, format, options, size);
    (open(&device, format, None), memory)
}

/// A new image in memory on a backing image.
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

/// A faulty device on a device in memory with these bytes.
pub(crate) fn faulty(bytes: Vec<u8>) -> (Arc<FaultyDevice>, Arc<MemoryDevice>) {
    let memory = Arc::new(MemoryDevice::new(bytes));
    (
        Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory))),
        memory,
    )
}
