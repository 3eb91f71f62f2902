//! A new image between its first byte and its publication.

use std::sync::Arc;

use diskimage_core::{Device, Filtered, NodeOptions, OpenFiles, Result};
use diskimage_protocols::{File, NewFile, Protocol};

use super::withheld::WithheldHead;

/// A new image whose files have no names yet, and whose storage has no head if it was there before. Dropped before it is
/// published, it is gone.
#[derive(Debug)]
#[must_use = "the image is lost unless it is published"]
pub struct NewImage {
    own: Own,
    pub(super) parts: Vec<NewFile>,
}

/// The image's own file.
#[derive(Debug)]
pub(super) enum Own {
    /// One that gets its name later.
    New(NewFile),
    /// One that has its name.
    InPlace(NewFile, Arc<Filtered<WithheldHead>>),
    /// Storage that is no file.
    Storage {
        /// The name of its protocol.
        protocol: &'static str,
        /// The options that it is opened with.
        node: NodeOptions,
        device: Arc<Filtered<WithheldHead>>,
    },
    /// A device that keeps nothing, as `/dev/null`.
    Sink(Arc<dyn Device>),
}

impl Own {
    /// A file that was made for the image.
    ///
    /// # Errors
    /// A file that has its name already cannot be written.
    pub(super) fn file(new: NewFile) -> Result<Self> {
        if !new.is_in_place() {
            return Ok(Self::New(new));
        }
        let file: Arc<dyn Device> = Arc::<File>::clone(new.file());
        let withheld = WithheldHead::new(file)?;
        Ok(Self::InPlace(new, Arc::new(Filtered(withheld))))
    }

    /// Storage that was opened by `protocol` with `node`.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn storage(
        device: Arc<dyn Device>,
        protocol: &dyn Protocol,
        node: NodeOptions,
    ) -> Result<Self> {
        if device.is_empty() {
            return Ok(Self::Sink(device));
        }
        Ok(Self::Storage {
            protocol: protocol.name(),
            node,
            device: Arc::new(Filtered(WithheldHead::new(device)?)),
        })
    }

    pub(super) fn device(&self) -> Arc<dyn Device> {
        match self {
            Self::New(new) => Arc::<File>::clone(new.file()),
            Self::InPlace(_, device) | Self::Storage { device, .. } => Arc::<Filtered<_>>::clone(device),
            Self::Sink(device) => Arc::clone(device),
        }
    }

    fn publish(self, parts: Vec<NewFile>) -> Result<()> {
        match self {
            Self::New(new) => NewFile::publish_all([new].into_iter().chain(parts).collect()),
            Self::InPlace(new, device) => {
                NewFile::publish_all(parts)?;
                device.0.publish()?;
                new.publish()
            }
            Self::Storage { device, .. } => {
                NewFile::publish_all(parts)?;
                device.0.publish()
            }
            Self::Sink(_) => NewFile::publish_all(parts),
        }
    }
}

impl NewImage {
    /// An image in `own` without further files.
    pub(super) fn new(own: Own) -> Self {
        Self {
            own,
            parts: Vec::new(),
        }
    }

    /// The files, for [`OpenOptions::new_files`](crate::OpenOptions::new_files): the image can be opened by its name with
    /// them.
    pub fn files(&self) -> OpenFiles {
        let of_part = |new: &NewFile| -> (String, Arc<dyn Device>) {
            (new.file().name(), Arc::<File>::clone(new.file()))
        };
        let parts = self.parts.iter().map(of_part);
        let device = self.own.device();
        match &self.own {
            Own::Storage { protocol, node, .. } => {
                OpenFiles::new(parts.collect()).with_storage(protocol, node.clone(), device)
            }
            Own::Sink(_) => OpenFiles::new(parts.collect()),
            Own::New(_) | Own::InPlace(..) => {
                OpenFiles::new(parts.chain([(device.name(), device)]).collect())
            }
        }
    }

    /// Gives the files their names, or the storage its head: that without which the image cannot be opened comes last.
    /// Files that had these names are replaced; if that fails, they are all there as before.
    ///
    /// # Errors
    /// A file cannot get its name, or something else has it by now; the storage cannot be written.
    pub fn publish(self) -> Result<()> {
        self.own.publish(self.parts)
    }
}
