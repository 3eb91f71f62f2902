//! The tables of drivers, and the names that they are found by.

use diskimage_core::{Error, NodeOptions, Result};

use crate::file::{FILE, HOST_CDROM, HOST_DEVICE};
use crate::filter::{self, Filter};
use crate::name::protocol_prefix;
use crate::nbd::NBD;
use crate::null::{NULL_AIO, NULL_CO};
use crate::protocol::Protocol;
use crate::vvfat::VVFAT;

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

/// Every filter.
pub static FILTERS: &[&dyn Filter] = &[
    &filter::blkdebug::Blkdebug,
    &filter::blklogwrites::BlkLogWrites,
    &filter::blkverify::Blkverify,
    &filter::compress::Compress,
    &filter::copy_on_read::CopyOnRead,
    &filter::preallocate::Preallocate,
    &filter::quorum::Quorum,
    &filter::throttle::Throttle,
];

/// The filter with this name.
pub fn filter_by_name(name: &str) -> Option<&'static dyn Filter> {
    FILTERS.iter().copied().find(|filter| filter.name() == name)
}

/// The filter whose filenames have this prefix.
fn filter_by_prefix(prefix: &str) -> Option<&'static dyn Filter> {
    FILTERS
        .iter()
        .copied()
        .find(|filter| filter.prefixes().contains(&prefix))
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
