//! The block graph: opens a node from its options, with all nodes below it.
//!
//! A node is a format on a file, a filter on other nodes, or a protocol. Which it is follows from `driver`:
//!
//! ```text
//!   driver=qcow2   file ─────────▶ driver=throttle   file ──▶ driver=file   filename=x
//!                  backing ──▶ ...
//! ```
//!
//! [`Opener`] opens single nodes and their children; [`chain`] opens the backing images.

mod chain;
mod common;
mod names;

use std::sync::Arc;

use diskimage_core::json::Value;
use diskimage_core::{
    Device, Error, ErrorKind, Filtered, Format, Image, Layer, Node, NodeOptions, Note, OpenContext,
    OpenRequest, Origin, Permissions, Reference, Result, ResultExt, Role, ZeroDetection, errno,
};
use diskimage_formats::{bare_layer, format_by_name};
use diskimage_protocols::{
    ChildKind, Filter, FilterChild, FilterRequest, LocalFileDriver, OpenedChild, Protocol, ProtocolRequest,
    filter_by_name, parse_name, protocol_by_name,
};

use crate::gate::require_all_taken;
use crate::guess::GuessedRaw;
use crate::open_options::{Mode, OpenOptions};
use crate::probe::{guess_device, only_guess};
use common::Common;

pub use chain::backing_not_found;
pub(crate) use chain::{Step, open_chain, open_device_chain, open_reference, walk_chain};

pub use names::{full_backing_name, is_driver, is_relative, node_of_name};

/// The three kinds of drivers.
enum Driver {
    Format(&'static dyn Format),
    Filter(&'static dyn Filter),
    Protocol(&'static dyn Protocol),
}

impl Driver {
    fn of(name: &str) -> Result<Self> {
        if let Some(format) = format_by_name(name) {
            Ok(Self::Format(format))
        } else if let Some(filter) = filter_by_name(name) {
            Ok(Self::Filter(filter))
        } else if let Some(protocol) = protocol_by_name(name) {
            Ok(Self::Protocol(protocol))
        } else {
            Err(Error::invalid(format!("Unknown driver '{name}'")))
        }
    }
}

/// The format called `name`.
///
/// # Errors
/// No format is called so.
pub(crate) fn known_format(name: &str) -> Result<&'static dyn Format> {
    format_by_name(name).ok_or_else(|| Error::invalid(format!("Unknown driver '{name}'")))
}

/// Opens the nodes of one image and of its backing images.
#[derive(Clone)]
pub(crate) struct Opener<'a> {
    options: &'a OpenOptions,
    /// What all nodes of the graph share.
    context: Arc<OpenContext>,
    /// The image that refers to the node, which is then opened through the gate; `None` if the user does.
    from: Option<Referrer<'a>>,
    /// Whether the drivers that the options name are stated: see [`Origin::format_is_stated`].
    states_formats: bool,
    /// The number of nodes above this one.
    nesting: u32,
}

/// The image that refers to a node.
#[derive(Clone, Copy, Debug)]
struct Referrer<'a> {
    name: &'a str,
    origin: Origin,
}

/// The largest number of nodes on top of each other. A limit of this program: opening recurses, and each level takes
/// stack.
const MAX_NESTING: u32 = 32;

/// The largest disk in bytes; a limit of qemu-img.
const MAX_LEN: u64 = (1 << 63) - (1 << 30);

/// An image of a chain whose backing image has not been opened yet.
pub(crate) struct Link {
    pub(crate) layer: Arc<dyn Layer>,
    /// `None` for a protocol or a filter without a format.
    pub(crate) format: Option<&'static dyn Format>,
    pub(crate) mode: Mode,
    pub(crate) node: Node,
    pub(crate) zeroes: ZeroDetection,
    /// The options of the backing image's node, as far as the node's options have any.
    pub(crate) backing: Option<NodeOptions>,
    pub(crate) no_backing: bool,
    pub(crate) identity: Option<(u64, u64)>,
}

impl Link {
    /// The name that relative names in the image are resolved against.
    pub(crate) fn base_name(&self) -> String {
        self.node.base_name()
    }

    /// The image of the link on its backing image. Lost changes are reported to [`OpenContext::on_lost`].
    pub(crate) fn into_image(self, below: Option<Arc<Image>>, context: &OpenContext) -> Arc<Image> {
        let image = Image::new(self.layer, below, String::new(), self.mode.write);
        let image = match self.format {
            Some(_) => image.with_node(self.node),
            None => image.bare(),
        };
        if let Some(on_lost) = context.on_lost.clone().filter(|_| self.mode.write) {
            let name = image.name();
            image.set_on_lost(Arc::new(move |error: &Error| on_lost(&name, error)));
        }
        Arc::new(image.with_zero_detection(self.zeroes))
    }
}

impl<'a> Opener<'a> {
    pub(crate) fn new(options: &'a OpenOptions) -> Self {
        Self {
            options,
            context: Arc::new(options.context()),
            from: None,
            states_formats: true,
            nesting: 0,
        }
    }

    /// The opener of a child node.
    fn deeper(&self) -> Result<Self> {
        if self.nesting >= MAX_NESTING {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("More than {MAX_NESTING} nodes on top of each other"),
            ));
        }
        Ok(Self {
            nesting: self.nesting + 1,
            ..self.clone()
        })
    }

    /// Opens the image of a node without its backing image.
    pub(crate) fn open_link(&self, mut node: NodeOptions, mode: Mode) -> Result<Link> {
        let driver = self.take_driver(&mut node)?;
        let label = node.text("node-name").map(str::to_owned);
        let common = Common::take(&mut node, mode)?;
        let mut link = self.open_link_as(driver, node, common)?;
        link.node.node_name = label;
        Ok(link)
    }

    fn open_link_as(&self, driver: Option<Driver>, mut node: NodeOptions, common: Common) -> Result<Link> {
        match driver {
            Some(Driver::Format(format)) => {
                let file = self.open_file_of(&mut node, &common)?;
                let name = file.node().name;
                self.open_format(file, name, Some(format), node, common)
            }
            Some(driver) => {
                let (device, name) = self.open_device_node(&driver, node, &common)?;
                Ok(Link {
                    identity: device.identity(),
                    node: device.node(),
                    layer: bare_layer(device, name),
                    format: None,
                    mode: common.mode,
                    zeroes: common.zeroes,
                    backing: None,
                    no_backing: false,
                })
            }
            None if node.has("file") || node.has_node("file") => {
                let file = self.open_file_of(&mut node, &common)?;
                let name = file.node().name;
                self.open_format(file, name, None, node, common)
            }
            None => Err(Error::invalid("Must specify either driver or file")),
        }
    }

    fn take_driver(&self, node: &mut NodeOptions) -> Result<Option<Driver>> {
        match node.take("driver") {
            Some(Value::Text(name)) => Driver::of(&name).map(Some),
            // As in qemu-img, a value that is not a string counts as not given.
            _ => Ok(None),
        }
    }

    /// Opens `file` in the given format, or else in the probed one.
    pub(crate) fn open_format(
        &self,
        file: Arc<dyn Device>,
        plain_name: Option<String>,
        format: Option<&'static dyn Format>,
        mut node: NodeOptions,
        common: Common,
    ) -> Result<Link> {
        let Common { mode, zeroes } = common;
        let is_given = format.is_some();
        let (format, device) = match format {
            Some(format) => (format, Arc::clone(&file)),
            None => self.probe_format(&file, plain_name.as_deref(), mode)?,
        };
        device.lock(self.options.permissions(Some(format), mode))?;
        let backing = self.backing_options(format, &mut node)?;
        let mut graph_node = Node {
            driver: format.name(),
            options: strong_options(format, &node),
            format_is_stated: is_given && self.states_formats,
            ..Node::default()
        };
        let children = self.open_children(format, &mut node, &common)?;
        let is_plain = !backing.is_given() && has_plain_name(format, &graph_node.options, &*file, &children);
        graph_node.name = plain_name.filter(|_| is_plain);
        graph_node.children = self.listed_children(format, file, &children);
        let layer = format.open(OpenRequest {
            file: device,
            name: &graph_node.base_name(),
            write: mode.write,
            for_check: self.options.for_check,
            no_data: self.options.no_data,
            force_share: mode.force_share,
            children,
            options: &mut node,
            origin: graph_node.origin(),
            context: &self.context,
        })?;
        if layer.len() > MAX_LEN {
            return Err(Error::from_errno(errno::EFBIG).context("Could not refresh total sector count"));
        }
        layer.notes().iter().for_each(|note| self.context.tell(note));
        if let Some(name) = node.first_unused() {
            return Err(unknown_option(format.name(), name));
        }
        graph_node.children.extend(layer.parts());
        let (backing, no_backing) = backing.split();
        Ok(Link {
            identity: layer.file().identity(),
            node: graph_node,
            layer,
            format: Some(format),
            mode,
            zeroes,
            backing,
            no_backing,
        })
    }

    /// The probed format of `file`, and the device to open it on: writes to a raw image that was only guessed must not turn
    /// it into an image of another format.
    fn probe_format(
        &self,
        file: &Arc<dyn Device>,
        plain_name: Option<&str>,
        mode: Mode,
    ) -> Result<(&'static dyn Format, Arc<dyn Device>)> {
        let name = plain_name.map_or_else(|| file.node().base_name(), str::to_owned);
        let guess = match self.options.unambiguous {
            true => only_guess(&**file, &name)?,
            false => guess_device(&**file, &name),
        };
        let guess = guess.context(|| "Could not read image for determining its format")?;
        let format = guess.format;
        if guess.is_loose {
            self.context.tell(&loose_guess(&name, format));
        }
        if format.name() != "raw" || !mode.write {
            return Ok((format, Arc::clone(file)));
        }
        // qemu-img opens backing images read-only first, so it prints no warning for them.
        if !mode.is_below {
            self.context.tell(&GuessedRaw::warning(&name));
        }
        let guarded = GuessedRaw::new(Arc::clone(file), &name);
        Ok((format, Arc::new(Filtered(guarded))))
    }

    /// Opens the children besides `file` that the node's options give.
    fn open_children(
        &self,
        format: &dyn Format,
        node: &mut NodeOptions,
        common: &Common,
    ) -> Result<Vec<(&'static str, Arc<dyn Device>)>> {
        let mut children = Vec::new();
        for name in format.properties().children {
            if node.has(name) || node.has_node(name) {
                let child = self.open_child(name, ChildKind::Bytes, node, common)?;
                children.push((*name, child.device));
            }
        }
        Ok(children)
    }

    /// The children of the node in the block graph.
    fn listed_children(
        &self,
        format: &dyn Format,
        file: Arc<dyn Device>,
        children: &[(&'static str, Arc<dyn Device>)],
    ) -> Vec<(String, Arc<dyn Device>)> {
        // qemu-img does not list data files of an image that is opened without data.
        let is_listed =
            |name: &str| !(self.options.no_data && format.properties().implicit_children.contains(&name));
        let given = children.iter().filter(|(name, _)| is_listed(name));
        let given = given.map(|(name, child)| ((*name).to_owned(), Arc::clone(child)));
        [("file".to_owned(), file)].into_iter().chain(given).collect()
    }

    /// Removes the options of the backing image from the node's options.
    fn backing_options(&self, format: &dyn Format, node: &mut NodeOptions) -> Result<BackingWords> {
        let whole = match node.take("backing") {
            None => None,
            // `backing: null` is valid for every format.
            Some(Value::Null) => return Ok(BackingWords::none()),
            Some(Value::Text(text)) if text.is_empty() => {
                let text = "Use of \"backing\": \"\" is deprecated; use \"backing\": null instead";
                self.context.tell(&Note::Warning(text.to_owned()));
                return Ok(BackingWords::none());
            }
            Some(other) => Some(other),
        };
        if self.options.no_backing {
            if let Some(reference) = whole {
                // Left in the node's options, where it is reported as an unknown option.
                node.set("backing", reference);
            }
            return Ok(BackingWords::default());
        }
        let mut below = node.take_node("backing");
        if !format.properties().has_backing && (whole.is_some() || !below.is_empty()) {
            return Err(Error::unsupported("Driver doesn't support backing files"));
        }
        if let Some(reference) = whole {
            below.set("", reference);
        }
        Ok(BackingWords {
            below: Some(below).filter(|below| !below.is_empty()),
            no_backing: false,
        })
    }

    /// Opens the `file` child of a format.
    fn open_file_of(&self, node: &mut NodeOptions, common: &Common) -> Result<Arc<dyn Device>> {
        Ok(self.open_child("file", ChildKind::Bytes, node, common)?.device)
    }

    /// Opens the child called `name`; `kind` decides what it is if no driver is given.
    fn open_child(
        &self,
        name: &str,
        kind: ChildKind,
        node: &mut NodeOptions,
        common: &Common,
    ) -> Result<OpenedChild> {
        let missing = || Error::invalid(format!("A block device must be specified for \"{name}\""));
        match node.take(name) {
            Some(Value::Null) => return Err(missing()),
            Some(reference) => {
                let reference = match reference {
                    Value::Text(text) => text,
                    other => other.compact(),
                };
                return Err(no_such_node(&reference));
            }
            None => {}
        }
        let mut child = node.take_node(name);
        if child.is_empty() {
            return Err(missing());
        }
        let below = |device, image| OpenedChild {
            name: name.to_owned(),
            device,
            image,
        };
        let open_image = |node| {
            let image = self.deeper()?.open_image(node, common.mode)?;
            Ok(below(Arc::clone(&image) as Arc<dyn Device>, Some(image)))
        };
        match (child.text("driver").map(Driver::of).transpose()?, kind) {
            (Some(Driver::Format(_)), _) | (None, ChildKind::Image) => open_image(child),
            (_, ChildKind::ImageFile) => {
                let mut image = NodeOptions::new();
                image.set_node("file", child);
                open_image(image)
            }
            (Some(driver), ChildKind::Bytes | ChildKind::Image) => {
                child.take("driver");
                let own = Common::take(&mut child, common.mode)?;
                let (device, _) = self.deeper()?.open_device_node(&driver, child, &own)?;
                Ok(below(device, None))
            }
            (None, ChildKind::Bytes) => {
                let own = Common::take(&mut child, common.mode)?;
                if !child.has("filename") {
                    return Err(Error::invalid("Must specify either driver or file"));
                }
                Ok(below(self.open_plain(child, &own)?, None))
            }
        }
    }

    /// Opens a local file: a regular file, a device or a directory.
    fn open_plain(&self, mut node: NodeOptions, common: &Common) -> Result<Arc<dyn Device>> {
        if let Some(from) = self.from {
            // Which driver it is the gate finds out: nothing looks at a file that it may refuse.
            return self.open_referenced(from, &node, common.mode);
        }
        let driver = LocalFileDriver::serving(node.text("filename").unwrap_or_default());
        let device = self.open_protocol(driver, &mut node, common.mode)?;
        require_all_taken(driver.name(), &node)?;
        Ok(device)
    }

    /// Opens a protocol or a filter, and returns the driver's name too.
    fn open_device_node(
        &self,
        driver: &Driver,
        mut node: NodeOptions,
        common: &Common,
    ) -> Result<(Arc<dyn Device>, &'static str)> {
        let (device, name) = match driver {
            Driver::Protocol(protocol) => {
                let device = self.open_protocol(*protocol, &mut node, common.mode)?;
                (device, protocol.name())
            }
            Driver::Filter(filter) => {
                let device = self.open_filter(*filter, &mut node, common)?;
                if filter.prefixes().is_empty()
                    && let Some(left) = node.first_unused()
                {
                    return Err(unknown_option(filter.name(), left));
                }
                (device, filter.name())
            }
            Driver::Format(_) => return Err(Error::invalid("A format needs a file")),
        };
        require_all_taken(name, &node)?;
        Ok((device, name))
    }

    fn open_filter(
        &self,
        filter: &dyn Filter,
        node: &mut NodeOptions,
        common: &Common,
    ) -> Result<Arc<dyn Device>> {
        let mut children = Vec::new();
        for FilterChild { name, kind } in filter.children(node, parse_name)? {
            children.push(self.open_child(&name, kind, node, common)?);
        }
        let open_file = |name: &str| {
            let mut options = NodeOptions::new();
            options.set("filename", name);
            let mode = Mode {
                write: false,
                ..common.mode
            };
            match self.from {
                Some(from) => self.open_referenced(from, &options, mode),
                None => self.open_protocol(LocalFileDriver::serving(name), &mut options, mode),
            }
        };
        filter.open(FilterRequest {
            options: node,
            children,
            write: common.mode.write,
            context: &self.context,
            open_file: &open_file,
        })
    }

    /// Opens a leaf of the graph. A file that an image refers to is opened through the gate only.
    fn open_protocol(
        &self,
        protocol: &dyn Protocol,
        node: &mut NodeOptions,
        mode: Mode,
    ) -> Result<Arc<dyn Device>> {
        let Some(from) = self.from else {
            let new = self.context.new_files.storage(protocol.name(), node);
            if let Some(device) = new.filter(|_| mode.write) {
                *node = NodeOptions::new();
                return Ok(Arc::clone(device));
            }
            return protocol.open(ProtocolRequest {
                options: node,
                write: mode.write,
                cache: mode.cache,
                context: &self.context,
            });
        };
        let mut options = std::mem::take(node);
        options.set("driver", protocol.name());
        self.open_referenced(from, &options, mode)
    }

    /// Opens the file that the image `from` refers to.
    fn open_referenced(
        &self,
        from: Referrer<'_>,
        options: &NodeOptions,
        mode: Mode,
    ) -> Result<Arc<dyn Device>> {
        self.context.gate.open(&Reference {
            options,
            from: from.name,
            origin: from.origin,
            role: Role::Backing,
            // The final lock follows when the format is known.
            permissions: Permissions {
                write: mode.write,
                ..Permissions::FORCE_SHARE
            },
            context: &self.context,
        })
    }
}

/// The options of the backing image in a node's options.
#[derive(Default)]
struct BackingWords {
    below: Option<NodeOptions>,
    no_backing: bool,
}

impl BackingWords {
    fn none() -> Self {
        Self {
            below: None,
            no_backing: true,
        }
    }

    fn is_given(&self) -> bool {
        self.below.is_some()
    }

    fn split(self) -> (Option<NodeOptions>, bool) {
        (self.below, self.no_backing)
    }
}

/// The options of `node` that are part of the `json:` filename of an image of `format`.
fn strong_options(format: &dyn Format, node: &NodeOptions) -> NodeOptions {
    let mut strong = node.clone();
    strong.retain(|name| {
        format.properties().strong_options.iter().any(|option| {
            name == *option
                || name
                    .strip_prefix(option)
                    .is_some_and(|rest| rest.starts_with('.'))
        })
    });
    strong
}

/// Whether the plain filename of `file` identifies the node, apart from its backing image.
fn has_plain_name(
    format: &dyn Format,
    strong: &NodeOptions,
    file: &dyn Device,
    children: &[(&'static str, Arc<dyn Device>)],
) -> bool {
    let implicit = format.properties().implicit_children;
    // The plain name of an image on another image would be read as the name of a file.
    let on_image = format_by_name(file.node().driver).is_some();
    strong.is_empty() && !on_image && children.iter().all(|(name, _)| implicit.contains(name))
}

/// The warning for an image whose format was guessed where `qemu-img` takes the file for raw.
fn loose_guess(name: &str, format: &dyn Format) -> Note {
    Note::Warning(format!(
        "'{name}' is taken for an image of the format {0}, although it does not begin exactly like one. Specify the \
         format {0} to avoid this warning, or raw if the file is the disk itself.",
        format.name()
    ))
}

fn unknown_option(format: &str, option: &str) -> Error {
    Error::invalid(format!(
        "Block format '{format}' does not support the option '{option}'"
    ))
}

fn no_such_node(name: &str) -> Error {
    Error::invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
}
