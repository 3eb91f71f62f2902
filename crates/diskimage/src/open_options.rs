//! The options for opening an image, and the mode in which its nodes are opened.

use std::fmt;
use std::sync::Arc;

use diskimage_core::{
    Budget, Format, Gate, LocalTime, NodeOptions, Objects, OnImageLost, OnNote, OpenContext, OpenFiles,
    Permissions,
};
use diskimage_formats::Raw;
use diskimage_protocols::CacheMode;

use crate::gate::{FileGate, NewImageGate};

/// The options for opening an image. The default is to open it read-only, with its backing chain, in the probed format.
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
    objects: Arc<Objects>,
    pub(crate) node_options: NodeOptions,
    budget: Budget,
    local_time: LocalTime,
    pub(crate) unambiguous: bool,
    pub(crate) own_backing: Option<String>,
    gate: GateChoice,
    on_note: Option<Arc<OnNote>>,
    on_lost: Option<Arc<OnImageLost>>,
    new_files: OpenFiles,
}

impl OpenOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// The name of the format; the default is to probe it.
    pub fn format(mut self, format: impl Into<String>) -> Self {
        self.format = Some(format.into());
        self
    }

    /// Whether the image is opened for writing. Its backing images are not.
    pub fn write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// Whether the size of the image will be changed; other users must then not rely on it.
    pub fn resize(mut self, resize: bool) -> Self {
        self.resize = resize;
        self
    }

    /// The cache mode of the files.
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Whether to open the image although another process may be writing to it.
    pub fn force_share(mut self, force_share: bool) -> Self {
        self.force_share = force_share;
        self
    }

    /// Whether the image is opened without locks.
    pub fn shares(&self) -> bool {
        self.force_share
    }

    /// Whether to lock the chain against writers, raw images included, so that what is read stays consistent.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// The depth of the backing image that is opened for writing too: 1 is the backing image of the topmost one.
    pub fn write_below(mut self, depth: usize) -> Self {
        self.write_below = Some(depth);
        self
    }

    /// Whether to open the image without its backing images.
    pub fn no_backing(mut self, no_backing: bool) -> Self {
        self.no_backing = no_backing;
        self
    }

    /// Whether only metadata is read and no guest data.
    pub fn no_data(mut self, no_data: bool) -> Self {
        self.no_data = no_data;
        self
    }

    /// Whether the image is opened for a check: corruption that a check can repair is no reason to refuse it.
    pub fn for_check(mut self, for_check: bool) -> Self {
        self.for_check = for_check;
        self
    }

    /// The objects (secrets and the like) that the options of images refer to by name.
    pub fn objects(mut self, objects: Arc<Objects>) -> Self {
        self.objects = objects;
        self
    }

    /// Options of the topmost node; they take precedence over those in its name.
    pub fn node_options(mut self, options: NodeOptions) -> Self {
        self.node_options = options;
        self
    }

    /// The memory that the numbers in the images may claim.
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// The user's time zone, for the dates of files in directories (vvfat); the default is UTC.
    pub fn local_time(mut self, local_time: LocalTime) -> Self {
        self.local_time = local_time;
        self
    }

    /// The gate that opens the files that the images refer to; the default is [`FileGate`].
    pub fn gate(mut self, gate: Arc<dyn Gate>) -> Self {
        self.gate = GateChoice::Given(gate);
        self
    }

    /// What makes the gate of the default one, whose cache mode and sharing are those of these options:
    /// `options.gate_from(Arc::new(|files| Arc::new(BeneathGate::new(files))))`.
    pub fn gate_from(mut self, make: Arc<MakeGate>) -> Self {
        self.gate = GateChoice::From(make);
        self
    }

    /// Whether a format that is not stated has to be certain. A file that several formats recognize is an error then, and
    /// so is one that only looks like an image of a format, but does not begin like one.
    pub fn unambiguous(mut self, unambiguous: bool) -> Self {
        self.unambiguous = unambiguous;
        self
    }

    /// Called with each message for the user.
    pub fn on_note(mut self, on_note: Arc<OnNote>) -> Self {
        self.on_note = Some(on_note);
        self
    }

    /// Called with the name of an image and the error if changes cannot be written back when the image is dropped: a
    /// drop cannot return an error.
    pub fn on_lost(mut self, on_lost: Arc<OnImageLost>) -> Self {
        self.on_lost = Some(on_lost);
        self
    }

    /// The permissions that the file of an image of `format` is locked with.
    pub(crate) fn permissions(&self, format: Option<&dyn Format>, mode: Mode) -> Permissions {
        // An image without a format is locked as raw: it has no metadata that another writer could corrupt.
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

    /// The permissions that the file is locked with when the whole chain is open.
    pub(crate) fn final_permissions(&self, format: Option<&dyn Format>, mode: Mode) -> Permissions {
        let mut permissions = self.permissions(format, mode);
        if self.exclusive && !mode.write && !mode.force_share {
            permissions.share_write = false;
            permissions.share_resize = false;
        }
        permissions
    }

    /// The files of a new image, which are opened from here and not by name.
    pub fn new_files(mut self, files: OpenFiles) -> Self {
        self.new_files = files;
        self
    }

    /// The name of the backing image that the user has given the topmost image, which is new: it is no reference that only an
    /// image makes.
    pub fn own_backing(mut self, name: Option<impl Into<String>>) -> Self {
        self.own_backing = name.map(Into::into);
        self
    }

    /// The mode of the topmost node.
    pub(crate) fn mode(&self) -> Mode {
        Mode {
            write: self.write,
            cache: self.cache,
            force_share: self.force_share,
            is_below: false,
        }
    }

    /// What all nodes of the graph share.
    pub(crate) fn context(&self) -> OpenContext {
        let files = FileGate {
            cache: self.cache,
            force_share: self.force_share,
            exclusive: self.exclusive,
        };
        let gate: Arc<dyn Gate> = match &self.gate {
            GateChoice::Files => Arc::new(files),
            GateChoice::Given(gate) => Arc::clone(gate),
            GateChoice::From(make) => make(files),
        };
        let is_new = self.new_files.iter().next().is_some();
        OpenContext {
            objects: Arc::clone(&self.objects),
            gate: match is_new {
                true => Arc::new(NewImageGate(gate)),
                false => gate,
            },
            budget: self.budget.clone(),
            local_time: self.local_time.clone(),
            on_note: self.on_note.clone(),
            on_lost: self.on_lost.clone(),
            new_files: self.new_files.clone(),
        }
    }
}

/// Makes a gate of the default one.
pub type MakeGate = dyn Fn(FileGate) -> Arc<dyn Gate> + Send + Sync;

#[derive(Clone, Default)]
enum GateChoice {
    #[default]
    Files,
    Given(Arc<dyn Gate>),
    From(Arc<MakeGate>),
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

/// The mode that a node is opened in; its children inherit it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) write: bool,
    pub(crate) cache: CacheMode,
    pub(crate) force_share: bool,
    /// The node is a backing image.
    pub(crate) is_below: bool,
}
