//! Short names: what becomes of a host's name in eight and three characters.

use std::collections::{HashMap, HashSet};

use diskimage_core::{Error, ErrorKind, Result};

use super::entry::{Label, ShortName};

/// The short names of one directory, no two of which are the same.
#[derive(Debug, Default)]
pub(super) struct ShortNames {
    taken: HashSet<ShortName>,
    /// For each name that was cut, the number to be tried next.
    next: HashMap<ShortName, u32>,
}

impl ShortNames {
    /// The names of a directory with this label, which takes a name as well.
    pub(super) fn beside(label: &Label) -> Self {
        let mut names = Self::default();
        names.taken.insert(*label.bytes());
        names
    }

    /// The name of the next entry: as it is if it fits and is free, else with a number at the end.
    ///
    /// # Errors
    /// More names that are cut to the same than there are numbers.
    pub(super) fn add(&mut self, name: &[u8]) -> Result<ShortName> {
        let (cut, is_whole) = shorten(name);
        if is_whole && self.taken.insert(cut) {
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
            if self.taken.insert(short) {
                return Ok(short);
            }
        }
    }
}

/// The largest number behind `~`, as the specification has it.
const MAX_NUMBER: u32 = 999_999;

/// Puts `~` and a number behind the part before the dot, and over its end if that is needed.
fn with_number(mut name: ShortName, number: u32) -> ShortName {
    let tail = format!("~{number}");
    let length = name[..8].iter().take_while(|byte| **byte != b' ').count();
    let start = length.min(8 - tail.len());
    name[start..start + tail.len()].copy_from_slice(tail.as_bytes());
    name
}

/// Cuts a name to eight and three characters; also whether it lost nothing.
fn shorten(name: &[u8]) -> (ShortName, bool) {
    let mut is_whole = true;
    let mut characters = Vec::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        let (character, len) = character(&name[at..]);
        match character.filter(|character| is_allowed(*character)) {
            Some(character) => characters.push(character.to_ascii_uppercase()),
            None => is_whole = false,
        }
        at += len;
    }
    let dots = characters.iter().take_while(|byte| **byte == b'.').count();
    is_whole &= dots == 0;
    let characters = &characters[dots..];
    let first = characters.iter().position(|byte| *byte == b'.');
    let last = characters.iter().rposition(|byte| *byte == b'.');
    let base = &characters[..first.unwrap_or(characters.len())];
    let extension = last.map_or(&[][..], |last| &characters[last + 1..]);
    let mut short = [b' '; 11];
    is_whole &= first == last && base.len() <= 8 && extension.len() <= 3;
    for (slot, byte) in short[..8].iter_mut().zip(base) {
        *slot = *byte;
    }
    for (slot, byte) in short[8..].iter_mut().zip(extension) {
        *slot = *byte;
    }
    (short, is_whole)
}

/// The first character if it is of ASCII, and how many bytes to go on: where the name is not UTF-8, as many as its first
/// byte speaks of, whatever they are.
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

/// Whether a short name may have the character; the dot between its parts included.
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

    /// What the original makes of them.
    #[test]
    fn names_are_cut_as_by_the_original() {
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
    fn names_that_are_taken_get_numbers() {
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
