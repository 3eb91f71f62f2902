//! The descriptor: the text that lists the extents of the disk.
//!
//! ```text
//!   # Disk DescriptorFile
//!   version=1
//!   encoding="windows-1252"               the encoding of names, optional
//!   CID=4c46164f                          a new one each time the disk is opened and written
//!   parentCID=ffffffff                    the CID of the backing image when this image was created
//!   createType="monolithicFlat"
//!   parentFileNameHint="base.vmdk"
//!
//!   # Extent description
//!   RW 10485760 FLAT "disk-flat.vmdk" 0   access, sectors, kind, file, first sector in the file
//!   RDONLY 63 ZERO                        extents without a file
//!
//!   # The Disk Data Base
//!   ddb.adapterType = "ide"
//! ```
//!
//! Descriptors that were edited by hand are read as well: with a byte order mark, blanks around `=`, and keywords in
//! other letter case.

use std::borrow::Cow;

use diskimage_core::{Error, Name, Result, errno, name};
use encoding_rs::Encoding;

/// The fields of a descriptor that this crate uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) cid: u32,
    pub(super) parent_cid: u32,
    /// `None` if an embedded descriptor does not have it.
    pub(super) create_type: Option<String>,
    /// The name of the backing image.
    pub(super) parent: Option<Name>,
    /// `parent` in UTF-8, if the descriptor declares another encoding.
    pub(super) decoded_parent: Option<Name>,
    pub(super) extents: Vec<ExtentLine>,
}

/// A line of the extent description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) access: Access,
    pub(super) sectors: u64,
    pub(super) kind: ExtentKind,
    /// The name of the file, which the other keywords may follow; empty if there is none.
    pub(super) name: String,
    /// `name` in UTF-8, if the descriptor declares another encoding.
    pub(super) decoded_name: Option<String>,
    /// The sector of the file at which the extent starts; 0 for all kinds but flat extents.
    pub(super) offset: u64,
}

/// What the guest may do with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
    Denied,
}

impl Access {
    /// The keyword in the extent's line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ReadWrite => "RW",
            Self::ReadOnly => "RDONLY",
            Self::Denied => "NOACCESS",
        }
    }

    fn of(keyword: &str) -> Option<Self> {
        [Self::ReadWrite, Self::ReadOnly, Self::Denied]
            .into_iter()
            .find(|access| access.name().eq_ignore_ascii_case(keyword))
    }
}

/// The layout of an extent's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentKind {
    /// The guest's bytes, contiguous.
    Flat,
    /// The same, on a file system of ESX.
    Vmfs,
    /// A hosted sparse extent.
    Sparse,
    /// A sparse extent of ESX before 6.5.
    VmfsSparse,
    /// A sparse extent of ESX 6.5 and later.
    SeSparse,
    /// Zeroes, without a file.
    Zero,
    /// A mapping file of ESX, which leads to a raw device.
    VmfsRdm,
    /// A raw device of ESX.
    VmfsRaw,
}

impl ExtentKind {
    /// The keyword in the extent's line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Vmfs => "VMFS",
            Self::Sparse => "SPARSE",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::SeSparse => "SESPARSE",
            Self::Zero => "ZERO",
            Self::VmfsRdm => "VMFSRDM",
            Self::VmfsRaw => "VMFSRAW",
        }
    }

    fn of(keyword: &str) -> Option<Self> {
        [
            Self::Flat,
            Self::Vmfs,
            Self::Sparse,
            Self::VmfsSparse,
            Self::SeSparse,
            Self::Zero,
            Self::VmfsRdm,
            Self::VmfsRaw,
        ]
        .into_iter()
        .find(|kind| kind.name().eq_ignore_ascii_case(keyword))
    }
}

/// The parent CID of an image without a backing image.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// The most bytes of a descriptor that are read: enough for [`MAX_EXTENTS`] with names of a hundred bytes.
pub(super) const MAX_LEN: u64 = 4 << 20;

/// The most extents: those of the largest disk of VMware, 62 TiB, in extents of 2 GiB. Each may keep a file open.
pub(super) const MAX_EXTENTS: usize = 32768;

impl Descriptor {
    /// Parses a descriptor. Bytes from the first zero on are padding.
    ///
    /// # Errors
    /// Invalid extent lines, and a descriptor without a CID.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = &*to_utf8(bytes);
        let encoding = encoding_of(&text_of(bytes));
        let mut extents = Vec::new();
        for line in lines_of(bytes) {
            let text = name::from_bytes(line);
            if let Some(mut extent) = ExtentLine::parse(text.trim_end_matches('\n'))? {
                extent.decoded_name = encoding.and_then(|encoding| decoded(&extent.name, encoding));
                extents.push(extent);
            }
            if extents.len() > MAX_EXTENTS {
                return Err(Error::corrupt(format!("More than {MAX_EXTENTS} extents")));
            }
        }
        Ok(Self {
            extents,
            ..Self::parse_head(bytes)?
        })
    }

    /// Parses a descriptor without its extents: in an embedded one their lines say nothing of use.
    ///
    /// # Errors
    /// A descriptor without a CID.
    pub(super) fn parse_head(bytes: &[u8]) -> Result<Self> {
        let text = text_of(&to_utf8(bytes));
        let missing = || Error::from_errno(errno::EINVAL);
        let cid = |word: &str| u32::from_str_radix(word, 16).map_err(|_| missing());
        let encoding = encoding_of(&text);
        let parent = value_of(&text, "parentFileNameHint").filter(|name| !name.is_empty());
        let decoded_parent = parent
            .zip(encoding)
            .and_then(|(name, encoding)| decoded(name, encoding));
        Ok(Self {
            cid: cid(value_of(&text, "CID").ok_or_else(missing)?)?,
            parent_cid: value_of(&text, "parentCID").map_or(Ok(NO_PARENT), cid)?,
            create_type: value_of(&text, "createType").map(str::to_owned),
            parent: parent.map(Name::from),
            decoded_parent: decoded_parent.map(Name::from),
            extents: Vec::new(),
        })
    }

    /// What a stream without an embedded descriptor is taken for: streams are often sent without one.
    pub(super) fn of_bare_stream() -> Self {
        Self {
            cid: 0,
            parent_cid: NO_PARENT,
            create_type: Some("streamOptimized".to_owned()),
            parent: None,
            decoded_parent: None,
            extents: Vec::new(),
        }
    }

    /// The create type alone, even of a descriptor that is otherwise invalid.
    pub(super) fn create_type(bytes: &[u8]) -> Option<String> {
        value_of(&text_of(&to_utf8(bytes)), "createType").map(str::to_owned)
    }

    /// The descriptor in `bytes` with another CID.
    pub(super) fn with_cid(bytes: &[u8], cid: u32) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        for raw in lines_of(bytes) {
            let line = name::from_bytes(raw);
            if key_and_value(&line).is_some_and(|(key, _)| key.eq_ignore_ascii_case("CID")) {
                let (start, _) = line.split_once('=').unwrap_or_default();
                let end = &line[line.trim_end().len()..];
                out.extend_from_slice(&name::to_bytes(&format!("{start}={cid:08x}{end}")));
            } else {
                out.extend(raw);
            }
        }
        out
    }
}

impl Descriptor {
    /// The descriptor in `bytes`, changed for a disk of `disk` sectors whose last extent has `sectors` and is followed
    /// by the extent lines `added`.
    pub(super) fn grown(bytes: &[u8], sectors: u64, added: &[String], disk: u64) -> Vec<u8> {
        let text = text_of(bytes);
        let is_extent = |line: &str| ExtentLine::parse(line).is_ok_and(|extent| extent.is_some());
        let last = text.lines().filter(|line| is_extent(line)).count();
        let number = |key| value_of(&text, key).and_then(|value| value.parse::<u64>().ok());
        let heads = number("ddb.geometry.heads");
        let cylinder = heads.zip(number("ddb.geometry.sectors"));
        let cylinder = cylinder.and_then(|(heads, sectors)| heads.checked_mul(sectors));
        let cylinders = cylinder.and_then(|cylinder| disk.checked_div(cylinder));
        let mut out = Vec::with_capacity(text.len());
        let mut extents = 0;
        for raw in lines_of(bytes) {
            let line = &*name::from_bytes(raw);
            let is_cylinders = || key_and_value(line).is_some_and(|(key, _)| key == "ddb.geometry.cylinders");
            extents += usize::from(is_extent(line));
            match (line.split_whitespace().nth(1), cylinders) {
                (Some(old), _) if is_extent(line) && extents == last => {
                    out.extend_from_slice(&name::to_bytes(&line.replacen(old, &sectors.to_string(), 1)));
                    for line in added {
                        out.extend_from_slice(&name::to_bytes(line));
                        out.push(b'\n');
                    }
                }
                (_, Some(cylinders)) if is_cylinders() => {
                    let end = &line[line.trim_end().len()..];
                    out.extend(format!("ddb.geometry.cylinders = \"{cylinders}\"{end}").into_bytes());
                }
                _ => out.extend(raw),
            }
        }
        out
    }
}

impl ExtentLine {
    /// Parses a line; `None` if it is not that of an extent, or if the extent has no sectors.
    ///
    /// # Errors
    /// A line that begins like that of an extent and is none: without it, all extents behind would move forward.
    fn parse(line: &str) -> Result<Option<Self>> {
        let invalid = || Error::corrupt(format!("Invalid extent line: {}", line.trim_end_matches('\r')));
        let mut rest = line.trim_start_matches(BOM).trim_start();
        let mut word = || {
            let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            rest = after.trim_start();
            word
        };
        let Some(access) = Access::of(word()) else {
            return Ok(None);
        };
        let (sectors, kind) = (word(), word());
        let sectors = sectors.parse::<u64>().map_err(|_| invalid())?;
        if sectors == 0 {
            return Ok(None);
        }
        let kind = ExtentKind::of(kind).ok_or_else(invalid)?;
        let file = rest.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let has_file = kind != ExtentKind::Zero && access != Access::Denied;
        let (name, after) = match file.filter(|(name, _)| !name.is_empty()) {
            Some(file) => file,
            None if has_file => return Err(invalid()),
            None => ("", ""),
        };
        // A device's partition and identifier may follow; only the first word can be a number.
        let offset = after
            .split_whitespace()
            .next()
            .and_then(|word| word.parse::<i64>().ok());
        let offset = match (kind, offset) {
            _ if !has_file => 0,
            (ExtentKind::Flat, None) => return Err(invalid()),
            (ExtentKind::Flat | ExtentKind::VmfsRdm | ExtentKind::VmfsRaw, Some(offset)) => {
                u64::try_from(offset).map_err(|_| invalid())?
            }
            (_, None) => 0,
            (_, Some(_)) => return Err(invalid()),
        };
        Ok(Some(Self {
            access,
            sectors,
            kind,
            name: name.to_owned(),
            decoded_name: None,
            offset,
        }))
    }
}

/// The mark that some editors put in front of a text.
const BOM: char = '\u{feff}';

/// `bytes` without a byte order mark, and in UTF-8 if the mark is that of UTF-16.
fn to_utf8(bytes: &[u8]) -> Cow<'_, [u8]> {
    match Encoding::for_bom(bytes) {
        None => Cow::Borrowed(bytes),
        Some((encoding, mark)) if encoding == encoding_rs::UTF_8 => Cow::Borrowed(&bytes[mark..]),
        Some((encoding, mark)) => {
            let (text, _) = encoding.decode_without_bom_handling(&bytes[mark..]);
            Cow::Owned(text.into_owned().into_bytes())
        }
    }
}

/// Refuses to change a descriptor in UTF-16.
///
/// # Errors
/// The bytes begin with a byte order mark of UTF-16.
pub(super) fn require_changeable(bytes: &[u8]) -> Result<()> {
    match Encoding::for_bom(bytes) {
        Some((encoding, _)) if encoding != encoding_rs::UTF_8 => Err(Error::unsupported(format!(
            "The descriptor is in {}, which can only be read",
            encoding.name()
        ))),
        _ => Ok(()),
    }
}

/// The lines in `bytes` with their line ends, up to the padding. They need not be UTF-8.
fn lines_of(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes[..end].split_inclusive(|byte| *byte == b'\n')
}

/// The text in `bytes`, up to its padding.
fn text_of(bytes: &[u8]) -> String {
    lines_of(bytes).map(name::from_bytes).collect()
}

/// The encoding of names that the descriptor declares.
fn encoding_of(text: &str) -> Option<&'static Encoding> {
    Encoding::for_label(value_of(text, "encoding")?.as_bytes())
}

/// `name` decoded to UTF-8; `None` if it is invalid in `encoding` or does not change.
fn decoded(name: &str, encoding: &'static Encoding) -> Option<String> {
    let bytes = name::to_bytes(name);
    let text = encoding.decode_without_bom_handling_and_without_replacement(&bytes)?;
    let text = name::from_bytes(text.as_bytes()).into_owned();
    (text != name).then_some(text)
}

/// The value in the first line with `key`; if there is none, in the first with `key` in other letter case.
fn value_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let pairs = || text.lines().filter_map(key_and_value);
    pairs()
        .find(|(found, _)| *found == key)
        .or_else(|| pairs().find(|(found, _)| found.eq_ignore_ascii_case(key)))
        .map(|(_, value)| value)
}

/// The key and the value of a line `key=value`, without quotes.
fn key_and_value(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim();
    let value = value
        .strip_prefix('"')
        .map_or(value, |rest| rest.split('"').next().unwrap_or(rest));
    Some((key.trim_start_matches(BOM).trim(), value))
}

/// Whether a file starts like a descriptor that is not written as [`is_descriptor`] has it: with a byte order mark, or
/// other blanks, keywords and lines in front. `head` may end within the descriptor.
pub(super) fn is_loose_descriptor(head: &[u8]) -> bool {
    let text = text_of(&to_utf8(head));
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let is_signature = |line: &str| {
        let comment = line.strip_prefix('#').map(str::trim_start);
        comment.is_some_and(|comment| comment.eq_ignore_ascii_case("Disk DescriptorFile"))
    };
    let is_version = |line: &str| {
        key_and_value(line).is_some_and(|(key, value)| {
            key.eq_ignore_ascii_case("version") && ["1", "2", "3"].contains(&value)
        })
    };
    // What is in front of the first line that says something is comments.
    let Some(first) = lines.find(|line| is_signature(line) || !line.starts_with('#')) else {
        return false;
    };
    (is_signature(first) || is_version(first)) && value_of(&text, "createType").is_some()
}

/// Whether a file starts like a descriptor: with comments and lines of blanks, then the version.
pub(super) fn is_descriptor(head: &[u8]) -> bool {
    for line in head.split_inclusive(|byte| *byte == b'\n') {
        let Some(line) = line.strip_suffix(b"\n") else {
            return false;
        };
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        // As in qemu-img, a line without even a blank is not one of blanks.
        let is_blank = !line.is_empty() && line.iter().all(|byte| *byte == b' ');
        if line.starts_with(b"#") || is_blank {
            continue;
        }
        return [&b"version=1"[..], b"version=2", b"version=3"].contains(&line);
    }
    false
}

/// The contents of a new descriptor.
#[derive(Debug)]
pub(super) struct NewDescriptor<'a> {
    pub(super) cid: u32,
    pub(super) parent_cid: u32,
    pub(super) create_type: &'a str,
    pub(super) parent: Option<&'a str>,
    /// The lines of the extents.
    pub(super) extents: &'a [String],
    pub(super) hardware_version: &'a str,
    pub(super) adapter_type: &'a str,
    pub(super) tools_version: &'a str,
    /// The disk's size in sectors.
    pub(super) sectors: u64,
}

impl NewDescriptor<'_> {
    /// The text.
    pub(super) fn text(&self) -> String {
        let parent = self
            .parent
            .map(|name| format!("parentFileNameHint=\"{name}\"\n"))
            .unwrap_or_default();
        let heads = if self.adapter_type == "ide" { 16 } else { 255 };
        let extents: String = self.extents.iter().map(|line| format!("{line}\n")).collect();
        let cylinders = self.sectors / (heads * SECTORS_PER_TRACK);
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID={:08x}\ncreateType=\"{}\"\n{parent}\n\
             # Extent description\n{extents}\n\
             # The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\n\
             ddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\n\
             ddb.geometry.sectors = \"{SECTORS_PER_TRACK}\"\n\
             ddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.cid,
            self.parent_cid,
            self.create_type,
            self.hardware_version,
            self.adapter_type,
            self.tools_version,
        )
    }
}

/// Sectors per track of the disk's CHS geometry.
const SECTORS_PER_TRACK: u64 = 63;

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\n\
                        createType=\"twoGbMaxExtentSparse\"\n\n# Extent description\n\
                        RW 4194304 SPARSE \"a b-s001.vmdk\"\r\nRW 100 FLAT \"x\" 7\nRDONLY 5 ZERO\n\
                        RW 8 VMFS \"y\"\n\nddb.adapterType = \"ide\"\n\0\0RW 1 FLAT \"no\" 0\n";

    #[test]
    fn what_it_says_is_read() {
        let descriptor = Descriptor::parse(TEXT.as_bytes()).expect("is one");
        assert_eq!((descriptor.cid, descriptor.parent_cid), (0x1234_abcd, NO_PARENT));
        assert_eq!(descriptor.create_type.as_deref(), Some("twoGbMaxExtentSparse"));
        let lines: Vec<_> = descriptor
            .extents
            .iter()
            .map(|line| {
                (
                    line.access,
                    line.sectors,
                    line.kind,
                    line.name.as_str(),
                    line.offset,
                )
            })
            .collect();
        assert_eq!(
            lines,
            [
                (
                    Access::ReadWrite,
                    4_194_304,
                    ExtentKind::Sparse,
                    "a b-s001.vmdk",
                    0
                ),
                (Access::ReadWrite, 100, ExtentKind::Flat, "x", 7),
                (Access::ReadOnly, 5, ExtentKind::Zero, "", 0),
                (Access::ReadWrite, 8, ExtentKind::Vmfs, "y", 0),
            ]
        );
    }

    #[test]
    fn only_the_cid_changes() {
        let changed = Descriptor::with_cid(TEXT.as_bytes(), 5);
        let text = TEXT.split('\0').next().expect("text");
        assert_eq!(changed, text.replace("1234abcd", "00000005").into_bytes());
        let latin = b"CID=1\n# \xe9\r\nddb.comment = \"\xff\"";
        assert_eq!(
            Descriptor::with_cid(latin, 5),
            b"CID=00000005\n# \xe9\r\nddb.comment = \"\xff\""
        );
    }

    #[test]
    fn a_disk_that_grows_has_another_last_extent_and_more_cylinders() {
        let text = NewDescriptor {
            cid: 1,
            parent_cid: NO_PARENT,
            create_type: "twoGbMaxExtentFlat",
            parent: None,
            extents: &["RW 4194304 FLAT \"a-f001\" 0", "RW 22 FLAT \"a-f002\" 0"].map(str::to_owned),
            hardware_version: "4",
            adapter_type: "ide",
            tools_version: "1",
            sectors: 4_194_326,
        }
        .text();
        let expected = text
            .replace("RW 22 ", "RW 1000000 ")
            .replace("cylinders = \"4161\"", "cylinders = \"5153\"");
        assert_ne!(text, expected);
        assert_eq!(
            Descriptor::grown(text.as_bytes(), 1_000_000, &[], 5_194_304),
            expected.as_bytes()
        );
        let added = ["RW 7 FLAT \"a-f003\" 0".to_owned()];
        let lines = format!("RW 1000000 FLAT \"a-f002\" 0\n{}\n", added[0]);
        assert_eq!(
            Descriptor::grown(text.as_bytes(), 1_000_000, &added, 5_194_304),
            expected
                .replace("RW 1000000 FLAT \"a-f002\" 0\n", &lines)
                .into_bytes()
        );
    }

    #[test]
    fn names_that_are_not_utf8_are_not_taken_for_others() {
        let image = |line: &[u8]| [b"CID=1\nparentCID=2\n", line, b"\n"].concat();
        let extent = image(b"RW 5 FLAT \"o\xff\" 0");
        let extents = Descriptor::parse(&extent).expect("is one").extents;
        assert_eq!(*name::to_bytes(&extents[0].name), *b"o\xff");
        let grown = Descriptor::grown(&extent, 7, &["RW 1 FLAT \"\u{10ffe9}\" 0".to_owned()], 8);
        assert_eq!(grown, image(b"RW 7 FLAT \"o\xff\" 0\nRW 1 FLAT \"\xe9\" 0"));
        let comment = image(b"# \xff\nRW 5 FLAT \"o\" 0");
        assert_eq!(
            Descriptor::parse(&comment).expect("only a comment").extents.len(),
            1
        );
        let parent = image(b"parentFileNameHint=\"o\xff\"");
        let parent = Descriptor::parse(&parent).expect("is one").parent;
        assert_eq!(*parent.expect("it has one").to_bytes(), *b"o\xff");
    }

    #[test]
    fn names_are_decoded_as_the_descriptor_says() {
        let decoded_name = |encoding: &str, name: &[u8]| {
            let head = format!("CID=1\nparentCID=2\nencoding=\"{encoding}\"\nRW 5 FLAT \"");
            let text = [head.as_bytes(), name, b"\" 0\n"].concat();
            let extents = Descriptor::parse(&text).expect("is one").extents;
            assert_eq!(*name::to_bytes(&extents[0].name), *name);
            extents[0].decoded_name.clone()
        };
        for (encoding, bytes, expected) in [
            ("windows-1252", &b"caf\xe9.vmdk"[..], Some("café.vmdk")),
            ("Shift_JIS", b"\x93\xfa\x96\x7b", Some("日本")),
            ("Shift_JIS", b"\x83\x5c", Some("ソ")),
            ("GBK", b"\xd6\xd0\xce\xc4", Some("中文")),
            ("UTF-8", b"caf\xe9", None),
            ("UTF-8", "café".as_bytes(), None),
            ("GBK", b"plain", None),
            ("GBK", b"\xff\xff", None),
            ("nonsense", b"caf\xe9", None),
        ] {
            assert_eq!(
                decoded_name(encoding, bytes).as_deref(),
                expected,
                "{encoding} {bytes:x?}"
            );
        }
    }

    #[test]
    fn invalid_lines_are_errors() {
        for line in [
            "RW 5 FLAT \"x\"",
            "RW 5 FLAT \"x\" -1",
            "RW 5 FOO \"x\" 0",
            "RW 5 SPARSE \"x\" 0",
            "RW 5 VMFS \"x\" 1",
        ] {
            let text = format!("CID=1\nparentCID=2\n{line}\n");
            let error = Descriptor::parse(text.as_bytes()).expect_err("makes no sense");
            assert_eq!(error.chain(), format!("Invalid extent line: {line}"));
        }
        assert!(Descriptor::parse(b"createType=\"vmfs\"\n").is_err(), "no CID");
    }

    #[test]
    fn a_descriptor_is_known_by_its_version() {
        for (text, expected) in [
            ("# Disk DescriptorFile\nversion=1\n", true),
            ("#\r\n   \r\nversion=3\r\n", true),
            ("version=2\n", true),
            ("version=1", false),
            ("\nversion=1\n", false),
            ("#\r\n\r\nversion=1\r\n", false),
            ("# a\nversion=4\n", false),
            ("# a\n version=1\n", false),
            ("\tversion=1\n", false),
            ("foo\nversion=1\n", false),
            ("", false),
        ] {
            assert_eq!(is_descriptor(text.as_bytes()), expected, "{text:?}");
        }
    }
}
