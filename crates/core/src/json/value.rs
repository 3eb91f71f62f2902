//! A JSON value, and its text.

use std::borrow::Cow;
use std::fmt::{self, Write};

use super::order;
use crate::name;

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

    /// On several lines, with a newline at the end: what is printed. An empty list or object takes two lines. Bytes of
    /// names that are not UTF-8 become U+FFFD.
    pub fn pretty(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_pretty(&mut text);
        text
    }

    /// Writes [`Value::pretty`] piece by piece: a list in an image may have a million members.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_pretty(&self, out: &mut dyn Write) -> fmt::Result {
        self.print(out, Some(0))?;
        out.write_char('\n')
    }

    /// On one line, without a newline: `{"driver": "qcow2", "size": 1}`. [`parse`](super::parse()) reads the same value
    /// from it: bytes of [names](crate::name) that are not UTF-8 stay what they are.
    pub fn compact(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.print(&mut text, None);
        text
    }

    fn print(&self, out: &mut dyn Write, depth: Option<usize>) -> fmt::Result {
        match self {
            Self::Null => out.write_str("null"),
            Self::Bool(value) => out.write_str(if *value { "true" } else { "false" }),
            Self::Int(value) => write!(out, "{value}"),
            Self::Real(value) => out.write_str(value),
            Self::Text(value) => quote(out, value, depth.is_some()),
            Self::List(values) => {
                out.write_char('[')?;
                for (at, value) in values.iter().enumerate() {
                    separate(out, at, depth)?;
                    value.print(out, depth.map(|depth| depth + 1))?;
                }
                close(out, ']', depth)
            }
            Self::Object(members) => {
                out.write_char('{')?;
                for (at, (name, value)) in members.iter().enumerate() {
                    separate(out, at, depth)?;
                    quote(out, name, depth.is_some())?;
                    out.write_str(": ")?;
                    value.print(out, depth.map(|depth| depth + 1))?;
                }
                close(out, '}', depth)
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
fn separate(out: &mut dyn Write, at: usize, depth: Option<usize>) -> fmt::Result {
    match (at, depth) {
        (0, None) => Ok(()),
        (_, None) => out.write_str(", "),
        (_, Some(depth)) => {
            if at > 0 {
                out.write_char(',')?;
            }
            new_line(out, depth + 1)
        }
    }
}

fn close(out: &mut dyn Write, bracket: char, depth: Option<usize>) -> fmt::Result {
    if let Some(depth) = depth {
        new_line(out, depth)?;
    }
    out.write_char(bracket)
}

fn new_line(out: &mut dyn Write, depth: usize) -> fmt::Result {
    out.write_char('\n')?;
    (0..depth).try_for_each(|_| out.write_str("    "))
}

fn quote(out: &mut dyn Write, value: &str, is_printed: bool) -> fmt::Result {
    out.write_char('"')?;
    if is_printed {
        let bytes = name::to_bytes(value);
        let mut rest = &*bytes;
        while !rest.is_empty() {
            let (c, len) = decode(rest);
            write_escaped(out, c.unwrap_or(char::REPLACEMENT_CHARACTER))?;
            rest = &rest[len..];
        }
    } else {
        for c in value.chars() {
            match name::byte_of(c) {
                Some(_) => out.write_char(c)?,
                None => write_escaped(out, c)?,
            }
        }
    }
    out.write_char('"')
}

fn write_escaped(out: &mut dyn Write, c: char) -> fmt::Result {
    match c {
        '"' => out.write_str("\\\""),
        '\\' => out.write_str("\\\\"),
        '\u{8}' => out.write_str("\\b"),
        '\u{c}' => out.write_str("\\f"),
        '\n' => out.write_str("\\n"),
        '\r' => out.write_str("\\r"),
        '\t' => out.write_str("\\t"),
        ' '..='~' => out.write_char(c),
        c => {
            let mut units = [0; 2];
            let mut units = c.encode_utf16(&mut units).iter();
            units.try_for_each(|unit| write!(out, "\\u{unit:04X}"))
        }
    }
}

/// The first character of what is not empty, and how many bytes it takes: as in qemu-img, a sequence that is cut off, too
/// long for its character or of none is one error, and `C0 80` is NUL.
fn decode(bytes: &[u8]) -> (Option<char>, usize) {
    let first = bytes[0];
    let (len, bits) = match first {
        0..0x80 => return (Some(char::from(first)), 1),
        0xc0..0xe0 => (2, first & 0x1f),
        0xe0..0xf0 => (3, first & 0x0f),
        0xf0..0xf8 => (4, first & 0x07),
        0xf8..0xfc => (5, first & 0x03),
        0xfc..0xfe => (6, first & 0x01),
        _ => return (None, 1),
    };
    let following = bytes[1..]
        .iter()
        .take(len - 1)
        .take_while(|byte| **byte & 0xc0 == 0x80);
    let present = 1 + following.clone().count();
    if present < len {
        return (None, present);
    }
    let code = following.fold(u32::from(bits), |code, byte| code << 6 | u32::from(byte & 0x3f));
    let c = char::from_u32(code).filter(|c| {
        let is_none = matches!(code, 0xfdd0..0xfdf0) || code & 0xfffe == 0xfffe;
        !is_none && (c.len_utf8() == len || bytes.starts_with(b"\xc0\x80"))
    });
    (c, len)
}

#[cfg(test)]
mod tests {
    use super::super::parse;
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

    #[test]
    fn bytes_that_are_not_utf8_are_printed_as_errors_and_otherwise_kept() {
        for (bytes, printed) in [
            (&b"caf\xe9.img"[..], r"caf\uFFFD.img"),
            (b"a\x80\x80b", r"a\uFFFD\uFFFDb"),
            (b"a\xc0\x80b", r"a\u0000b"),
            (b"a\xc1\xbfb", r"a\uFFFDb"),
            (b"a\xe0\x80\x80b", r"a\uFFFDb"),
            (b"a\xed\xa0\xbd\xed\xb8\x80b", r"a\uFFFD\uFFFDb"),
            (b"a\xe2\x82\xe2\x82\xacb", r"a\uFFFD\u20ACb"),
            (b"a\xf0\x80\x80b", r"a\uFFFDb"),
            (b"a\xf4\x90\x80\x80\xe0", r"a\uFFFD\uFFFD"),
            (b"a\xf8\x88\x80\x80\x80b", r"a\uFFFDb"),
            (b"a\xfc\x84\x80\x80\x80\x80b", r"a\uFFFDb"),
            (b"a\xfd\xbfb\xfe\xff", r"a\uFFFDb\uFFFD\uFFFD"),
            ("\u{fffe}\u{fdd0}\u{1fffe}".as_bytes(), r"\uFFFD\uFFFD\uFFFD"),
            (
                "\u{10ffff}\u{10fffd}\u{10ff80}".as_bytes(),
                r"\uFFFD\uDBFF\uDFFD\uDBFF\uDF80",
            ),
        ] {
            let value = Value::Text(name::from_bytes(bytes).into_owned());
            assert_eq!(value.pretty(), format!("\"{printed}\"\n"), "{bytes:x?}");
            assert_eq!(parse(&value.compact()).expect("is JSON"), value, "{bytes:x?}");
        }
    }

    #[test]
    fn an_escape_is_never_a_byte_of_a_name() {
        let Value::Text(text) = parse(r#""\udbff\udfe9""#).expect("is JSON") else {
            panic!("text expected")
        };
        assert_eq!(&*name::to_bytes(&text), "\u{10ffe9}".as_bytes());
    }
}
