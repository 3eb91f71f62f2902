//! Parses options and operands by the rules and with the messages of `getopt_long` of C.
//!
//! A word may have several letters, and a value may follow its letter (`-qp`, `-fqcow2`). A long option takes its value
//! after `=` or from the next word, and may be abbreviated unless the abbreviation is ambiguous. Operands and options
//! may be mixed; `--` ends the options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use diskimage::name;

use super::{Command, Flag, Policy, Stop};

/// Parses the words of one command, option by option. Operands are collected until all options are parsed.
#[derive(Debug)]
pub struct Parser {
    command: &'static Command,
    words: std::vec::IntoIter<OsString>,
    /// The letters of the current word that have not been parsed yet.
    letters: Vec<u8>,
    operands: Vec<OsString>,
    operands_end_options: bool,
    /// The previous word was an operand.
    after_operand: bool,
    policy: Policy,
}

impl Parser {
    /// A parser of the words after the command's name. With `operands_end_options` all words after the first operand
    /// are operands, as with `POSIXLY_CORRECT`.
    pub fn new(command: &'static Command, words: Vec<OsString>, operands_end_options: bool) -> Self {
        Self {
            command,
            words: words.into_iter(),
            letters: Vec::new(),
            operands: Vec::new(),
            operands_end_options,
            after_operand: false,
            policy: Policy::default(),
        }
    }

    /// The same parser, where `policy` holds besides what the options say.
    #[must_use]
    pub(crate) fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// The next option that is not the same for all commands: its [`Flag::name`], and its value, which is empty for an
    /// option without one.
    ///
    /// # Errors
    /// An option is unknown, its value is missing, or it takes none and has one. [`Stop::Help`] for `--help`.
    pub fn next_flag(&mut self) -> Result<Option<(&'static str, OsString)>, Stop> {
        loop {
            match self.find_flag()? {
                Some(("help", _)) => return Err(Stop::Help),
                Some(("untrusted", _)) => self.policy.untrusted = true,
                Some(("deny-references", _)) => self.policy.deny_references = true,
                found => return Ok(found),
            }
        }
    }

    /// The policy about images, after [`Self::next_flag`] has returned `None`.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The operands, after [`Self::next_flag`] has returned `None`.
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
        // An unknown letter that is not ASCII is shown as a character, not as its first byte.
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

    /// The option whose long name `name` is or abbreviates. Messages show `word`.
    fn find_long(&self, name: &[u8], word: &[u8]) -> Result<(&'static str, &'static Flag), Stop> {
        let of_qemu = self.command.qemu_longs.iter().copied().filter_map(|long| {
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
        let all: Vec<_> = of_qemu.clone().chain(ours.clone()).collect();
        if let Some(exact) = all.iter().find(|(long, _)| long.as_bytes() == name) {
            return Ok(*exact);
        }
        let abbreviated: Vec<_> = of_qemu
            .filter(|(long, _)| long.as_bytes().starts_with(name))
            .collect();
        let abbreviated = match abbreviated.is_empty() {
            false => abbreviated,
            true => ours
                .filter(|(long, _)| long.as_bytes().starts_with(name))
                .collect(),
        };
        let shown = name::from_bytes(word);
        let Some((_, first)) = abbreviated.first() else {
            return Err(Stop::unreadable(format!("unrecognized option '--{shown}'")));
        };
        if abbreviated.iter().all(|(_, flag)| flag.name() == first.name()) {
            return Ok(abbreviated[0]);
        }
        let possible: Vec<_> = abbreviated
            .iter()
            .map(|(long, _)| format!("'--{long}'"))
            .collect();
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
        qemu_longs: &[
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
    fn a_word_may_have_several_letters_and_a_value() {
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
    fn our_own_names_never_make_those_of_qemu_img_ambiguous() {
        assert_eq!(
            flags(&["--target-f", "x", "--compress"]),
            [("target-format", "x".into()), ("compress", "".into())]
        );
        assert_eq!(flags(&["--p"]), [("progress", "".into())]);
    }

    #[test]
    fn options_and_operands_may_be_mixed() {
        let quiet = [("quiet", String::new())];
        let (flags, operands) = read(&["a", "-q", "-", "--", "-p"]).unwrap();
        assert_eq!(flags, quiet);
        assert_eq!(operands, ["a", "-", "-p"]);
        let (flags, operands) = read_with(&["-q", "a", "-q"], true).unwrap();
        assert_eq!(flags, quiet);
        assert_eq!(operands, ["a", "-q"]);
    }

    #[test]
    fn a_negative_number_is_an_operand_only_at_the_position_of_one() {
        assert_eq!(read(&["a", "-5M", "-q"]).unwrap().1, ["a", "-5M"]);
        assert_eq!(wrong(&["-5", "a"]), "invalid option -- '5'");
        assert_eq!(wrong(&["a", "-5", "-5"]), "invalid option -- '5'");
    }

    #[test]
    fn wrong_options_have_the_messages_of_getopt() {
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
