//! Files in memory that refer to each other by name.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, ErrorKind, Gate, Image, Reference, Result, ZeroMode};

use crate::testing::create;
use crate::{MemoryDevice, OpenOptions, open_device};

/// The contents of files, in the order of [`NAMES`].
pub(super) type Files = Vec<Vec<u8>>;

/// The names of the files.
pub(super) const NAMES: [&str; 3] = ["top", "base", "new"];

/// Devices in the order of [`NAMES`].
#[derive(Clone, Debug)]
pub(super) struct Disks(pub(super) Vec<Arc<dyn Device>>);

impl Disks {
    pub(super) fn holding(files: &[Vec<u8>]) -> Self {
        let device = |bytes: &Vec<u8>| Arc::new(MemoryDevice::new(bytes.clone())) as Arc<dyn Device>;
        Self(files.iter().map(device).collect())
    }

    pub(super) fn contents(&self) -> Files {
        let bytes = |device: &Arc<dyn Device>| {
            let mut bytes = vec![0; usize::try_from(device.len()).expect("small")];
            device.read_at(&mut bytes, 0).expect("memory");
            bytes
        };
        self.0.iter().map(bytes).collect()
    }

    /// Opens an image with its backing chain.
    pub(super) fn open(&self, name: &str, options: OpenOptions) -> Result<Arc<Image>> {
        let device = self.find(name).expect("known");
        open_device(Arc::clone(device), name, &options.gate(Arc::new(self.clone())))
    }

    fn find(&self, name: &str) -> Option<&Arc<dyn Device>> {
        self.0.get(NAMES.iter().position(|known| *known == name)?)
    }
}

impl Gate for Disks {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        let found = self.find(name).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no file '{name}'")))
    }
}

/// A new image and the changes that are made to it.
#[derive(Clone, Debug)]
pub(super) struct ImagePlan {
    format: &'static str,
    options: &'static str,
    len: u64,
    steps: Vec<ImageStep>,
}

/// A change of a new image.
#[derive(Clone, Copy, Debug)]
enum ImageStep {
    Data(u64, u64, u8),
    Zeroes(u64, u64),
    Snapshot(&'static str),
    Resize(u64),
}

impl ImagePlan {
    pub(super) fn qcow2(options: &'static str, len: u64) -> Self {
        Self {
            format: "qcow2",
            options,
            len,
            steps: Vec::new(),
        }
    }

    pub(super) fn raw(len: u64) -> Self {
        Self {
            format: "raw",
            ..Self::qcow2("", len)
        }
    }

    /// Writes `len` bytes of `value` at `at`.
    pub(super) fn data(self, at: u64, len: u64, value: u8) -> Self {
        self.with(ImageStep::Data(at, len, value))
    }

    /// Writes `len` zeroes at `at`, over the data of a backing image too.
    pub(super) fn zeroes(self, at: u64, len: u64) -> Self {
        self.with(ImageStep::Zeroes(at, len))
    }

    /// Takes a snapshot.
    pub(super) fn snapshot(self, name: &'static str) -> Self {
        self.with(ImageStep::Snapshot(name))
    }

    /// Resizes the image.
    pub(super) fn resize(self, len: u64) -> Self {
        self.with(ImageStep::Resize(len))
    }

    fn with(mut self, step: ImageStep) -> Self {
        self.steps.push(step);
        self
    }
}

/// Creates the images, the last one first: it may be the backing image of the others.
pub(super) fn make(plans: &[ImagePlan]) -> Files {
    let disks = Disks::holding(&vec![Vec::new(); plans.len()]);
    for (plan, name) in plans.iter().zip(NAMES).rev() {
        let device = disks.find(name).expect("one for each plan");
        create(device, plan.format, plan.options, plan.len);
        let options = OpenOptions::new().format(plan.format).write(true);
        let image = disks.open(name, options).expect("opens");
        for step in &plan.steps {
            step.apply(&image).expect("memory");
        }
        image.flush().expect("memory");
    }
    disks.contents()
}

impl ImageStep {
    fn apply(self, image: &Image) -> Result<()> {
        match self {
            Self::Data(at, len, value) => {
                image.write_at(&vec![value; usize::try_from(len).expect("small")], at)
            }
            Self::Zeroes(at, len) => image.write_zeroes(ByteRange::at(at, len), ZeroMode::Unmap),
            Self::Snapshot(name) => crate::create_snapshot(image, name, std::time::UNIX_EPOCH),
            Self::Resize(len) => crate::Resize::new(len)
                .policy(crate::ShrinkPolicy::Allow)
                .run(image),
        }
    }
}
