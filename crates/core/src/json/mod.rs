//! JSON as `qemu-img` reads and prints it: indented by four spaces, ASCII only; strings in single quotes are read, too.

mod order;
mod parse;

use std::borrow::Cow;
use std::fmt::Write;

pub use parse::parse;

/// A JSON value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// Any other number, as written in the source.
    Real(String),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Value>),
    /// Members in the order in which they are printed.
    Object(Vec<(Cow<'static, str>, Value)>),
}

impl Value {
    /// An object of these members.
    pub fn object<K: Into<Cow<'static, str>>>(members: impl IntoIterator<Item = (K, Self)>) -> Self {
        Self::Object(
            members
                .into_iter()
                .map(|(name, value)| (name.into(), value))
                .collect(),
        )
    }

    /// The same value with the members of every object in the order in which `qemu-img` prints them where no
    /// schema defines an order.
    #[must_use]
    pub fn in_table_order(self) -> Self {
        match self {
            Self::List(values) => Self::List(values.into_iter().map(Self::in_table_order).collect()),
            Self::Object(mut members) => {
                members.sort_by_key(|(name, _)| order::bucket(name));
                let member = |(name, value): (_, Self)| (name, value.in_table_order());
                Self::Object(members.into_iter().map(member).collect())
            }
            other => other,
        }
    }

    /// On several lines, with a newline at the end. An empty list or object takes two lines.
    pub fn pretty(&self) -> String {
        let mut text = String::new();
        self.print(&mut text, Some(0));
        text.push('\n');
        text
    }

    /// On one line, without a newline: `{"driver": "qcow2", "size": 1}`.
    pub fn compact(&self) -> String {
        let mut text = String::new();
        self.print(&mut text, None);
        text
    }

    fn print(&self, text: &mut String, depth: Option<usize>) {
        match self {
            Self::Null => text.push_str("null"),
            Self::Bool(value) => text.push_str(if *value { "true" } else { "false" }),
            // Writing to a string does not fail.
            Self::Int(value) => drop(write!(text, "{value}")),
            Self::Real(value) => text.push_str(value),
            Self::Text(value) => quote(text, value),
            Self::List(values) => {
                text.push('[');
                for (at, value) in values.iter().enumerate() {
                    separate(text, at, depth);
                    value.print(text, depth.map(|depth| depth + 1));
                }
                close(text, ']', depth);
            }
            Self::Object(members) => {
                text.push('{');
                for (at, (name, value)) in members.iter().enumerate() {
                    separate(text, at, depth);
                    quote(text, name);
                    text.push_str(": ");
                    value.print(text, depth.map(|depth| depth + 1));
                }
                close(text, '}', depth);
            }
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Int(value.into())
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value.into())
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<Vec<Value>> for Value {
    fn from(values: Vec<Value>) -> Self {
        Self::List(values)
    }
}

/// Writes the separator before the `at`-th element of a list or object.
fn separate(text: &mut String, at: usize, depth: Option<usize>) {
    match (at, depth) {
        (0, None) => (),
        (_, None) => text.push_str(", "),
        (_, Some(depth)) => {
            if at > 0 {
                text.push(',');
            }
            new_line(text, depth + 1);
        }
    }
}

fn close(text: &mut String, bracket: char, depth: Option<usize>) {
    if let Some(depth) = depth {
        new_line(text, depth);
    }
    text.push(bracket);
}

fn new_line(text: &mut String, depth: usize) {
    text.push('\n');
    text.extend(std::iter::repeat_n("    ", depth));
}

fn quote(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(c),
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_indented_by_four_and_empty_ones_take_two_lines() {
        let value = Value::object([
            ("children", Value::from(vec![])),
            (
                "info",
                Value::object([
                    ("virtual-size", Value::from(197_120u64)),
                    ("dirty-flag", false.into()),
                ]),
            ),
            ("data", Value::Object(vec![])),
            ("list", Value::from(vec![Value::Null, Value::from(-1i64)])),
        ]);
        assert_eq!(
            value.pretty(),
            r#"{
    "children": [
    ],
    "info": {
        "virtual-size": 197120,
        "dirty-flag": false
    },
    "data": {
    },
    "list": [
        null,
        -1
    ]
}
"#
        );
        assert_eq!(
            value.compact(),
            r#"{"children": [], "info": {"virtual-size": 197120, "dirty-flag": false}, "data": {}, "list": [null, -1]}"#
        );
    }

    #[test]
    fn text_is_ascii_with_upper_case_escapes() {
        assert_eq!(
            Value::from("\u{e9}\t\u{1}\u{1f600}\"\\\u{7f}\u{fffd}\u{8}/").compact(),
            r#""\u00E9\t\u0001\uD83D\uDE00\"\\\u007F\uFFFD\b/""#
        );
    }
}
