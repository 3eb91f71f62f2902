//! The files of images by identity (device and inode), whatever their names are: a file must not be source and new
//! target at once, and a chain must not contain an image twice.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use diskimage_core::json::Value;
use diskimage_core::{Device, Error, Gate, Image, NodeOptions, Objects, Result, name};
use diskimage_protocols::{Target, identity_of_path, protocol_by_name};

use crate::graph::{full_backing_name, node_of_name};
use crate::open::open_node;
use crate::open_options::OpenOptions;

/// The device and inode numbers of a file.
pub(crate) type Identity = (u64, u64);

/// The files of the topmost `layers` images of a chain.
pub(crate) fn files_of_chain(image: &Image, layers: usize) -> HashSet<Identity> {
    let mut files = HashSet::new();
    let chain = std::iter::successors(Some(image), |image| image.backing().map(|below| &**below));
    for image in chain.take(layers) {
        add_image(image, &mut files);
    }
    files
}

/// The files of an image without those of its backing images.
pub(crate) fn files_of(image: &Image) -> HashSet<Identity> {
    files_of_chain(image, 1)
}

/// Whether two images have a file in common, without those of their backing images.
pub fn share_a_file(one: &Image, other: &Image) -> bool {
    !files_of(one).is_disjoint(&files_of(other))
}

/// Whether data of `image` or of a node below it is stored encrypted. Storage that was never written then does not read
/// as zero, as far as it is not known to be unallocated.
///
/// # Errors
/// The facts of an image cannot be read.
pub fn is_encrypted(image: &Image) -> Result<bool> {
    let layer = image.layer();
    if layer.info()?.encrypted || is_encrypted_below(layer.file())? {
        return Ok(true);
    }
    layer.data_file().map_or(Ok(false), is_encrypted_below)
}

fn is_encrypted_below(device: &Arc<dyn Device>) -> Result<bool> {
    if let Some(image) = device.as_image() {
        return is_encrypted(image);
    }
    for (_, below) in device.node().children {
        if is_encrypted_below(&below)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn add_image(image: &Image, files: &mut HashSet<Identity>) {
    let layer = image.layer();
    add_device(layer.file(), files);
    if let Some(data) = layer.data_file() {
        add_device(data, files);
    }
    for (_, part) in layer.parts() {
        add_device(&part, files);
    }
}

fn add_device(device: &Arc<dyn Device>, files: &mut HashSet<Identity>) {
    if let Some(image) = device.as_image() {
        // A device that is an image reads from all files of its chain.
        files.extend(files_of_chain(image, usize::MAX));
        return;
    }
    files.extend(device.identity());
    for (_, below) in device.node().children {
        add_device(&below, files);
    }
}

/// An existing file, or the path of a missing one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Location {
    File(Identity),
    Nothing(PathBuf),
}

impl Location {
    /// The file at `path`, which has no protocol prefix.
    pub(crate) fn at(path: &str) -> Self {
        let path = Target::plain(path).path;
        if let Some(identity) = identity_of_path(&path) {
            return Self::File(identity);
        }
        let path = name::to_path(&path);
        let directory = path
            .parent()
            .and_then(|directory| match directory.as_os_str().is_empty() {
                true => name::to_path(".").canonicalize().ok(),
                false => directory.canonicalize().ok(),
            });
        Self::Nothing(match (directory, path.file_name()) {
            (Some(directory), Some(name)) => directory.join(name),
            _ => path,
        })
    }

    /// Whether it is one of `files`.
    pub(crate) fn is_among(&self, files: &HashSet<Identity>) -> bool {
        matches!(self, Self::File(identity) if files.contains(identity))
    }
}

/// The identity of the file called `name`, if `name` is that of an existing file.
fn file_named(name: &str) -> Option<Identity> {
    let target = Target::parse(name).ok()?;
    identity_of_path(&target.path)
}

/// The overlay that a backing chain must not contain.
pub(crate) enum Above {
    /// An existing image with these files.
    Files(HashSet<Identity>),
    /// A new image that will be created at this location.
    New(Location),
}

impl Above {
    /// Whether the image called `name` with these `files` is the overlay. A new image over an existing file is not:
    /// that file must not be overwritten, which is checked elsewhere.
    fn is_met(&self, files: &HashSet<Identity>, name: &str) -> bool {
        match self {
            Self::Files(own) => !own.is_disjoint(files),
            Self::New(Location::File(_)) => false,
            Self::New(own) => {
                files.is_empty() && Target::parse(name).is_ok_and(|target| Location::at(&target.path) == *own)
            }
        }
    }
}

/// Follows the backing file names of images.
pub(crate) struct Follow<'a> {
    pub(crate) objects: &'a Arc<Objects>,
    pub(crate) gate: Option<&'a Arc<dyn Gate>>,
}

impl Follow<'_> {
    /// The files of the image called `name` and of its backing chain, as far as they are local and can be opened.
    ///
    /// # Errors
    /// The chain contains an image twice, or `above`.
    pub(crate) fn files_below(
        &self,
        name: &str,
        format: Option<&str>,
        above: &Above,
    ) -> Result<HashSet<Identity>> {
        let mut files = HashSet::new();
        let (mut name, mut format) = (name.to_owned(), format.map(str::to_owned));
        for _ in 0..MAX_STEPS {
            let image = self.open(&name, format.as_deref());
            let own = match &image {
                Some(image) => files_of(image),
                None => file_named(&name).into_iter().collect(),
            };
            if above.is_met(&own, &name) || !own.is_disjoint(&files) {
                return Err(Error::invalid(format!(
                    "Backing file '{name}' creates an infinite loop"
                )));
            }
            files.extend(own);
            let Some((image, below)) =
                image.and_then(|image| Some((Arc::clone(&image), image.layer().backing()?)))
            else {
                break;
            };
            name = full_backing_name(&image.base_name(), below.name.text());
            format = below.format;
        }
        Ok(files)
    }

    /// Opens the image called `name` without its backing image; `None` if it is not local or cannot be opened.
    fn open(&self, name: &str, format: Option<&str>) -> Option<Arc<Image>> {
        let node = node_of_name(name, format).ok().filter(is_local)?;
        let mut options = OpenOptions::new()
            .no_backing(true)
            .no_data(true)
            .force_share(true)
            .objects(Arc::clone(self.objects));
        if let Some(gate) = self.gate {
            options = options.gate(Arc::clone(gate));
        }
        open_node(node, &options).ok()
    }
}

/// The largest number of images in a chain; the same limit as that for opening a chain.
const MAX_STEPS: usize = 200;

/// Whether opening the node needs no network.
fn is_local(node: &NodeOptions) -> bool {
    node.iter().all(|(name, value)| match value {
        Value::Text(driver) if name == "driver" || name.ends_with(".driver") => {
            protocol_by_name(driver).is_none_or(|protocol| LOCAL.contains(&protocol.name()))
        }
        _ => true,
    })
}

/// The protocols that need no network.
const LOCAL: &[&str] = &["file", "host_device", "host_cdrom"];
