//! Text from images made safe to print.
//!
//! Names of snapshots, backing files and the like come out of files from strangers. On a terminal their control
//! characters could move the cursor, change the title or hide what follows.

use std::borrow::Cow;
use std::fmt::Write;

/// `text` with control characters as `\xNN`, and characters that change the order of what is shown as `\u{NNNN}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        // Writing to a string does not fail.
        let _ = match c {
            c if !is_unsafe(c) => safe.write_char(c),
            c if c.is_control() => write!(safe, "\\x{:02x}", u32::from(c)),
            c => write!(safe, "\\u{{{:04x}}}", u32::from(c)),
        };
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
    fn other_text_is_left_alone() {
        assert!(matches!(printable("Ünïcode \\ \"x\" 日本"), Cow::Borrowed(_)));
    }
}
