//! Compares the images of two tools by the output of the stock tool.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::process::{self, Outcome, Tools};
use crate::script::{Comparison, ImageName, StockTool, os_word};
use crate::verdict;

/// The differences that one comparison finds between the two directories; empty if there are none.
///
/// # Errors
/// A tool cannot be run, or the stock tool has not created the image.
pub fn compare(
    comparison: &Comparison,
    tools: &Tools,
    expected: &Path,
    actual: &Path,
) -> Result<String, String> {
    let sides = Sides {
        tools,
        expected,
        actual,
    };
    match comparison {
        Comparison::Image(image) => Ok(sides.content(image)? + &sides.structure(image, Strictness::Guest)?),
        Comparison::Structure(image) => sides.structure(image, Strictness::Guest),
        Comparison::Layout(image) => sides.structure(image, Strictness::Host),
        Comparison::Bytes { name, length } => sides.bytes(name, *length),
    }
}

/// Compares the names of all files in two directories and their subdirectories. Those of `unfinished` must be in the first
/// one only.
///
/// # Errors
/// A directory cannot be read.
pub fn file_names(expected: &Path, actual: &Path, unfinished: &[String]) -> Result<String, String> {
    let list = |root: &Path| {
        let mut names = Vec::new();
        collect_names(root, "", &mut names).map_err(|error| error.to_string())?;
        names.sort();
        Ok::<_, String>(names)
    };
    let mut names = list(expected)?;
    for name in unfinished {
        let at = names.iter().position(|there| there == name);
        names.remove(at.ok_or_else(|| format!("the stock tool leaves no file called {name} behind"))?);
    }
    Ok(verdict::lines(
        "files left behind",
        &names.join("\n"),
        &list(actual)?.join("\n"),
    ))
}

/// The part of an image's structure that has to be equal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strictness {
    /// The allocation status of guest offsets; host offsets may differ.
    Guest,
    /// Host offsets and the length of the file as well.
    Host,
}

struct Sides<'a> {
    tools: &'a Tools,
    expected: &'a Path,
    actual: &'a Path,
}

impl Sides<'_> {
    fn content(&self, image: &ImageName) -> Result<String, String> {
        let path = |side: &Path| format!("{}/{}", side.display(), image.name);
        let mut args = vec!["compare".to_owned(), "-U".to_owned(), "-s".to_owned()];
        if let Some(format) = &image.format {
            args.extend(["-f", format, "-F", format].map(str::to_owned));
        }
        args.extend([path(self.expected), path(self.actual)]);
        let outcome = process::run(&self.tools.stock_img, StockTool::Img, &args, self.expected)?;
        if outcome.is_success() {
            return Ok(String::new());
        }
        let said = [outcome.stdout, outcome.stderr].concat();
        Ok(format!(
            "$ qemu-img compare -s expected/{0} actual/{0}\n    {1}\n",
            image.name,
            String::from_utf8_lossy(&said).trim_end()
        ))
    }

    fn structure(&self, image: &ImageName, strictness: Strictness) -> Result<String, String> {
        if !self.expected.join(os_word(&image.name)).exists() {
            return Err(format!("the stock tool made no {}", image.name));
        }
        let mut text = String::new();
        for command in ["info", "map", "check"] {
            let mut args = vec![command.to_owned(), "-U".to_owned(), "--output=json".to_owned()];
            if let Some(format) = &image.format {
                args.extend(["-f".to_owned(), format.clone()]);
            }
            args.push(image.name.clone());
            let side = |directory: &Path| {
                let outcome = process::run(&self.tools.stock_img, StockTool::Img, &args, directory)?;
                Ok::<_, String>(describe(command, strictness, &outcome))
            };
            let title = format!("stock qemu-img {}", args.join(" "));
            text += &verdict::lines(&title, &side(self.expected)?, &side(self.actual)?);
        }
        Ok(text)
    }

    fn bytes(&self, name: &str, length: Option<u64>) -> Result<String, String> {
        let read = |side: &Path| -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            File::open(side.join(os_word(name)))?
                .take(length.unwrap_or(LARGEST_FILE))
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let expected = read(self.expected).map_err(|error| format!("{name}: {error}"))?;
        let actual = match read(self.actual) {
            Ok(actual) => actual,
            Err(error) => return Ok(format!("  {name}: {error}\n")),
        };
        if let Some(at) = expected.iter().zip(&actual).position(|(a, b)| a != b) {
            let around = |bytes: &[u8]| bytes[at..bytes.len().min(at + 16)].escape_ascii().to_string();
            return Ok(format!(
                "  {name}: first difference at byte {at}:\n  - {}\n  + {}\n",
                around(&expected),
                around(&actual)
            ));
        }
        if expected.len() != actual.len() {
            return Ok(format!(
                "  {name}:\n  - {} bytes\n  + {} bytes\n",
                expected.len(),
                actual.len()
            ));
        }
        Ok(String::new())
    }
}

/// The output of a tool about an image, without members that may differ between two equivalent images.
fn describe(command: &str, strictness: Strictness, outcome: &Outcome) -> String {
    let stdout = String::from_utf8_lossy(&outcome.stdout);
    let stdout = match (command, strictness) {
        ("map", Strictness::Guest) => merged_map(&stdout),
        ("info", Strictness::Guest) => without_protocol_node(&without_members(&stdout, TIMES_AND_BLOCKS)),
        ("info", Strictness::Host) => without_members(&stdout, TIMES_AND_BLOCKS),
        ("check", Strictness::Guest) => without_members(&stdout, PLACEMENT),
        _ => stdout.into_owned(),
    };
    format!(
        "{}\n{stdout}{}",
        outcome.ending,
        String::from_utf8_lossy(&outcome.stderr)
    )
}

/// Drops the lines of the given members; the stock tool prints one member a line.
fn without_members(json: &str, members: &[&str]) -> String {
    let is_dropped = |line: &str| {
        let member = line
            .trim_start()
            .strip_prefix('"')
            .and_then(|rest| rest.split_once('"'));
        member.is_some_and(|(name, _)| members.contains(&name))
    };
    let kept: Vec<&str> = json.lines().filter(|line| !is_dropped(line)).collect();
    let mut text = String::new();
    for (at, line) in kept.iter().enumerate() {
        let is_last = kept
            .get(at + 1)
            .is_some_and(|next| next.trim_start().starts_with(['}', ']']));
        // The last member that is kept loses its comma: otherwise it would show that a member after it was dropped.
        text += if is_last { line.trim_end_matches(',') } else { line };
        text.push('\n');
    }
    text
}

/// Drops the virtual size of protocol nodes: it is the length of the file.
fn without_protocol_node(json: &str) -> String {
    let lines: Vec<&str> = json.lines().collect();
    let mut kept = String::new();
    for (at, line) in lines.iter().enumerate() {
        // Nodes below the first level are indented deeper than the image's own members (4 columns).
        let nested = line.len() - line.trim_start().len() > 4;
        if !(nested && line.trim_start().starts_with("\"virtual-size\"") && is_file_node(&lines[at..])) {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

/// Whether the node whose members `lines` begin with has the format `file`.
fn is_file_node(lines: &[&str]) -> bool {
    lines
        .iter()
        .take_while(|line| !line.trim_start().starts_with('}'))
        .any(|line| line.trim_start().starts_with("\"format\": \"file\""))
}

/// The lines of `map --output=json` without host offsets, with neighbours of the same status joined: the stock tool
/// splits a run where its clusters are not contiguous in the file.
fn merged_map(json: &str) -> String {
    let mut runs: Vec<(u64, u64, String)> = Vec::new();
    for line in json.lines() {
        let Some((start, length, kind)) = parse_map_line(line) else {
            continue;
        };
        match runs.last_mut() {
            Some((first, sum, last)) if *last == kind && *first + *sum == start => *sum += length,
            _ => runs.push((start, length, kind)),
        }
    }
    runs.iter().fold(String::new(), |text, (start, length, kind)| {
        text + &format!("{start}+{length}: {kind}\n")
    })
}

fn parse_map_line(line: &str) -> Option<(u64, u64, String)> {
    let body = line
        .trim_start_matches('[')
        .trim_end_matches(['}', ',', ']'])
        .trim_start_matches(['{', ' ']);
    let (mut start, mut length, mut kind) = (None, None, Vec::new());
    for member in body.trim_end_matches(['}', ' ']).split(", ") {
        match member.split_once(": ")? {
            ("\"start\"", value) => start = value.parse().ok(),
            ("\"length\"", value) => length = value.parse().ok(),
            ("\"offset\"", _) => {}
            (name, value) => kind.push(format!("{} {value}", name.trim_matches('"'))),
        }
    }
    Some((start?, length?, kind.join(", ")))
}

fn collect_names(directory: &Path, prefix: &str, names: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().as_bytes().escape_ascii());
        if entry.file_type()?.is_dir() {
            collect_names(&entry.path(), &format!("{name}/"), names)?;
        }
        names.push(name);
    }
    Ok(())
}

/// Members of `info` that depend on the time or on the allocation by the file system.
const TIMES_AND_BLOCKS: &[&str] = &["actual-size", "date-sec", "date-nsec"];
/// Members of `check` that depend on host offsets.
const PLACEMENT: &[&str] = &["image-end-offset", "fragmented-clusters"];
/// The largest file that is compared by bytes, which are read into memory.
const LARGEST_FILE: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_runs_are_joined_across_host_offsets() {
        let json = "[{ \"start\": 0, \"length\": 10, \"depth\": 0, \"data\": true, \"offset\": 50},\n\
                    { \"start\": 10, \"length\": 5, \"depth\": 0, \"data\": true, \"offset\": 20},\n\
                    { \"start\": 15, \"length\": 5, \"depth\": 0, \"data\": false}]\n";
        assert_eq!(
            merged_map(json),
            "0+15: depth 0, data true\n15+5: depth 0, data false\n"
        );
    }

    #[test]
    fn members_are_dropped_by_name() {
        assert_eq!(
            without_members("{\n  \"a\": 1,\n  \"ab\": 2\n}", &["a"]),
            "{\n  \"ab\": 2\n}\n"
        );
        assert_eq!(
            without_members("{\n  \"ab\": 2,\n  \"a\": 1\n}", &["a"]),
            "{\n  \"ab\": 2\n}\n"
        );
    }

    #[test]
    fn the_length_of_the_file_is_not_the_size_of_the_image() {
        let json = "{\n    \"children\": [\n            \"info\": {\n                \"virtual-size\": 7,\n                \
                    \"format\": \"file\"\n            }\n    ],\n    \"virtual-size\": 9\n}\n";
        let kept = without_protocol_node(json);
        assert!(!kept.contains("\"virtual-size\": 7"));
        assert!(kept.contains("\"virtual-size\": 9"));
    }
}
