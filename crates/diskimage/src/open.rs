//! Opening images with their backing chains.

use std::fmt;
use std::sync::Arc;

use diskimage_core::{
    Budget, Device, Error, ErrorKind, Format, Gate, Image, Layer, NodeOptions, Objects, OpenRequest,
    Permissions, Reference, Result, ResultExt, Role,
};
use diskimage_formats::format_by_name;
use diskimage_protocols::{CacheMode, File, Target};

use crate::gate::FileGate;
use crate::guess::GuessedRaw;
use crate::probe::probe;

/// How an image is opened: for reading, with its backing chain and as its bytes tell, unless said otherwise.
#[derive(Clone, Default)]
pub struct OpenOptions {
    format: Option<String>,
    write: bool,
    resize: bool,
    cache: CacheMode,
    force_share: bool,
    exclusive: bool,
    no_backing: bool,
    no_data: bool,
    for_check: bool,
    objects: Arc<Objects>,
    budget: Budget,
    gate: Option<Arc<dyn Gate>>,
    on_warning: Option<Arc<OnWarning>>,
}

/// Takes a message for the user, which may have several lines.
type OnWarning = dyn Fn(&str) + Send + Sync;

impl OpenOptions {
    /// The options that [`OpenOptions`] describes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The format to open it as, by name.
    #[must_use]
    pub fn format(mut self, format: impl Into<String>) -> Self {
        self.format = Some(format.into());
        self
    }

    /// Whether it will be changed; the images below never are.
    #[must_use]
    pub fn write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// Whether its size will be changed, too.
    #[must_use]
    pub fn resize(mut self, resize: bool) -> Self {
        self.resize = resize;
        self
    }

    /// How requests reach the disk.
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Whether to read it even though another process may be changing it.
    #[must_use]
    pub fn force_share(mut self, force_share: bool) -> Self {
        self.force_share = force_share;
        self
    }

    /// Whether nobody may write to it meanwhile, raw images included: what is read will be relied on.
    #[must_use]
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// Whether to leave the images below alone.
    #[must_use]
    pub fn no_backing(mut self, no_backing: bool) -> Self {
        self.no_backing = no_backing;
        self
    }

    /// Whether only facts are wanted and no bytes of the guest's.
    #[must_use]
    pub fn no_data(mut self, no_data: bool) -> Self {
        self.no_data = no_data;
        self
    }

    /// Whether it is opened to be checked: damage that a check can mend is no reason to refuse it.
    #[must_use]
    pub fn for_check(mut self, for_check: bool) -> Self {
        self.for_check = for_check;
        self
    }

    /// What the options of images refer to by name: secrets and the like.
    #[must_use]
    pub fn objects(mut self, objects: Arc<Objects>) -> Self {
        self.objects = objects;
        self
    }

    /// The memory that the numbers in the images may claim.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Who opens the files that the images refer to; [`FileGate`] if nobody is named.
    #[must_use]
    pub fn gate(mut self, gate: Arc<dyn Gate>) -> Self {
        self.gate = Some(gate);
        self
    }

    /// Who is told what the user ought to know.
    #[must_use]
    pub fn on_warning(mut self, on_warning: Arc<OnWarning>) -> Self {
        self.on_warning = Some(on_warning);
        self
    }

    /// What a file is locked for whose image is of `format`.
    fn permissions(&self, format: &dyn Format, write: bool) -> Permissions {
        let mut permissions = format.permissions(write);
        permissions.resize |= write && self.resize;
        if self.no_data && !write {
            permissions.read = false;
        }
        if self.force_share {
            permissions.share_write = true;
            permissions.share_resize = true;
        }
        permissions
    }

    /// What it is locked for once the whole chain is open.
    fn final_permissions(&self, format: &dyn Format, write: bool) -> Permissions {
        let mut permissions = self.permissions(format, write);
        if self.exclusive && !write && !self.force_share {
            permissions.share_write = false;
            permissions.share_resize = false;
        }
        permissions
    }

    fn gate_or_default(&self) -> Arc<dyn Gate> {
        self.gate.clone().unwrap_or_else(|| {
            Arc::new(FileGate {
                cache: self.cache,
                force_share: self.force_share,
                exclusive: self.exclusive,
            })
        })
    }
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions")
            .field("format", &self.format)
            .field("write", &self.write)
            .field("cache", &self.cache)
            .field("force_share", &self.force_share)
            .field("exclusive", &self.exclusive)
            .field("no_backing", &self.no_backing)
            .field("no_data", &self.no_data)
            .finish_non_exhaustive()
    }
}

/// How many images a chain may have: more than anybody has, fewer than there are file descriptors.
const MAX_CHAIN: usize = 200;

/// Opens the image that `name` names.
///
/// # Errors
/// `Could not open 'NAME'` and below it everything that can be wrong with the file, the image, and the images that it
/// is based on.
pub fn open(name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    open_bare(name, options).context(|| format!("Could not open '{name}'"))
}

/// [`open`], with no word about which image it is.
pub(crate) fn open_bare(name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    let format = options.format.as_deref().map(known).transpose()?;
    let target = Target::parse(name)?;
    if options.force_share && options.write {
        return Err(Error::invalid(
            "force-share=on can only be used with read-only images",
        ));
    }
    let file = Arc::new(File::open(&target, options.write, options.cache)?);
    open_chain(file, &target.path, format, options)
}

/// Opens the image on a device. `name` is where relative names in the image start.
///
/// # Errors
/// As [`open`], without the topmost words.
pub fn open_device(device: Arc<dyn Device>, name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    let format = options.format.as_deref().map(known).transpose()?;
    open_chain(device, name, format, options)
}

fn known(format: &str) -> Result<&'static dyn Format> {
    format_by_name(format).ok_or_else(|| Error::invalid(format!("Unknown driver '{format}'")))
}

/// An image of the chain, before those below it are known.
struct Link {
    layer: Arc<dyn Layer>,
    name: String,
    write: bool,
    format: &'static dyn Format,
    identity: Option<(u64, u64)>,
}

fn open_chain(
    device: Arc<dyn Device>,
    name: &str,
    format: Option<&'static dyn Format>,
    options: &OpenOptions,
) -> Result<Arc<Image>> {
    let gate = options.gate_or_default();
    let mut links = vec![open_link(device, name, format, options.write, &*gate, options)?];
    while !options.no_backing
        && let Some(last) = links.last()
        && let Some(backing) = last.layer.backing()
    {
        let next = open_below(&links, &backing.name, backing.format.as_deref(), &*gate, options);
        // Every image on the way down has a word to say about it.
        let link = next.map_err(|error| {
            links
                .iter()
                .fold(error, |error, _| error.context("Could not open backing file"))
        })?;
        links.push(link);
    }
    for link in &links {
        let permissions = options.final_permissions(link.format, link.write);
        link.layer.file().lock(permissions)?;
    }
    let chain = links.into_iter().rev().fold(None, |below, link| {
        Some(Arc::new(Image::new(link.layer, below, link.name, link.write)))
    });
    chain.ok_or_else(|| Error::invalid("No image"))
}

/// Opens the image that the last of `links` is based on.
fn open_below(
    links: &[Link],
    backing: &str,
    format: Option<&str>,
    gate: &dyn Gate,
    options: &OpenOptions,
) -> Result<Link> {
    let from = links.last().map_or("", |link| link.name.as_str());
    if links.len() >= MAX_CHAIN {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("More than {MAX_CHAIN} images in a chain"),
        ));
    }
    let format = format.map(known).transpose()?;
    let device = gate.open(&Reference {
        name: backing,
        from,
        role: Role::Backing,
        // What to lock it for is known when its format is.
        permissions: Permissions::FORCE_SHARE,
    })?;
    let name = device.name();
    let link = open_link(device, &name, format, false, gate, options)?;
    let again = |other: &Link| other.identity == link.identity && other.format.name() == link.format.name();
    if link.identity.is_some() && links.iter().any(again) {
        return Err(Error::corrupt(format!(
            "Backing file '{name}' creates an infinite loop"
        )));
    }
    Ok(link)
}

fn open_link(
    device: Arc<dyn Device>,
    name: &str,
    format: Option<&'static dyn Format>,
    write: bool,
    gate: &dyn Gate,
    options: &OpenOptions,
) -> Result<Link> {
    let mut file = device;
    let chosen = match format {
        Some(format) => format,
        None => {
            let format = probe(&*file, name)?;
            if format.name() == "raw" && write {
                if let Some(warn) = &options.on_warning {
                    warn(&GuessedRaw::warning(name));
                }
                file = Arc::new(GuessedRaw::new(file, name));
            }
            format
        }
    };
    file.lock(options.permissions(chosen, write))?;
    let identity = file.identity();
    let layer = chosen.open(OpenRequest {
        file,
        name,
        write,
        for_check: options.for_check,
        no_data: options.no_data,
        force_share: options.force_share,
        options: &mut NodeOptions::new(),
        objects: &options.objects,
        gate,
        budget: options.budget.clone(),
    })?;
    Ok(Link {
        layer,
        name: name.to_owned(),
        write,
        format: chosen,
        identity,
    })
}
