//! Names of exports: URIs as in the NetworkBlockDevice project's `doc/uri.md`, and the older form.
//!
//! ```text
//!   nbd://HOST[:PORT]/[EXPORT]       nbd+tcp://HOST[:PORT]/[EXPORT]       nbd+unix:///[EXPORT]?socket=PATH
//!   nbd:HOST:PORT[:exportname=EXPORT]                                     nbd:unix:PATH[:exportname=EXPORT]
//! ```
//!
//! Both become options of a node: `host` and `port` or `path`, and `export`.

use diskimage_core::{Error, NodeOptions, Result, name};

use super::address::Address;

/// The default port.
pub(super) const DEFAULT_PORT: &str = "10809";

/// The options of a filename.
///
/// # Errors
/// Names of neither form, and invalid ones.
pub(super) fn parse(name: &str) -> Result<NodeOptions> {
    if name.contains("://") {
        return parse_uri(name).ok_or_else(|| Error::invalid("No valid URL specified"));
    }
    let rest = name
        .strip_prefix("nbd:")
        .ok_or_else(|| Error::invalid("File name string for NBD must start with 'nbd:'"))?;
    parse_old(rest)
}

fn parse_old(rest: &str) -> Result<NodeOptions> {
    let (host_port, export) = match rest.split_once(":exportname=") {
        // As in qemu-img: an empty export name discards the address as well.
        Some((_, "")) => return Ok(NodeOptions::new()),
        Some((host_port, export)) => (host_port, Some(export)),
        None => (rest, None),
    };
    let mut options = NodeOptions::new();
    if let Some(path) = host_port.strip_prefix("unix:") {
        options.set("path", path);
    } else if !host_port.is_empty() {
        let (host, port) = split_port(host_port)
            .ok_or_else(|| Error::invalid(format!("error parsing address '{host_port}'")))?;
        options.set("host", host);
        options.set("port", port);
    }
    if let Some(export) = export {
        options.set("export", export);
    }
    Ok(options)
}

/// `HOST:PORT`, with brackets around a host that has colons.
fn split_port(host_port: &str) -> Option<(&str, &str)> {
    let (host, port) = match host_port.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':')?)
        }
        None => host_port.split_once(':')?,
    };
    (!port.is_empty()).then_some((host, port))
}

fn parse_uri(name: &str) -> Option<NodeOptions> {
    let (scheme, rest) = name.split_once("://")?;
    let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, ""),
    };
    let mut options = NodeOptions::new();
    let export = decode(path.strip_prefix('/').unwrap_or(path))?;
    if !export.is_empty() {
        options.set("export", export);
    }
    match scheme {
        "nbd+unix" => {
            let mut socket = None;
            for pair in query?.split('&').filter(|pair| !pair.is_empty()) {
                match pair.split_once('=')? {
                    ("socket", path) if socket.is_none() => socket = Some(decode_bytes(path)?),
                    _ => return None,
                }
            }
            if !authority.is_empty() {
                return None;
            }
            options.set("path", socket?);
        }
        "nbd" | "nbd+tcp" => {
            if query.is_some_and(|query| !query.is_empty()) {
                return None;
            }
            let host_port = authority
                .rsplit_once('@')
                .map_or(authority, |(_, host_port)| host_port);
            let (host, port) = authority_parts(host_port)?;
            options.set("host", decode(host)?);
            options.set("port", port);
        }
        _ => return None,
    }
    Some(options)
}

/// The host and the port of a URI.
fn authority_parts(host_port: &str) -> Option<(&str, &str)> {
    let (host, rest) = match host_port.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => host_port.split_at(host_port.find(':').unwrap_or(host_port.len())),
    };
    if host.is_empty() {
        return None;
    }
    let port = rest.strip_prefix(':').unwrap_or(rest);
    if port.is_empty() {
        return Some((host, DEFAULT_PORT));
    }
    port.parse::<u16>().ok()?;
    Some((host, port))
}

/// Decodes percent-encoding (`%41` for `A`). The outcome has to be UTF-8.
fn decode(text: &str) -> Option<String> {
    let text = decode_bytes(text)?;
    std::str::from_utf8(&name::to_bytes(&text))
        .is_ok()
        .then_some(text)
}

/// Decodes percent-encoding in the name of a socket, which may have any bytes but NUL.
fn decode_bytes(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let text = name::to_bytes(text);
    let mut rest = &*text;
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        // `from_str_radix` would accept a sign.
        let byte = u8::from_str_radix(digits, 16)
            .ok()
            .filter(|_| !digits.starts_with('+'))?;
        if byte == 0 {
            return None;
        }
        bytes.push(byte);
        rest = tail;
    }
    Some(name::from_bytes(&bytes).into_owned())
}

/// The filename to show for an export.
pub(super) fn show(address: &Address, export: &str) -> String {
    match address {
        Address::Unix(path) if export.is_empty() => format!("nbd+unix://?socket={path}"),
        Address::Unix(path) => format!("nbd+unix:///{export}?socket={path}"),
        Address::Inet(inet) if export.is_empty() => format!("nbd://{}:{}", inet.host, inet.port),
        Address::Inet(inet) => format!("nbd://{}:{}/{export}", inet.host, inet.port),
    }
}
