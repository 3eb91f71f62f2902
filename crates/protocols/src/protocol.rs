//! What a protocol is: an entry of the table [`PROTOCOLS`](crate::PROTOCOLS).

use std::fmt::Debug;
use std::sync::Arc;

use diskimage_core::{Device, NodeOptions, OpenContext, Result};

use crate::cache::CacheMode;

/// A protocol, which accesses the storage of bytes. A unit struct listed once in [`PROTOCOLS`](crate::PROTOCOLS).
pub trait Protocol: Debug + Sync {
    /// The driver's name.
    fn name(&self) -> &'static str;

    /// The prefixes of its filenames, without the colon; empty if it has no filenames.
    fn prefixes(&self) -> &'static [&'static str];

    /// The options of a filename (prefix included), as [`Protocol::open`] takes them.
    ///
    /// # Errors
    /// An invalid name.
    fn parse(&self, name: &str) -> Result<NodeOptions>;

    /// Opens the storage that the options name, and takes the options that it supports.
    ///
    /// # Errors
    /// Invalid options, and errors of opening the storage.
    fn open(&self, request: ProtocolRequest<'_>) -> Result<Arc<dyn Device>>;

    /// Whether the protocol can create the file for a new image.
    fn can_create(&self) -> bool {
        false
    }

    /// Whether a new image can be written into existing storage.
    fn can_hold_image(&self) -> bool {
        true
    }
}

/// The arguments of [`Protocol::open`].
pub struct ProtocolRequest<'a> {
    /// The options of the node.
    pub options: &'a mut NodeOptions,
    /// Whether it is opened for writing.
    pub write: bool,
    /// How requests reach the disk.
    pub cache: CacheMode,
    /// What it shares with the other nodes of its graph.
    pub context: &'a OpenContext,
}

impl Debug for ProtocolRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProtocolRequest")
            .field("options", &self.options)
            .field("write", &self.write)
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}
