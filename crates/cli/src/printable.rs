//! What a line of output may hold.
//!
//! Names of snapshots, backing files and the like are untrusted. On a terminal their control characters could move the
//! cursor, change the title or hide later output; a newline could look like a line of this program.

use std::fmt::Write;

use diskimage::name;

/// The longest line in bytes, with its newline.
const LONGEST: usize = 4096;

/// What stands for the middle of a line that is too long.
const CUT: &str = " ... ";

/// How many bytes of the end of such a line are shown: the reason of an error comes last.
const END: usize = 1024;

/// A line as it is printed. Control characters are shown as `\xNN`, characters that are invisible or change the direction
/// of text as `\u{NNNN}`. Bytes of names that are not UTF-8 are printed unchanged, except for those that are control
/// characters on terminals without UTF-8. Of a line that is too long the middle is left out.
pub fn printable_line(line: &str) -> String {
    let mut safe = String::with_capacity(line.len() + 1);
    if line.chars().any(|c| is_unsafe(c) || name::byte_of(c).is_some()) {
        escape(line, &mut safe);
    } else {
        safe.push_str(line);
    }
    if safe.len() >= LONGEST { cut(&safe) } else { safe }
}

fn escape(line: &str, safe: &mut String) {
    for chunk in name::to_bytes(line).utf8_chunks() {
        // Writing to a string does not fail.
        for c in chunk.valid().chars() {
            match c {
                c if !is_unsafe(c) => name::push_char(safe, c),
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
}

fn cut(line: &str) -> String {
    let start = line.floor_char_boundary(LONGEST - 1 - END - CUT.len());
    let end = line.ceil_char_boundary(line.len() - END);
    [&line[..start], CUT, &line[end..]].concat()
}

fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Direction.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Line and paragraph separators.
            | '\u{2028}' | '\u{2029}'
            // Invisible: soft hyphen, joiners and fillers, operators, marks of annotations, tags.
            | '\u{ad}' | '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{3164}'
            | '\u{feff}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(
            printable_line("a\x1b[31m\n\u{9b}\x7f"),
            "a\\x1b[31m\\x0a\\x9b\\x7f"
        );
    }

    #[test]
    fn characters_that_hide_or_turn_text_are_escaped() {
        for c in
            "\u{61c}\u{ad}\u{200b}\u{200f}\u{202a}\u{202e}\u{2060}\u{2069}\u{206f}\u{feff}\u{e0041}".chars()
        {
            let shown = printable_line(&format!("a{c}b"));
            assert_eq!(shown, format!("a\\u{{{:04x}}}b", u32::from(c)));
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_escaped_where_they_are_control_characters() {
        let name = name::from_bytes(b"caf\xe9 \x9b31m\xa0\xf4\x8f\xbe\x80");
        let shown = name::from_bytes(b"caf\xe9 \\x9b31m\xa0\xf4\x8f\xbe\x80");
        assert_eq!(printable_line(&name), shown);
    }

    #[test]
    fn other_text_is_left_alone() {
        let text = "Ünïcode \\ \"x\" 日本";
        assert_eq!(printable_line(text), text);
    }

    #[test]
    fn a_long_line_shows_its_start_and_its_end() {
        let fits = "日".repeat(LONGEST / 3);
        assert_eq!(printable_line(&fits), fits);
        let line = format!("start {} end", "日".repeat(LONGEST));
        let shown = printable_line(&line);
        assert!(shown.starts_with("start ") && shown.ends_with(" end"));
        assert!(shown.contains(CUT));
        assert!((LONGEST - 8..LONGEST).contains(&shown.len()), "{}", shown.len());
    }
}
