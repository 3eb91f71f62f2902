//! What a layer can have besides what every [`Layer`] has.
//!
//! [`Capabilities`] has a place for each, `None` where the format has no such thing: what a format does not set, it does not
//! have. The methods of `dyn Layer` below ask for one and give the answer of a layer without it.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{
    Bitmaps, Check, CheckReport, Codec, Device, Encoder, Error, Layer, Name, Objects, Progress, Repair,
    ResizeRequest, Result, Snapshots, errno,
};

/// What one open image can do besides what all can.
#[derive(Clone, Copy, Debug, Default)]
pub struct Capabilities<'a> {
    /// Clusters are stored in encoded form.
    pub codec: Option<&'a dyn Codec>,
    /// The image can have a backing image.
    pub backed: Option<&'a dyn Backed>,
    /// Internal snapshots.
    pub snapshots: Option<&'a dyn Snapshots>,
    /// Persistent bitmaps.
    pub bitmaps: Option<&'a dyn Bitmaps>,
    /// An image like this could have persistent bitmaps, whether or not this one does.
    pub supports_bitmaps: bool,
    /// Inconsistencies can be looked for.
    pub check: Option<&'a dyn Check>,
    /// Options can be changed after creation.
    pub amend: Option<&'a dyn Amend>,
    /// The image is more than one file.
    pub multi_file: Option<&'a dyn MultiFile>,
    /// The device that holds the guest's data, if it is not [`Layer::file`].
    pub data_file: Option<&'a Arc<dyn Device>>,
    /// When the disk shrinks, the bytes cut off inside its last unit stay. They are mapped and written like the disk's own.
    pub keeps_tail: bool,
    /// What [`Layer::map`] finds in the tables is not reported as the allocation of the disk: qemu-img does not ask the
    /// tables of this format, and reports that all is data.
    pub hides_allocation: bool,
}

/// The backing image, as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name, which may be relative to the image's own directory.
    pub name: Name,
    /// The format, if the image says which.
    pub format: Option<String>,
}

/// A layer that can have a backing image.
pub trait Backed: Debug + Send + Sync {
    /// The backing image that the image names.
    fn backing(&self) -> Option<Backing>;

    /// Names another backing image, or none; what was written so far is durable before. The layer itself goes on with what
    /// it was opened on.
    ///
    /// # Errors
    /// `Operation not supported` if the format cannot change the name; names that are too long.
    fn set_backing(&self, _backing: Option<&Backing>) -> Result<()> {
        Err(Error::from_errno(errno::ENOTSUP))
    }

    /// Gives up all data, so that the backing image shows everywhere. A format that has no way keeps it, as in qemu-img:
    /// what it hides is the same.
    ///
    /// # Errors
    /// As for writing.
    fn make_empty(&self) -> Result<()> {
        Ok(())
    }

    /// The content ID: a number that changes with the contents of the disk, where the format keeps one.
    fn cid(&self) -> Option<u32> {
        None
    }

    /// Whether `backing` still has the contents that this image was made on. If not, what it does not have itself cannot be
    /// read.
    fn matches_backing(&self, _backing: &dyn Layer) -> bool {
        true
    }
}

/// A layer whose options can be changed after creation.
pub trait Amend: Debug + Send + Sync {
    /// Changes options that the image was created with. Afterwards the layer refuses to write: the image has to be opened
    /// again.
    ///
    /// # Errors
    /// What the format cannot change, each in words of its own.
    fn amend(&self, request: &AmendRequest<'_>) -> Result<()>;
}

/// A change of options.
#[derive(Clone, Copy, Debug)]
pub struct AmendRequest<'a> {
    /// Values for the options in [`Format::amend_options`](crate::Format::amend_options).
    pub options: &'a crate::options::Options,
    /// What would lock the user out, or is unsafe otherwise, is done as well.
    pub force: bool,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
    /// Told how far it is.
    pub progress: &'a Progress<'a>,
    /// As [`ResizeRequest::backing_len`], for options that change the size. [`Image::amend`](crate::Image::amend) sets it.
    pub backing_len: u64,
}

impl<'a> AmendRequest<'a> {
    /// A change to what `options` say, in which nothing is forced.
    pub fn new(
        options: &'a crate::options::Options,
        objects: &'a Arc<Objects>,
        progress: &'a Progress<'a>,
    ) -> Self {
        Self {
            options,
            force: false,
            objects,
            progress,
            backing_len: 0,
        }
    }
}

/// A layer whose image is several files.
pub trait MultiFile: Debug + Send + Sync {
    /// The files that make up the image besides [`Layer::file`], by their names in the block graph.
    fn parts(&self) -> Vec<(String, Arc<dyn Device>)>;

    /// The paths of further files that [`Layer::resize`] needs for `request`, relative to the current directory if they
    /// are not absolute. The caller makes them, and passes them on in [`ResizeRequest::parts`].
    ///
    /// # Errors
    /// As [`Layer::resize`].
    fn new_parts(&self, request: &ResizeRequest) -> Result<Vec<String>>;
}

impl<'a> dyn Layer + 'a {
    /// [`Backed::backing`]; `None` also if there can be none.
    pub fn backing(&self) -> Option<Backing> {
        self.capabilities().backed?.backing()
    }

    /// [`Backed::set_backing`].
    ///
    /// # Errors
    /// As there, and `Operation not supported` if the format has no backing images.
    pub fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        match self.capabilities().backed {
            Some(backed) => backed.set_backing(backing),
            None => Err(Error::from_errno(errno::ENOTSUP)),
        }
    }

    /// [`Backed::make_empty`]; nothing where there can be no backing image.
    ///
    /// # Errors
    /// As there.
    pub fn make_empty(&self) -> Result<()> {
        match self.capabilities().backed {
            Some(backed) => backed.make_empty(),
            None => Ok(()),
        }
    }

    /// [`Backed::cid`]; `None` also if there can be no backing image.
    pub fn cid(&self) -> Option<u32> {
        self.capabilities().backed?.cid()
    }

    /// Its [`Codec`].
    ///
    /// # Errors
    /// There is none.
    pub fn codec(&self) -> Result<&dyn Codec> {
        let codec = self.capabilities().codec;
        codec.ok_or_else(|| Error::unsupported("This format has no encoded clusters"))
    }

    /// [`Codec::encoder`]; `None` also if the format does not compress.
    ///
    /// # Errors
    /// As there.
    pub fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        match self.capabilities().codec {
            Some(codec) => codec.encoder(),
            None => Ok(None),
        }
    }

    /// Whether the disk can be written only as the encoded form of whole clusters.
    pub fn needs_encoding(&self) -> bool {
        self.capabilities()
            .codec
            .is_some_and(|codec| codec.needs_encoding())
    }

    /// Its internal snapshots; `None` if the format has none.
    pub fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.capabilities().snapshots
    }

    /// Its persistent bitmaps; `None` if the format or this version of it has none.
    pub fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        self.capabilities().bitmaps
    }

    /// How many bytes its persistent bitmaps take in a copy with clusters of `cluster_size`; `None` if an image like this
    /// could not have any.
    ///
    /// # Errors
    /// Damage in their directory.
    pub fn bitmap_bytes(&self, cluster_size: u64) -> Result<Option<u64>> {
        let capabilities = self.capabilities();
        match capabilities.bitmaps {
            Some(bitmaps) => bitmaps.bytes(cluster_size).map(Some),
            None => Ok(capabilities.supports_bitmaps.then_some(0)),
        }
    }

    /// [`Check::check`].
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format has no check.
    pub fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        match self.capabilities().check {
            Some(check) => check.check(repair, progress),
            None => Err(Error::unsupported("This image format does not support checks")),
        }
    }

    /// [`Amend::amend`].
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format has no options to change.
    pub fn amend(&self, request: &AmendRequest<'_>) -> Result<()> {
        match self.capabilities().amend {
            Some(amend) => amend.amend(request),
            None => Err(Error::unsupported(format!(
                "Format driver '{}' does not support option amendment",
                self.format()
            ))),
        }
    }

    /// [`MultiFile::parts`]; none if the image is one file.
    pub fn parts(&self) -> Vec<(String, Arc<dyn Device>)> {
        let multi_file = self.capabilities().multi_file;
        multi_file.map(|files| files.parts()).unwrap_or_default()
    }

    /// [`MultiFile::new_parts`]; none if the image stays one file.
    ///
    /// # Errors
    /// As there.
    pub fn new_parts(&self, request: &ResizeRequest) -> Result<Vec<String>> {
        match self.capabilities().multi_file {
            Some(files) => files.new_parts(request),
            None => Ok(Vec::new()),
        }
    }

    /// The device that holds the guest's data, if it is another one than [`Layer::file`].
    pub fn data_file(&self) -> Option<&Arc<dyn Device>> {
        self.capabilities().data_file
    }
}
