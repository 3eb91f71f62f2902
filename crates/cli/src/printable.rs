//! Escapes text from images for printing.
//!
//! Names of snapshots, backing files and the like are untrusted. On a terminal their control characters could move the
//! cursor, change the title or hide later output.

use std::borrow::Cow;
use std::fmt::Write;

use diskimage::name;

/// Escapes control characters as `\xNN`, and characters that change the direction of text as `\u{NNNN}`. Bytes of names
/// that are not UTF-8 are printed unchanged, except for those that are control characters on terminals without UTF-8.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| is_unsafe(c) || name::byte_of(c).is_some()) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for chunk in name::to_bytes(text).utf8_chunks() {
        // Writing to a string does not fail.
        for c in chunk.valid().chars() {
            match c {
                c if !is_unsafe(c) => name::push_char(&mut safe, c),
                c if c.is_control() => drop(write!(safe, "\\x{:02x}", u32::from(c))),
                c => drop(write!(safe, "\\u{{{:04x}}}", u32::from(c))),
            }
        }
        for byte in chunk.invalid() {
            match byte {
                0xa0.. => safe.push_str(&name::from_bytes(&[*byte])),
                _ => drop(write!(safe, "\\x{byte:02x}")),
            }
        }
    }
    Cow::Owned(safe)
}

fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("a\x1b[31m\n\u{9b}\x7f"), "a\\x1b[31m\\x0a\\x9b\\x7f");
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
    }

    #[test]
    fn bytes_that_are_not_utf8_are_escaped_where_they_are_control_characters() {
        let name = name::from_bytes(b"caf\xe9 \x9b31m\xa0\xf4\x8f\xbe\x80");
        let shown = name::from_bytes(b"caf\xe9 \\x9b31m\xa0\xf4\x8f\xbe\x80");
        assert_eq!(printable(&name), shown);
    }

    #[test]
    fn other_text_is_left_alone() {
        assert!(matches!(printable("Ünïcode \\ \"x\" 日本"), Cow::Borrowed(_)));
    }
}
