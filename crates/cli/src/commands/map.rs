//! `map`: shows where the bytes of an image are.

use super::{LARGEST, only_image, unavailable};
use crate::objects::Objects;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, OutputFormat, Parser, Source, Stop, size, text};

/// The table of `map`.
pub static COMMAND: Command = Command {
    name: "map",
    summary: "Dump image metadata",
    usage: "[-f FMT | --image-opts] [--object OBJDEF] [--output human|json]
        [--start-offset OFFSET] [--max-length LENGTH] [-U] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::FORMAT,
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('s'),
            &["start-offset"],
            "OFFSET",
            &["start at this offset of the image (default 0)"],
        ),
        Flag::option(
            Some('l'),
            &["max-length"],
            "LENGTH",
            &["stop after this many bytes (default up to the end)"],
        ),
        Flag::OUTPUT,
        Flag::FORCE_SHARE,
        Flag::OBJECT,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    original: &[
        "help",
        "format",
        "output",
        "object",
        "image-opts",
        "force-share",
        "start-offset",
        "max-length",
    ],
    negative_operand: None,
};

/// What to show.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The first byte.
    pub start_offset: u64,
    /// How many bytes at most; up to the end without.
    pub max_length: Option<u64>,
    /// How.
    pub output: OutputFormat,
    /// Take no locks that others could mind.
    pub force_share: bool,
    /// Secrets.
    pub objects: Objects,
}

impl Args {
    /// Reads the words.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let (mut start_offset, mut max_length) = (0, None);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "format" => format = Some(text(value)?),
                "image-opts" => image_opts = true,
                "start-offset" => start_offset = size("start offset", &value, 0, LARGEST)?,
                "max-length" => max_length = Some(size("max length", &value, 0, LARGEST)?),
                "output" => output = OutputFormat::read(&value)?,
                "force-share" => force_share = true,
                "object" => objects.add(value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let image = Source::new(only_image(words)?, format, image_opts)?;
        Ok(Self {
            image,
            start_offset,
            max_length,
            output,
            force_share,
            objects,
        })
    }
}

/// Reads the words of `map` and does it.
///
/// # Errors
/// What is wrong with the words.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    Args::parse(words)?;
    Err(unavailable(&COMMAND))
}
