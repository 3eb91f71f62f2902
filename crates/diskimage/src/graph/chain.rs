//! Opens backing chains.
//!
//! ```text
//!   open_link(top) ──▶ open_below(1) ──▶ open_below(2) ...     each file locked as its format needs
//!   all links: files locked with their final permissions
//!   from the last link to the first: Image(base) ◀── Image(middle) ◀── Image(top)
//! ```

use std::sync::Arc;

use diskimage_core::{
    BackingIdentity, Device, Error, ErrorKind, Image, Layer, NodeOptions, Origin, Result, errno,
};

use super::common::Common;
use super::names::{full_backing_name, is_relative, node_of_name};
use super::{Link, Mode, Opener, Referrer, known_format, no_such_node};
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
    let mut node = options.node_options.clone();
    let common = Common::take(&mut node, options.mode())?;
    let link = opener.open_format(device, Some(name.to_owned()), format, node, common)?;
    opener.complete(link)
}

/// Opens the node to which the image `from` refers by `name`, with its backing chain.
///
/// # Errors
/// As [`open_chain`], and refusals of the gate.
pub(crate) fn open_reference(
    from: &Image,
    name: &str,
    node: NodeOptions,
    options: &OpenOptions,
) -> Result<Arc<Image>> {
    let (base_name, origin) = (from.base_name(), from.node().origin());
    let opener = Opener {
        from: Some(Referrer {
            name: &base_name,
            origin,
        }),
        states_formats: origin.format_is_stated,
        ..Opener::new(options)
    };
    opener.context.gate.admit(&base_name, name, &node)?;
    opener.open_image(node, options.mode())
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
            && let Some(below) = links.last().and_then(|last| self.node_below(last))
        {
            // As in qemu-img, each overlay on the way adds its message to the error.
            let link = below.and_then(|below| self.open_below(below, &links));
            let link = link.map_err(|error| {
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
            .fold(None, |below, link| Some(link.into_image(below, &self.context)));
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

    /// Opens the backing image of the last of `links`.
    fn open_below(&self, below: Below, links: &[Link]) -> Result<Link> {
        let depth = links.len();
        if depth >= MAX_CHAIN {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("More than {MAX_CHAIN} images in a chain"),
            ));
        }
        let mode = Mode {
            write: self.options.write_below == Some(depth),
            is_below: true,
            ..below.mode
        };
        let opener = Opener {
            from: below.named_by.as_ref().map(|(name, origin)| Referrer {
                name,
                origin: *origin,
            }),
            states_formats: below.states_format,
            ..self.clone()
        };
        let link = match (opener.open_link(below.node, mode), below.others) {
            (Err(error), Some(others)) if error.kind() == ErrorKind::NotFound => opener
                .open_other(&others, mode)
                .unwrap_or_else(|| Err(others.missing(error))),
            (link, _) => link,
        };
        let Some(overlay) = links.last() else { return link };
        let link = link.map_err(|error| backing_not_found(&*overlay.layer, error))?;
        if let BackingIdentity::MayHaveChanged(note) = overlay.layer.check_backing(&*link.layer)? {
            self.context.tell(&note);
        }
        not_again(link, links)
    }

    /// Opens the first existing image of those that a backing image can be; `None` if none exists.
    fn open_other(&self, others: &OtherNames, mode: Mode) -> Option<Result<Link>> {
        for name in &others.names {
            // A name of another system may look like one with a protocol.
            let Ok(node) = self.named_node(others, name) else {
                continue;
            };
            match self.open_link(node, mode) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                link => return Some(link),
            }
        }
        let found = self.context.gate.locate(&others.from, others.names.last()?)?;
        let node = self.named_node(others, &found);
        Some(node.and_then(|node| self.open_link(node, mode)))
    }

    /// The node of the backing image that an image calls `name`, if the gate admits it.
    fn named_node(&self, others: &OtherNames, name: &str) -> Result<NodeOptions> {
        let mut node = others.node(name)?;
        self.context.gate.admit(&others.from, name, &node)?;
        node.overlay(others.given.clone());
        Ok(node)
    }

    /// The node of the backing image of `link`, if it has one.
    fn node_below(&self, link: &Link) -> Option<Result<Below>> {
        let named = link.layer.backing();
        if link.no_backing || (link.backing.is_none() && named.is_none()) {
            return None;
        }
        let given = link.backing.clone().unwrap_or_default();
        let from = link.base_name();
        let origin = link.node.origin();
        let states_format = origin.format_is_stated || given.has("driver");
        let node = || {
            if let Some(reference) = given.text("") {
                return Err(no_such_node(reference));
            }
            let format = named.as_ref().and_then(|named| named.format.as_deref());
            // As in qemu-img, a driver alone is for the file that the image names.
            let by_user = given
                .iter()
                .any(|(name, _)| name.starts_with("file.") && name != "file.driver");
            let Some(named) = named.as_ref().filter(|_| !by_user) else {
                let mut node = NodeOptions::new();
                if let Some(format) = format {
                    node.set("driver", format);
                }
                node.overlay(given);
                return Ok(Below {
                    node,
                    mode: link.mode,
                    named_by: (!by_user).then_some((from, origin)),
                    states_format: states_format || by_user,
                    others: None,
                });
            };
            let names = link.layer.backing_search().names;
            let others = OtherNames {
                names: names.iter().map(|name| name.text().to_owned()).collect(),
                from: from.clone(),
                format: format.map(str::to_owned),
                given,
            };
            let is_own =
                !link.mode.is_below && self.options.own_backing.as_deref() == Some(named.name.text());
            if is_own {
                let mut node = others.node(named.name.text())?;
                node.overlay(others.given);
                return Ok(Below {
                    node,
                    mode: link.mode,
                    named_by: None,
                    states_format: true,
                    others: None,
                });
            }
            let node = match self.named_node(&others, named.name.text()) {
                // `C:\dir\base.vmdk` looks like a name with a protocol. It is a path for a format that knows others.
                Err(error) if !names.is_empty() && error.kind() != ErrorKind::Denied => {
                    self.named_node(&others, &format!("./{}", named.name))?
                }
                node => node?,
            };
            Ok(Below {
                node,
                mode: link.mode,
                named_by: Some((from, origin)),
                states_format,
                others: Some(others).filter(|others| !others.names.is_empty()),
            })
        };
        Some(node())
    }
}

/// The node of a backing image.
struct Below {
    node: NodeOptions,
    /// The mode of the overlay.
    mode: Mode,
    /// The overlay if that names the file; `None` if the options of the overlay's node do.
    named_by: Option<(String, Origin)>,
    /// Whether the format that the node names is stated: by the user, or by an overlay whose own format is.
    states_format: bool,
    /// What it can be if its file does not exist.
    others: Option<OtherNames>,
}

/// Further names of a backing image, for images that name it as another machine does.
struct OtherNames {
    names: Vec<String>,
    /// The name of the overlay.
    from: String,
    format: Option<String>,
    /// The options of the backing image's node that the user gave.
    given: NodeOptions,
}

impl OtherNames {
    /// The node of the backing image called `name`, without the options that the user gave.
    fn node(&self, name: &str) -> Result<NodeOptions> {
        node_of_name(&full_backing_name(&self.from, name), self.format.as_deref())
    }

    /// The error if no file is called by any of the names.
    fn missing(&self, error: Error) -> Error {
        match &self.names[..] {
            [first, .., last] if first != last => {
                error.hint(format!("No file '{last}' is beside the image either."))
            }
            _ => error,
        }
    }
}

/// What [`walk_chain`] has come to.
pub(crate) enum Step<'a> {
    /// The options of an image's node, before it is opened.
    Node(&'a NodeOptions),
    /// An image that has been opened.
    Link(&'a dyn Layer),
}

/// Calls `visit` for each image of a chain from the top down, until it returns `false`. A chain that leads back to an
/// image of its own ends there.
///
/// # Errors
/// An image cannot be opened.
pub(crate) fn walk_chain(
    node: NodeOptions,
    options: &OpenOptions,
    visit: &mut dyn FnMut(Step<'_>) -> bool,
) -> Result<()> {
    let opener = Opener::new(options);
    if !visit(Step::Node(&node)) {
        return Ok(());
    }
    let mut links = vec![opener.open_link(node, options.mode())?];
    while let Some(last) = links.last()
        && visit(Step::Link(&*last.layer))
        && let Some(below) = opener.node_below(last).transpose()?
        && visit(Step::Node(&below.node))
    {
        links.push(opener.open_below(below, &links)?);
    }
    Ok(())
}

/// Adds to `error` where the backing image of `layer` was looked for, if it was not found.
pub fn backing_not_found(layer: &dyn Layer, error: Error) -> Error {
    match layer.backing_search().description {
        Some(description) if error.errno() == Some(errno::ENOENT) => error.context(description),
        _ => error,
    }
}

/// Refuses an image that is in the chain already and has led to itself. Only links that images make by themselves can form
/// a loop: those that the options of a node make are as many as the options.
fn not_again(link: Link, links: &[Link]) -> Result<Link> {
    let again = |other: &Link| {
        other.identity == link.identity
            && other.node.driver == link.node.driver
            && other.backing.is_none()
            && link.backing.is_none()
    };
    let follows_header = link.identity.is_some() && !link.no_backing;
    if follows_header && links.iter().any(again) {
        return Err(Error::corrupt(format!(
            "Backing file '{}' creates an infinite loop",
            link.base_name()
        )));
    }
    Ok(link)
}
