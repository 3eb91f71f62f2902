//! The entries of the protocol table.

use std::fmt::Debug;
use std::sync::Arc;

use diskimage_core::{Budget, Device, Error, Gate, LocalTime, NodeOptions, Objects, Progress, Result};

use crate::cache::CacheMode;
use crate::file::{FILE, HOST_CDROM, HOST_DEVICE};
use crate::filter::filter_by_prefix;
use crate::name::protocol_prefix;
use crate::nbd::NBD;
use crate::null::{NULL_AIO, NULL_CO};
use crate::vvfat::VVFAT;

/// A protocol: where bytes live. A unit struct listed once in [`PROTOCOLS`].
pub trait Protocol: Debug + Sync {
    /// The driver's name.
    fn name(&self) -> &'static str;

    /// What names of this protocol have before their first colon; none if it has no such names.
    fn prefixes(&self) -> &'static [&'static str];

    /// The options that a name stands for, prefix included, as [`Protocol::open`] takes them.
    ///
    /// # Errors
    /// What is wrong with the name.
    fn parse(&self, name: &str) -> Result<NodeOptions>;

    /// Opens what the options name, taking those that it knows.
    ///
    /// # Errors
    /// Options that make no sense, and why it could not be opened.
    fn open(&self, request: ProtocolRequest<'_>) -> Result<Arc<dyn Device>>;

    /// Whether there is a way to make a new image with the protocol alone.
    fn can_create(&self) -> bool {
        false
    }

    /// Whether a new image can go into something that is there.
    fn can_hold_image(&self) -> bool {
        true
    }
}

/// What a protocol opens with.
pub struct ProtocolRequest<'a> {
    /// The options of the node.
    pub options: &'a mut NodeOptions,
    /// Whether it will be changed.
    pub write: bool,
    /// How requests reach the disk.
    pub cache: CacheMode,
    /// What options refer to by name.
    pub objects: &'a Arc<Objects>,
    /// Who opens what it finds in what it opens.
    pub gate: &'a Arc<dyn Gate>,
    /// The memory that what it finds may claim.
    pub budget: &'a Budget,
    /// What time it is where the user is.
    pub local_time: &'a LocalTime,
    /// Who is told what the user ought to know.
    pub notes: Progress<'a>,
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

/// The protocol of this name.
pub fn protocol_by_name(name: &str) -> Option<&'static dyn Protocol> {
    PROTOCOLS.iter().copied().find(|protocol| protocol.name() == name)
}

/// The protocol that a name is of, if it says so.
pub fn protocol_of_name(name: &str) -> Option<&'static dyn Protocol> {
    let prefix = protocol_prefix(name)?;
    PROTOCOLS
        .iter()
        .copied()
        .find(|protocol| protocol.prefixes().contains(&prefix))
}

/// The options that a name stands for as a user writes it: a path, or a protocol or filter and what it needs.
///
/// # Errors
/// Protocols that there are none of, and what is wrong with the rest.
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
