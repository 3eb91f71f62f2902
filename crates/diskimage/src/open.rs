//! Opens images with their backing chains.

use std::sync::Arc;

use diskimage_core::{Device, Image, NodeOptions, Result, ResultExt};

use crate::graph::{node_of_name, open_chain, open_device_chain, open_reference};
use crate::open_options::OpenOptions;

/// Opens the image called `name`: a path, a name with the prefix of a protocol, or `json:` and the options of a node.
///
/// An image that was opened for writing keeps some changes in memory until [`Device::flush`], [`Image::close`], or
/// until the last [`Arc`] of it is dropped. See [`Image`] for what a drop cannot do, and [`OpenOptions::on_lost`] for
/// how to be told.
///
/// # Errors
/// `Could not open 'NAME'`, with the error of the file, of the image, or of a backing image as its source.
pub fn open(name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    open_bare(name, options).context(|| format!("Could not open '{name}'"))
}

/// Opens the image of a node from its options, such as `driver`.
///
/// # Errors
/// As [`open`], without the topmost message.
pub fn open_node(mut node: NodeOptions, options: &OpenOptions) -> Result<Arc<Image>> {
    node.overlay(options.node_options.clone());
    open_chain(node, options)
}

/// Opens the backing image of `overlay`, which was opened without it, by the name `name`: a reference of the overlay, which
/// the gate may refuse.
///
/// # Errors
/// As [`open`], without the topmost message.
pub fn open_backing(
    overlay: &Image,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Arc<Image>> {
    open_reference(overlay, name, node_of_name(name, format)?, options)
}

/// [`open`] without the topmost message.
pub(crate) fn open_bare(name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    let format = options.format.as_deref();
    open_node(node_of_name(name, format)?, options)
}

/// Opens the image on a device. Relative names in the image are resolved against `name`.
///
/// # Errors
/// As [`open`], without the topmost message.
pub fn open_device(device: Arc<dyn Device>, name: &str, options: &OpenOptions) -> Result<Arc<Image>> {
    open_device_chain(device, name, options)
}
