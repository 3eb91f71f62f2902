//! Opening images with their backing chains.

use std::fmt;
use std::sync::Arc;

use diskimage_core::{
    Budget, Device, Error, Format, Gate, Image, LocalTime, NodeOptions, Note, Objects, Permissions, Result,
    ResultExt,
};
use diskimage_formats::Raw;
use diskimage_protocols::CacheMode;

use crate::gate::FileGate;
use crate::graph::{Mode, node_of_name, open_chain, open_device_chain};

/// How an image is opened: for reading, with its backing chain and as its bytes tell, unless said otherwise.
#[must_use = "it only says how an image is opened"]
#[derive(Clone, Default)]
pub struct OpenOptions {
    pub(crate) format: Option<String>,
    write: bool,
    pub(crate) resize: bool,
    cache: CacheMode,
    force_share: bool,
    exclusive: bool,
    pub(crate) no_backing: bool,
    pub(crate) write_below: Option<usize>,
    pub(crate) no_data: bool,
    pub(crate) for_check: bool,
    pub(crate) objects: Arc<Objects>,
    pub(crate) node_options: NodeOptions,
    pub(crate) budget: Budget,
    pub(crate) local_time: LocalTime,
    gate: Option<Arc<dyn Gate>>,
    pub(crate) on_note: Option<Arc<OnNote>>,
    pub(crate) on_lost: Option<Arc<OnImageLost>>,
}

/// Takes a message for the user, which may have several lines.
type OnNote = dyn Fn(&Note) + Send + Sync;

/// Takes the name of an image whose changes were lost when it was dropped, and why they were.
type OnImageLost = dyn Fn(&str, &Error) + Send + Sync;

impl OpenOptions {
    /// The options that [`OpenOptions`] describes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The format to open it as, by name.
    pub fn format(mut self, format: impl Into<String>) -> Self {
        self.format = Some(format.into());
        self
    }

    /// Whether it will be changed; the images below never are.
    pub fn write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// Whether its size will be changed, too.
    pub fn resize(mut self, resize: bool) -> Self {
        self.resize = resize;
        self
    }

    /// How requests reach the disk.
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Whether to read it even though another process may be changing it.
    pub fn force_share(mut self, force_share: bool) -> Self {
        self.force_share = force_share;
        self
    }

    /// Whether nobody may write to it meanwhile, raw images included: what is read will be relied on.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// Which of the images below will be changed as well, 1 being the one right below.
    pub fn write_below(mut self, depth: usize) -> Self {
        self.write_below = Some(depth);
        self
    }

    /// Whether to leave the images below alone.
    pub fn no_backing(mut self, no_backing: bool) -> Self {
        self.no_backing = no_backing;
        self
    }

    /// Whether only facts are wanted and no bytes of the guest's.
    pub fn no_data(mut self, no_data: bool) -> Self {
        self.no_data = no_data;
        self
    }

    /// Whether it is opened to be checked: damage that a check can mend is no reason to refuse it.
    pub fn for_check(mut self, for_check: bool) -> Self {
        self.for_check = for_check;
        self
    }

    /// What the options of images refer to by name: secrets and the like.
    pub fn objects(mut self, objects: Arc<Objects>) -> Self {
        self.objects = objects;
        self
    }

    /// Options of the image's own node, on top of what its name says.
    pub fn node_options(mut self, options: NodeOptions) -> Self {
        self.node_options = options;
        self
    }

    /// The memory that the numbers in the images may claim.
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// What time it is where the user is, for images that are made up of files with dates; UTC if nobody says.
    pub fn local_time(mut self, local_time: LocalTime) -> Self {
        self.local_time = local_time;
        self
    }

    /// Who opens the files that the images refer to; [`FileGate`] if nobody is named.
    pub fn gate(mut self, gate: Arc<dyn Gate>) -> Self {
        self.gate = Some(gate);
        self
    }

    /// Who is told what the user ought to know.
    pub fn on_note(mut self, on_note: Arc<OnNote>) -> Self {
        self.on_note = Some(on_note);
        self
    }

    /// Who is told the name of an image, and the error, if changes cannot be written back when the image is dropped: a
    /// drop has nobody to return an error to.
    pub fn on_lost(mut self, on_lost: Arc<OnImageLost>) -> Self {
        self.on_lost = Some(on_lost);
        self
    }

    pub(crate) fn tell(&self, note: &Note) {
        if let Some(on_note) = &self.on_note {
            on_note(note);
        }
    }

    /// What a file is locked for whose image is of `format`.
    pub(crate) fn permissions(&self, format: Option<&dyn Format>, mode: Mode) -> Permissions {
        // What has no format has no tables that another writer could spoil, as raw has none.
        let mut permissions = format.unwrap_or(&Raw).permissions(mode.write);
        permissions.resize |= mode.write && self.resize;
        if self.no_data && !mode.write {
            permissions.read = false;
        }
        if mode.force_share {
            permissions.share_write = true;
            permissions.share_resize = true;
        }
        permissions
    }

    /// What it is locked for once the whole chain is open.
    pub(crate) fn final_permissions(&self, format: Option<&dyn Format>, mode: Mode) -> Permissions {
        let mut permissions = self.permissions(format, mode);
        if self.exclusive && !mode.write && !mode.force_share {
            permissions.share_write = false;
            permissions.share_resize = false;
        }
        permissions
    }

    /// How the topmost node is opened.
    pub(crate) fn mode(&self) -> Mode {
        Mode {
            write: self.write,
            cache: self.cache,
            force_share: self.force_share,
            is_below: false,
        }
    }

    pub(crate) fn gate_or_default(&self) -> Arc<dyn Gate> {
        self.gate.clone().unwrap_or_else(|| {
            Arc::new(FileGate {
                cache: self.cache,
                force_share: self.force_share,
                exclusive: self.exclusive,
                objects: Arc::clone(&self.objects),
                budget: self.budget.clone(),
                local_time: self.local_time.clone(),
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

/// Opens the image that `name` names: a file, what a protocol has under that name, or with `json:` in front the options
/// of a node.
///
/// An image that was opened for writing keeps some changes in memory until [`Device::flush`], [`Image::close`], or until the
/// last [`Arc`] of it is dropped. See [`Image`] for what a drop cannot do, and [`OpenOptions::on_lost`] for how to be told.
///
/// # Errors
/// `Could not open 'NAME'` and below it everything that can be wrong with the file, the image, and the images that it
/// is based on.
pub fn open(name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    open_bare(name, options).context(|| format!("Could not open '{name}'"))
}

/// Opens the image that the options of a node describe, `driver` first of all.
///
/// # Errors
/// As [`open`], without the topmost words.
pub fn open_node(mut node: NodeOptions, options: &OpenOptions) -> Result<Arc<Image>> {
    node.overlay(options.node_options.clone());
    open_chain(node, options)
}

/// [`open`], with no word about which image it is.
pub(crate) fn open_bare(name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    let format = options.format.as_deref();
    open_node(node_of_name(name, format)?, options)
}

/// Opens the image on a device. `name` is where relative names in the image start.
///
/// # Errors
/// As [`open`], without the topmost words.
pub fn open_device(device: Arc<dyn Device>, name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    open_device_chain(device, name, options)
}
