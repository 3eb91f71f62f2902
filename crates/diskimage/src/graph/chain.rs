//! Opens backing chains.
//!
//! ```text
//!   open_link(top) ──▶ open_below(1) ──▶ open_below(2) ...     each file locked as its format needs
//!   all links: files locked with their final permissions
//!   from the last link to the first: Image(base) ◀── Image(middle) ◀── Image(top)
//! ```

use std::sync::Arc;

use diskimage_core::{Device, Error, ErrorKind, Image, Layer, NodeOptions, Result, errno};

use super::common::Common;
use super::names::{full_backing_name, is_relative, node_of_name};
use super::{Link, Mode, Opener, known_format, no_such_node};
use crate::open_options::OpenOptions;

/// The largest number of images in a chain. A limit of this program: it keeps the number of open files below the usual
/// limit of the system.
const MAX_CHAIN: usize = 200;

/// Opens the image of a node from its options, with its backing chain.
///
/// # Errors
/// An option is wrong, a file cannot be opened, or an image of the chain is corrupt or not supported.
pub(crate) fn open_chain(node: NodeOptions, options: &OpenOptions) -> Result<Arc<Image>> {
    Opener::new(options).open_image(node, options.mode())
}

/// Opens the image on a device, with its backing chain. Relative names in the image are resolved against `name`.
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
    /// Opens an image with its backing chain.
    pub(super) fn open_image(&self, node: NodeOptions, mode: Mode) -> Result<Arc<Image>> {
        let link = self.open_link(node, mode)?;
        self.complete(link)
    }

    /// Opens the backing chain of `top`, and locks all files with their final permissions.
    fn complete(&self, top: Link) -> Result<Arc<Image>> {
        let mut links = vec![top];
        self.require_place(&links)?;
        while !self.options.no_backing
            && let Some(below) = self.open_below(&mut links)
        {
            // As in qemu-img, each overlay on the way adds its message to the error.
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

    /// Refuses a relative backing file name in an image on several files (quorum), which have no common directory.
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

    /// Opens the backing image of the last of `links`, if it has one.
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
        let link = open().map_err(|error| backing_not_found(&*last.layer, error));
        let link = link.and_then(|link| {
            if let Some(note) = last.layer.check_backing(&*link.layer)? {
                self.options.tell(&note);
            }
            Ok(link)
        });
        Some(link.and_then(|link| not_again(link, links)))
    }
}

/// Adds to `error` where the backing image of `layer` was looked for, if it was not found.
pub fn backing_not_found(layer: &dyn Layer, error: Error) -> Error {
    match layer.locators().filter(|_| error.errno() == Some(errno::ENOENT)) {
        Some(locators) => error.context(locators),
        None => error,
    }
}

/// Refuses an image that is in the chain already.
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
