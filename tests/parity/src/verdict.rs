//! Differences as text: what the stock tool did is marked `-`, what ours did `+`.

use crate::process::Outcome;

/// What differs between two runs of one command; empty if nothing does.
pub fn command(line: &str, expected: &Outcome, actual: &Outcome, ignore_stdout: bool) -> String {
    let mut text = String::new();
    if expected.ending != actual.ending {
        text += &format!("  - {}\n  + {}\n", expected.ending, actual.ending);
    }
    if !ignore_stdout {
        text += &output("stdout", &expected.stdout, &actual.stdout);
    }
    text += &output("stderr", &expected.stderr, &actual.stderr);
    if text.is_empty() {
        text
    } else {
        format!("$ {line}\n{text}")
    }
}

/// The lines of two texts with the differing ones marked; empty if they are equal.
pub fn lines(title: &str, expected: &str, actual: &str) -> String {
    if expected == actual {
        return String::new();
    }
    let (left, right): (Vec<_>, Vec<_>) = (split_lines(expected), split_lines(actual));
    let head = left.iter().zip(&right).take_while(|(a, b)| a == b).count();
    let tail = left[head..]
        .iter()
        .rev()
        .zip(right[head..].iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let mut text = format!("  {title}:\n");
    if head > CONTEXT {
        text += "    ...\n";
    }
    for line in &left[head.saturating_sub(CONTEXT)..head] {
        text += &format!("    {line}\n");
    }
    for (mark, side) in [('-', &left), ('+', &right)] {
        let changed = &side[head..side.len() - tail];
        for line in changed.iter().take(LONGEST) {
            text += &format!("  {mark} {line}\n");
        }
        if changed.len() > LONGEST {
            text += &format!("  {mark} ... and {} more lines\n", changed.len() - LONGEST);
        }
    }
    let rest = &left[left.len() - tail..];
    for line in rest.iter().take(CONTEXT) {
        text += &format!("    {line}\n");
    }
    if rest.len() > CONTEXT {
        text += "    ...\n";
    }
    text
}

fn output(title: &str, expected: &[u8], actual: &[u8]) -> String {
    lines(title, &normalise(expected), &normalise(actual))
}

/// The version line, and how long something took, are the things that two programs cannot have in common.
fn normalise(bytes: &[u8]) -> String {
    let text = bytes
        .escape_ascii()
        .to_string()
        .replace("\\n", "\n")
        .replace("\\'", "'")
        .replace("\\\"", "\"");
    split_lines(&text)
        .into_iter()
        .map(|line| {
            if line.starts_with("qemu-img version ") {
                "qemu-img version (any)"
            } else if is_duration(line) {
                "Run completed in (any) seconds."
            } else {
                line
            }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// What `bench` prints last, with three decimals.
fn is_duration(line: &str) -> bool {
    let seconds = line
        .strip_prefix("Run completed in ")
        .and_then(|rest| rest.strip_suffix(" seconds."));
    seconds
        .and_then(|seconds| seconds.split_once('.'))
        .is_some_and(|(whole, part)| {
            let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits(whole) && digits(part) && part.len() == 3
        })
}

/// Like `str::lines`, but a missing newline at the end stays visible as a missing empty last line.
fn split_lines(text: &str) -> Vec<&str> {
    text.split('\n').collect()
}

/// Unchanged lines shown around a difference.
const CONTEXT: usize = 3;
/// Changed lines shown of either side.
const LONGEST: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_give_nothing() {
        assert_eq!(lines("x", "a\nb", "a\nb"), "");
    }

    #[test]
    fn common_head_and_tail_are_context() {
        assert_eq!(
            lines("x", "a\nb\nc", "a\nB\nc"),
            "  x:\n    a\n  - b\n  + B\n    c\n"
        );
    }

    #[test]
    fn a_missing_final_newline_is_a_difference() {
        assert_ne!(output("x", b"a\n", b"a"), "");
        assert_ne!(output("x", b"50%\r100%\r", b"100%\r"), "");
    }

    #[test]
    fn bytes_that_are_not_text_are_told_apart() {
        assert_ne!(output("x", b"\xff", b"\xfe"), "");
    }
}
