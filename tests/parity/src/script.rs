//! Parses the line format of `cases/*.cases` into [`Case`]s. `README.md` documents the format.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::files::{FileOperation, Generator, parse_hex, parse_size};

/// A sequence of commands, and the comparisons after it.
#[derive(Debug)]
pub struct Case {
    /// `<file stem>::<name after "case">`.
    pub name: String,
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The comparisons after both runs.
    pub comparisons: Vec<Comparison>,
    /// The reason why the tool under test does not pass yet.
    pub expect_fail: Option<String>,
    /// The reason why the standard output of the tool under test is not compared.
    pub ignore_stdout: Option<String>,
    /// Files that only the stock tool leaves behind: its commands failed before they were complete.
    pub unfinished: Vec<String>,
}

/// A line that is executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `qemu-img ...`: the tool under test; all its output is compared.
    UnderTest(Vec<String>),
    /// `stock qemu-img ...`, `qemu-io ...`: the installed tool, which has to succeed; its output is ignored.
    Stock(StockTool, Vec<String>),
    /// `observe qemu-img ...`, `observe qemu-io ...`: the installed tool, whose output is compared.
    Observe(StockTool, Vec<String>),
    /// `hold IMAGE ...`: an installed `qemu-io` opens the image and keeps it open.
    Hold {
        /// The image; `release` refers to it by this name.
        image: String,
        /// Whether it is opened without write access.
        read_only: bool,
        /// Further `qemu-io` options.
        options: Vec<String>,
    },
    /// `release IMAGE`: ends a `hold` before the end of the case.
    Release(String),
    /// `serve PROGRAM SOCKET ...`: starts a server that listens on the socket.
    Serve {
        /// The program.
        server: Server,
        /// The name of the socket; `release` refers to the server by it.
        socket: String,
        /// Further arguments of the server.
        args: Vec<String>,
    },
    /// A change of files done by the harness itself.
    File(FileOperation),
}

impl Step {
    /// Whether the step has the same result in both runs, and may be done once before them.
    pub fn is_preparation(&self) -> bool {
        matches!(self, Step::Stock(..) | Step::File(_))
    }

    /// The line as a user would type it.
    pub fn display(&self) -> String {
        match self {
            Step::UnderTest(args) => join_command("qemu-img", args),
            Step::Stock(tool, args) => format!("stock {}", join_command(tool.name(), args)),
            Step::Observe(tool, args) => format!("observe {}", join_command(tool.name(), args)),
            Step::Hold { image, .. } => format!("hold {image}"),
            Step::Release(image) => format!("release {image}"),
            Step::Serve { server, socket, .. } => format!("serve {} {socket}", server.name()),
            Step::File(operation) => format!("{operation:?}"),
        }
    }
}

/// The servers of network block devices a case may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// `qemu-nbd`, which stays when a client goes.
    QemuNbd,
    /// `nbdkit`.
    Nbdkit,
}

impl Server {
    /// The program's name.
    pub fn name(self) -> &'static str {
        match self {
            Server::QemuNbd => "qemu-nbd",
            Server::Nbdkit => "nbdkit",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Server::QemuNbd, Server::Nbdkit]
            .into_iter()
            .find(|server| server.name() == word)
    }
}

/// The installed tools a case may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StockTool {
    /// `qemu-img`.
    Img,
    /// `qemu-io`.
    Io,
}

impl StockTool {
    fn name(self) -> &'static str {
        match self {
            StockTool::Img => "qemu-img",
            StockTool::Io => "qemu-io",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "qemu-img" => Some(StockTool::Img),
            "qemu-io" => Some(StockTool::Io),
            _ => None,
        }
    }
}

/// A comparison of the two directories after the runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// Content and structure of an image, by `compare`, `info`, `map` and `check` of the stock tool.
    Image(ImageName),
    /// Structure only, for images whose content cannot be read.
    Structure(ImageName),
    /// Structure including host offsets and file lengths.
    Layout(ImageName),
    /// The bytes of the file, or its first `length` ones.
    Bytes {
        /// File name.
        name: String,
        /// The number of leading bytes; `None` for all bytes and the length of the file.
        length: Option<u64>,
    },
}

/// `NAME` or `FORMAT:NAME` of an `images` line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// The format given to the stock tool; probed if `None`.
    pub format: Option<String>,
    /// File name.
    pub name: String,
}

impl ImageName {
    fn parse(word: &str) -> Self {
        for format in ["raw", "qcow2"] {
            if let Some(name) = word.strip_prefix(format).and_then(|rest| rest.strip_prefix(':')) {
                return Self {
                    format: Some(format.to_owned()),
                    name: name.to_owned(),
                };
            }
        }
        Self {
            format: None,
            name: word.to_owned(),
        }
    }
}

/// Parses one `.cases` file; `stem` is put before the name of each case.
///
/// # Errors
/// A message that begins with `stem:line:` for the first line that is not understood.
pub fn parse(stem: &str, text: &str) -> Result<Vec<Case>, String> {
    let mut cases: Vec<Case> = Vec::new();
    let mut definitions = Definitions::default();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = |message: String| format!("{stem}:{}: {message}", index + 1);
        let line = definitions.expand(line).map_err(at)?;
        if let Some(definition) = line.strip_prefix("let ") {
            definitions.add(definition, cases.is_empty()).map_err(at)?;
            continue;
        }
        let words = split_words(&line).map_err(at)?;
        if words[0] == "case" {
            let [_, name] = words.as_slice() else {
                return Err(at("a case has one name".to_owned()));
            };
            let name = format!("{stem}::{name}");
            if cases.iter().any(|case| case.name == name) {
                return Err(at(format!("a second case called {name}")));
            }
            definitions.of_case.clear();
            cases.push(Case {
                name,
                steps: Vec::new(),
                comparisons: Vec::new(),
                expect_fail: None,
                ignore_stdout: None,
                unfinished: Vec::new(),
            });
        } else {
            let case = cases
                .last_mut()
                .ok_or_else(|| at("a line before the first case".to_owned()))?;
            parse_line(case, &words).map_err(at)?;
        }
    }
    if let Some(case) = cases
        .iter()
        .find(|case| !case.steps.iter().any(|s| matches!(s, Step::UnderTest(_))))
    {
        return Err(format!("{}: nothing is run by the tool under test", case.name));
    }
    Ok(cases)
}

/// The texts that `let` lines define.
#[derive(Default)]
struct Definitions {
    /// Those before the first case, for the whole file.
    of_file: BTreeMap<String, String>,
    /// Those of the current case.
    of_case: BTreeMap<String, String>,
}

impl Definitions {
    /// Adds `NAME = TEXT`.
    fn add(&mut self, definition: &str, for_file: bool) -> Result<(), String> {
        let (name, text) = definition.split_once('=').ok_or("let NAME = TEXT")?;
        let (name, text) = (name.trim(), text.trim());
        if !is_name(name) || name == HERE {
            return Err(format!("{name:?} cannot be defined"));
        }
        if self.find(name).is_some() {
            return Err(format!("a second definition of {name}"));
        }
        let scope = if for_file {
            &mut self.of_file
        } else {
            &mut self.of_case
        };
        scope.insert(name.to_owned(), text.to_owned());
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&str> {
        let found = self.of_case.get(name).or_else(|| self.of_file.get(name));
        found.map(String::as_str)
    }

    /// Replaces each `{NAME}` by its text. Braces around anything but a name stay, as those of JSON, and so does
    /// `{here}`.
    fn expand(&self, line: &str) -> Result<String, String> {
        let mut expanded = String::with_capacity(line.len());
        let mut rest = line;
        while let Some(open) = rest.find('{') {
            let (before, from_brace) = rest.split_at(open);
            expanded.push_str(before);
            let name = from_brace[1..].split('}').next().unwrap_or_default();
            let end = if is_name(name) && from_brace[1..].len() > name.len() {
                expanded.push_str(match self.find(name) {
                    Some(text) => text,
                    None if name == HERE => "{here}",
                    None => return Err(format!("{name} is not defined")),
                });
                name.len() + 2
            } else {
                expanded.push('{');
                1
            };
            rest = &from_brace[end..];
        }
        expanded.push_str(rest);
        Ok(expanded)
    }
}

/// Whether a `let` line may define `word`. A single letter in braces is text.
fn is_name(word: &str) -> bool {
    word.len() > 1
        && word.starts_with(|c: char| c.is_ascii_lowercase())
        && word
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// The name of the case's directory in the arguments of a server, which is known when the server starts.
const HERE: &str = "here";

impl Case {
    /// The servers that the case starts.
    pub fn servers(&self) -> impl Iterator<Item = Server> {
        self.steps.iter().filter_map(|step| match step {
            Step::Serve { server, .. } => Some(*server),
            _ => None,
        })
    }
}

fn parse_line(case: &mut Case, words: &[String]) -> Result<(), String> {
    let (directive, rest) = words.split_first().ok_or("an empty line")?;
    let reason = || {
        Some(rest.join(" "))
            .filter(|r| !r.is_empty())
            .ok_or("a reason is needed".to_owned())
    };
    match directive.as_str() {
        "qemu-img" => case.steps.push(Step::UnderTest(rest.to_vec())),
        "qemu-io" => case.steps.push(Step::Stock(StockTool::Io, rest.to_vec())),
        "stock" | "observe" => {
            let (tool, args) = rest.split_first().ok_or("which tool?")?;
            let tool = StockTool::parse(tool).ok_or_else(|| format!("no tool called {tool}"))?;
            case.steps.push(match directive.as_str() {
                "stock" => Step::Stock(tool, args.to_vec()),
                _ => Step::Observe(tool, args.to_vec()),
            });
        }
        "hold" => case.steps.push(parse_hold(rest)?),
        "serve" => {
            let [server, socket, args @ ..] = rest else {
                return Err("serve PROGRAM SOCKET [ARGS]".to_owned());
            };
            case.steps.push(Step::Serve {
                server: Server::parse(server).ok_or_else(|| format!("no server called {server}"))?,
                socket: socket.clone(),
                args: args.to_vec(),
            });
        }
        "release" => {
            let [image] = rest else {
                return Err("release IMAGE".to_owned());
            };
            case.steps.push(Step::Release(image.clone()));
        }
        "images" => case
            .comparisons
            .extend(rest.iter().map(|w| Comparison::Image(ImageName::parse(w)))),
        "structure" => case
            .comparisons
            .extend(rest.iter().map(|w| Comparison::Structure(ImageName::parse(w)))),
        "layout" => case
            .comparisons
            .extend(rest.iter().map(|w| Comparison::Layout(ImageName::parse(w)))),
        "same-bytes" => case.comparisons.extend(parse_same_bytes(rest)?),
        "expect-fail" => case.expect_fail = Some(reason()?),
        "unfinished" => case.unfinished.extend_from_slice(rest),
        "ignore-stdout" => case.ignore_stdout = Some(reason()?),
        _ => case
            .steps
            .push(Step::File(parse_file_operation(directive, rest)?)),
    }
    Ok(())
}

fn parse_hold(words: &[String]) -> Result<Step, String> {
    let (image, rest) = words.split_first().ok_or("hold IMAGE [rw|ro] [OPTIONS]")?;
    let (read_only, options) = match rest.split_first() {
        Some((mode, options)) if mode == "ro" => (true, options),
        Some((mode, options)) if mode == "rw" => (false, options),
        _ => (false, rest),
    };
    Ok(Step::Hold {
        image: image.clone(),
        read_only,
        options: options.to_vec(),
    })
}

fn parse_same_bytes(words: &[String]) -> Result<Vec<Comparison>, String> {
    words
        .iter()
        .map(|word| match word.split_once('@') {
            Some((name, length)) => Ok(Comparison::Bytes {
                name: name.to_owned(),
                length: Some(parse_size(length)?),
            }),
            None => Ok(Comparison::Bytes {
                name: word.clone(),
                length: None,
            }),
        })
        .collect()
}

fn parse_file_operation(directive: &str, words: &[String]) -> Result<FileOperation, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match (directive, words.as_slice()) {
        ("file", [name, generator @ ..]) => Ok(FileOperation::Create {
            name: (*name).to_owned(),
            generator: Generator::parse(generator)?,
        }),
        ("poke", [name, offset, hex]) => Ok(FileOperation::Poke {
            name: (*name).to_owned(),
            offset: parse_size(offset)?,
            bytes: parse_hex(hex)?,
        }),
        ("truncate", [name, length]) => Ok(FileOperation::Truncate {
            name: (*name).to_owned(),
            length: parse_size(length)?,
        }),
        ("copy", [from, to]) => Ok(FileOperation::Copy {
            from: (*from).to_owned(),
            to: (*to).to_owned(),
        }),
        ("dir", [name]) => Ok(FileOperation::Directory((*name).to_owned())),
        ("symlink", [target, name]) => Ok(FileOperation::Symlink {
            target: (*target).to_owned(),
            name: (*name).to_owned(),
        }),
        ("remove", [name]) => Ok(FileOperation::Remove((*name).to_owned())),
        _ => Err(format!("not a line of a case: {directive} {}", words.join(" "))),
    }
}

/// Splits a line into words: blanks separate, quotes of either kind protect, nothing is expanded.
fn split_words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match quote {
            Some(q) if q == c => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if c == '\'' || c == '"' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            None => word.get_or_insert_default().push(c),
        }
    }
    if let Some(q) = quote {
        return Err(format!("a {q} without its partner"));
    }
    words.extend(word);
    Ok(words)
}

/// A word as the operating system gets it: `\xNN` is the byte of that number.
pub fn os_word(word: &str) -> OsString {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((before, after)) = rest.split_once("\\x") {
        bytes.extend_from_slice(before.as_bytes());
        let byte = after
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.extend_from_slice(b"\\x");
                rest = after;
            }
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    OsString::from_vec(bytes)
}

fn join_command(program: &str, args: &[String]) -> String {
    let mut line = program.to_owned();
    for arg in args {
        line.push(' ');
        if arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "'\"\\$*?;&|<>()".contains(c)) {
            line.push('\'');
            line.push_str(&arg.replace('\'', "'\\''"));
            line.push('\'');
        } else {
            line.push_str(arg);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_protect_blanks_and_make_empty_words() {
        assert_eq!(
            split_words("a 'b c' '' \"d'e\"f").unwrap(),
            ["a", "b c", "", "d'ef"]
        );
        assert!(split_words("a 'b").is_err());
    }

    #[test]
    fn words_can_have_any_byte() {
        let words = split_words(r"a\xe9.img '\x93\xfA b' \xg \x\x4").unwrap();
        let bytes = words.iter().map(|word| os_word(word).into_vec());
        assert_eq!(
            bytes.collect::<Vec<_>>(),
            [&b"a\xe9.img"[..], b"\x93\xfa b", b"\\xg", b"\\x\\x4"]
        );
    }

    #[test]
    fn directives_become_steps() {
        let text = "case one\n# comment\n file a zero 1M\n qemu-io -c 'write 0 1' a\n hold a ro -U\n \
                    qemu-img info a\n release a\n serve qemu-nbd s -f raw a\n images raw:a b\n same-bytes c@512\n expect-fail not yet\n";
        let cases = parse("x", text).unwrap();
        let [case] = cases.as_slice() else {
            panic!("one case expected")
        };
        assert_eq!(case.name, "x::one");
        assert_eq!(case.steps.len(), 6);
        assert_eq!(case.steps.iter().take_while(|s| s.is_preparation()).count(), 2);
        assert_eq!(
            case.steps[2],
            Step::Hold {
                image: "a".into(),
                read_only: true,
                options: vec!["-U".into()]
            }
        );
        assert_eq!(case.comparisons.len(), 3);
        assert_eq!(
            case.comparisons[2],
            Comparison::Bytes {
                name: "c".into(),
                length: Some(512)
            }
        );
        assert_eq!(case.expect_fail.as_deref(), Some("not yet"));
    }

    fn under_test(text: &str) -> Vec<Vec<String>> {
        let cases = parse("x", text).unwrap();
        let steps = cases.into_iter().flat_map(|case| case.steps);
        steps
            .filter_map(|step| match step {
                Step::UnderTest(args) => Some(args),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn definitions_are_replaced_before_words_are_split() {
        let text = "let image = driver=raw,file.filename=a\nlet both = --image-opts {image}\n\
                    case one\nlet size = 1M\nqemu-img resize {both} {size}\ncase two\nlet size = 2M\n\
                    qemu-img resize '{both}' {size}\n";
        assert_eq!(
            under_test(text),
            [
                vec!["resize", "--image-opts", "driver=raw,file.filename=a", "1M"],
                vec!["resize", "--image-opts driver=raw,file.filename=a", "2M"],
            ]
        );
    }

    #[test]
    fn other_braces_stay() {
        let text = "case one\nqemu-img info 'json:{\"driver\":{}}' {here} {x} {\n";
        assert_eq!(
            under_test(text),
            [["info", "json:{\"driver\":{}}", "{here}", "{x}", "{"]]
        );
    }

    #[test]
    fn names_are_defined_once_and_before_their_use() {
        for (text, line) in [
            ("case a\nqemu-img info {image}\n", 2),
            (
                "case a\nlet name = c\nqemu-img info {name}\ncase d\nqemu-img info {name}\n",
                5,
            ),
            ("let name = c\ncase a\nlet name = d\nqemu-img info\n", 3),
            ("let here = c\n", 1),
            ("let Bc = d\n", 1),
            ("let b = d\n", 1),
            ("let name c\n", 1),
        ] {
            let message = parse("x", text).unwrap_err();
            assert!(message.starts_with(&format!("x:{line}: ")), "{message}");
        }
    }

    #[test]
    fn mistakes_name_their_line() {
        assert!(
            parse("x", "case a\nfrobnicate\n")
                .unwrap_err()
                .starts_with("x:2:")
        );
        assert!(
            parse("x", "case a\nqemu-img info\ncase a\n")
                .unwrap_err()
                .starts_with("x:3:")
        );
        assert!(parse("x", "case a\n").unwrap_err().contains("nothing is run"));
        assert!(parse("x", "qemu-img info\n").unwrap_err().starts_with("x:1:"));
    }
}
