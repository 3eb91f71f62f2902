//! Images in memory for the tests of operations, and devices that fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskimage_core::options::Options;
use diskimage_core::{
    Budget, ByteRange, CreateRequest, Device, Error, ErrorKind, Extent, Gate, Image, Limits, MemoryDevice,
    OpenRequest, Preallocation, Reference, Result, Want, ZeroMode,
};
use diskimage_formats::format_by_name;

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
            gate: &Closed,
        })
        .expect("created");
}

/// Opens the image on `device`.
pub(crate) fn open(device: &Arc<dyn Device>, format: &str, backing: Option<Arc<Image>>) -> Arc<Image> {
    let layer = format_by_name(format)
        .expect("known")
        .open(OpenRequest {
            file: Arc::clone(device),
            name: "test",
            write: true,
            for_check: false,
            no_data: false,
            force_share: false,
            gate: &Closed,
            budget: Budget::default(),
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

/// Fails every request from the n-th on that reads, writes or asks for status.
#[derive(Debug)]
pub(crate) struct Failing {
    below: MemoryDevice,
    left: AtomicU64,
}

impl Failing {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            below: MemoryDevice::new(bytes),
            left: AtomicU64::new(u64::MAX),
        }
    }

    /// Lets `requests` more through.
    pub(crate) fn fail_after(&self, requests: u64) {
        self.left.store(requests, Ordering::Relaxed);
    }

    fn count(&self) -> Result<()> {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .map(drop)
            .map_err(|_| Error::from_errno(5))
    }
}

impl Device for Failing {
    fn len(&self) -> u64 {
        self.below.len()
    }
    fn limits(&self) -> &Limits {
        self.below.limits()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.count()?;
        self.below.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.count()?;
        self.below.write_at(buf, offset)
    }
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.count()?;
        self.below.write_zeroes(range, mode)
    }
    fn discard(&self, range: ByteRange) -> Result<()> {
        self.below.discard(range)
    }
    fn status(&self, range: ByteRange, want: Want) -> Result<Extent> {
        self.count()?;
        self.below.status(range, want)
    }
    fn flush(&self) -> Result<()> {
        self.below.flush()
    }
    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.below.resize(len, preallocation)
    }
}
