//! Filters: devices on top of other devices that modify or observe requests.
//!
//! [`Filter`] is the entry of the table [`FILTERS`](crate::FILTERS); each filter is a module of its own. Most have one child and
//! are a [`FilterDevice`](diskimage_core::FilterDevice).

pub(crate) mod blkdebug;
pub(crate) mod blklogwrites;
pub(crate) mod blkverify;
pub(crate) mod compress;
pub(crate) mod copy_on_read;
pub(crate) mod preallocate;
pub(crate) mod quorum;
pub(crate) mod throttle;

use std::fmt::Debug;
use std::sync::Arc;

use diskimage_core::{Device, Error, Image, Node, NodeOptions, OpenContext, Result};

/// A filter: a device on top of others that modifies or observes requests. A unit struct listed once in [`FILTERS`](crate::FILTERS).
pub trait Filter: Debug + Sync {
    /// The driver's name.
    fn name(&self) -> &'static str;

    /// The prefixes of its filenames, without the colon; empty if it has no filenames.
    fn prefixes(&self) -> &'static [&'static str] {
        &[]
    }

    /// The options of a filename, prefix included.
    ///
    /// # Errors
    /// An invalid name.
    fn parse(&self, _name: &str) -> Result<NodeOptions> {
        Ok(NodeOptions::new())
    }

    /// The children that it needs, in the order in which [`Filter::open`] gets them. Options of the filter that
    /// describe a child are converted to options of that child; `parse_name` does this for filenames.
    ///
    /// # Errors
    /// Options that describe no valid children.
    fn children(&self, options: &mut NodeOptions, parse_name: ParseName) -> Result<Vec<FilterChild>>;

    /// Opens the filter on top of its children, and takes the options that it supports.
    ///
    /// # Errors
    /// Invalid options.
    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>>;
}

/// Returns the options of a filename: [`parse_name`](crate::parse_name), which knows all drivers, filters too.
pub type ParseName = fn(&str) -> Result<NodeOptions>;

/// A child that a filter needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterChild {
    /// Its name among the filter's options.
    pub name: String,
    /// Its kind if its options do not name a driver.
    pub kind: ChildKind,
}

/// The kind of a filter's child whose options do not name a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildKind {
    /// A file.
    Bytes,
    /// An image, whose file is a child called `file`.
    Image,
    /// An image; the options are those of its file.
    ImageFile,
}

/// The arguments of [`Filter::open`].
pub struct FilterRequest<'a> {
    /// The options of the node, without those of its children.
    pub options: &'a mut NodeOptions,
    /// The children, in the order of [`Filter::children`].
    pub children: Vec<OpenedChild>,
    /// Whether it is opened for writing.
    pub write: bool,
    /// What it shares with the other nodes of its graph.
    pub context: &'a OpenContext,
    /// Opens a file that an option names, for reading.
    pub open_file: &'a dyn Fn(&str) -> Result<Arc<dyn Device>>,
}

impl FilterRequest<'_> {
    /// The only child.
    fn only_child(&self) -> Result<&OpenedChild> {
        self.children.first().ok_or_else(|| missing("file"))
    }

    /// The filter's node in the block graph, with the options for which `is_strong` returns true.
    fn node(&self, driver: &'static str, is_strong: impl Fn(&str) -> bool) -> Node {
        let mut options = self.options.clone();
        options.retain(is_strong);
        Node {
            driver,
            options,
            children: self
                .children
                .iter()
                .map(|below| (below.name.clone(), Arc::clone(&below.device)))
                .collect(),
            ..Node::default()
        }
    }
}

/// An opened child of a filter.
#[derive(Clone, Debug)]
pub struct OpenedChild {
    /// Its name among the filter's options.
    pub name: String,
    /// The device of the child.
    pub device: Arc<dyn Device>,
    /// The same child, if it is an image.
    pub image: Option<Arc<Image>>,
}

/// The only child of most filters.
fn file_child() -> Vec<FilterChild> {
    vec![child("file", ChildKind::Bytes)]
}

fn child(name: &str, kind: ChildKind) -> FilterChild {
    FilterChild {
        name: name.to_owned(),
        kind,
    }
}

fn missing(child: &str) -> Error {
    Error::invalid(format!("A block device must be specified for \"{child}\""))
}

/// Sets the options of `child` to those of the filename in `option`. Returns whether that is given.
fn name_child(options: &mut NodeOptions, option: &str, child: &str, parse_name: ParseName) -> Result<bool> {
    let Some(name) = options.take_text(option) else {
        return Ok(false);
    };
    options.set_node(child, parse_name(&name)?);
    Ok(true)
}

fn read_only() -> Error {
    Error::invalid("Block node is read-only")
}
