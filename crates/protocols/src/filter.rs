//! The entries of the filter table: devices that hold devices.

use std::fmt::Debug;
use std::sync::Arc;

use diskimage_core::{Device, Image, NodeOptions, Objects, Result};

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

    /// The nodes below that it needs, given its options, in the order in which [`Filter::open`] gets them.
    fn children(&self, options: &NodeOptions) -> Vec<FilterChild>;

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
    /// Whether it is an image whose format is found out where none is given; else it is plain bytes then.
    pub probed: bool,
    /// Whether the filter writes to it when it is itself only read.
    pub write: bool,
}

/// What a filter opens with.
#[derive(Debug)]
pub struct FilterRequest<'a> {
    /// The options of the node, without those of the nodes below.
    pub options: &'a mut NodeOptions,
    /// The nodes below, as [`Filter::children`] lists them.
    pub children: Vec<Below>,
    /// Whether it will be changed.
    pub write: bool,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
}

/// A node below a filter.
#[derive(Clone, Debug)]
pub struct Below {
    /// Its name among the filter's options.
    pub name: String,
    /// What it is.
    pub device: Arc<dyn Device>,
    /// The same node, if it is an image.
    pub image: Option<Arc<Image>>,
}

/// Every filter.
pub static FILTERS: &[&dyn Filter] = &[];

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
