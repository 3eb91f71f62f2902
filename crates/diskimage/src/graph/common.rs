//! The options that nodes of all drivers have.

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{Error, NodeOptions, Result, ZeroDetection, is_identifier};
use diskimage_protocols::{CacheMode, Flush};

use super::Mode;

/// The common options of one node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    pub(crate) mode: Mode,
    pub(crate) zeroes: ZeroDetection,
}

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("node-name", OptionKind::Text, "Name of the node"),
    OptionDef::new("read-only", OptionKind::Flag, "Never write to it"),
    OptionDef::new(
        "auto-read-only",
        OptionKind::Flag,
        "Do not write to it if it cannot be written to",
    ),
    OptionDef::new("force-share", OptionKind::Flag, "Do not mind other users"),
    OptionDef::new("cache.direct", OptionKind::Flag, "Past the system's cache"),
    OptionDef::new("cache.no-flush", OptionKind::Flag, "Flushing does nothing"),
    OptionDef::new(
        "discard",
        OptionKind::Text,
        "Whether discarding gives storage back",
    ),
    OptionDef::new(
        "detect-zeroes",
        OptionKind::Text,
        "Whether zeroes that are written take storage",
    ),
];

impl Common {
    /// Removes the common options from a node's options and parses them. Options that are not given are inherited from
    /// `above`, the mode of the parent node.
    ///
    /// # Errors
    /// An option has an invalid value, or a read-only node is opened for writing.
    pub(crate) fn take(node: &mut NodeOptions, above: Mode) -> Result<Self> {
        let options = node.take_known(OPTIONS)?;
        let mode = Mode {
            force_share: options.flag("force-share").unwrap_or(above.force_share),
            cache: CacheMode {
                direct: options.flag("cache.direct").unwrap_or(above.cache.direct),
                flush: match options.flag("cache.no-flush") {
                    Some(true) => Flush::Never,
                    Some(false) => Flush::Always,
                    None => above.cache.flush,
                },
                ..above.cache
            },
            ..above
        };
        let unmap = match options.text("discard") {
            Some("unmap" | "on") => true,
            Some("ignore" | "off") | None => false,
            Some(_) => return Err(Error::invalid("Invalid discard option")),
        };
        let zeroes = match options.text("detect-zeroes") {
            None | Some("off") => ZeroDetection::Off,
            Some("on") => ZeroDetection::On,
            Some("unmap") if unmap => ZeroDetection::Unmap,
            Some("unmap") => {
                return Err(Error::invalid(
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
                ));
            }
            Some(other) => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
        };
        if let Some(name) = options.text("node-name") {
            if !is_identifier(name) {
                return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
            }
            if name.len() >= MAX_NODE_NAME {
                return Err(Error::invalid("Node name too long"));
            }
        }
        if mode.write
            && options.flag("read-only") == Some(true)
            && options.flag("auto-read-only") != Some(true)
        {
            return Err(Error::invalid("Block node is read-only"));
        }
        if mode.force_share && mode.write {
            return Err(Error::invalid(
                "force-share=on can only be used with read-only images",
            ));
        }
        Ok(Self { mode, zeroes })
    }
}

/// A limit of qemu-img, which stores node names in 32 bytes with a NUL at the end.
const MAX_NODE_NAME: usize = 32;
