//! The entries of the format table.

use std::fmt::Debug;
use std::sync::Arc;

use crate::options::{OptionDef, Options};
use crate::{Device, Error, Layer, NodeOptions, Objects, OpenContext, Origin, Permissions, Result};

/// How certain a format is that an image is of this format: 0 means that it is not; raw returns 1 for anything.
pub type Score = u32;

/// The score of an image that qemu-img takes for raw, because it does not begin exactly as its format says: more than
/// that of raw, less than that of all others.
pub const LOOSE: Score = 3;

/// The data that a format is probed with.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The first bytes of the file, up to 2048.
    pub head: &'a [u8],
    /// The last sector of the file, 512 bytes from a multiple of 512 on, padded with zeroes; empty if the file is
    /// empty.
    pub tail: &'a [u8],
    /// The length of the file.
    pub len: u64,
    /// The filename, for formats that are recognised by its extension.
    pub name: &'a str,
}

/// A format: a unit struct listed once in the table of formats. What is only a fact about it is data, in
/// [`Format::properties`].
pub trait Format: Debug + Sync {
    /// The name on the command line.
    fn name(&self) -> &'static str;

    /// What is known about the format without an image.
    fn properties(&self) -> &'static FormatProperties;

    /// How sure it is; the highest score wins.
    fn probe(&self, probe: &Probe<'_>) -> Score;

    /// Opens the image on a device.
    ///
    /// # Errors
    /// Everything that is wrong with it, and files that the gate refused.
    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>>;

    /// Plans a new image. Nothing is made or written before [`CreatePlan::write`].
    ///
    /// # Errors
    /// The mistakes in the options that qemu-img finds before it makes a file, and a format that is only read.
    fn plan_create<'a>(&self, _request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        Err(no_creation(self.name()))
    }

    /// How large a file would be.
    ///
    /// # Errors
    /// Options that make no sense, and reading the source's tables.
    fn measure(&self, _options: &Options, _source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        Err(Error::unsupported(format!(
            "Block driver '{}' does not support size measurement",
            self.name()
        )))
    }
}

/// What is known about a format without an image.
#[derive(Clone, Copy, Debug)]
pub struct FormatProperties {
    /// The options of `create`: parsing, `-o help` and documentation come from this slice. `None` if images of this format
    /// are only read.
    pub create_options: Option<&'static [OptionDef]>,
    /// The options of `amend`; `None` if images of this format cannot be amended.
    pub amend_options: Option<&'static [OptionDef]>,
    /// The nodes below that a user can give besides the file that the image is in.
    pub children: &'static [&'static str],
    /// Those of them that opening finds from the header: naming one does not change the node's identity.
    pub implicit_children: &'static [&'static str],
    /// Options that are part of the node's `json:` filename.
    pub strong_options: &'static [&'static str],
    /// Images can have a backing image.
    pub has_backing: bool,
    /// Clusters can be compressed.
    pub has_compression: bool,
    /// There are no tables that another writer could spoil: others may write to the file meanwhile.
    pub shares_writes: bool,
}

impl FormatProperties {
    /// A format that is only read and has none of it.
    pub const READ_ONLY: Self = Self {
        create_options: None,
        amend_options: None,
        children: &[],
        implicit_children: &[],
        strong_options: &[],
        has_backing: false,
        has_compression: false,
        shares_writes: false,
    };
}

impl dyn Format + '_ {
    /// The options of `create`; none if images of this format are only read.
    pub fn create_options(&self) -> &'static [OptionDef] {
        self.properties().create_options.unwrap_or_default()
    }

    /// What the file is locked for when an image of this format is opened to `write` or to read.
    pub fn permissions(&self, write: bool) -> Permissions {
        match (self.properties().shares_writes, write) {
            (true, write) => Permissions {
                write,
                ..Permissions::READ_SHARED
            },
            (false, true) => Permissions::WRITE,
            (false, false) => Permissions::READ,
        }
    }

    /// Refuses formats that are only read.
    ///
    /// # Errors
    /// There is no way to make images of this format.
    pub fn require_creation(&self) -> Result<()> {
        match self.properties().create_options {
            Some(_) => Ok(()),
            None => Err(no_creation(self.name())),
        }
    }
}

fn no_creation(format: &str) -> Error {
    Error::unsupported(format!(
        "Format driver '{format}' does not support image creation"
    ))
}

/// The arguments of [`Format::open`].
#[derive(Debug)]
pub struct OpenRequest<'a> {
    /// The file of the image.
    pub file: Arc<dyn Device>,
    /// Its filename, for messages and to resolve relative names against.
    pub name: &'a str,
    /// Whether it is opened for writing.
    pub write: bool,
    /// Opened by `check`: damage that the check can repair is no error.
    pub for_check: bool,
    /// Opened for `info`: data files are not opened.
    pub no_data: bool,
    /// Take no locks that conflict with other processes (`-U`).
    pub force_share: bool,
    /// The children that the user gave, of those in [`FormatProperties::children`].
    pub children: Vec<(&'static str, Arc<dyn Device>)>,
    /// The options of its node; the format takes those that it supports.
    pub options: &'a mut NodeOptions,
    /// What is known about the image, for the gate that opens its other files.
    pub origin: Origin,
    /// What it shares with the other nodes of its graph.
    pub context: &'a OpenContext,
}

impl<'a> OpenRequest<'a> {
    /// To read the image `name` in `file` with `options`, and defaults for the rest.
    pub fn new(
        file: Arc<dyn Device>,
        name: &'a str,
        options: &'a mut NodeOptions,
        context: &'a OpenContext,
    ) -> Self {
        Self {
            file,
            name,
            write: false,
            for_check: false,
            no_data: false,
            force_share: false,
            children: Vec::new(),
            options,
            origin: Origin::STATED,
            context,
        }
    }

    /// Opens the file `name`, in which the image keeps guest data. A relative name is resolved against the current
    /// directory.
    ///
    /// # Errors
    /// As [`Gate::open`](crate::Gate::open).
    pub fn open_data(&self, name: &str, permissions: Permissions) -> Result<Arc<dyn Device>> {
        self.context.open_data(name, self.name, self.origin, permissions)
    }

    /// Takes the child `name`, if the user gave one.
    pub fn take_child(&mut self, name: &str) -> Option<Arc<dyn Device>> {
        let at = self.children.iter().position(|(other, _)| *other == name)?;
        Some(self.children.swap_remove(at).1)
    }
}

/// A new image that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct CreateRequest<'a> {
    /// The name of its file, which those of further files go by.
    pub name: &'a str,
    /// The disk's size in bytes.
    pub size: u64,
    /// What the user asked for.
    pub options: &'a Options,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
}

/// A new image whose options are parsed.
pub struct CreatePlan<'a> {
    /// The paths of the files that the image has besides its own.
    pub parts: Vec<String>,
    /// What these files are locked for before they are emptied.
    pub part_permissions: Permissions,
    /// The new image records what its backing image contains: that one is opened and passed on in [`NewFiles::backing`].
    pub reads_backing: bool,
    /// What is written to the new image is always encoded.
    pub encodes: bool,
    write: Box<WriteImage<'a>>,
}

type WriteImage<'a> = dyn FnOnce(NewFiles<'_>) -> Result<()> + 'a;

impl<'a> CreatePlan<'a> {
    /// A new image in one file, which `write` writes.
    pub fn new(write: impl FnOnce(NewFiles<'_>) -> Result<()> + 'a) -> Self {
        Self {
            parts: Vec::new(),
            part_permissions: Permissions::WRITE,
            reads_backing: false,
            encodes: false,
            write: Box::new(write),
        }
    }

    /// The same image with further files at the paths `parts`, which are locked for `permissions`.
    #[must_use]
    pub fn with_parts(self, parts: Vec<String>, permissions: Permissions) -> Self {
        Self {
            parts,
            part_permissions: permissions,
            ..self
        }
    }

    /// The same image, which records what its backing image contains, or does not.
    #[must_use]
    pub fn with_reads_backing(self, reads_backing: bool) -> Self {
        Self {
            reads_backing,
            ..self
        }
    }

    /// The same image, in which everything is encoded, or is not.
    #[must_use]
    pub fn with_encodes(self, encodes: bool) -> Self {
        Self { encodes, ..self }
    }

    /// Writes the image.
    ///
    /// # Errors
    /// Options that do not fit together, and what the operating system says.
    pub fn write(self, files: NewFiles<'_>) -> Result<()> {
        (self.write)(files)
    }
}

impl Debug for CreatePlan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatePlan")
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

/// The files that a new image is written to.
pub struct NewFiles<'a> {
    /// The image's own, which exists and is empty, or is a device with enough room.
    pub file: Arc<dyn Device>,
    /// Makes one of [`CreatePlan::parts`], empty and locked: they can be more than a process may have open at once.
    pub make_part: &'a mut dyn FnMut(&str) -> Result<Arc<dyn Device>>,
    /// The backing image, where [`CreatePlan::reads_backing`] asks for it.
    pub backing: Option<Arc<crate::Image>>,
}

impl NewFiles<'_> {
    /// Runs `write` with an image's own file and no others.
    ///
    /// # Errors
    /// Those of `write`, and [`ErrorKind::Denied`](crate::ErrorKind::Denied) if other files are asked for.
    pub fn only(file: Arc<dyn Device>, write: impl FnOnce(NewFiles<'_>) -> Result<()>) -> Result<()> {
        let denied = |part: &str| Error::new(crate::ErrorKind::Denied, format!("No file '{part}'"));
        write(NewFiles {
            file,
            make_part: &mut |part| Err(denied(part)),
            backing: None,
        })
    }
}

impl Debug for NewFiles<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewFiles")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// The data to measure for.
#[derive(Clone, Copy, Debug)]
pub enum MeasureSource<'a> {
    /// An empty disk of this many bytes.
    Size(u64),
    /// The contents of an opened image.
    Image(&'a crate::Image),
}

impl MeasureSource<'_> {
    /// The virtual size in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Size(len) => *len,
            Self::Image(image) => image.len(),
        }
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The size that a file would have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// With the present data.
    pub required: u64,
    /// With every cluster allocated.
    pub fully_allocated: u64,
    /// The additional size of persistent bitmaps, if the source has any.
    pub bitmaps: Option<u64>,
}
