//! The entries of the format table.

use std::fmt::Debug;
use std::sync::Arc;

use crate::options::{OptionDef, Options};
use crate::{Budget, Device, Error, Gate, Layer, NodeOptions, Objects, Permissions, Result};

/// How sure a format is that an image is one of its own: 0 is not at all, 1 is raw's "anything could be".
pub type Score = u32;

/// What probing looks at.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The first bytes of the file, up to 2048.
    pub head: &'a [u8],
    /// The file's name, for formats known by it.
    pub name: &'a str,
}

/// A format: a unit struct listed once in the table of formats; its options are data.
pub trait Format: Debug + Sync {
    /// The name on the command line.
    fn name(&self) -> &'static str;

    /// How sure it is; the highest score wins.
    fn probe(&self, probe: &Probe<'_>) -> Score;

    /// What the file is locked for when an image of this format is opened to `write` or to read.
    fn permissions(&self, write: bool) -> Permissions {
        if write {
            Permissions::WRITE
        } else {
            Permissions::READ
        }
    }

    /// The nodes below that a user can give besides the file that the image is in.
    fn children(&self) -> &'static [&'static str] {
        &[]
    }

    /// Those of them that an image finds by itself: giving one makes no other image of it.
    fn implicit_children(&self) -> &'static [&'static str] {
        &[]
    }

    /// The options without which an image that is open would be another one.
    fn strong_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// Opens the image on a device.
    ///
    /// # Errors
    /// Everything that is wrong with it, and files that the gate refused.
    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>>;

    /// Whether there is a way to make images of this format; others are only read.
    fn can_create(&self) -> bool {
        true
    }

    /// Refuses formats that are only read.
    ///
    /// # Errors
    /// There is no way to make images of this format.
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

    /// The options of `create`: parsing, `-o help` and documentation come from this slice.
    fn create_options(&self) -> &'static [OptionDef];

    /// The options of `amend`; `None` if images of this format cannot be amended.
    fn amend_options(&self) -> Option<&'static [OptionDef]> {
        None
    }

    /// The files besides the one called `name` that [`Format::create`] opens through the gate: they are made before.
    ///
    /// # Errors
    /// Options that do not fit together.
    fn new_parts(&self, _name: &str, _size: u64, _options: &Options) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Whether images of this format can have a backing file.
    fn has_backing(&self) -> bool {
        false
    }

    /// Whether a new image says what the contents of the one below are.
    fn records_backing_cid(&self) -> bool {
        false
    }

    /// Whether clusters can be compressed.
    fn has_compression(&self) -> bool {
        false
    }

    /// Whether a file that did not become an image stays, empty: the original's drivers differ in that.
    fn keeps_failed_file(&self) -> bool {
        false
    }

    /// Writes a new image.
    ///
    /// # Errors
    /// Options that do not fit together, and what the operating system says.
    fn create(&self, request: CreateRequest<'_>) -> Result<()>;

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

/// What an image is opened with.
#[derive(Debug)]
pub struct OpenRequest<'a> {
    /// Where its bytes are.
    pub file: Arc<dyn Device>,
    /// Its name, for messages and as the start of relative names.
    pub name: &'a str,
    /// Whether it will be changed.
    pub write: bool,
    /// Opened by `check`: damage that the check can mend does not keep the image from being opened.
    pub for_check: bool,
    /// Only facts are wanted: files with the guest's data need not be there.
    pub no_data: bool,
    /// Take no locks that others could mind, as `-U` asks for.
    pub force_share: bool,
    /// The nodes below that the user gave, of those in [`Format::children`].
    pub children: Vec<(&'static str, Arc<dyn Device>)>,
    /// The options of its node; the format takes those that it knows.
    pub options: &'a mut NodeOptions,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
    /// Opens what the image refers to.
    pub gate: &'a dyn Gate,
    /// Memory for tables.
    pub budget: Budget,
}

impl<'a> OpenRequest<'a> {
    /// To read the image called `name` in `file`, with nothing said but `options`.
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

    /// Takes the node below called `name`, if the user gave one.
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

/// What an image is made from. The file exists and is empty, or is a device with enough room.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    /// Where the image goes.
    pub file: Arc<dyn Device>,
    /// Its name, for messages.
    pub name: &'a str,
    /// The disk's size in bytes.
    pub size: u64,
    /// What the user asked for.
    pub options: &'a Options,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
    /// Opens the files of [`Format::new_parts`], which exist.
    pub gate: &'a dyn Gate,
    /// The [`Layer::cid`] of the image below, where [`Format::records_backing_cid`].
    pub backing_cid: Option<u32>,
}

/// What `measure` measures for.
#[derive(Clone, Copy, Debug)]
pub enum MeasureSource<'a> {
    /// An empty disk of this many bytes.
    Size(u64),
    /// The contents of an opened image.
    Image(&'a crate::Image),
}

impl MeasureSource<'_> {
    /// The disk's size in bytes.
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

/// How large a file would be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// For what is there now.
    pub required: u64,
    /// When every byte of the disk has been written.
    pub fully_allocated: u64,
    /// What persistent bitmaps take on top, where the source has any.
    pub bitmaps: Option<u64>,
}
