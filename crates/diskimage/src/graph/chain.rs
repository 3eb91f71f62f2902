//! Images with those that they are based on.

use std::sync::Arc;

use diskimage_core::{Device, Error, ErrorKind, Image, NodeOptions, Result};

use super::common::Common;
use super::names::{full_backing_name, is_relative, node_of_name};
use super::{Link, Mode, Opener, known_format, no_such_node};
use crate::open::OpenOptions;

/// How many images a chain may have: more than anybody has, fewer than there are file descriptors.
const MAX_CHAIN: usize = 200;

/// Opens the image that a node's options describe, with its backing chain.
///
/// # Errors
/// Everything that can be wrong with the options, the files, the image, and the images that it is based on.
pub(crate) fn open_chain(node: NodeOptions, options: &OpenOptions) -> Result<Arc<Image>> {
    Opener::new(options).open_image(node, options.mode())
}

/// Opens the image on a device, with its backing chain. `name` is where relative names in the image start.
///
/// # Errors
/// As [`open_chain`].
pub(crate) fn open_device_chain(
    device: Arc<dyn Device>,
    name: &str,
    options: &OpenOptions,
) -> Result<Arc<Image>> {
    let format = options.format.as_deref().map(known_format).transpose()?;
    let opener = Opener::new(options);
    let mut node = NodeOptions::new();
    let common = Common::take(&mut node, options.mode())?;
    let link = opener.open_format(device, Some(name.to_owned()), format, node, common)?;
    opener.complete(link)
}

impl Opener<'_> {
    /// Opens an image with those below it.
    pub(super) fn open_image(&self, node: NodeOptions, mode: Mode) -> Result<Arc<Image>> {
        let link = self.open_link(node, mode)?;
        self.complete(link)
    }

    /// Opens the images below `top`, and locks all for good.
    fn complete(&self, top: Link) -> Result<Arc<Image>> {
        let mut links = vec![top];
        self.require_place(&links)?;
        while !self.options.no_backing
            && let Some(below) = self.open_below(&mut links)
        {
            // Every image on the way down has a word to say about it.
            let link = below.map_err(|error| {
                links
                    .iter()
                    .fold(error, |error, _| error.context("Could not open backing file"))
            })?;
            links.push(link);
        }
        for link in &links {
            let permissions = self.options.final_permissions(link.format, link.mode);
            link.layer.file().lock(permissions)?;
        }
        let chain = links
            .into_iter()
            .rev()
            .fold(None, |below, link| Some(link.into_image(below, self.options)));
        chain.ok_or_else(|| Error::invalid("No image"))
    }

    /// Refuses a relative name of an image below where there is no one place that it could start from.
    fn require_place(&self, links: &[Link]) -> Result<()> {
        let scattered = links.last().filter(|link| link.node.spans_several_files());
        let named = scattered.and_then(|link| link.layer.backing());
        match named {
            Some(backing) if !self.options.no_backing && is_relative(backing.name.text()) => Err(
                Error::unsupported("Cannot generate a base directory for quorum nodes"),
            ),
            _ => Ok(()),
        }
    }

    /// Opens the image that the last of `links` is based on, if it is.
    fn open_below(&self, links: &mut [Link]) -> Option<Result<Link>> {
        let depth = links.len();
        let last = links.last_mut()?;
        if last.no_backing {
            return None;
        }
        let given = last.backing.take();
        let named = last.layer.backing();
        if given.is_none() && named.is_none() {
            return None;
        }
        let from = last.base_name();
        let mode = Mode {
            write: self.options.write_below == Some(depth),
            is_below: true,
            ..last.mode
        };
        let open = || {
            if depth >= MAX_CHAIN {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("More than {MAX_CHAIN} images in a chain"),
                ));
            }
            let given = given.unwrap_or_default();
            if let Some(reference) = given.text("") {
                return Err(no_such_node(reference));
            }
            let format = named.as_ref().and_then(|named| named.format.as_deref());
            let by_user = given.has_node("file");
            let mut node = match named.as_ref().filter(|_| !by_user) {
                Some(named) => node_of_name(&full_backing_name(&from, named.name.text()), format)?,
                None => {
                    let mut node = NodeOptions::new();
                    if let Some(format) = format {
                        node.set("driver", format);
                    }
                    node
                }
            };
            node.overlay(given);
            let opener = Opener {
                from: (!by_user).then_some(from.as_str()),
                ..self.clone()
            };
            opener.open_link(node, mode)
        };
        let link = open();
        Some(link.and_then(|link| not_again(link, links)))
    }
}

/// Refuses an image that the chain has already.
fn not_again(link: Link, links: &[Link]) -> Result<Link> {
    let again = |other: &Link| other.identity == link.identity && other.node.driver == link.node.driver;
    if link.identity.is_some() && links.iter().any(again) {
        return Err(Error::corrupt(format!(
            "Backing file '{}' creates an infinite loop",
            link.base_name()
        )));
    }
    Ok(link)
}
