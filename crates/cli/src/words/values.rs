//! Types of values that several commands take.

use std::ffi::{OsStr, OsString};

use diskimage::options;
use diskimage::size::{SizeError, parse_number, parse_size};
use diskimage::{CacheMode, SnapshotSelector, name};

use super::{Parser, Stop};

/// A word as text, in which [`name`] keeps the bytes that are not UTF-8.
pub fn text(value: OsString) -> String {
    name::from_os_string(value)
}

/// A size from `min` to `max`; `what` names it in messages.
///
/// # Errors
/// Text that is no size, or one out of the range.
pub fn size(what: &str, value: &OsStr, min: u64, max: u64) -> Result<u64, Stop> {
    let value = name::from_os(value);
    in_range(what, &value, parse_size(&value), min, max)
}

/// A whole number from `min` to `max` without a unit; `what` names it in messages.
///
/// # Errors
/// Text that is no number, or one out of the range.
pub fn count(what: &str, value: &OsStr, min: u64, max: u64) -> Result<u64, Stop> {
    let value = name::from_os(value);
    let number =
        parse_number(&value).and_then(|number| u64::try_from(number).map_err(|_| SizeError::OutOfRange));
    in_range(what, &value, number, min, max)
}

fn in_range(what: &str, text: &str, value: Result<u64, SizeError>, min: u64, max: u64) -> Result<u64, Stop> {
    match value {
        Err(SizeError::Malformed) => Err(Stop::wrong(format!("Invalid {what} specified: '{text}'."))),
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(Stop::wrong(format!(
            "Invalid {what} specified. Must be between {min} and {max}."
        ))),
    }
}

/// The cache mode of an image that is read (`-T`), or `writeback`.
///
/// # Errors
/// An unknown name.
pub fn source_cache(name: Option<&OsStr>) -> Result<CacheMode, Stop> {
    cache(name, CacheMode::WRITEBACK, "source cache option")
}

/// The cache mode of an image that is written (`-t`), or `default`.
///
/// # Errors
/// An unknown name.
pub fn target_cache(name: Option<&OsStr>, default: CacheMode) -> Result<CacheMode, Stop> {
    cache(name, default, "cache option")
}

fn cache(name: Option<&OsStr>, default: CacheMode, what: &str) -> Result<CacheMode, Stop> {
    let Some(name) = name.map(name::from_os) else {
        return Ok(default);
    };
    CacheMode::from_name(&name).ok_or_else(|| Stop::wrong(format!("Invalid {what}: {name}")))
}

/// The format of a command's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputFormat {
    /// Text.
    #[default]
    Human,
    /// JSON.
    Json,
}

impl OutputFormat {
    /// Reads the value of `--output`.
    ///
    /// # Errors
    /// Anything but `human` and `json`.
    pub fn read(value: &OsStr) -> Result<Self, Stop> {
        match name::from_os(value).as_str() {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(Stop::misused(format!(
                "--output expects 'human' or 'json' not '{other}'"
            ))),
        }
    }
}

/// How an image is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageName {
    /// A file name, or a protocol's URL or `json:` in place of one.
    File(String),
    /// A specification `driver=qcow2,file.filename=x`, after `--image-opts`.
    Options(String),
}

impl ImageName {
    /// A word read as a file name or as a specification.
    pub fn new(word: OsString, image_opts: bool) -> Self {
        if image_opts {
            Self::Options(text(word))
        } else {
            Self::File(text(word))
        }
    }

    /// The name as it is shown.
    pub fn shown(&self) -> String {
        match self {
            Self::File(text) | Self::Options(text) => text.clone(),
        }
    }
}

/// An image to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub name: ImageName,
    /// Its format, if that is not to be found out; never with [`ImageName::Options`].
    pub format: Option<String>,
}

impl Source {
    /// An image from the word that names it, the value of `-f`, and whether `--image-opts` was given.
    ///
    /// # Errors
    /// A format together with a specification.
    pub fn new(word: OsString, format: Option<String>, image_opts: bool) -> Result<Self, Stop> {
        if image_opts && format.is_some() {
            return Err(Stop::wrong("--image-opts and --format are mutually exclusive"));
        }
        Ok(Self {
            name: ImageName::new(word, image_opts),
            format,
        })
    }
}

/// The values of all `-o` options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// The lists joined by commas, for [`options::Options::parse`].
    pub list: Option<String>,
    /// Whether `help` was given: the command prints the list of options and does nothing else.
    pub wants_help: bool,
}

impl CreateOptions {
    /// Adds the value of one `-o`.
    ///
    /// # Errors
    /// The list begins or ends with a comma, and could not be separated from its neighbours when they are joined.
    pub fn add(&mut self, value: OsString) -> Result<(), Stop> {
        let value = text(value);
        if !options::is_list(&value) {
            return Err(Stop::wrong(format!("Invalid option list: {value}")));
        }
        self.wants_help |= options::wants_help(&value);
        match &mut self.list {
            Some(list) => {
                list.push(',');
                list.push_str(&value);
            }
            None => self.list = Some(value),
        }
        Ok(())
    }
}

/// Reads the value of `-l`: `NAME`, or `snapshot.id=ID,snapshot.name=NAME`.
///
/// # Errors
/// Other parameters.
pub fn snapshot_selector(value: OsString) -> Result<SnapshotSelector, Stop> {
    let value = text(value);
    if !value.starts_with("snapshot.") {
        return Ok(SnapshotSelector::Either(value));
    }
    let mut parameters = options::Options::new(&SNAPSHOT_PARAMETERS);
    parameters
        .parse(&value)
        .map_err(|error| Stop::from(error).and(format!("Failed in parsing snapshot param '{value}'")))?;
    Ok(SnapshotSelector::Exact {
        id: parameters.text("snapshot.id").map(str::to_owned),
        name: parameters.text("snapshot.name").map(str::to_owned),
    })
}

static SNAPSHOT_PARAMETERS: [options::OptionDef; 2] = [
    options::OptionDef {
        name: "snapshot.id",
        kind: options::OptionKind::Text,
        help: "Identifier of the snapshot",
        default: None,
        is_listed: true,
    },
    options::OptionDef {
        name: "snapshot.name",
        kind: options::OptionKind::Text,
        help: "Name of the snapshot",
        default: None,
        is_listed: true,
    },
];

/// The largest size and offset of a disk image.
pub const LARGEST: u64 = i64::MAX.unsigned_abs();

/// The operand of a command that takes a single image.
///
/// # Errors
/// No operand, or several.
pub fn only_image(words: Parser) -> Result<OsString, Stop> {
    let mut operands = words.operands().into_iter();
    match (operands.next(), operands.next()) {
        (Some(image), None) => Ok(image),
        _ => Err(Stop::misused("Expecting one image file name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    #[test]
    fn invalid_sizes_are_reported_with_the_name_of_the_option() {
        assert_eq!(size("image size", os("1.5K"), 0, 1 << 62), Ok(1536));
        assert_eq!(
            size("image size", os("1Q"), 0, 9),
            Err(Stop::wrong("Invalid image size specified: '1Q'."))
        );
        for text in ["-1", "10", "99E"] {
            assert_eq!(
                size("bs", os(text), 1, 9),
                Err(Stop::wrong("Invalid bs specified. Must be between 1 and 9."))
            );
        }
    }

    #[test]
    fn counts_take_no_unit() {
        assert_eq!(count("number of coroutines", os("0x10"), 1, 16), Ok(16));
        assert_eq!(
            count("number of coroutines", os("1K"), 1, 16),
            Err(Stop::wrong("Invalid number of coroutines specified: '1K'."))
        );
        assert_eq!(
            count("number of coroutines", os("-1"), 1, 16),
            Err(Stop::wrong(
                "Invalid number of coroutines specified. Must be between 1 and 16."
            ))
        );
    }

    #[test]
    fn cache_modes_have_names_and_defaults() {
        assert_eq!(source_cache(Some(os("off"))), Ok(CacheMode::NONE));
        assert_eq!(target_cache(None, CacheMode::UNSAFE), Ok(CacheMode::UNSAFE));
        assert_eq!(
            source_cache(Some(os("foo"))),
            Err(Stop::wrong("Invalid source cache option: foo"))
        );
        assert_eq!(
            target_cache(Some(os("")), CacheMode::UNSAFE),
            Err(Stop::wrong("Invalid cache option: "))
        );
    }

    #[test]
    fn option_lists_are_joined() {
        let mut lists = CreateOptions::default();
        lists.add("a=b".into()).unwrap();
        lists.add("c".into()).unwrap();
        assert_eq!(lists.list.as_deref(), Some("a=b,c"));
        assert!(!lists.wants_help);
        assert_eq!(
            lists.add("x,".into()),
            Err(Stop::wrong("Invalid option list: x,"))
        );
        lists.add("?".into()).unwrap();
        assert!(lists.wants_help);
    }

    #[test]
    fn snapshots_are_selected_by_either_or_by_exact_parameters() {
        assert_eq!(
            snapshot_selector("a=b".into()),
            Ok(SnapshotSelector::Either("a=b".into()))
        );
        assert_eq!(
            snapshot_selector("snapshot.name=x".into()),
            Ok(SnapshotSelector::Exact {
                id: None,
                name: Some("x".into())
            })
        );
        assert_eq!(
            snapshot_selector("snapshot.foo=x".into()),
            Err(Stop::wrong("Invalid parameter 'snapshot.foo'")
                .and("Failed in parsing snapshot param 'snapshot.foo=x'"))
        );
    }
}
