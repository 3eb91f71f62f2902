//! The entries of the protocol table.

use std::fmt::Debug;
use std::sync::Arc;

use diskimage_core::{Device, Error, NodeOptions, OpenContext, Result};

use crate::cache::CacheMode;
use crate::file::{FILE, HOST_CDROM, HOST_DEVICE};
use crate::filter::filter_by_prefix;
use crate::name::protocol_prefix;
use crate::nbd::NBD;
use crate::null::{NULL_AIO, NULL_CO};
use crate::vvfat::VVFAT;

/// A protocol, which accesses the storage of bytes. A unit struct listed once in [`PROTOCOLS`].
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

/// Every protocol.
pub static PROTOCOLS: &[&dyn Protocol] = &[
    &FILE,
    &HOST_DEVICE,
    &HOST_CDROM,
    &NBD,
    &NULL_CO,
    &NULL_AIO,
    &VVFAT,
];

/// The protocol with this name.
pub fn protocol_by_name(name: &str) -> Option<&'static dyn Protocol> {
    PROTOCOLS.iter().copied().find(|protocol| protocol.name() == name)
}

/// The protocol of a filename, if the name has a prefix.
pub fn protocol_of_name(name: &str) -> Option<&'static dyn Protocol> {
    let prefix = protocol_prefix(name)?;
    PROTOCOLS
        .iter()
        .copied()
        .find(|protocol| protocol.prefixes().contains(&prefix))
}

/// The options of a filename as a user writes it: a path, or a protocol or filter and its argument.
///
/// # Errors
/// Unknown protocols, and invalid names.
pub fn parse_name(name: &str) -> Result<NodeOptions> {
    let Some(prefix) = protocol_prefix(name) else {
        let mut options = NodeOptions::new();
        options.set("filename", name);
        return Ok(options);
    };
    let (driver, mut options) = match (protocol_of_name(name), filter_by_prefix(prefix)) {
        (Some(protocol), _) => (protocol.name(), protocol.parse(name)?),
        (None, Some(filter)) => (filter.name(), filter.parse(name)?),
        (None, None) => return Err(Error::invalid(format!("Unknown protocol '{prefix}'"))),
    };
    options.set("driver", driver);
    Ok(options)
}
