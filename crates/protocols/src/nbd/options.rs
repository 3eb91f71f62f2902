//! The options of a node of the driver `nbd`.

use std::time::Duration;

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{Error, Node, NodeOptions, Result, name};

use super::address::{Address, Inet};
use super::negotiate::MAX_NAME;
use super::uri::{DEFAULT_PORT, show};

/// The options to open an export with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NbdOptions {
    pub(super) address: Address,
    pub(super) export: String,
    /// The identifier of the credentials object.
    pub(super) tls_creds: Option<String>,
    /// The name that the server's certificate must have, if not that of the host.
    pub(super) tls_hostname: Option<String>,
    /// The metadata context whose block status is reported as allocation.
    pub(super) context: Option<String>,
    /// For how long requests wait while a lost connection is replaced.
    pub(super) reconnect_delay: Duration,
    /// For how long opening retries.
    pub(super) open_timeout: Duration,
    /// The options for the node's `json:` filename, as they were given.
    given: NodeOptions,
}

const TABLE: &[OptionDef] = &[
    text("host", "The server's host"),
    text("port", "The server's port"),
    text("path", "The server's socket in the file system"),
    text("export", "The name of the export"),
    text("tls-creds", "The identifier of the credentials for encryption"),
    text(
        "tls-hostname",
        "The name that the server's certificate should have",
    ),
    text("x-dirty-bitmap", "A context to take block status from"),
    number(
        "reconnect-delay",
        "Seconds that requests wait for a lost connection",
    ),
    number("open-timeout", "Seconds for which opening is tried again"),
];

/// The options that are part of the node's `json:` filename.
const STRONG: &[&str] = &["host", "port", "path", "export", "tls-creds", "tls-hostname"];

const SERVER_INET: &[OptionDef] = &[
    text("host", "The server's host"),
    text("port", "The server's port"),
    // Accepted and ignored.
    flag("numeric", "Whether the host is a number"),
    flag("ipv4", "Whether addresses of version 4 are taken"),
    flag("ipv6", "Whether addresses of version 6 are taken"),
    flag(
        "keep-alive",
        "Whether the system looks if the server is still there",
    ),
];

const SERVER_UNIX: &[OptionDef] = &[text("path", "The server's socket in the file system")];

const fn text(name: &'static str, help: &'static str) -> OptionDef {
    OptionDef {
        name,
        kind: OptionKind::Text,
        help,
        default: None,
        is_listed: true,
    }
}

const fn number(name: &'static str, help: &'static str) -> OptionDef {
    OptionDef {
        kind: OptionKind::Number,
        ..text(name, help)
    }
}

const fn flag(name: &'static str, help: &'static str) -> OptionDef {
    OptionDef {
        kind: OptionKind::Flag,
        ..text(name, help)
    }
}

impl NbdOptions {
    /// Takes the options of the driver.
    ///
    /// # Errors
    /// Invalid values, and no server address or more than one.
    pub(super) fn take(options: &mut NodeOptions) -> Result<Self> {
        let mut given = options.clone();
        given.retain(|name| STRONG.contains(&name) || name.starts_with("server."));
        let server = options.take_node("server");
        let own = options.take_known(TABLE)?;
        let (host, port, path) = (own.text("host"), own.text("port"), own.text("path"));
        let address = if !server.is_empty() {
            if host.or(port).or(path).is_some() {
                return Err(Error::invalid(
                    "Cannot use 'server' and path/host/port at the same time",
                ));
            }
            take_server(server)?
        } else {
            match (path, host) {
                (Some(_), Some(_)) => {
                    return Err(Error::invalid("path and host may not be used at the same time"));
                }
                (Some(_), None) if port.is_some() => {
                    return Err(Error::invalid("port may not be used without host"));
                }
                (Some(path), None) => Address::Unix(path.to_owned()),
                (None, Some(host)) => Address::Inet(Inet {
                    host: host.to_owned(),
                    port: port.unwrap_or(DEFAULT_PORT).to_owned(),
                    ..Inet::default()
                }),
                (None, None) => return Err(Error::invalid("NBD server address missing")),
            }
        };
        let export = own.text("export").unwrap_or_default().to_owned();
        if name::len(&export) > MAX_NAME {
            return Err(Error::invalid("export name too long to send to server"));
        }
        let context = own.text("x-dirty-bitmap").map(str::to_owned);
        if context
            .as_ref()
            .is_some_and(|context| name::len(context) > MAX_NAME)
        {
            return Err(Error::invalid("x-dirty-bitmap query too long to send to server"));
        }
        let seconds = |name| Duration::from_secs(own.number(name).unwrap_or(0).min(MAX_SECONDS));
        Ok(Self {
            address,
            export,
            tls_creds: own.text("tls-creds").map(str::to_owned),
            tls_hostname: own.text("tls-hostname").map(str::to_owned),
            context,
            reconnect_delay: seconds("reconnect-delay"),
            open_timeout: seconds("open-timeout"),
            given,
        })
    }
}

impl NbdOptions {
    /// The export's node in the block graph.
    pub(super) fn node(&self) -> Node {
        Node {
            driver: "nbd",
            options: self.given.clone(),
            name: Some(show(&self.address, &self.export)),
            ..Node::default()
        }
    }
}

/// The limit of `qemu-img`, which uses 32 bits.
const MAX_SECONDS: u64 = u32::MAX as u64;

fn take_server(mut server: NodeOptions) -> Result<Address> {
    let missing = |name: &str| Error::invalid(format!("Parameter '{name}' is missing"));
    let kind = server.take_text("type").ok_or_else(|| missing("type"))?;
    let address = match kind.as_str() {
        "unix" => {
            let own = server.take_known(SERVER_UNIX)?;
            Address::Unix(own.text("path").ok_or_else(|| missing("path"))?.to_owned())
        }
        "inet" => {
            let own = server.take_known(SERVER_INET)?;
            let required = |name| own.text(name).map(str::to_owned).ok_or_else(|| missing(name));
            Address::Inet(Inet {
                host: required("host")?,
                port: required("port")?,
                ipv4: own.flag("ipv4"),
                ipv6: own.flag("ipv6"),
                keep_alive: own.flag("keep-alive").unwrap_or(false),
            })
        }
        "vsock" | "fd" => {
            return Err(Error::unsupported(format!(
                "Servers of type '{kind}' are not available in this build"
            )));
        }
        other => {
            return Err(Error::invalid(format!(
                "Parameter 'type' does not accept value '{other}'"
            )));
        }
    };
    match server.first_unused() {
        Some(name) => Err(Error::invalid(format!("Parameter '{name}' is unexpected"))),
        None => Ok(address),
    }
}
