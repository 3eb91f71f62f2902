//! Creation options as data: parsing, `-o help` and documentation all come from a driver's slice of [`OptionDef`].
//!
//! ```
//! use diskimage_core::options::{OptionDef, OptionKind, Options};
//!
//! const TABLE: &[OptionDef] = &[OptionDef {
//!     name: "cluster_size",
//!     kind: OptionKind::Size,
//!     help: "qcow2 cluster size",
//!     default: Some("65536"),
//!     is_listed: true,
//! }];
//! let mut options = Options::new(TABLE);
//! options.parse("cluster_size=4k")?;
//! assert_eq!(options.size("cluster_size"), Some(4096));
//! # Ok::<(), diskimage_core::options::OptionError>(())
//! ```

use std::fmt;

use crate::size::{SizeError, parse_number, parse_size};
use crate::{Error, ErrorKind};

/// The type of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// `on` or `off` (also `yes`/`no`, `true`/`false`, `y`/`n`).
    Flag,
    /// A number of bytes with an optional unit, as [`parse_size`] reads it.
    Size,
    /// A whole number; a negative one counts down from 2^64, as in C.
    Number,
    /// Any text.
    Text,
}

impl OptionKind {
    /// The name of the kind in `-o help`.
    const fn placeholder(self) -> &'static str {
        match self {
            Self::Flag => "<bool (on/off)>",
            Self::Size => "<size>",
            Self::Number => "<num>",
            Self::Text => "<str>",
        }
    }
}

/// One creation option.
#[derive(Clone, Copy, Debug)]
pub struct OptionDef {
    /// The name.
    pub name: &'static str,
    /// The type of its value.
    pub kind: OptionKind,
    /// Its description in one line, for `-o help`.
    pub help: &'static str,
    /// The value if none is given; `create` prints it.
    pub default: Option<&'static str>,
    /// Whether `-o help` lists it. Options that `qemu-img` does not have are not listed.
    pub is_listed: bool,
}

impl OptionDef {
    /// The size of a new disk.
    pub const SIZE: Self = Self::new("size", OptionKind::Size, "Virtual disk size");
    /// The backing image of a new image.
    pub const BACKING_FILE: Self = Self::new("backing_file", OptionKind::Text, "File name of a base image");
    /// The format of that backing image.
    pub const BACKING_FMT: Self =
        Self::new("backing_fmt", OptionKind::Text, "Image format of the base image");
    /// How hard a conversion to the new image tries to make clusters shorter, from 1 to 9.
    pub const COMPRESSION_LEVEL: Self = Self {
        is_listed: false,
        ..Self::new(
            "compression_level",
            OptionKind::Number,
            "Effort of compression, 1 (fastest) to 9 (smallest)",
        )
    };

    /// An option without a default.
    pub const fn new(name: &'static str, kind: OptionKind, help: &'static str) -> Self {
        Self {
            name,
            kind,
            help,
            default: None,
            is_listed: true,
        }
    }

    /// The same by another name.
    #[must_use]
    pub const fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    /// The same with a default.
    #[must_use]
    pub const fn or(self, default: &'static str) -> Self {
        Self {
            default: Some(default),
            ..self
        }
    }
}

/// Values for a table of options.
#[derive(Clone, Debug)]
pub struct Options {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    def: &'static OptionDef,
    given: Option<Value>,
    default: Option<Value>,
}

#[derive(Clone, Debug)]
enum Value {
    /// Also the text, because `qemu-img` prints it as written.
    Flag(bool, String),
    Integer(u64),
    Text(String),
}

impl Options {
    /// No values yet for the options of `table`, whose order is also that of [`Options::summary`].
    pub fn new(table: &'static [OptionDef]) -> Self {
        Self::merged(&[table])
    }

    /// The options of several tables: those of a format and of its protocol. Of two options with the same name the
    /// first is kept.
    pub fn merged(tables: &[&'static [OptionDef]]) -> Self {
        let entries = merge(tables)
            .into_iter()
            .map(|def| Entry {
                def,
                given: None,
                default: def.default.and_then(|text| read(def, text).ok()),
            })
            .collect();
        Self { entries }
    }

    /// Parses a list `a=b,c=d` as given with `-o`; a later value replaces an earlier one.
    ///
    /// A comma inside a value is doubled; a bare `name` means `on` and a bare `noname` means `off`.
    ///
    /// # Errors
    /// The first name that is not in the table, or invalid value.
    pub fn parse(&mut self, text: &str) -> Result<(), OptionError> {
        for (name, value) in split_list(text, None) {
            self.set(&name, &value)?;
        }
        Ok(())
    }

    /// Sets one option.
    ///
    /// # Errors
    /// A name that is not in the table, or an invalid value.
    pub fn set(&mut self, name: &str, text: &str) -> Result<(), OptionError> {
        let entry = self.entries.iter_mut().find(|entry| entry.def.name == name);
        let Some(entry) = entry else {
            return Err(OptionError::new(format!("Invalid parameter '{name}'")));
        };
        entry.given = Some(read(entry.def, text)?);
        Ok(())
    }

    /// Whether the table has such an option.
    pub fn has(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// Whether a value was given.
    pub fn is_given(&self, name: &str) -> bool {
        self.entry(name).is_some_and(|entry| entry.given.is_some())
    }

    /// The given value or the default of a [`OptionKind::Flag`].
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.value(name)? {
            Value::Flag(on, _) => Some(*on),
            _ => None,
        }
    }

    /// The given value or the default of a [`OptionKind::Size`].
    pub fn size(&self, name: &str) -> Option<u64> {
        self.integer(name, OptionKind::Size)
    }

    /// The given value or the default of a [`OptionKind::Number`].
    pub fn number(&self, name: &str) -> Option<u64> {
        self.integer(name, OptionKind::Number)
    }

    /// The given value or the default of a [`OptionKind::Text`].
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.value(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The options as `create` prints them: `cluster_size=65536 extended_l2=off`, given values and defaults in the
    /// table's order. Integers are printed as signed and commas in text are doubled, as in `qemu-img`.
    pub fn summary(&self) -> String {
        let shown = self.entries.iter().filter_map(|entry| {
            let value = entry.given.as_ref().or(entry.default.as_ref())?;
            Some(format!("{}={value}", entry.def.name))
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.def.name == name)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        let entry = self.entry(name)?;
        entry.given.as_ref().or(entry.default.as_ref())
    }

    fn integer(&self, name: &str, kind: OptionKind) -> Option<u64> {
        match (self.entry(name)?.def.kind, self.value(name)?) {
            (k, Value::Integer(number)) if k == kind => Some(*number),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(_, text) => f.write_str(text),
            Self::Integer(number) => write!(f, "{}", number.cast_signed()),
            Self::Text(text) => f.write_str(&text.replace(',', ",,")),
        }
    }
}

/// An invalid option: a message, and lines of help that are printed without a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    message: String,
    hints: &'static [&'static str],
}

impl OptionError {
    fn new(message: String) -> Self {
        Self { message, hints: &[] }
    }

    /// The message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Lines to print after the message.
    pub fn hints(&self) -> &'static [&'static str] {
        self.hints
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for OptionError {}

impl From<OptionError> for Error {
    fn from(error: OptionError) -> Self {
        let result = Self::new(ErrorKind::Invalid, error.message);
        error.hints.iter().copied().fold(result, Self::and_hint)
    }
}

/// Parses the value of an option or parameter `name` as a size.
///
/// # Errors
/// The messages of `qemu-img` for text that is no size.
pub fn read_size(name: &str, text: &str) -> Result<u64, OptionError> {
    parse_size(text).map_err(|error| match error {
        SizeError::Malformed => OptionError {
            message: format!("Parameter '{name}' expects a non-negative number below 2^64"),
            hints: SIZE_HINT,
        },
        SizeError::OutOfRange => {
            OptionError::new(format!("Value '{text}' is out of range for parameter '{name}'"))
        }
    })
}

const SIZE_HINT: &[&str] = &[
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
];

/// Whether a list as given with `-o` asks for help: one of its items is `help` or `?`.
pub fn wants_help(list: &str) -> bool {
    // A doubled comma is part of a value: `backing_file=a,,help` names a file.
    let items = list.replace(",,", "\0");
    items.split(',').any(|item| matches!(item, "help" | "?"))
}

/// Whether a list can be joined to others with a comma: not empty, no comma in front and no single one at the end.
pub fn is_list(list: &str) -> bool {
    let trailing = list.len() - list.trim_end_matches(',').len();
    !list.is_empty() && !list.starts_with(',') && trailing.is_multiple_of(2)
}

/// The text of `create -f NAME -o help`, without a file name.
pub fn create_help(format: &str, table: &'static [OptionDef]) -> String {
    format!(
        "Supported {format} options:\n{}\nThe protocol level may support further options.\nSpecify the target filename \
         to include those options.\n",
        help_lines(&[table])
    )
}

/// The text of `create -f NAME -o help FILENAME`: the options of the format and of the protocol under it.
pub fn create_help_with_protocol(format: &'static [OptionDef], protocol: &'static [OptionDef]) -> String {
    format!("Supported options:\n{}", help_lines(&[format, protocol]))
}

/// The text of `amend -f NAME -o help`.
pub fn amend_help(format: &str, table: &'static [OptionDef]) -> String {
    format!("Amend options for '{format}':\n{}", help_lines(&[table]))
}

/// An item of a list `a=b,c`.
struct Item<'a> {
    word: &'a str,
    /// What follows `=`; `None` for a bare word.
    value: Option<String>,
    /// The rest of the list, starting with this item.
    text: &'a str,
}

/// The items of a list. A comma inside a value is doubled.
fn items(text: &str) -> impl Iterator<Item = Item<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let text = rest;
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let value = match after.strip_prefix('=') {
            Some(after) => {
                let (value, after) = split_value(after);
                rest = after;
                Some(value)
            }
            None => {
                rest = after.strip_prefix(',').unwrap_or(after);
                None
            }
        };
        Some(Item { word, value, text })
    })
}

/// The option and value of a bare word: `name` means on, `noname` off.
fn switch(word: &str) -> (&str, &'static str) {
    match word.strip_prefix("no") {
        Some(name) => (name, "off"),
        None => (word, "on"),
    }
}

/// The bare words of a list except its first item, each with the option and the value that it means.
pub fn short_forms(text: &str) -> Vec<(&str, &str, &'static str)> {
    let bare = items(text).skip(1).filter(|item| item.value.is_none());
    bare.map(|item| {
        let (name, value) = switch(item.word);
        (item.word, name, value)
    })
    .collect()
}

/// Splits a list `a=b,c=d`.
///
/// A comma inside a value is doubled; a bare `name` means `on` and a bare `noname` means `off`. A bare first item is
/// the value of the option `implied`, if that is given.
pub fn split_list(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
    let (first, rest) = match implied.zip(items(text).next().filter(|item| item.value.is_none())) {
        Some((implied, item)) => {
            let (value, rest) = split_value(item.text);
            (Some((implied.to_owned(), value)), rest)
        }
        None => (None, text),
    };
    let others = items(rest).map(|item| match item.value {
        Some(value) => (item.word.to_owned(), value),
        None => {
            let (name, value) = switch(item.word);
            (name.to_owned(), value.to_owned())
        }
    });
    first.into_iter().chain(others).collect()
}

fn help_lines(tables: &[&'static [OptionDef]]) -> String {
    let mut defs = merge(tables);
    defs.retain(|def| def.is_listed);
    defs.sort_by_key(|def| def.name);
    let line = |def: &&OptionDef| {
        let left = format!("{}={}", def.name, def.kind.placeholder());
        format!("  {left:<22} - {}\n", def.help)
    };
    defs.iter().map(line).collect()
}

fn merge(tables: &[&'static [OptionDef]]) -> Vec<&'static OptionDef> {
    let mut defs: Vec<&'static OptionDef> = Vec::new();
    for def in tables.iter().copied().flatten() {
        if !defs.iter().any(|other| other.name == def.name) {
            defs.push(def);
        }
    }
    defs
}

/// Reads a value up to a single comma; a doubled comma means one. Also returns the text after it.
fn split_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
    value.push_str(rest);
    (value, "")
}

fn read(def: &OptionDef, text: &str) -> Result<Value, OptionError> {
    let name = def.name;
    match def.kind {
        OptionKind::Flag => match text {
            "on" | "yes" | "true" | "y" => Ok(Value::Flag(true, text.to_owned())),
            "off" | "no" | "false" | "n" => Ok(Value::Flag(false, text.to_owned())),
            _ => Err(OptionError::new(format!(
                "Parameter '{name}' expects 'on' or 'off'"
            ))),
        },
        OptionKind::Size => read_size(name, text).map(Value::Integer),
        OptionKind::Number => match parse_number(text) {
            Ok(number) => Ok(Value::Integer(wrap(number))),
            Err(SizeError::Malformed) => {
                Err(OptionError::new(format!("Parameter '{name}' expects a number")))
            }
            Err(SizeError::OutOfRange) => Err(OptionError::new(format!(
                "Value '{text}' is too large for parameter '{name}'"
            ))),
        },
        OptionKind::Text => Ok(Value::Text(text.to_owned())),
    }
}

/// A number modulo 2^64, as C converts it to an unsigned integer.
fn wrap(number: i128) -> u64 {
    // Larger numbers saturate, as by strtoull.
    let magnitude = u64::try_from(number.unsigned_abs()).unwrap_or(u64::MAX);
    if number < 0 {
        magnitude.wrapping_neg()
    } else {
        magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn def(name: &'static str, kind: OptionKind, default: Option<&'static str>) -> OptionDef {
        OptionDef {
            name,
            kind,
            help: "Help text",
            default,
            is_listed: true,
        }
    }

    const TABLE: &[OptionDef] = &[
        def("cluster_size", OptionKind::Size, Some("65536")),
        def("preallocation", OptionKind::Text, None),
        def("backing_file", OptionKind::Text, None),
        def("data_file_raw", OptionKind::Flag, None),
        def("lazy_refcounts", OptionKind::Flag, Some("off")),
        def("refcount_bits", OptionKind::Number, Some("16")),
    ];

    const PROTOCOL: &[OptionDef] = &[
        def("preallocation", OptionKind::Text, None),
        def("nocow", OptionKind::Flag, None),
    ];

    fn parsed(text: &str) -> Options {
        let mut options = Options::new(TABLE);
        options.parse(text).expect("valid options");
        options
    }

    fn error(text: &str) -> (String, &'static [&'static str]) {
        let error = Options::new(TABLE).parse(text).expect_err("invalid options");
        (error.message, error.hints)
    }

    #[test]
    fn given_values_win_over_defaults() {
        let options = parsed("cluster_size=4k,lazy_refcounts=yes,cluster_size=8k");
        assert_eq!(options.size("cluster_size"), Some(8192));
        assert_eq!(options.flag("lazy_refcounts"), Some(true));
        assert_eq!(options.number("refcount_bits"), Some(16));
        assert_eq!(options.text("preallocation"), None);
        assert!(options.is_given("cluster_size") && !options.is_given("refcount_bits"));
    }

    #[test]
    fn accessors_answer_only_for_their_own_kind() {
        let options = parsed("");
        assert_eq!(
            (options.number("cluster_size"), options.text("cluster_size")),
            (None, None)
        );
    }

    #[test]
    fn doubled_commas_stand_for_one_and_are_shown_doubled() {
        let options = parsed("backing_file=a,,,,b=c,refcount_bits=0x8");
        assert_eq!(options.text("backing_file"), Some("a,,b=c"));
        assert_eq!(
            options.summary(),
            "cluster_size=65536 backing_file=a,,,,b=c lazy_refcounts=off refcount_bits=8"
        );
    }

    #[test]
    fn bare_names_are_switches() {
        assert_eq!(parsed("lazy_refcounts").flag("lazy_refcounts"), Some(true));
        assert_eq!(
            parsed("nolazy_refcounts,data_file_raw").flag("lazy_refcounts"),
            Some(false)
        );
        assert_eq!(parsed("preallocation").text("preallocation"), Some("on"));
    }

    #[test]
    fn the_summary_shows_flags_as_written_and_numbers_as_signed() {
        assert_eq!(
            parsed("lazy_refcounts=y,refcount_bits=-1").summary(),
            "cluster_size=65536 lazy_refcounts=y refcount_bits=-1"
        );
    }

    #[test]
    fn unknown_names_are_refused() {
        for (text, message) in [
            ("foo=1", "Invalid parameter 'foo'"),
            ("foo", "Invalid parameter 'foo'"),
            ("nofoo", "Invalid parameter 'foo'"),
            ("no", "Invalid parameter ''"),
            ("=x", "Invalid parameter ''"),
            ("lazy_refcounts,,", "Invalid parameter ''"),
            ("nolazy_refcounts=on", "Invalid parameter 'nolazy_refcounts'"),
        ] {
            assert_eq!(error(text), (message.to_owned(), &[][..]), "{text}");
        }
    }

    #[test]
    fn invalid_values_are_refused_with_the_messages_of_qemu_img() {
        let size = "Parameter 'cluster_size' expects a non-negative number below 2^64".to_owned();
        assert_eq!(error("cluster_size=64Q"), (size, SIZE_HINT));
        for (text, message) in [
            (
                "cluster_size=-1",
                "Value '-1' is out of range for parameter 'cluster_size'",
            ),
            ("refcount_bits=1k", "Parameter 'refcount_bits' expects a number"),
            ("refcount_bits=08", "Parameter 'refcount_bits' expects a number"),
            (
                "refcount_bits=18446744073709551616",
                "Value '18446744073709551616' is too large for parameter 'refcount_bits'",
            ),
            (
                "lazy_refcounts=ON",
                "Parameter 'lazy_refcounts' expects 'on' or 'off'",
            ),
            (
                "refcount_bits=x,foo=1",
                "Parameter 'refcount_bits' expects a number",
            ),
        ] {
            assert_eq!(error(text), (message.to_owned(), &[][..]), "{text}");
        }
    }

    #[test]
    fn options_that_are_not_listed_are_in_no_help_and_shown_if_given() {
        const UNLISTED: &[OptionDef] = &[TABLE[0], OptionDef::COMPRESSION_LEVEL];
        const LISTED: &[OptionDef] = &[TABLE[0]];
        assert_eq!(create_help("x", UNLISTED), create_help("x", LISTED));
        let mut options = Options::new(UNLISTED);
        assert_eq!(options.summary(), "cluster_size=65536");
        options.parse("compression_level=3").expect("is in the table");
        assert_eq!(options.summary(), "cluster_size=65536 compression_level=3");
    }

    #[test]
    fn help_is_sorted_and_aligned() {
        assert_eq!(
            create_help("qcow2", TABLE),
            "Supported qcow2 options:
  backing_file=<str>     - Help text
  cluster_size=<size>    - Help text
  data_file_raw=<bool (on/off)> - Help text
  lazy_refcounts=<bool (on/off)> - Help text
  preallocation=<str>    - Help text
  refcount_bits=<num>    - Help text

The protocol level may support further options.
Specify the target filename to include those options.
"
        );
        assert_eq!(
            amend_help("x", PROTOCOL).lines().next(),
            Some("Amend options for 'x':")
        );
    }

    #[test]
    fn merged_tables_name_an_option_once() {
        let lines = create_help_with_protocol(TABLE, PROTOCOL);
        assert_eq!(lines.matches("preallocation=").count(), 1);
        let mut options = Options::merged(&[TABLE, PROTOCOL]);
        options.parse("nocow=on").expect("an option of the protocol");
        assert_eq!(options.flag("nocow"), Some(true));
    }

    #[test]
    fn help_and_lists_are_recognised() {
        assert!(wants_help("a=b,help") && wants_help("?") && wants_help("a,,,help"));
        assert!(!wants_help("a=b,,help") && !wants_help("help=1") && !wants_help("helpx"));
        for list in ["", ",", ",,", ",a", "a=b,", "a ,"] {
            assert!(!is_list(list), "{list}");
        }
        assert!(is_list("a=b,c") && is_list("a=b,,"));
    }
}
