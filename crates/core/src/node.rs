//! The options of a node of the block graph, as the user gave them.
//!
//! A node is a driver with its options and its named child nodes. Users write it as
//! `driver=qcow2,file.driver=file,file.filename=x`, as `json:{"driver": "qcow2", "file": {...}}`, or as a plain
//! file name with defaults for the rest. All forms become the same flat list of dotted names:
//!
//! ```text
//!   driver         qcow2
//!   file.driver    file
//!   file.filename  x
//! ```
//!
//! A driver takes the options that it supports out of the list. Options that are left after it has opened are errors.

use std::collections::BTreeMap;

use crate::json::Value;
use crate::options::{OptionDef, Options, split_list};
use crate::{Error, Result};

/// The options of a node and of its child nodes, by dotted name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// Scalars, and empty lists and objects.
    entries: BTreeMap<String, Value>,
}

impl NodeOptions {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// The options of a list `driver=qcow2,file.filename=x`, as given with `--image-opts`.
    ///
    /// # Errors
    /// An `id` that is not an identifier.
    pub fn from_list(text: &str) -> Result<Self> {
        let mut options = Self::new();
        for (name, value) in split_list(text, Some("file")) {
            if name == "id" && !is_identifier(&value) {
                return Err(Error::invalid("Parameter 'id' expects an identifier")
                    .hint("Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."));
            }
            options.set(&name, value);
        }
        Ok(options)
    }

    /// The options of a JSON object.
    ///
    /// # Errors
    /// A value that is not an object.
    pub fn from_json(value: Value) -> Result<Self> {
        let Value::Object(_) = value else {
            return Err(Error::invalid("Invalid JSON object given"));
        };
        let mut options = Self::new();
        options.flatten("", value);
        Ok(options)
    }

    fn flatten(&mut self, name: &str, value: Value) {
        let below = |key: &str| {
            if name.is_empty() {
                key.to_owned()
            } else {
                format!("{name}.{key}")
            }
        };
        match value {
            Value::Object(members) if name.is_empty() || !members.is_empty() => {
                // Nested options override the same options given as dotted names.
                let (nested, flat): (Vec<_>, Vec<_>) = members
                    .into_iter()
                    .partition(|(_, value)| matches!(value, Value::Object(_) | Value::List(_)));
                for (key, value) in flat.into_iter().chain(nested) {
                    self.flatten(&below(&key), value);
                }
            }
            Value::List(values) if !values.is_empty() => {
                for (at, value) in values.into_iter().enumerate() {
                    self.flatten(&below(&at.to_string()), value);
                }
            }
            value => {
                self.entries.insert(name.to_owned(), value);
            }
        }
    }

    /// Sets an option.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.entries.insert(name.to_owned(), value.into());
    }

    /// Sets `options` for the child node `child`, over those that it has.
    pub fn set_node(&mut self, child: &str, options: Self) {
        for (name, value) in options.entries {
            self.entries.insert(format!("{child}.{name}"), value);
        }
    }

    /// Sets `options` over the present ones.
    pub fn overlay(&mut self, options: Self) {
        self.entries.extend(options.entries);
    }

    /// Keeps the options for whose names `keep` returns true.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.entries.retain(|name, _| keep(name));
    }

    /// Whether there are no options.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the option `name` itself is given; options of a child node of this name do not count.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether options of the child node `child` are given.
    pub fn has_node(&self, child: &str) -> bool {
        self.entries.keys().any(|name| name_below(name, child).is_some())
    }

    /// The text of an option; `None` if it is not given or is no text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.entries.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Removes an option and returns its value.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.entries.remove(name)
    }

    /// Removes an option and returns it as text: numbers as written, `on` and `off` for booleans.
    pub fn take_text(&mut self, name: &str) -> Option<String> {
        self.take(name).map(|value| shown(&value))
    }

    /// Removes and returns all options of the child node `child`.
    pub fn take_node(&mut self, child: &str) -> Self {
        let mut node = Self::new();
        self.entries.retain(|name, value| match name_below(name, child) {
            Some(below) => {
                node.entries
                    .insert(below.to_owned(), std::mem::replace(value, Value::Null));
                false
            }
            None => true,
        });
        node
    }

    /// The options of the child node `child`.
    pub fn node(&self, child: &str) -> Self {
        self.clone().take_node(child)
    }

    /// Removes and returns the options of `table`, each checked to be of its kind.
    ///
    /// # Errors
    /// An invalid value of an option.
    pub fn take_known(&mut self, table: &'static [OptionDef]) -> Result<Options> {
        let mut options = Options::new(table);
        for def in table {
            if let Some(text) = self.take_text(def.name) {
                options.set(def.name, &text)?;
            }
        }
        Ok(options)
    }

    /// The name of an option that no driver has taken: the one that `qemu-img` would report.
    pub fn first_unused(&self) -> Option<&str> {
        let members = self.entries.keys().map(|name| (name.clone(), Value::Null));
        let Value::Object(members) = Value::object(members).in_table_order() else {
            return None;
        };
        let first = members.first()?;
        self.entries
            .get_key_value(&*first.0)
            .map(|(name, _)| name.as_str())
    }

    /// The options as messages show them: `driver=nbd,server.host=x`.
    pub fn shown(&self) -> String {
        let shown = self.iter().map(|(name, value)| match value {
            Value::Text(text) => format!("{name}={text}"),
            other => format!("{name}={}", other.compact()),
        });
        shown.collect::<Vec<_>>().join(",")
    }

    /// The options by dotted name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(name, value)| (name.as_str(), value))
    }
}

/// Whether `text` is a valid name of an object or node.
pub fn is_identifier(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// The part of `name` after `child.`.
fn name_below<'a>(name: &'a str, child: &str) -> Option<&'a str> {
    name.strip_prefix(child)?.strip_prefix('.')
}

fn shown(value: &Value) -> String {
    match value {
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::Text(text) => text.clone(),
        other => other.compact(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;
    use crate::options::OptionKind;

    fn from_json(text: &str) -> NodeOptions {
        NodeOptions::from_json(json::parse(text).expect("JSON")).expect("an object")
    }

    #[test]
    fn lists_and_objects_give_the_same_options() {
        let list = NodeOptions::from_list("driver=raw,file.driver=file,file.filename=a,,b").expect("options");
        let object = from_json("{'driver':'raw','file':{'driver':'file','filename':'a,b'}}");
        assert_eq!(list, object);
        assert_eq!(
            NodeOptions::from_list("a.raw").expect("options").text("file"),
            Some("a.raw")
        );
    }

    #[test]
    fn members_of_lists_are_numbered() {
        let mut options = from_json("{'children':[{'driver':'raw'},{'driver':'qcow2'}],'empty':[]}");
        assert_eq!(options.take_node("children.1").text("driver"), Some("qcow2"));
        assert_eq!(options.take("empty"), Some(Value::List(Vec::new())));
        assert_eq!(options.first_unused(), Some("children.0.driver"));
    }

    #[test]
    fn drivers_take_the_options_that_they_support() {
        const TABLE: &[OptionDef] = &[
            OptionDef {
                name: "size",
                kind: OptionKind::Size,
                help: "The size",
                default: None,
                is_listed: true,
            },
            OptionDef {
                name: "lazy",
                kind: OptionKind::Flag,
                help: "Be lazy",
                default: Some("off"),
                is_listed: true,
            },
        ];
        let mut options = from_json("{'size':4096,'lazy':true,'filename':'x'}");
        let taken = options.take_known(TABLE).expect("right kinds");
        assert_eq!((taken.size("size"), taken.flag("lazy")), (Some(4096), Some(true)));
        assert_eq!(options.first_unused(), Some("filename"));
        let wrong = NodeOptions::from_list("lazy=maybe")
            .expect("options")
            .take_known(TABLE);
        assert_eq!(
            wrong.map(|_| ()).map_err(|error| error.chain()),
            Err("Parameter 'lazy' expects 'on' or 'off'".to_owned())
        );
    }
}
