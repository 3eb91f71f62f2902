//! Short names: names of the host converted to the 8.3 format.

use std::collections::{HashMap, HashSet};

use diskimage_core::{Error, ErrorKind, Result};

use super::entry::{Label, ShortName};

/// The unique short names of one directory.
#[derive(Debug, Default)]
pub(super) struct ShortNames {
    used: HashSet<ShortName>,
    /// For each shortened name, the next number to try.
    next: HashMap<ShortName, u32>,
}

impl ShortNames {
    /// The names of the root directory, in which the label uses one name.
    pub(super) fn with_label(label: &Label) -> Self {
        let mut names = Self::default();
        names.used.insert(*label.bytes());
        names
    }

    /// The short name of the next entry: unchanged if it fits and is unused, else with `~` and a number.
    ///
    /// # Errors
    /// More names with the same shortened form than there are numbers.
    pub(super) fn add(&mut self, name: &[u8]) -> Result<ShortName> {
        let (cut, is_unchanged) = shorten(name);
        if is_unchanged && self.used.insert(cut) {
            return Ok(cut);
        }
        let number = self.next.entry(cut).or_insert(1);
        loop {
            if *number > MAX_NUMBER {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("More than {MAX_NUMBER} names with the same beginning in a directory"),
                ));
            }
            let short = with_number(cut, *number);
            *number += 1;
            if self.used.insert(short) {
                return Ok(short);
            }
        }
    }
}

/// The largest number after `~`, a limit of the specification.
const MAX_NUMBER: u32 = 999_999;

/// Appends `~` and a number to the part before the dot, and replaces its end if it is too long.
fn with_number(mut name: ShortName, number: u32) -> ShortName {
    let tail = format!("~{number}");
    let length = name[..8].iter().take_while(|byte| **byte != b' ').count();
    let start = length.min(8 - tail.len());
    name[start..start + tail.len()].copy_from_slice(tail.as_bytes());
    name
}

/// Shortens a name to the 8.3 format. Also returns whether it is unchanged.
fn shorten(name: &[u8]) -> (ShortName, bool) {
    let mut is_unchanged = true;
    let mut characters = Vec::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        let (character, len) = character(&name[at..]);
        match character.filter(|character| is_allowed(*character)) {
            Some(character) => characters.push(character.to_ascii_uppercase()),
            None => is_unchanged = false,
        }
        at += len;
    }
    let dots = characters.iter().take_while(|byte| **byte == b'.').count();
    is_unchanged &= dots == 0;
    let characters = &characters[dots..];
    let first = characters.iter().position(|byte| *byte == b'.');
    let last = characters.iter().rposition(|byte| *byte == b'.');
    let base = &characters[..first.unwrap_or(characters.len())];
    let extension = last.map_or(&[][..], |last| &characters[last + 1..]);
    let mut short = [b' '; 11];
    is_unchanged &= first == last && base.len() <= 8 && extension.len() <= 3;
    for (slot, byte) in short[..8].iter_mut().zip(base) {
        *slot = *byte;
    }
    for (slot, byte) in short[8..].iter_mut().zip(extension) {
        *slot = *byte;
    }
    (short, is_unchanged)
}

/// The first character if it is ASCII, and the number of bytes to advance. For other characters, and for invalid UTF-8,
/// that is the length that the first byte announces.
fn character(name: &[u8]) -> (Option<u8>, usize) {
    match name[0] {
        byte @ 0..0x80 => (Some(byte), 1),
        0xc0..0xe0 => (None, 2),
        0xe0..0xf0 => (None, 3),
        0xf0..0xf8 => (None, 4),
        0xf8..0xfc => (None, 5),
        0xfc..0xfe => (None, 6),
        0x80..0xc0 | 0xfe.. => (None, 1),
    }
}

/// Whether a short name may contain the character, or it is the dot.
fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"$%'-_@~`!(){}^#&.".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(name: &str) -> String {
        let short = ShortNames::default().add(name.as_bytes()).expect("has a number");
        String::from_utf8_lossy(&short).into_owned()
    }

    /// The expected names are those of `qemu-img`.
    #[test]
    fn names_are_shortened_as_in_qemu_img() {
        for (name, expected) in [
            ("abcdefgh.txt", "ABCDEFGHTXT"),
            ("abcdefghi.txt", "ABCDEF~1TXT"),
            ("abc.defg", "ABC~1   DEF"),
            (".hidden", "HIDDEN~1   "),
            (".hid.den", "HID~1   DEN"),
            ("a.b.c", "A~1     C  "),
            ("trail.", "TRAIL      "),
            ("trail..", "TRAIL~1    "),
            ("a.b.", "A~1        "),
            ("sp ace", "SPACE~1    "),
            ("a,b;c=d[e]", "ABCDE~1    "),
            ("q'w", "Q'W        "),
            ("#!$()", "#!$()      "),
            ("日本語.txt", "TXT~1      "),
            ("aé.txt", "A~1     TXT"),
            ("x.t日t", "X~1     TT "),
            ("...", "~1         "),
            ("+", "~1         "),
            ("~", "~          "),
            ("12345678.1234", "123456~1123"),
        ] {
            assert_eq!(short(name), expected, "{name}");
        }
    }

    #[test]
    fn names_in_use_get_numbers() {
        let mut names = ShortNames::default();
        let mut add = |name: &str| {
            let short = names.add(name.as_bytes()).expect("has a number");
            String::from_utf8_lossy(&short).into_owned()
        };
        assert_eq!(add("FOO"), "FOO        ");
        assert_eq!(add("fOO."), "FOO~1      ");
        assert_eq!(add("Foo"), "FOO~2      ");
        assert_eq!(add("foo~1"), "FOO~1~1    ");
        assert_eq!(add("foo"), "FOO~3      ");
        for number in 1..=9 {
            assert_eq!(add("longfilename"), format!("LONGFI~{number}   "));
        }
        assert_eq!(add("longfilename"), "LONGF~10   ");
    }
}
