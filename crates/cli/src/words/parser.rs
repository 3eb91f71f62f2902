//! Words to options and operands, by the rules and with the messages of C's `getopt_long`.
//!
//! Letters may share a word and a value may be glued to its letter (`-qp`, `-fqcow2`); a long option takes its value
//! after `=` or from the next word, and may be abbreviated as long as one option alone is meant. Operands may stand
//! anywhere; `--` ends the options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use diskimage::name;

use super::{Command, Flag, Stop};

/// Reads the words of one command, option by option; operands are put aside until the end.
#[derive(Debug)]
pub struct Parser {
    command: &'static Command,
    words: std::vec::IntoIter<OsString>,
    /// What is left of a word of letters.
    letters: Vec<u8>,
    operands: Vec<OsString>,
    operands_end_options: bool,
    /// The word before was an operand.
    after_operand: bool,
}

impl Parser {
    /// For the words after the command's name. With `operands_end_options` everything after the first operand is an
    /// operand, as `POSIXLY_CORRECT` asks for.
    pub fn new(command: &'static Command, words: Vec<OsString>, operands_end_options: bool) -> Self {
        Self {
            command,
            words: words.into_iter(),
            letters: Vec::new(),
            operands: Vec::new(),
            operands_end_options,
            after_operand: false,
        }
    }

    /// The next option: its [`Flag::name`] and its value, which is empty if it takes none.
    ///
    /// # Errors
    /// A word that is no option of the command, or an option whose value is missing or not wanted; and
    /// [`Stop::Help`] for `--help`.
    pub fn next_flag(&mut self) -> Result<Option<(&'static str, OsString)>, Stop> {
        let found = self.find_flag()?;
        if matches!(&found, Some(("help", _))) {
            return Err(Stop::Help);
        }
        Ok(found)
    }

    /// The operands, once [`Self::next_flag`] has found no more options.
    pub fn operands(self) -> Vec<OsString> {
        self.operands
    }

    fn find_flag(&mut self) -> Result<Option<(&'static str, OsString)>, Stop> {
        if !self.letters.is_empty() {
            return self.letter().map(Some);
        }
        while let Some(word) = self.words.next() {
            let bytes = word.as_bytes();
            let after_operand = std::mem::take(&mut self.after_operand);
            if bytes == b"--" {
                break;
            }
            if let Some(long) = bytes.strip_prefix(b"--") {
                return self.long(long).map(Some);
            }
            if bytes.len() > 1 && bytes[0] == b'-' && !(after_operand && self.is_negative_operand(bytes)) {
                self.letters = bytes[1..].to_vec();
                return self.letter().map(Some);
            }
            self.operands.push(word);
            self.after_operand = true;
            if self.operands_end_options {
                break;
            }
        }
        self.operands.extend(self.words.by_ref());
        Ok(None)
    }

    fn is_negative_operand(&self, word: &[u8]) -> bool {
        self.command.negative_operand == Some(self.operands.len()) && word[1].is_ascii_digit()
    }

    fn letter(&mut self) -> Result<(&'static str, OsString), Stop> {
        // A letter that is not ASCII is no option; it is shown whole and not as its first byte.
        let text = name::from_bytes(&self.letters);
        let letter = text.chars().next().unwrap_or_default();
        let Some(flag) = self.command.flags.iter().find(|flag| flag.short == Some(letter)) else {
            return Err(Stop::unreadable(format!("invalid option -- '{letter}'")));
        };
        let rest = self.letters.split_off(1);
        self.letters.clear();
        if flag.value.is_none() {
            self.letters = rest;
            return Ok((flag.name(), OsString::new()));
        }
        let value = if rest.is_empty() {
            self.words.next()
        } else {
            Some(OsString::from_vec(rest))
        };
        match value {
            Some(value) => Ok((flag.name(), value)),
            None => Err(Stop::unreadable(format!(
                "option requires an argument -- '{letter}'"
            ))),
        }
    }

    fn long(&mut self, word: &[u8]) -> Result<(&'static str, OsString), Stop> {
        let (name, value) = match word.iter().position(|&byte| byte == b'=') {
            Some(at) => (&word[..at], Some(OsStr::from_bytes(&word[at + 1..]).to_owned())),
            None => (word, None),
        };
        let (long, flag) = self.find_long(name, word)?;
        let value = match (flag.value, value) {
            (None, None) => OsString::new(),
            (None, Some(_)) => {
                return Err(Stop::unreadable(format!(
                    "option '--{long}' doesn't allow an argument"
                )));
            }
            (Some(_), Some(value)) => value,
            (Some(_), None) => self
                .words
                .next()
                .ok_or_else(|| Stop::unreadable(format!("option '--{long}' requires an argument")))?,
        };
        Ok((flag.name(), value))
    }

    /// The option that `name` names or abbreviates. `word` is what to show where there is none.
    fn find_long(&self, name: &[u8], word: &[u8]) -> Result<(&'static str, &'static Flag), Stop> {
        let original = self.command.original.iter().copied().filter_map(|long| {
            let flag = self
                .command
                .flags
                .iter()
                .find(|flag| flag.longs.contains(&long))?;
            Some((long, flag))
        });
        let ours = self
            .command
            .flags
            .iter()
            .flat_map(|flag| flag.longs.iter().map(move |long| (*long, flag)));
        let all: Vec<_> = original.clone().chain(ours.clone()).collect();
        if let Some(exact) = all.iter().find(|(long, _)| long.as_bytes() == name) {
            return Ok(*exact);
        }
        let begun: Vec<_> = original
            .filter(|(long, _)| long.as_bytes().starts_with(name))
            .collect();
        let begun = match begun.is_empty() {
            false => begun,
            true => ours
                .filter(|(long, _)| long.as_bytes().starts_with(name))
                .collect(),
        };
        let shown = name::from_bytes(word);
        let Some((_, first)) = begun.first() else {
            return Err(Stop::unreadable(format!("unrecognized option '--{shown}'")));
        };
        if begun.iter().all(|(_, flag)| flag.name() == first.name()) {
            return Ok(begun[0]);
        }
        let possible: Vec<_> = begun.iter().map(|(long, _)| format!("'--{long}'")).collect();
        Err(Stop::unreadable(format!(
            "option '--{shown}' is ambiguous; possibilities: {}",
            possible.join(" ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static COMMAND: Command = Command {
        name: "test",
        summary: "Test",
        usage: "",
        flags: &[
            Flag::HELP,
            Flag::QUIET,
            Flag::PROGRESS,
            Flag::option(Some('f'), &["format"], "FMT", &[]),
            Flag::FORCE_SHARE,
            Flag::option(None, &["target-format", "output-format"], "FMT", &[]),
            Flag::switch(Some('c'), &["compress"], &[]),
        ],
        operands: &[],
        original: &[
            "help",
            "quiet",
            "force-share",
            "format",
            "output-format",
            "compare",
        ],
        negative_operand: Some(1),
    };

    type Read = (Vec<(&'static str, String)>, Vec<String>);

    fn read_with(words: &[&str], posix: bool) -> Result<Read, Stop> {
        let mut parser = Parser::new(&COMMAND, words.iter().map(OsString::from).collect(), posix);
        let mut flags = Vec::new();
        while let Some((name, value)) = parser.next_flag()? {
            flags.push((name, value.into_string().unwrap()));
        }
        let operands = parser
            .operands()
            .into_iter()
            .map(|word| word.into_string().unwrap());
        Ok((flags, operands.collect()))
    }

    fn read(words: &[&str]) -> Result<Read, Stop> {
        read_with(words, false)
    }

    fn flags(words: &[&str]) -> Vec<(&'static str, String)> {
        read(words).unwrap().0
    }

    fn wrong(words: &[&str]) -> String {
        match read(words) {
            Err(Stop::Wrong(wrong)) => wrong.messages.join("\n"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn letters_share_a_word_and_values_are_glued() {
        let expected = vec![
            ("quiet", String::new()),
            ("progress", String::new()),
            ("format", "qcow2".into()),
        ];
        assert_eq!(flags(&["-qpfqcow2"]), expected);
        assert_eq!(flags(&["-qpf", "qcow2"]), expected);
    }

    #[test]
    fn long_options_take_values_both_ways_and_may_be_abbreviated() {
        assert_eq!(
            flags(&["--format=", "--form", "--"]),
            [("format", "".into()), ("format", "--".into())]
        );
        assert_eq!(flags(&["--q"]), [("quiet", "".into())]);
        assert_eq!(flags(&["--out=x"]), [("target-format", "x".into())]);
    }

    #[test]
    fn our_own_names_never_make_the_originals_ambiguous() {
        assert_eq!(
            flags(&["--target-f", "x", "--compress"]),
            [("target-format", "x".into()), ("compress", "".into())]
        );
        assert_eq!(flags(&["--p"]), [("progress", "".into())]);
    }

    #[test]
    fn operands_may_stand_anywhere() {
        let (flags, operands) = read(&["a", "-q", "-", "--", "-p"]).unwrap();
        assert_eq!(
            (flags.len(), operands),
            (1, vec!["a".into(), "-".into(), "-p".into()])
        );
        let (flags, operands) = read_with(&["-q", "a", "-q"], true).unwrap();
        assert_eq!((flags.len(), operands), (1, vec!["a".into(), "-q".into()]));
    }

    #[test]
    fn a_negative_number_is_an_operand_only_in_its_place() {
        assert_eq!(read(&["a", "-5M", "-q"]).unwrap().1, ["a", "-5M"]);
        assert_eq!(wrong(&["-5", "a"]), "invalid option -- '5'");
        assert_eq!(wrong(&["a", "-5", "-5"]), "invalid option -- '5'");
    }

    #[test]
    fn wrong_words_are_described_as_getopt_does() {
        assert_eq!(wrong(&["-qx"]), "invalid option -- 'x'");
        assert_eq!(wrong(&["-é"]), "invalid option -- 'é'");
        assert_eq!(wrong(&["-q=1"]), "invalid option -- '='");
        assert_eq!(wrong(&["-f"]), "option requires an argument -- 'f'");
        assert_eq!(wrong(&["--foo=1"]), "unrecognized option '--foo=1'");
        assert_eq!(wrong(&["---"]), "unrecognized option '---'");
        assert_eq!(wrong(&["--qui=1"]), "option '--quiet' doesn't allow an argument");
        assert_eq!(wrong(&["--form"]), "option '--format' requires an argument");
        assert_eq!(
            wrong(&["--fo=1"]),
            "option '--fo=1' is ambiguous; possibilities: '--force-share' '--format'"
        );
    }

    #[test]
    fn help_stops_at_once() {
        assert_eq!(read(&["-q", "-h", "--foo"]), Err(Stop::Help));
    }
}
