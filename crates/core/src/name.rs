//! Names that need not be UTF-8: of files, snapshots, bitmaps and sockets.
//!
//! To the operating system and in images a name is bytes; in options, in `json:` names and in messages it is text. Inside
//! the program it is always text, in a form that loses nothing: each byte that is not part of UTF-8 is kept as one
//! reserved character. A name is translated where it comes in and where it goes out, and nowhere else:
//!
//! ```text
//!    command line   bytes in an image   %E9 of a URI           JSON \uXXXX
//!     from_os()        from_bytes()     from_bytes()            push_char()
//!         │                 │                │                      │
//!         ▼                 ▼                ▼                      ▼
//!    ┌──────────────────────────────────────────────────────────────────────┐
//!    │  str: options, json:, messages, comparisons;  E9 is U+10FFE9 in it   │
//!    └──────────────────────────────────────────────────────────────────────┘
//!         │                 │                │                      │
//!         ▼                 ▼                ▼                      ▼
//!      to_path()        to_bytes()       to_bytes()         json::Value::pretty()
//!   open(2), connect    an image, the   the terminal,        --output=json, where
//!                       wire of NBD     a pipe               such a byte is U+FFFD
//! ```
//!
//! The byte `b` is the character U+10FF00 + `b`, so U+10FF80 to U+10FFFF are the reserved ones. Where the bytes of a name
//! are one of these characters in UTF-8, each of its four bytes becomes a reserved character like any byte that is not
//! UTF-8. Therefore `to_bytes(from_bytes(b)) == b` for all bytes, and two different names never have the same text.
//!
//! [`std::fs`] and the like take any `str` for a path and would open the file that is called as the text looks. So
//! `clippy.toml` forbids them, and what opens a file takes the [`Path`] that [`to_path`] makes: [`open`], [`open_with`],
//! [`remove`], [`connect`], and the methods of [`Path`].

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

/// A name that stands in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// The name of these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(from_bytes(bytes).into_owned())
    }

    /// The name as text.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The name as it stands in the image.
    pub fn to_bytes(&self) -> Cow<'_, [u8]> {
        to_bytes(&self.0)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<T: Into<String>> From<T> for Name {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

/// The text of a name that is these bytes.
pub fn from_bytes(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !may_have_reserved(text) => Cow::Borrowed(text),
        _ => Cow::Owned(escaped(bytes)),
    }
}

/// The text of a name or other word that the operating system gives.
pub fn from_os(name: &OsStr) -> String {
    from_bytes(name.as_bytes()).into_owned()
}

/// The same of one that is no longer needed.
pub fn from_os_string(name: OsString) -> String {
    match name.into_string() {
        Ok(text) if !may_have_reserved(&text) => text,
        Ok(text) => escaped(text.as_bytes()),
        Err(name) => escaped(name.as_bytes()),
    }
}

/// The text of a path.
pub fn of_path(path: &Path) -> String {
    from_os(path.as_os_str())
}

/// Appends a character that is meant as such, and not as the byte that it may be reserved for.
pub fn push_char(text: &mut String, c: char) {
    match byte_of(c) {
        None => text.push(c),
        Some(_) => text.extend(c.encode_utf8(&mut [0; 4]).bytes().map(char_of)),
    }
}

/// The bytes of a name.
pub fn to_bytes(text: &str) -> Cow<'_, [u8]> {
    if !may_have_reserved(text) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// How many bytes a name is long.
pub fn len(text: &str) -> usize {
    to_bytes(text).len()
}

/// As much of the beginning of a name as fits into `max` bytes. No character is cut.
pub fn prefix(text: &str, max: usize) -> &str {
    let mut room = max;
    let end = text.char_indices().find(|(_, c)| {
        let len = byte_of(*c).map_or(c.len_utf8(), |_| 1);
        let fits = len <= room;
        room = room.saturating_sub(len);
        !fits
    });
    end.map_or(text, |(at, _)| &text[..at])
}

/// The path by which the operating system knows a name.
pub fn to_path(text: &str) -> PathBuf {
    PathBuf::from(OsString::from_vec(to_bytes(text).into_owned()))
}

/// The name with U+FFFD for each byte that is not UTF-8: for texts that can hold nothing else.
pub fn lossy(text: &str) -> String {
    text.chars()
        .map(|c| byte_of(c).map_or(c, |_| char::REPLACEMENT_CHARACTER))
        .collect()
}

/// The byte that a character stands for, if it is a reserved one.
pub fn byte_of(c: char) -> Option<u8> {
    u32::from(c)
        .checked_sub(RESERVED)
        .and_then(|byte| u8::try_from(byte).ok())
        .filter(|byte| *byte >= 0x80)
}

/// Opens a file to read it.
///
/// # Errors
/// What the operating system says.
#[expect(clippy::disallowed_methods, reason = "a path that was made from a name")]
pub fn open(path: &Path) -> io::Result<fs::File> {
    fs::File::open(path)
}

/// Opens or makes a file as `options` say.
///
/// # Errors
/// What the operating system says.
#[expect(clippy::disallowed_methods, reason = "a path that was made from a name")]
pub fn open_with(path: &Path, options: &fs::OpenOptions) -> io::Result<fs::File> {
    options.open(path)
}

/// Removes a file.
///
/// # Errors
/// What the operating system says.
#[expect(clippy::disallowed_methods, reason = "a path that was made from a name")]
pub fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)
}

/// Connects to a socket.
///
/// # Errors
/// What the operating system says.
#[expect(clippy::disallowed_methods, reason = "a path that was made from a name")]
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path)
}

/// The character of byte zero, were that one kept.
const RESERVED: u32 = 0x10_ff00;

/// Whether there may be reserved characters: all of them begin with this byte in UTF-8.
fn may_have_reserved(text: &str) -> bool {
    text.as_bytes().contains(&0xf4)
}

fn char_of(byte: u8) -> char {
    char::from_u32(RESERVED + u32::from(byte)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            push_char(&mut text, c);
        }
        text.extend(chunk.invalid().iter().copied().map(char_of));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Bytes among which many are parts of characters, reserved ones among them.
    fn names() -> impl Strategy<Value = Vec<u8>> {
        let parts = prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            (0x80u8..).prop_map(|byte| char_of(byte).to_string().into_bytes()),
            Just(b"\xf4\x8f\xbf".to_vec()),
            Just(b"\xc3".to_vec()),
            Just(b"\xa9".to_vec()),
        ];
        prop::collection::vec(parts, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes in names()) {
            let text = from_bytes(&bytes);
            prop_assert_eq!(&*to_bytes(&text), &*bytes);
            prop_assert_eq!(len(&text), bytes.len());
            prop_assert_eq!(from_os_string(OsString::from_vec(bytes.clone())), &*text);
            prop_assert_eq!(to_path(&text).into_os_string().into_vec(), &*bytes);
            prop_assert_eq!(Name::from_bytes(&bytes).to_bytes().into_owned(), bytes);
        }

        #[test]
        fn two_names_have_two_texts(all in prop::collection::vec(names(), 2..40)) {
            let mut texts = HashMap::new();
            for bytes in all {
                let other = texts.insert(from_bytes(&bytes).into_owned(), bytes.clone());
                prop_assert!(other.is_none_or(|other| other == bytes));
            }
        }

        #[test]
        fn a_prefix_is_the_text_of_the_first_bytes(bytes in names(), max in 0usize..20) {
            let text = from_bytes(&bytes);
            let cut = prefix(&text, max);
            let kept = to_bytes(cut);
            prop_assert!(kept.len() <= max && bytes.starts_with(&kept));
            prop_assert_eq!(from_bytes(&kept), cut);
            prop_assert!(bytes.len() > max || kept.len() == bytes.len());
        }

        #[test]
        fn characters_are_pushed_as_such(c in any::<char>()) {
            let mut text = String::new();
            push_char(&mut text, c);
            prop_assert_eq!(to_bytes(&text).into_owned(), c.to_string().into_bytes());
        }
    }

    #[test]
    fn other_bytes_are_reserved_characters() {
        assert_eq!(from_bytes(b"caf\xe9.img"), "caf\u{10ffe9}.img");
        assert_eq!(from_bytes("café".as_bytes()), "café");
        assert_eq!(
            from_bytes("\u{10ff80}".as_bytes()),
            "\u{10fff4}\u{10ff8f}\u{10ffbe}\u{10ff80}"
        );
        assert_eq!(lossy("caf\u{10ffe9}"), "caf\u{fffd}");
    }

    #[test]
    fn names_that_look_alike_differ() {
        let names = [
            &b"o\xff.raw"[..],
            "o\u{fffd}.raw".as_bytes(),
            "o\u{10ffff}.raw".as_bytes(),
        ];
        let [broken, replaced, reserved] = names.map(Name::from_bytes);
        assert_ne!(broken, replaced);
        assert_ne!(broken, reserved);
    }
}
