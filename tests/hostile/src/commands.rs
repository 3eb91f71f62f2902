//! The commands that every image is given to.

use std::time::Duration;

use crate::files::Files;
use crate::images::{Image, Open};
use crate::process::Allowance;

const MIB: u64 = 1 << 20;

/// A command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    arguments: fn(&Opened) -> Vec<String>,
    /// The most seconds of the processors.
    pub(crate) cpu: u64,
    /// The largest resident set in bytes.
    pub(crate) memory: u64,
    /// Whether its output is limited. That of `map` has a line for each extent.
    pub(crate) short: bool,
}

/// How the words of a command name the image.
struct Opened {
    /// Objects, and the format or `--image-opts`.
    options: Vec<String>,
    name: String,
    /// The same for `compare`, which has two formats.
    twice: Vec<String>,
}

impl Opened {
    fn new(open: Open) -> Self {
        let plain = |flags: &[&str], format: &str| {
            flags
                .iter()
                .flat_map(|flag| [(*flag).to_owned(), format.to_owned()])
                .collect()
        };
        match open {
            Open::Probe => Self {
                options: Vec::new(),
                name: Files::IMAGE.to_owned(),
                twice: Vec::new(),
            },
            Open::Format(format) => Self {
                options: plain(&["-f"], format),
                name: Files::IMAGE.to_owned(),
                twice: plain(&["-f", "-F"], format),
            },
            Open::Options { objects, node } => {
                let mut options = plain(&["--object"], objects);
                if objects.is_empty() {
                    options.clear();
                }
                options.push("--image-opts".to_owned());
                Self {
                    twice: options.clone(),
                    options,
                    name: format!("{node},file.filename={}", Files::IMAGE),
                }
            }
        }
    }

    /// `words` with `{options}` and `{image}` replaced.
    fn words(&self, words: &[&str]) -> Vec<String> {
        let word = |word: &&str| match *word {
            "{options}" => self.options.clone(),
            "{twice}" => self.twice.clone(),
            other => vec![other.replace("{image}", &self.name)],
        };
        words.iter().flat_map(word).collect()
    }
}

/// What all commands but `info` may have resident, besides that of threads.
const MEMORY: u64 = 256 * MIB;
/// What each thread may have.
const THREAD: u64 = 8 * MIB;
/// The most threads that a conversion starts, which `-m 16` asks for.
const THREADS: u64 = 16;

const fn short(name: &'static str, arguments: fn(&Opened) -> Vec<String>) -> Command {
    Command {
        name,
        arguments,
        cpu: 10,
        memory: MEMORY,
        short: true,
    }
}

const fn info(name: &'static str, arguments: fn(&Opened) -> Vec<String>) -> Command {
    Command {
        cpu: 2,
        memory: 64 * MIB,
        ..short(name, arguments)
    }
}

const fn threads(name: &'static str, arguments: fn(&Opened) -> Vec<String>) -> Command {
    Command {
        memory: MEMORY + THREADS * THREAD,
        ..short(name, arguments)
    }
}

pub(crate) const COMMANDS: &[Command] = &[
    info("info", |image| image.words(&["info", "{options}", "{image}"])),
    info("info --output=json", |image| {
        image.words(&["info", "--output=json", "{options}", "{image}"])
    }),
    short("check", |image| image.words(&["check", "{options}", "{image}"])),
    Command {
        short: false,
        ..short("map", |image| image.words(&["map", "{options}", "{image}"]))
    },
    Command {
        short: false,
        ..short("map --output=json", |image| {
            image.words(&["map", "--output=json", "{options}", "{image}"])
        })
    },
    threads("convert to nothing", |image| {
        let nothing = "driver=null-co,size=9223372036854774784";
        image.words(&[
            "convert",
            "-m",
            "16",
            "-n",
            "{options}",
            "--target-image-opts",
            "{image}",
            nothing,
        ])
    }),
    threads("convert -O raw", |image| {
        image.words(&["convert", "-m", "16", "-O", "raw", "{options}", "{image}", OUT])
    }),
    threads("convert -c -O qcow2", |image| {
        image.words(&[
            "convert",
            "-m",
            "16",
            "-c",
            "-O",
            "qcow2",
            "{options}",
            "{image}",
            OUT,
        ])
    }),
    short("measure", |image| {
        image.words(&["measure", "-O", "qcow2", "{options}", "{image}"])
    }),
    short("compare", |image| {
        image.words(&["compare", "{twice}", "{image}", "{image}"])
    }),
    short("dd", |image| {
        image.words(&[
            "dd",
            "{options}",
            "-O",
            "raw",
            "bs=512",
            "count=1",
            "if={image}",
            "of=out",
        ])
    }),
    short("snapshot -l", |image| {
        let open = match image.options.first().map(String::as_str) {
            Some("-f") => {
                let node = format!("driver={},file.filename={}", image.options[1], image.name);
                return vec!["snapshot".into(), "-l".into(), "--image-opts".into(), node];
            }
            _ => &["snapshot", "-l", "{options}", "{image}"],
        };
        image.words(open)
    }),
];

/// What commands write.
pub(crate) const OUT: &str = "out";

impl Command {
    /// The words of the command for an image.
    pub(crate) fn words(&self, image: &Image) -> Vec<String> {
        (self.arguments)(&Opened::new(image.open))
    }

    /// What the kernel keeps it to.
    pub(crate) fn allowance(&self) -> Allowance {
        Allowance {
            address_space: 1 << 30,
            cpu: self.cpu,
            file: 64 * MIB,
            // Long, as other programs may keep the processors busy.
            wall: Duration::from_secs(120),
        }
    }
}
