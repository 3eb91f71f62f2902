//! Files in memory that refer to each other by name.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    ByteRange, CreatePlan, CreateRequest, Device, Error, ErrorKind, Gate, Image, NewFiles, NodeOptions,
    Objects, Reference, Result, ZeroMode,
};
use diskimage_formats::format_by_name;

use crate::{MemoryDevice, OpenOptions, open_device};

/// The contents of files, in the order of their [`Cast`].
pub(super) type Files = Vec<Vec<u8>>;

/// The names of the files, if there are no others.
const NAMES: [&str; 3] = ["top", "base", "new"];

/// What the files are.
#[derive(Clone, Debug, Default)]
pub(super) struct Cast {
    pub(super) roles: Vec<Role>,
    /// The keys of encrypted images.
    pub(super) objects: Arc<Objects>,
}

/// What a file is.
#[derive(Clone, Debug)]
pub(super) struct Role {
    pub(super) name: String,
    /// A part of an image with another name is not opened by itself.
    pub(super) is_image: bool,
    /// The name of the format; the default is to probe it.
    pub(super) format: Option<&'static str>,
    /// Nothing is written to a new image: where it does not read as zeroes, it may read as anything.
    pub(super) is_blank: bool,
    /// Node options that the image is opened with.
    pub(super) options: Vec<(String, &'static str)>,
}

impl Role {
    pub(super) fn image(name: &str, format: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            is_image: true,
            format: Some(format),
            is_blank: false,
            options: Vec::new(),
        }
    }

    pub(super) fn part(name: &str) -> Self {
        Self {
            is_image: false,
            format: None,
            ..Self::image(name, "")
        }
    }
}

impl Cast {
    /// Images called as in [`NAMES`].
    pub(super) fn usual() -> Arc<Self> {
        let role = |name: &&str| Role {
            format: None,
            ..Role::image(name, "")
        };
        Arc::new(Self {
            roles: NAMES.iter().map(role).collect(),
            objects: Arc::default(),
        })
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.roles.iter().position(|role| role.name == name)
    }
}

/// Called when a command tells its caller that what it has done so far is durable.
type OnAcknowledge = dyn Fn(&Disks) + Send + Sync;

/// Devices in the order of their cast.
#[derive(Clone)]
pub(super) struct Disks {
    pub(super) devices: Vec<Arc<dyn Device>>,
    pub(super) cast: Arc<Cast>,
    on_acknowledge: Option<Arc<OnAcknowledge>>,
}

impl Disks {
    /// Devices in memory with these bytes, in the usual cast.
    pub(super) fn holding(files: &[Vec<u8>]) -> Self {
        Self::of(&Cast::usual(), files)
    }

    /// Devices in memory with these bytes.
    pub(super) fn of(cast: &Arc<Cast>, files: &[Vec<u8>]) -> Self {
        let device = |bytes: &Vec<u8>| Arc::new(MemoryDevice::new(bytes.clone())) as Arc<dyn Device>;
        Self::on(cast, files.iter().map(device).collect())
    }

    pub(super) fn on(cast: &Arc<Cast>, devices: Vec<Arc<dyn Device>>) -> Self {
        Self {
            devices,
            cast: Arc::clone(cast),
            on_acknowledge: None,
        }
    }

    /// The same files, one of them on another device.
    pub(super) fn with(&self, index: usize, device: Arc<dyn Device>) -> Self {
        let mut disks = self.clone();
        disks.devices[index] = device;
        disks
    }

    pub(super) fn contents(&self) -> Files {
        let bytes = |device: &Arc<dyn Device>| {
            let mut bytes = vec![0; usize::try_from(device.len()).expect("small")];
            device.read_at(&mut bytes, 0).expect("memory");
            bytes
        };
        self.devices.iter().map(bytes).collect()
    }

    /// Opens an image with its backing chain.
    pub(super) fn open(&self, name: &str, options: OpenOptions) -> Result<Arc<Image>> {
        let index = self.cast.index(name).expect("known");
        let role = &self.cast.roles[index];
        let mut node = NodeOptions::new();
        for (name, value) in &role.options {
            if !(options.no_backing && name.starts_with("backing.")) {
                node.set(name, *value);
            }
        }
        let mut options = options
            .gate(Arc::new(self.clone()))
            .objects(Arc::clone(&self.cast.objects))
            .node_options(node);
        if let Some(format) = role.format {
            options = options.format(format);
        }
        open_device(Arc::clone(&self.devices[index]), name, &options)
    }

    /// The file called `name`.
    pub(super) fn find(&self, name: &str) -> Option<&Arc<dyn Device>> {
        self.devices.get(self.cast.index(name)?)
    }

    /// The same files; `hear` is called whenever a command acknowledges what it has done so far.
    pub(super) fn hearing(self, hear: impl Fn(&Self) + Send + Sync + 'static) -> Self {
        Self {
            on_acknowledge: Some(Arc::new(hear)),
            ..self
        }
    }

    /// Whether the image called `name` has got data.
    pub(super) fn has_data(&self, name: &str) -> bool {
        self.cast
            .roles
            .iter()
            .any(|role| role.name == name && !role.is_blank)
    }

    /// Says that what the command has done so far is durable. The end of a command says so, too.
    pub(super) fn acknowledge(&self) {
        if let Some(hear) = &self.on_acknowledge {
            hear(self);
        }
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
    options: String,
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
    pub(super) fn new(format: &'static str, options: impl Into<String>, len: u64) -> Self {
        Self {
            format,
            options: options.into(),
            len,
            steps: Vec::new(),
        }
    }

    pub(super) fn qcow2(options: &'static str, len: u64) -> Self {
        Self::new("qcow2", options, len)
    }

    pub(super) fn raw(len: u64) -> Self {
        Self::new("raw", "", len)
    }

    /// The same image with another length.
    pub(super) fn of_len(self, len: u64) -> Self {
        Self { len, ..self }
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
    let named: Vec<_> = NAMES.into_iter().zip(plans.iter().cloned()).collect();
    let mut cast = Cast::clone(&Cast::usual());
    cast.roles.truncate(plans.len());
    make_cast(&Arc::new(cast), &named).expect("memory")
}

/// Creates the images in the files of a cast, the last one first.
pub(super) fn make_cast(cast: &Arc<Cast>, plans: &[(&str, ImagePlan)]) -> Result<Files> {
    let disks = Disks::of(cast, &vec![Vec::new(); cast.roles.len()]);
    for (name, plan) in plans.iter().rev() {
        plan.create(&disks, name)?;
        let options = OpenOptions::new().format(plan.format).write(true);
        let image = disks.open(name, options)?;
        for step in &plan.steps {
            step.apply(&image)?;
        }
        image.flush()?;
    }
    Ok(disks.contents())
}

impl ImagePlan {
    /// Creates the image called `name`, still without the changes that are made to it.
    pub(super) fn create(&self, disks: &Disks, name: &str) -> Result<()> {
        self.with_creation(name, &disks.cast.objects, |plan| {
            let find = |name: &str| disks.find(name).cloned();
            let missing = |name: &str| Error::new(ErrorKind::NotFound, format!("no file '{name}'"));
            let backing = plan.reads_backing.then(|| disks.open("base", OpenOptions::new()));
            plan.write(NewFiles {
                file: find(name).ok_or_else(|| missing(name))?,
                make_part: &mut |part| find(part).ok_or_else(|| missing(part)),
                backing: backing.transpose()?,
            })
        })
    }

    /// The names of the files that the image called `name` has besides its own.
    pub(super) fn parts(&self, name: &str, objects: &Arc<Objects>) -> Vec<String> {
        self.with_creation(name, objects, |plan| Ok(plan.parts))
            .expect("valid options")
    }

    fn with_creation<T>(
        &self,
        name: &str,
        objects: &Arc<Objects>,
        act: impl FnOnce(CreatePlan<'_>) -> Result<T>,
    ) -> Result<T> {
        let format = format_by_name(self.format).expect("known");
        let mut options = Options::new(format.create_options());
        options.parse(&self.options).expect("valid options");
        act(format.plan_create(CreateRequest {
            name,
            size: self.len,
            options: &options,
            objects,
        })?)
    }
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
