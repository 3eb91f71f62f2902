//! The files of images by identity (device and inode), whatever their names are: a file must not be source and new
//! target at once.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use diskimage_core::json::Value;
use diskimage_core::{Device, Image, Layer, NodeOptions, Result, ResultExt, name};
use diskimage_protocols::{Target, identity_of_path, place_of_path, protocol_by_name};

use crate::graph::{Step, full_backing_name, node_of_name, walk_chain};
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

/// Flushes an image that a command has written to.
///
/// # Errors
/// `Could not flush 'NAME'`, with the reason.
pub fn flush(image: &Image) -> Result<()> {
    image
        .flush()
        .context(|| format!("Could not flush '{}'", image.name()))
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
    add_layer(&**image.layer(), files);
}

fn add_layer(layer: &dyn Layer, files: &mut HashSet<Identity>) {
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
        Self::Nothing(place_of_path(&path).unwrap_or_else(|| name::to_path(&path)))
    }

    /// Whether it is one of `files`.
    pub(crate) fn is_among(&self, files: &HashSet<Identity>) -> bool {
        matches!(self, Self::File(identity) if files.contains(identity))
    }
}

/// The files of the image called `name` and of its backing chain, as far as they are local and can be opened with
/// `options`. The last image may be one that cannot be opened; a chain that leads back to an image of its own ends there.
pub(crate) fn files_below(name: &str, format: Option<&str>, options: &OpenOptions) -> HashSet<Identity> {
    let options = options.clone().no_data(true).force_share(true);
    let mut files = HashSet::new();
    let _ = node_of_name(name, format).and_then(|node| {
        walk_chain(node, &options, &mut |step| match step {
            Step::Node(node) => {
                files.extend(files_of_node(node));
                is_local(node)
            }
            Step::Link(layer) => {
                add_layer(layer, &mut files);
                true
            }
        })
    });
    files
}

/// The name by which the backing image of `image` is opened from outside: the one in the image, resolved. If that file
/// does not exist and the image was made on another machine, the name of the one that is found instead, by the gate of
/// `options`.
pub fn found_backing_name(image: &Image, options: &OpenOptions) -> Option<String> {
    let named = image.layer().backing()?;
    let full = |name: &str| full_backing_name(&image.base_name(), name);
    let exists =
        |name: &String| Target::parse(name).is_ok_and(|target| identity_of_path(&target.path).is_some());
    let first = full(named.name.text());
    let others = image.layer().backing_search().names;
    if others.is_empty() || exists(&first) {
        return Some(first);
    }
    let found = others.iter().map(|name| full(name.text())).find(exists);
    let in_other_case = || {
        let gate = options.context().gate;
        let found = gate.locate(&image.base_name(), others.last()?.text())?;
        Some(full(&found))
    };
    found.or_else(in_other_case).or(Some(first))
}

/// The existing files that the options of a node name.
fn files_of_node(node: &NodeOptions) -> impl Iterator<Item = Identity> {
    node.iter().filter_map(|(name, value)| match value {
        Value::Text(path) if name == "filename" || name.ends_with(".filename") => identity_of_path(path),
        _ => None,
    })
}

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
