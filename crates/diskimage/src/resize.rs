//! Changes the size of a disk.

use std::path::{Path, PathBuf};
use std::{fs, io};

use diskimage_core::{
    Device, Error, Image, OpenContext, Permissions, Preallocation, ResizeRequest, Result, ResultExt, name,
};
use diskimage_protocols::Target;

use crate::files::flush;
use crate::open_options::OpenOptions;

/// Whether a disk may become smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShrinkPolicy {
    /// A smaller size is an error.
    #[default]
    Refuse,
    /// Data beyond the new end is discarded.
    Allow,
}

/// A change of a disk's size.
pub struct Resize {
    len: u64,
    preallocation: Preallocation,
    policy: ShrinkPolicy,
    context: OpenContext,
}

impl Resize {
    /// A change to `len` bytes.
    pub fn new(len: u64) -> Self {
        Self {
            len,
            preallocation: Preallocation::Off,
            policy: ShrinkPolicy::Refuse,
            context: OpenOptions::new().context(),
        }
    }

    /// The preallocation mode of the range that is added.
    #[must_use]
    pub fn preallocation(mut self, preallocation: Preallocation) -> Self {
        self.preallocation = preallocation;
        self
    }

    /// Whether the disk may become smaller; the default is [`ShrinkPolicy::Refuse`].
    #[must_use]
    pub fn policy(mut self, policy: ShrinkPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// The options, such as the gate, that files are opened with which are added to an image whose files have a limited
    /// length (VMDK extents).
    #[must_use]
    pub fn opening(mut self, options: &OpenOptions) -> Self {
        self.context = options.context();
        self
    }

    /// Resizes `image`.
    ///
    /// # Errors
    /// The policy refuses a smaller size, preallocation is asked for without growth, a file to be added exists already,
    /// the format cannot resize, or a request fails.
    pub fn run(&self, image: &Image) -> Result<()> {
        let present = image.len();
        if self.len <= present && self.preallocation != Preallocation::Off {
            return Err(Error::invalid(
                "Preallocation can only be used for growing images",
            ));
        }
        if self.len < present && self.policy == ShrinkPolicy::Refuse {
            return Err(Error::invalid(
                "Use the --shrink option to perform a shrink operation.",
            ));
        }
        let mut request = ResizeRequest::new(self.len, self.preallocation);
        let paths = image.layer().new_parts(&request)?;
        let mut made = Vec::new();
        let outcome = self.grow_into(image, &paths, &mut request, &mut made);
        if outcome.is_err() {
            // An empty file has not become a part of the image. An error of its removal is not reported: the resize's
            // is.
            for path in made.iter().filter(|path| is_empty_file(path)) {
                let _ = name::remove(path);
            }
        }
        outcome?;
        flush(image)
    }

    fn grow_into(
        &self,
        image: &Image,
        paths: &[String],
        request: &mut ResizeRequest,
        made: &mut Vec<PathBuf>,
    ) -> Result<()> {
        for path in paths {
            made.push(make_file(path).context(|| format!("Could not create '{path}'"))?);
            let part = self.context.open_data(
                path,
                &image.base_name(),
                image.node().origin(),
                Permissions::WRITE,
            )?;
            request.parts.push(part);
        }
        image.resize_with(request)
    }
}

/// Creates a file that does not exist yet, and makes its directory entry durable.
fn make_file(path: &str) -> io::Result<PathBuf> {
    let path = name::to_path(&Target::plain(path).path);
    let mut new = fs::OpenOptions::new();
    new.write(true).create_new(true);
    name::open_with(&path, &new)?;
    let directory = path
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty());
    name::open(directory.unwrap_or(&name::to_path(".")))?.sync_all()?;
    Ok(path)
}

fn is_empty_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.len() == 0)
}
