//! The command line.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::units::{KIB, parse_size};
use crate::workload::{WORKLOADS, Workload};

pub(crate) const HELP: &str = "\
Usage: compare-bench [OPTIONS]
Runs two builds of qemu-img in turn on the same inputs and compares time, memory and output size.

  --ours PATH         the program under test (default: target/release/qemu-img)
  --stock PATH        the program it is compared with (default: qemu-img)
  --runs N            measured runs of each side per workload (default: 5)
  --only WORKLOAD...  only these; a name stands for all that begin with it
  --size SIZE         size of the input image (default: 1G, at least 32M)
  --work DIR          where inputs are kept and outputs written (default: target/bench)
  --no-limits         leave out the measurement of the machine's own limits
  --markdown          print the table as Markdown
  --help              print this
";

#[derive(Debug)]
pub(crate) enum Invocation {
    Help,
    Compare(Options),
}

#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) ours: PathBuf,
    pub(crate) stock: PathBuf,
    pub(crate) runs: u32,
    /// Prefixes of names of workloads; empty for all.
    pub(crate) only: Vec<String>,
    pub(crate) size: u64,
    pub(crate) work: PathBuf,
    pub(crate) limits: bool,
    pub(crate) markdown: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ours: "target/release/qemu-img".into(),
            stock: "qemu-img".into(),
            runs: 5,
            only: Vec::new(),
            size: KIB * KIB * KIB,
            work: "target/bench".into(),
            limits: true,
            markdown: false,
        }
    }
}

impl Options {
    /// The selected workloads in the order of the table.
    pub(crate) fn selected(&self) -> impl Iterator<Item = &'static Workload> {
        WORKLOADS.iter().filter(|workload| {
            self.only.is_empty()
                || self
                    .only
                    .iter()
                    .any(|name| workload.name.starts_with(name.as_str()))
        })
    }
}

/// Parses the words after the program's name.
pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Invocation> {
    let mut options = Options::default();
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .ok_or_else(|| Error::new(format!("option '{word}' requires an argument")))
        };
        match word.as_str() {
            "--ours" => options.ours = value()?.into(),
            "--stock" => options.stock = value()?.into(),
            "--work" => options.work = value()?.into(),
            "--runs" => options.runs = runs(&value()?)?,
            "--size" => options.size = size(&value()?)?,
            "--markdown" => options.markdown = true,
            "--no-limits" => options.limits = false,
            "--only" => {
                options.only.push(name(value()?)?);
                while let Some(more) = words.next_if(|word| !word.starts_with('-')) {
                    options.only.push(name(more)?);
                }
            }
            "--help" | "-h" => return Ok(Invocation::Help),
            _ => return Err(Error::new(format!("unknown argument '{word}' (see --help)"))),
        }
    }
    Ok(Invocation::Compare(options))
}

fn runs(text: &str) -> Result<u32> {
    text.parse()
        .ok()
        .filter(|&runs| runs > 0)
        .ok_or_else(|| Error::new(format!("invalid number of runs '{text}'")))
}

/// The size of the inputs in whole MiB, which are part of the name of their directory.
fn size(text: &str) -> Result<u64> {
    const SMALLEST: u64 = 32 * KIB * KIB;
    const LARGEST: u64 = KIB * KIB * KIB * KIB;
    parse_size(text)
        .filter(|size| (SMALLEST..=LARGEST).contains(size) && size.is_multiple_of(KIB * KIB))
        .ok_or_else(|| Error::new(format!("invalid size '{text}': whole MiB from 32M to 1T")))
}

fn name(text: String) -> Result<String> {
    if WORKLOADS.iter().any(|workload| workload.name.starts_with(&text)) {
        return Ok(text);
    }
    Err(Error::new(format!("no workload is called '{text}' (see --help)")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options> {
        match parse(line.split_whitespace().map(str::to_owned))? {
            Invocation::Compare(options) => Ok(options),
            Invocation::Help => Err(Error::new("help")),
        }
    }

    #[test]
    fn an_empty_command_line_is_the_default() {
        assert_eq!(parsed("").unwrap(), Options::default());
    }

    #[test]
    fn only_takes_names_up_to_the_next_option() {
        let options = parsed("--only create raw-zlib --runs 3").unwrap();
        assert_eq!(options.only, ["create", "raw-zlib"]);
        assert_eq!(options.runs, 3);
        let names: Vec<_> = options.selected().map(|workload| workload.name).collect();
        assert_eq!(
            names,
            [
                "raw-zlib",
                "raw-zlib-1",
                "create-small",
                "create-1T",
                "create-metadata"
            ]
        );
    }

    #[test]
    fn invalid_options_are_refused() {
        for line in [
            "--runs 0",
            "--runs",
            "--size 1M",
            "--size 2T",
            "--only nothing",
            "--fast",
            "extra",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
