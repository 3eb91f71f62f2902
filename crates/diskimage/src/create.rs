//! Creates new images.
//!
//! ```text
//!   Creation ── prepare: options parsed, backing image opened, nothing written ──▶ Prepared
//!   Prepared ── write:   files made and locked, format written                 ──▶ NewImage, its files have no names yet
//!   NewImage ── publish: the files get their names                             ──▶ image
//!               dropped: the files are gone, what was there before is still there
//! ```

use std::collections::HashSet;
use std::sync::Arc;

use diskimage_core::options::{OptionDef, Options};
use diskimage_core::{
    CompressionLevel, CreatePlan, CreateRequest, Device, Error, ErrorKind, Format, Gate, Image, NewFiles,
    NodeOptions, Objects, OnNote, OpenContext, OpenFiles, Permissions, Preallocation, Result, name,
};
use diskimage_formats::format_by_name;
use diskimage_protocols::{
    CREATE_OPTIONS as FILE_CREATE_OPTIONS, CacheMode, EXISTING_CREATE_OPTIONS, File, FileCreation,
    LocalFileDriver, NewFile, Protocol, ProtocolRequest, Target, filter_by_name, parse_name,
    protocol_by_name, protocol_of_name,
};

use crate::files::{Identity, Location, files_below, files_of_chain};
use crate::graph::full_backing_name;
use crate::open::open_bare;
use crate::open_options::OpenOptions;

/// What is written to a new image as soon as it is created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filling {
    /// Nothing.
    #[default]
    None,
    /// Guest data, encoded only if the image stores no other.
    Plain,
    /// Guest data in encoded form.
    Encoded,
}

/// The name, the format and the options of a new image.
#[must_use = "nothing is made before `create`"]
#[derive(Clone)]
pub struct Creation {
    name: String,
    format: String,
    size: Option<u64>,
    exact_size: Option<u64>,
    options: Vec<String>,
    backing_file: Option<String>,
    backing_format: Option<String>,
    trust_backing: bool,
    needed: HashSet<Identity>,
    cache: CacheMode,
    filling: Filling,
    /// What the user gave for opening other images.
    open: OpenOptions,
    on_note: Option<Arc<OnNote>>,
}

impl Creation {
    /// An image called `name` of the format called `format`.
    pub fn new(name: impl Into<String>, format: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            format: format.into(),
            size: None,
            exact_size: None,
            options: Vec::new(),
            backing_file: None,
            backing_format: None,
            trust_backing: false,
            needed: HashSet::new(),
            cache: CacheMode::WRITEBACK,
            filling: Filling::None,
            open: OpenOptions::new(),
            on_note: None,
        }
    }

    /// The size of the disk in bytes; the default is the size of the backing image.
    pub fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// The size of the disk in bytes; takes precedence over a `size` in the options.
    pub fn exact_size(mut self, size: u64) -> Self {
        self.exact_size = Some(size);
        self
    }

    /// Options of the format and of its file, `name=value` separated by commas.
    pub fn options(mut self, list: impl Into<String>) -> Self {
        self.options.push(list.into());
        self
    }

    /// The name of the backing image.
    pub fn backing_file(mut self, name: impl Into<String>) -> Self {
        self.backing_file = Some(name.into());
        self
    }

    /// The format of the backing image.
    pub fn backing_format(mut self, format: impl Into<String>) -> Self {
        self.backing_format = Some(format.into());
        self
    }

    /// Whether to store the backing file name and format without opening the backing image.
    pub fn trust_backing(mut self, trust: bool) -> Self {
        self.trust_backing = trust;
        self
    }

    /// Images that are read after the new one has been created, such as the sources of a conversion: their files and
    /// those of their backing images are not overwritten.
    pub fn apart_from(mut self, images: &[Arc<Image>]) -> Self {
        for image in images {
            self.needed.extend(files_of_chain(image, usize::MAX));
        }
        self
    }

    /// What is written next. It decides whether the option `compression_level` has a meaning, which is not stored in the
    /// image, and has to be passed on in [`Conversion::compression_level`](crate::Conversion::compression_level).
    pub fn filling(mut self, filling: Filling) -> Self {
        self.filling = filling;
        self
    }

    /// The cache mode of the new file.
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// The objects (secrets and the like) that the options refer to by name.
    pub fn objects(mut self, objects: Arc<Objects>) -> Self {
        self.open = self.open.objects(objects);
        self
    }

    /// The gate that opens the files that images refer to; the default is [`FileGate`](crate::FileGate).
    pub fn gate(mut self, gate: Arc<dyn Gate>) -> Self {
        self.open = self.open.gate(gate);
        self
    }

    /// Receives the notes of opening the backing image.
    pub fn on_note(mut self, on_note: Arc<OnNote>) -> Self {
        self.on_note = Some(on_note);
        self
    }

    /// Checks everything that can be checked before a file is written.
    ///
    /// # Errors
    /// A format, protocol or option is unknown, options contradict each other, or the backing image cannot be opened.
    pub fn prepare(self) -> Result<Prepared> {
        let format = format_of_new(&self.format)?;
        if existing_only(&self.name).is_none() {
            target_of(&self.name)?;
        }
        let options = self.all_options(format)?;
        let protocol = protocol_by_name(&self.format);
        let size = self.size_with(&options)?;
        let mut options = options;
        options.set("size", &size.to_string())?;
        let needed = self.needed_files(&options);
        Ok(Prepared {
            needed,
            format,
            protocol,
            size,
            options,
            cache: self.cache,
            filling: self.filling,
            context: self.open.cache(self.cache).context(),
            name: self.name,
        })
    }

    fn all_options(&self, format: &dyn Format) -> Result<Options> {
        let mut options = Options::merged(&[format.create_options(), FILE_CREATE_OPTIONS]);
        for list in &self.options {
            options.parse(list)?;
        }
        let unsupported = |what: &str| {
            Error::unsupported(format!("{what} not supported for file format '{}'", self.format))
        };
        if let Some(backing) = &self.backing_file {
            if !options.has("backing_file") {
                return Err(unsupported("Backing file"));
            }
            options.set("backing_file", backing)?;
        }
        if let Some(backing) = &self.backing_format {
            if !options.has("backing_fmt") {
                return Err(unsupported("Backing file format"));
            }
            options.set("backing_fmt", backing)?;
        }
        Ok(options)
    }

    /// The files that must not be overwritten.
    fn needed_files(&self, options: &Options) -> HashSet<Identity> {
        let mut needed = self.needed.clone();
        if let Some(backing) = options.text("backing_file") {
            let name = full_backing_name(&self.name, backing);
            needed.extend(files_below(&name, options.text("backing_fmt"), &self.open));
        }
        needed
    }

    /// The size that was given, or else that of the backing image.
    fn size_with(&self, options: &Options) -> Result<u64> {
        let given = options.is_given("size").then(|| options.size("size")).flatten();
        let asked = match (given, self.size) {
            (Some(_), Some(_)) => return Err(Error::invalid("The image size must be specified only once")),
            (given, size) => self.exact_size.or(given).or(size),
        };
        let below = match options.text("backing_file") {
            Some(backing) => self.check_backing(backing, options.text("backing_fmt"))?,
            None => None,
        };
        asked
            .or(below)
            .ok_or_else(|| Error::invalid("Image creation needs a size parameter"))
    }

    /// Opens the backing image unless it is trusted, and returns its size.
    fn check_backing(&self, backing: &str, format: Option<&str>) -> Result<Option<u64>> {
        if backing.is_empty() {
            return Err(Error::invalid("Expected backing file name, got empty string"));
        }
        if backing == self.name {
            return Err(Error::invalid(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        let no_format = || Error::invalid("Backing file specified without backing format");
        if self.trust_backing {
            return if format.is_some() {
                Ok(None)
            } else {
                Err(no_format())
            };
        }
        let mut options = self.open.clone().no_data(true).force_share(true);
        if let Some(format) = format {
            options = options.format(format);
        }
        if let Some(on_note) = &self.on_note {
            options = options.on_note(Arc::clone(on_note));
        }
        let image = open_bare(&full_backing_name(&self.name, backing), &options)
            .map_err(|error| error.hint("Could not open backing image."))?;
        match format {
            Some(_) => Ok(Some(image.len())),
            None => Err(no_format().hint(format!("Detected format of {}.", image.layer().format()))),
        }
    }
}

/// A new image whose options have been checked. No file is written before [`Prepared::create`].
#[must_use = "nothing is made before `create`"]
pub struct Prepared {
    name: String,
    format: &'static dyn Format,
    /// The protocol that was given as the format.
    protocol: Option<&'static dyn Protocol>,
    size: u64,
    options: Options,
    /// The files that must not be overwritten.
    needed: HashSet<Identity>,
    cache: CacheMode,
    filling: Filling,
    context: OpenContext,
}

impl Prepared {
    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The value of an option, or its default.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.text(name)
    }

    /// The value of an option that is on or off, or its default.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.options.flag(name)
    }

    /// How hard clusters are to be compressed; `None` if that was not given.
    ///
    /// # Errors
    /// A number that is not from 1 to 9.
    pub fn compression_level(&self) -> Result<Option<CompressionLevel>> {
        CompressionLevel::from_options(&self.options)
    }

    /// Whether the format has this option.
    pub fn has_option(&self, name: &str) -> bool {
        self.options.has(name)
    }

    /// The format and all options, `fmt=qcow2 cluster_size=65536 ...`.
    pub fn summary(&self) -> String {
        let name = self
            .protocol
            .map_or_else(|| self.format.name(), |protocol| protocol.name());
        format!("fmt={name} {}", self.options.summary())
    }

    /// Creates the image: [`Prepared::write`] and [`NewImage::publish`].
    ///
    /// # Errors
    /// Those of both.
    pub fn create(&self) -> Result<()> {
        self.write()?.publish()
    }

    /// Writes the image into files that get their names when it is published, so that no file under these names is
    /// incomplete. Files that exist already are locked, and keep their contents until then. Storage that is not a regular
    /// file is overwritten.
    ///
    /// # Errors
    /// The format refuses an option, a file is needed by another image or in use, or a request fails.
    pub fn write(&self) -> Result<NewImage> {
        let creation = FileCreation::from_options(&self.options)?;
        self.check_preallocation()?;
        self.compression_level()?;
        // Errors in the options are found before the file is emptied.
        let name = target_of(&self.name)
            .ok()
            .and_then(|mut node| node.take_text("filename"));
        let name = name.as_deref().unwrap_or(&self.name);
        let plan = self.format.plan_create(CreateRequest {
            name,
            size: self.size,
            options: &self.options,
            objects: &self.context.objects,
        })?;
        self.check_compression_level(&plan)?;
        let (file, mut files) = self.own_file(&creation, &plan)?;
        self.fill(&file, plan, &creation, &mut files)?;
        Ok(NewImage { files })
    }

    /// Refuses to overwrite a file that is needed or in use, and two files of the new image that are the same.
    fn require_apart(&self, name: &str, plan: &CreatePlan<'_>) -> Result<()> {
        let mut places = vec![Location::at(name)];
        if places.iter().any(|place| place.is_among(&self.needed)) {
            // As in qemu-img, a lock of another process is the error to report.
            File::require_unlocked(&Target::plain(name), self.permissions(), self.cache)?;
            return Err(is_needed(name));
        }
        for part in &plan.parts {
            let place = Location::at(part);
            if place.is_among(&self.needed) {
                return Err(is_needed(part));
            }
            if places.contains(&place) {
                return Err(Error::invalid(format!(
                    "'{part}' cannot be two files of the new image"
                )));
            }
            places.push(place);
            // Each part is locked again before it is emptied. Until then the image's own file would be lost already.
            let target = Target::plain(part);
            if name::to_path(&target.path).is_file()
                && let Err(error) = File::require_unlocked(&target, plan.part_permissions, self.cache)
                && error.kind() == ErrorKind::Locked
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// What the image's own file is locked for.
    fn permissions(&self) -> Permissions {
        Permissions {
            resize: true,
            ..self.format.permissions(true)
        }
    }

    /// The file of the new image and, if it is made for the image, the same as a new file. Protocols that cannot create
    /// files open the existing one.
    fn own_file(
        &self,
        creation: &FileCreation,
        plan: &CreatePlan<'_>,
    ) -> Result<(Arc<dyn Device>, Vec<NewFile>)> {
        let no_making = |error: Error, driver: &str| {
            error.context(format!(
                "Protocol driver '{driver}' does not support creating new images, so an existing image must be selected \
                 as the target; however, opening the given target as an existing image failed"
            ))
        };
        let mut node = match (target_of(&self.name), existing_only(&self.name)) {
            (Err(error), Some(protocol)) => return Err(no_making(error, protocol.name())),
            (node, _) => node?,
        };
        let protocol: &dyn Protocol = match (node.text("driver").map(protocol_by_name), self.protocol) {
            (Some(protocol), _) => {
                protocol.ok_or_else(|| no_creation(node.text("driver").unwrap_or_default()))?
            }
            // A protocol with a prefix refuses a path, and its error says so. A protocol without a prefix takes paths.
            (None, Some(protocol)) => {
                node = protocol
                    .parse(&self.name)
                    .map_err(|error| no_making(error, protocol.name()))?;
                protocol
            }
            (None, None) => LocalFileDriver::serving(node.text("filename").unwrap_or_default()),
        };
        if protocol.can_create() {
            let path = node.take_text("filename").unwrap_or_default();
            self.require_apart(&path, plan)?;
            let target = Target::plain(&path);
            let new = File::create(&target, self.permissions(), creation, self.cache)?;
            return Ok((Arc::<File>::clone(new.file()), vec![new]));
        }
        node.take("driver");
        let opened = protocol.open(ProtocolRequest {
            options: &mut node,
            write: true,
            cache: self.cache,
            context: &self.context,
        });
        let device = opened.map_err(|error| no_making(error, protocol.name()))?;
        self.require_apart(&device.name(), plan)?;
        Ok((device, Vec::new()))
    }

    /// Refuses the level of compression if nothing is going to be compressed.
    fn check_compression_level(&self, plan: &CreatePlan<'_>) -> Result<()> {
        let why = match self.filling {
            Filling::None => "It is for writing compressed clusters, and is not stored in the image",
            Filling::Plain if !plan.encodes => "Clusters are compressed with -c only",
            Filling::Plain | Filling::Encoded => return Ok(()),
        };
        CompressionLevel::require_absent(&self.options, why)
    }

    /// If the format leaves preallocation to the file, checks that the mode exists before the file is emptied.
    fn check_preallocation(&self) -> Result<()> {
        let own = |format: &dyn Format| {
            format
                .create_options()
                .iter()
                .any(|option| option.name == "preallocation")
        };
        match self.options.text("preallocation") {
            Some(word) if !own(self.format) && Preallocation::from_name(word).is_none() => {
                Err(Error::invalid(format!("invalid parameter value: {word}")))
            }
            _ => Ok(()),
        }
    }

    /// Writes the image. Its further files are added to `files`.
    fn fill(
        &self,
        file: &Arc<dyn Device>,
        plan: CreatePlan<'_>,
        creation: &FileCreation,
        files: &mut Vec<NewFile>,
    ) -> Result<()> {
        file.lock(self.permissions())?;
        let backing = match plan.reads_backing {
            true => self.open_backing(file)?,
            false => None,
        };
        let permissions = plan.part_permissions;
        plan.write(NewFiles {
            file: Arc::clone(file),
            make_part: &mut |path| {
                let target = Target::plain(path);
                let part = File::create(&target, permissions, creation, self.cache)?;
                let device = Arc::<File>::clone(part.file());
                files.push(part);
                Ok(device)
            },
            backing,
        })
    }

    /// Opens the backing image of the new image in `file`.
    fn open_backing(&self, file: &Arc<dyn Device>) -> Result<Option<Arc<Image>>> {
        let Some(backing) = self.options.text("backing_file") else {
            return Ok(None);
        };
        let options = OpenOptions::new()
            .force_share(true)
            .objects(Arc::clone(&self.context.objects))
            .gate(Arc::clone(&self.context.gate));
        open_bare(&full_backing_name(&file.name(), backing), &options).map(Some)
    }
}

fn is_needed(name: &str) -> Error {
    Error::invalid(format!(
        "'{name}' is needed for the new image and would be overwritten"
    ))
}

/// The format of a new image that is given as `name`: the name of a format, or of a protocol, whose images are raw.
///
/// # Errors
/// The format or protocol cannot create images, or `name` is unknown ([`ErrorKind::NotFound`]).
pub fn format_of_new(name: &str) -> Result<&'static dyn Format> {
    let unknown = || Error::new(ErrorKind::NotFound, format!("Unknown file format '{name}'"));
    if let Some(format) = format_by_name(name) {
        return format.require_creation().map(|()| format);
    }
    match protocol_by_name(name) {
        Some(protocol) if protocol.can_hold_image() => format_by_name("raw").ok_or_else(unknown),
        None if filter_by_name(name).is_none() => Err(unknown()),
        _ => Err(Error::unsupported(format!(
            "Format driver '{name}' does not support image creation"
        ))),
    }
}

/// The creation options of the file called `name`, which are those of its protocol.
///
/// # Errors
/// The protocol is unknown or cannot hold new images.
pub fn file_options(name: &str) -> Result<&'static [OptionDef]> {
    let node = target_of(name)?;
    Ok(node.text("driver").map_or(FILE_CREATE_OPTIONS, protocol_options))
}

/// The creation options of a protocol.
pub fn protocol_options(protocol: &str) -> &'static [OptionDef] {
    match protocol_by_name(protocol) {
        Some(protocol) if !protocol.can_create() => EXISTING_CREATE_OPTIONS,
        _ => FILE_CREATE_OPTIONS,
    }
}

/// A new image whose files have no names yet. Dropped before it is published, they are gone.
#[derive(Debug)]
#[must_use = "the image is lost unless it is published"]
pub struct NewImage {
    /// The image's own file first.
    files: Vec<NewFile>,
}

impl NewImage {
    /// The files, for [`OpenOptions::new_files`]: the image can be opened by its name with them.
    pub fn files(&self) -> OpenFiles {
        let device = |new: &NewFile| -> Arc<dyn Device> { Arc::<File>::clone(new.file()) };
        self.files
            .iter()
            .map(|new| (new.file().name(), device(new)))
            .collect()
    }

    /// Gives the files their names, the one without which the image cannot be opened last. Files that had these names are
    /// replaced; if that fails, they are all there as before.
    ///
    /// # Errors
    /// A file cannot get its name, or something else has it by now.
    pub fn publish(self) -> Result<()> {
        NewFile::publish_all(self.files)
    }
}

/// The node options of the file of a new image. An empty name is passed on, so that the error is that of open(2).
fn target_of(name: &str) -> Result<NodeOptions> {
    let node = match name {
        "" | "file:" => {
            let mut node = NodeOptions::new();
            node.set("filename", "");
            node
        }
        _ => parse_name(name)?,
    };
    let driver = node.text("driver");
    match driver.map(|driver| (driver, protocol_by_name(driver))) {
        Some((_, Some(protocol))) if !protocol.can_hold_image() => Err(no_creation(protocol.name())),
        Some((driver, None)) => Err(no_creation(driver)),
        _ => Ok(node),
    }
}

/// The protocol of `name`, if it cannot create files and a new image needs an existing one.
fn existing_only(name: &str) -> Option<&'static dyn Protocol> {
    protocol_of_name(name).filter(|protocol| protocol.can_hold_image() && !protocol.can_create())
}

fn no_creation(driver: &str) -> Error {
    Error::unsupported(format!(
        "Protocol driver '{driver}' does not support image creation"
    ))
}
