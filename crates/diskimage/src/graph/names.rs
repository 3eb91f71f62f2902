//! Names of images: a path, a name with the prefix of a protocol, or `json:` and the options of a node.

use diskimage_core::json;
use diskimage_core::{NodeOptions, Result, ResultExt};
use diskimage_formats::format_by_name;
use diskimage_protocols::{Target, filter_by_name, parse_name, protocol_by_name};

/// The prefix of a name that contains the options of a node.
const JSON: &str = "json:";

/// The node options of the image called `name`, in `format` if that is given.
///
/// # Errors
/// The prefix of the name is unknown, or its JSON is invalid.
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
        // A protocol that is given as the format parses the name itself.
        Some((Some(protocol), _)) if !file.has("driver") => node = protocol.parse(name)?,
        Some((Some(_), _) | (_, Some(_))) => node = file,
        _ => node.set_node("file", file),
    }
    if let Some(format) = format {
        node.set("driver", format);
    }
    Ok(node)
}

/// Whether a driver is called `name`: a format, a protocol or a filter.
pub fn is_driver(name: &str) -> bool {
    format_by_name(name).is_some() || protocol_by_name(name).is_some() || filter_by_name(name).is_some()
}

/// The backing file name `backing`, resolved against the name of the overlay `image`.
pub fn full_backing_name(image: &str, backing: &str) -> String {
    if is_json(backing) {
        backing.to_owned()
    } else {
        Target::resolve(image, backing)
    }
}

/// Whether the backing file name `backing` is relative to the directory of the overlay.
pub fn is_relative(backing: &str) -> bool {
    full_backing_name("/", backing) != backing
}

/// Whether `name` contains the options of a node.
fn is_json(name: &str) -> bool {
    name.starts_with(JSON)
}
