//! Formats differences as text: lines of the stock tool begin with `-`, those of ours with `+`.

use crate::process::Outcome;

/// The differences between two runs of one command; empty if there are none.
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

/// The lines of two texts with marks for the differing ones; empty if they are equal.
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

/// Replaces what differs between two programs: the version line, durations, and which of reading and writing meets the
/// end of a connection that the peer closes during a TLS handshake.
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
                "qemu-img version (any)".to_owned()
            } else if is_duration(line) {
                "Run completed in (any) seconds.".to_owned()
            } else if let Some((start, _)) = line.split_once(HANDSHAKE).filter(|(_, end)| is_closed(end)) {
                format!("{start}{HANDSHAKE}(connection closed)")
            } else {
                line.to_owned()
            }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

const HANDSHAKE: &str = "TLS handshake failed: ";

/// Whether the cause of a failed handshake is that the peer has closed the connection.
fn is_closed(cause: &str) -> bool {
    [
        "Error in the pull function.: Unable to read from socket: Connection reset by peer",
        "Error in the push function.: Unable to write to socket: Connection reset by peer",
        "Error in the push function.: Unable to write to socket: Broken pipe",
    ]
    .contains(&cause)
}

/// Whether a line is the last one of `bench`, with a duration of three decimals.
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

/// Like `str::lines`, but a newline at the end gives an empty last line, so that a missing newline is visible.
fn split_lines(text: &str) -> Vec<&str> {
    text.split('\n').collect()
}

/// The number of unchanged lines shown around a difference.
const CONTEXT: usize = 3;
/// The largest number of changed lines shown for each side.
const LONGEST: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_have_no_differences() {
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
    fn a_handshake_that_the_peer_ends_is_seen_by_a_read_or_by_a_write() {
        let failed = |cause: &str| format!("qemu-img: x: TLS handshake failed: {cause}\n").into_bytes();
        let read =
            failed("Error in the pull function.: Unable to read from socket: Connection reset by peer");
        let write = failed("Error in the push function.: Unable to write to socket: Broken pipe");
        assert_eq!(output("x", &read, &write), "");
        assert_ne!(
            output("x", &read, &failed("A TLS fatal alert has been received.")),
            ""
        );
    }

    #[test]
    fn bytes_that_are_not_utf8_are_compared() {
        assert_ne!(output("x", b"\xff", b"\xfe"), "");
    }
}
