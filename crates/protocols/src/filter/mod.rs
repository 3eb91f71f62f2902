//! Filters: devices on top of other devices that change what requests do.
//!
//! [`Filter`] is the entry of the table [`FILTERS`]; each filter is a module of its own. Most stand on one node below and
//! are a [`FilterDevice`](diskimage_core::FilterDevice).

mod blkdebug;
mod blklogwrites;
mod blkverify;
mod compress;
mod copy_on_read;
mod preallocate;
mod quorum;
mod throttle;

use std::fmt::Debug;
use std::sync::Arc;

use diskimage_core::{Device, Error, Image, Node, NodeOptions, Objects, Result};

/// A filter: a device on top of others that changes what requests do. A unit struct listed once in [`FILTERS`].
pub trait Filter: Debug + Sync {
    /// The driver's name.
    fn name(&self) -> &'static str;

    /// What names of this filter have before their first colon; none if it has no such names.
    fn prefixes(&self) -> &'static [&'static str] {
        &[]
    }

    /// The options that a name stands for, prefix included.
    ///
    /// # Errors
    /// What is wrong with the name.
    fn parse(&self, _name: &str) -> Result<NodeOptions> {
        Ok(NodeOptions::new())
    }

    /// The nodes below that it needs, in the order in which [`Filter::open`] gets them; what its options say of them in
    /// other words becomes their options.
    ///
    /// # Errors
    /// Options that name no nodes.
    fn children(&self, options: &mut NodeOptions) -> Result<Vec<FilterChild>>;

    /// Puts the filter on top of its children, taking the options that it knows.
    ///
    /// # Errors
    /// Options that make no sense.
    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>>;
}

/// A node that a filter needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterChild {
    /// Its name among the filter's options.
    pub name: String,
    /// What it is where its options do not name a driver.
    pub kind: ChildKind,
}

/// What a node below a filter is where its options do not name a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildKind {
    /// The bytes of a file.
    Bytes,
    /// An image, on a node of its own called `file`.
    Image,
    /// An image in the file that the options name.
    ImageFile,
}

/// What a filter opens with.
pub struct FilterRequest<'a> {
    /// The options of the node, without those of the nodes below.
    pub options: &'a mut NodeOptions,
    /// The nodes below, as [`Filter::children`] lists them.
    pub children: Vec<OpenedChild>,
    /// Whether it will be changed.
    pub write: bool,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
    /// Opens a file that an option names, to read it.
    pub open_file: &'a dyn Fn(&str) -> Result<Arc<dyn Device>>,
}

impl FilterRequest<'_> {
    /// The one node below.
    fn only_child(&self) -> Result<&OpenedChild> {
        self.children.first().ok_or_else(|| missing("file"))
    }

    /// The filter's place in the block graph: with those of its options that `is_strong` says make it what it is.
    fn node(&self, driver: &'static str, is_strong: impl Fn(&str) -> bool) -> Node {
        let mut options = self.options.clone();
        options.retain(is_strong);
        Node {
            driver,
            options,
            node_name: None,
            name: None,
            children: self
                .children
                .iter()
                .map(|below| (below.name.clone(), Arc::clone(&below.device)))
                .collect(),
        }
    }
}

/// A node below a filter.
#[derive(Clone, Debug)]
pub struct OpenedChild {
    /// Its name among the filter's options.
    pub name: String,
    /// What it is.
    pub device: Arc<dyn Device>,
    /// The same node, if it is an image.
    pub image: Option<Arc<Image>>,
}

/// Every filter.
pub static FILTERS: &[&dyn Filter] = &[
    &blkdebug::Blkdebug,
    &blklogwrites::BlkLogWrites,
    &blkverify::Blkverify,
    &compress::Compress,
    &copy_on_read::CopyOnRead,
    &preallocate::Preallocate,
    &quorum::Quorum,
    &throttle::Throttle,
];

/// The filter of this name.
pub fn filter_by_name(name: &str) -> Option<&'static dyn Filter> {
    FILTERS.iter().copied().find(|filter| filter.name() == name)
}

pub(crate) fn filter_by_prefix(prefix: &str) -> Option<&'static dyn Filter> {
    FILTERS
        .iter()
        .copied()
        .find(|filter| filter.prefixes().contains(&prefix))
}

/// The one node that most filters stand on.
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

/// Has `child` be what `option` names, if that is given.
fn name_child(options: &mut NodeOptions, option: &str, child: &str) -> Result<bool> {
    let Some(name) = options.take_text(option) else {
        return Ok(false);
    };
    options.set_node(child, crate::protocol::parse_name(&name)?);
    Ok(true)
}

fn read_only() -> Error {
    Error::invalid("Block node is read-only")
}
