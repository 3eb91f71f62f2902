//! The entries of the format table.

use std::fmt::Debug;
use std::sync::Arc;

use crate::options::{OptionDef, Options};
use crate::{Budget, Device, Error, Gate, Layer, NodeOptions, Objects, Permissions, Result};

/// How certain a format is that an image is of this format: 0 means that it is not; raw returns 1 for anything.
pub type Score = u32;

/// The data that a format is probed with.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The first bytes of the file, up to 2048.
    pub head: &'a [u8],
    /// The filename, for formats that are recognised by its extension.
    pub name: &'a str,
}

/// A format: a unit struct listed once in the table of formats; its options are data.
pub trait Format: Debug + Sync {
    /// The name of the format on the command line.
    fn name(&self) -> &'static str;

    /// The certainty that an image is of this format; the highest score wins.
    fn probe(&self, probe: &Probe<'_>) -> Score;

    /// The permissions that the file is locked for when an image of this format is opened for writing or reading.
    fn permissions(&self, write: bool) -> Permissions {
        if write {
            Permissions::WRITE
        } else {
            Permissions::READ
        }
    }

    /// The child nodes that a user can give, besides `file`.
    fn children(&self) -> &'static [&'static str] {
        &[]
    }

    /// The children that opening finds from the header: giving one does not change the `json:` filename.
    fn implicit_children(&self) -> &'static [&'static str] {
        &[]
    }

    /// The options that are part of the node's `json:` filename.
    fn strong_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// Opens the image on a device.
    ///
    /// # Errors
    /// Damage, unsupported features, invalid options, and files that the gate refused.
    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>>;

    /// Whether images of this format can be created.
    fn can_create(&self) -> bool {
        true
    }

    /// Fails for formats that cannot be created.
    ///
    /// # Errors
    /// Images of this format cannot be created.
    fn require_creation(&self) -> Result<()> {
        if self.can_create() {
            Ok(())
        } else {
            Err(Error::unsupported(format!(
                "Format driver '{}' does not support image creation",
                self.name()
            )))
        }
    }

    /// The options of `create`: parsing, `-o help` and documentation all come from this slice.
    fn create_options(&self) -> &'static [OptionDef];

    /// The options of `amend`; `None` if images of this format cannot be amended.
    fn amend_options(&self) -> Option<&'static [OptionDef]> {
        None
    }

    /// The files besides `name` that [`Format::create`] opens through the gate. The caller creates them before.
    ///
    /// # Errors
    /// Options that contradict each other.
    fn new_parts(&self, _name: &str, _size: u64, _options: &Options) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Whether images of this format can have a backing file.
    fn has_backing(&self) -> bool {
        false
    }

    /// Whether a new image records the CID of its backing image.
    fn records_backing_cid(&self) -> bool {
        false
    }

    /// Whether clusters can be compressed.
    fn has_compression(&self) -> bool {
        false
    }

    /// Whether the file stays, empty, after its creation has failed. The drivers of `qemu-img` differ in this.
    fn keeps_failed_file(&self) -> bool {
        false
    }

    /// Creates an image.
    ///
    /// # Errors
    /// Options that contradict each other, and write errors of the file.
    fn create(&self, request: CreateRequest<'_>) -> Result<()>;

    /// Computes the size that the file of an image would have.
    ///
    /// # Errors
    /// Invalid options, and damage in the tables of the source.
    fn measure(&self, _options: &Options, _source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        Err(Error::unsupported(format!(
            "Block driver '{}' does not support size measurement",
            self.name()
        )))
    }
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
    /// The children that the user gave, of those in [`Format::children`].
    pub children: Vec<(&'static str, Arc<dyn Device>)>,
    /// The options of its node; the format takes those that it supports.
    pub options: &'a mut NodeOptions,
    /// The objects that options refer to.
    pub objects: &'a Arc<Objects>,
    /// Opens the files that the image refers to.
    pub gate: &'a dyn Gate,
    /// The memory budget for tables.
    pub budget: Budget,
}

impl<'a> OpenRequest<'a> {
    /// To read the image `name` in `file` with `options`, and defaults for the rest.
    pub fn new(
        file: Arc<dyn Device>,
        name: &'a str,
        options: &'a mut NodeOptions,
        objects: &'a Arc<Objects>,
        gate: &'a dyn Gate,
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
            objects,
            gate,
            budget: Budget::default(),
        }
    }

    /// Takes the child `name`, if the user gave one.
    pub fn take_child(&mut self, name: &str) -> Option<Arc<dyn Device>> {
        let at = self.children.iter().position(|(other, _)| *other == name)?;
        Some(self.children.swap_remove(at).1)
    }
}

impl Debug for dyn Gate + '_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

/// The arguments of [`Format::create`]. The file is empty, or is a device with enough space.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    /// The file of the image.
    pub file: Arc<dyn Device>,
    /// Its filename, for messages.
    pub name: &'a str,
    /// The virtual size in bytes.
    pub size: u64,
    /// The creation options.
    pub options: &'a Options,
    /// The objects that options refer to.
    pub objects: &'a Arc<Objects>,
    /// Opens the files of [`Format::new_parts`], which the caller has created.
    pub gate: &'a dyn Gate,
    /// The [`Layer::cid`] of the backing image, if [`Format::records_backing_cid`].
    pub backing_cid: Option<u32>,
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
