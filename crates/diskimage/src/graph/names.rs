//! Names as nodes: what a plain name, a protocol's, or `json:` stands for.

use diskimage_core::json;
use diskimage_core::{NodeOptions, Result, ResultExt};
use diskimage_formats::format_by_name;
use diskimage_protocols::{Target, filter_by_name, parse_name, protocol_by_name};

/// What marks a name that is a node's options.
const JSON: &str = "json:";

/// The options of the image that `name` stands for, opened as `format` if that is given.
///
/// # Errors
/// What is wrong with the name.
pub fn node_of_name(name: &str, format: Option<&str>) -> Result<NodeOptions> {
    if let Some(text) = name.strip_prefix(JSON) {
        let value = json::parse(text).context(|| "Could not parse the JSON options")?;
        let mut node = NodeOptions::from_json(value)?;
        if let Some(format) = format {
            node.set("driver", format);
        }
        return Ok(node);
    }
    let file = parse_name(name)?;
    let mut node = NodeOptions::new();
    match format.map(|format| (protocol_by_name(format), filter_by_name(format))) {
        // Its own names only, whatever a path is to others.
        Some((Some(protocol), _)) if !file.has("driver") => node = protocol.parse(name)?,
        Some((Some(_), _) | (_, Some(_))) => node = file,
        _ => node.set_node("file", file),
    }
    if let Some(format) = format {
        node.set("driver", format);
    }
    Ok(node)
}

/// Whether there is a driver of this name: a format, a protocol or a filter.
pub fn is_driver(name: &str) -> bool {
    format_by_name(name).is_some() || protocol_by_name(name).is_some() || filter_by_name(name).is_some()
}

/// The name to open `backing` by, which the image called `image` refers to.
pub fn full_backing_name(image: &str, backing: &str) -> String {
    if is_json(backing) {
        backing.to_owned()
    } else {
        Target::resolve(image, backing)
    }
}

/// Whether the name that an image has for the one below depends on where that image is.
pub fn is_relative(backing: &str) -> bool {
    full_backing_name("/", backing) != backing
}

/// Whether `name` is the options of a node and no plain name.
fn is_json(name: &str) -> bool {
    name.starts_with(JSON)
}
