//! The optional features of a [`Layer`].
//!
//! [`Capabilities`] has a field for each, `None` if the format does not support it. The methods of `dyn Layer` below
//! call a feature, and return the default of a layer that lacks it.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{
    Backing, Bitmaps, Check, CheckReport, Codec, CompressionLevel, Device, EncodedForm, Encoder, Error,
    Layer, Name, Note, Objects, Progress, Repair, ResizeRequest, Result, Snapshots, errno,
};

/// The optional features of one open image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Capabilities<'a> {
    /// Encoded clusters.
    pub codec: Option<&'a dyn Codec>,
    /// A backing image.
    pub backed: Option<&'a dyn Backed>,
    /// Internal snapshots.
    pub snapshots: Option<&'a dyn Snapshots>,
    /// Persistent bitmaps.
    pub bitmaps: Option<&'a dyn Bitmaps>,
    /// The format and version support persistent bitmaps, whether or not this image has any.
    pub supports_bitmaps: bool,
    /// Why this image can have no bitmaps although its format has them.
    pub bitmap_obstacle: Option<&'static str>,
    /// A check for inconsistencies.
    pub check: Option<&'a dyn Check>,
    /// Options that can be changed after creation.
    pub amend: Option<&'a dyn Amend>,
    /// What identifies the disk, where overlays record that of their backing image.
    pub identity: Option<&'a DiskIdentity>,
    /// Several files.
    pub multi_file: Option<&'a dyn MultiFile>,
    /// A mark for contents that are not complete.
    pub unfinished: Option<&'a dyn Unfinished>,
    /// The data file, if guest data is not in [`Layer::file`].
    pub data_file: Option<&'a Arc<dyn Device>>,
    /// A shrink of the disk keeps the bytes beyond its end in the last unit. They can be mapped and written like those
    /// of the disk.
    pub keeps_tail: bool,
    /// What [`Layer::map`] finds in the tables is not reported as the allocation of the disk: qemu-img does not ask the
    /// tables of this format, and reports that all is data.
    pub hides_allocation: bool,
}

/// What identifies the contents of a disk: overlays record it, and refuse a backing image with another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskIdentity {
    /// The unique ID of a VHD, the `DataWriteGuid` of a VHDX, as stored.
    pub id: [u8; 16],
    /// The time stamp of a VHD, in seconds since 2000.
    pub time_stamp: Option<u32>,
}

/// A layer that can have a backing image.
pub trait Backed: Debug + Send + Sync {
    /// The backing image that the image names.
    fn backing(&self) -> Option<Backing>;

    /// Changes or removes the name of the backing image. Earlier writes are durable before. The open layer keeps its
    /// present backing image.
    ///
    /// # Errors
    /// `Operation not supported` if the format cannot change the name; names that are too long.
    fn set_backing(&self, _backing: Option<&Backing>) -> Result<()> {
        Err(Error::from_errno(errno::ENOTSUP))
    }

    /// Discards all data, so that reads return the backing image everywhere. A format that does not support this keeps
    /// the data, as in qemu-img: it is equal to that of the backing image after a commit.
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

    /// Compares `backing` with the identity that the image recorded when it was created.
    ///
    /// # Errors
    /// Another image, with both identities, in a format that cannot be opened on it at all.
    fn check_backing(&self, _backing: &dyn Layer) -> Result<BackingIdentity> {
        Ok(BackingIdentity::Recorded)
    }

    /// Where the backing image is looked for besides the name in [`Backed::backing`].
    fn backing_search(&self) -> BackingSearch {
        BackingSearch::default()
    }
}

/// What an image finds when it compares its backing image with what it recorded of that.
#[derive(Clone, Debug)]
pub enum BackingIdentity {
    /// It is the recorded one, or the format does not tell.
    Recorded,
    /// It is the recorded one, which may have changed since; the note is a warning.
    MayHaveChanged(Note),
    /// It is another one, or has changed since: both identities, for the user. What the image reads from it cannot be
    /// read; what the image has itself can.
    Other(String),
}

/// Where a backing image is looked for, by formats that name it as another machine does.
#[derive(Clone, Debug, Default)]
pub struct BackingSearch {
    /// Further names, to be tried in order if no file has the name in [`Backed::backing`]. The last one is then looked
    /// for beside the image in other letter case. Empty if the format keeps to the one name.
    pub names: Vec<Name>,
    /// The names as the image stores them, if they are names of another system, or several.
    pub stored: Vec<String>,
    /// What the image says about its backing image and where that was looked for when the image was opened, if it names
    /// more than one file. For the message that no file was found.
    pub description: Option<String>,
}

/// A layer whose options can be changed after creation.
pub trait Amend: Debug + Send + Sync {
    /// Changes creation options. Afterwards the layer refuses to write: the image has to be opened again.
    ///
    /// # Errors
    /// Options that the format cannot change, and write errors of the file.
    fn amend(&self, request: &AmendRequest<'_>) -> Result<()>;
}

/// A change of options.
#[derive(Clone, Copy, Debug)]
pub struct AmendRequest<'a> {
    /// Values for the options in [`FormatProperties::amend_options`](crate::FormatProperties::amend_options).
    pub options: &'a crate::options::Options,
    /// Also makes unsafe changes, such as one that locks the user out.
    pub force: bool,
    /// The objects that options refer to.
    pub objects: &'a Arc<Objects>,
    /// Receives the progress.
    pub progress: &'a Progress<'a>,
    /// As [`ResizeRequest::backing_len`], for options that change the size. [`Image::amend`](crate::Image::amend) sets
    /// it.
    pub backing_len: u64,
}

impl<'a> AmendRequest<'a> {
    /// A change to `options`, without unsafe changes.
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
    /// are not absolute. The caller creates them and passes them in [`ResizeRequest::parts`].
    ///
    /// # Errors
    /// As [`Layer::resize`].
    fn new_parts(&self, request: &ResizeRequest) -> Result<Vec<String>>;
}

/// A layer that can be marked as one whose contents are not complete. The next writer repairs it.
pub trait Unfinished: Debug + Send + Sync {
    /// Sets or removes the mark, durably.
    ///
    /// # Errors
    /// A failed write or flush.
    fn mark(&self, unfinished: bool) -> Result<()>;
}

impl<'a> dyn Layer + 'a {
    /// [`Capabilities::unfinished`].
    pub fn unfinished(&self) -> Option<&dyn Unfinished> {
        self.capabilities().unfinished
    }

    /// [`Backed::backing`]; `None` also if there can be none.
    pub fn backing(&self) -> Option<Backing> {
        self.capabilities().backed?.backing()
    }

    /// [`Backed::set_backing`].
    ///
    /// # Errors
    /// As [`Backed::set_backing`], and `Operation not supported` if the format has no backing images.
    pub fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        match self.capabilities().backed {
            Some(backed) => backed.set_backing(backing),
            None => Err(Error::from_errno(errno::ENOTSUP)),
        }
    }

    /// [`Backed::make_empty`]; does nothing if the format has no backing images.
    ///
    /// # Errors
    /// As [`Backed::make_empty`].
    pub fn make_empty(&self) -> Result<()> {
        match self.capabilities().backed {
            Some(backed) => backed.make_empty(),
            None => Ok(()),
        }
    }

    /// [`Backed::backing_search`]; empty also if there can be no backing image.
    pub fn backing_search(&self) -> BackingSearch {
        self.capabilities()
            .backed
            .map(Backed::backing_search)
            .unwrap_or_default()
    }

    /// [`Backed::cid`]; `None` also if there can be no backing image.
    pub fn cid(&self) -> Option<u32> {
        self.capabilities().backed?.cid()
    }

    /// [`Backed::check_backing`]; the recorded one also if there can be no backing image.
    ///
    /// # Errors
    /// As [`Backed::check_backing`].
    pub fn check_backing(&self, backing: &dyn Layer) -> Result<BackingIdentity> {
        match self.capabilities().backed {
            Some(backed) => backed.check_backing(backing),
            None => Ok(BackingIdentity::Recorded),
        }
    }

    /// The [`Codec`] of the layer.
    ///
    /// # Errors
    /// The format has no encoded clusters.
    pub fn codec(&self) -> Result<&dyn Codec> {
        let codec = self.capabilities().codec;
        codec.ok_or_else(|| Error::unsupported("This format has no encoded clusters"))
    }

    /// [`Codec::encoder`]; `None` also if the format does not compress.
    ///
    /// # Errors
    /// As [`Codec::encoder`].
    pub fn encoder(&self, level: Option<CompressionLevel>) -> Result<Option<Box<dyn Encoder>>> {
        match self.capabilities().codec {
            Some(codec) => codec.encoder(level),
            None => Ok(None),
        }
    }

    /// [`Codec::form`]; `None` also if the format does not compress.
    pub fn encoded_form(&self) -> Option<EncodedForm> {
        self.capabilities().codec.and_then(|codec| codec.form())
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

    /// The bytes that the persistent bitmaps need in a copy with clusters of `cluster_size`; `None` if the format or
    /// version does not support bitmaps.
    ///
    /// # Errors
    /// Damage in the bitmap directory, or a failure to read it.
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
    /// As [`Check::check`], and [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format has no check.
    pub fn check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        match self.capabilities().check {
            Some(check) => check.check(repair, progress),
            None => Err(Error::unsupported("This image format does not support checks")),
        }
    }

    /// [`Amend::amend`].
    ///
    /// # Errors
    /// As [`Amend::amend`], and [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format has no options
    /// to change.
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
    /// As [`MultiFile::new_parts`].
    pub fn new_parts(&self, request: &ResizeRequest) -> Result<Vec<String>> {
        match self.capabilities().multi_file {
            Some(files) => files.new_parts(request),
            None => Ok(Vec::new()),
        }
    }

    /// The data file, if guest data is not in [`Layer::file`].
    pub fn data_file(&self) -> Option<&Arc<dyn Device>> {
        self.capabilities().data_file
    }
}
