//! `measure`: tells how large an image would be.

use super::{LARGEST, unavailable};
use crate::objects::Objects;
use crate::out::Console;
use crate::words::{
    Command, CreateOptions, Flag, Operand, OutputFormat, Parser, SnapshotName, Source, Stop, size, text,
};

/// The table of `measure`.
pub static COMMAND: Command = Command {
    name: "measure",
    summary: "Calculate file size required for a new image",
    usage: "[-f FMT|--image-opts] [-o OPTIONS] [-O OUTPUT_FMT]
       [--output OFMT] [--object OBJDEF] [-l SNAPSHOT_PARAM]
       (--size SIZE | FILENAME)",
    flags: &[
        Flag::HELP,
        Flag::option(
            Some('O'),
            &["target-format"],
            "FMT",
            &["desired target/output image format (default raw)"],
        ),
        Flag::option(
            Some('o'),
            &["options"],
            "OPTIONS",
            &["format-specific options of the target image"],
        ),
        Flag::option(
            Some('s'),
            &["size"],
            "SIZE",
            &["measure file size for given image size"],
        ),
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify format of FILENAME explicitly"],
        ),
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('l'),
            &["snapshot"],
            "SNAPSHOT",
            &["use this snapshot in FILENAME as source"],
        ),
        Flag::option(None, &["output"], "human|json", &["output format"]),
        Flag::FORCE_SHARE_ALL,
        Flag::OBJECT,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["measure file size required to convert from FILENAME"],
    }],
    original: &[
        "help",
        "target-format",
        "format",
        "image-opts",
        "options",
        "snapshot",
        "object",
        "output",
        "size",
        "force-share",
    ],
    negative_operand: None,
};

/// What to measure.
#[derive(Debug)]
pub struct Args {
    /// What would be in the new image.
    pub contents: Contents,
    /// Its format.
    pub target_format: String,
    /// The list of its options, for [`diskimage_core::options::Options::parse`].
    pub options: Option<String>,
    /// How to report.
    pub output: OutputFormat,
    /// Take no locks that others could mind.
    pub force_share: bool,
    /// Secrets.
    pub objects: Objects,
}

/// What an image would be made from.
#[derive(Debug)]
pub enum Contents {
    /// An empty disk of this many bytes.
    Empty(u64),
    /// What is in an image.
    Image {
        /// The image.
        image: Source,
        /// The internal snapshot that counts instead of the present state.
        snapshot: Option<SnapshotName>,
    },
}

impl Args {
    /// Reads the words.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let (mut target_format, mut options) = (None, CreateOptions::default());
        let (mut snapshot, mut length) = (None, None);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "target-format" => target_format = Some(text(value)?),
                "options" => options.add(value)?,
                "size" => length = Some(size("image size", &value, 0, LARGEST)?),
                "format" => format = Some(text(value)?),
                "image-opts" => image_opts = true,
                "snapshot" => snapshot = Some(SnapshotName::read(value)?),
                "output" => output = OutputFormat::read(&value)?,
                "force-share" => force_share = true,
                "object" => objects.add(value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let mut operands = words.operands().into_iter();
        let name = operands.next();
        if operands.next().is_some() {
            return Err(Stop::wrong("At most one filename argument is allowed."));
        }
        if name.is_none() && (format.is_some() || image_opts || snapshot.is_some()) {
            return Err(Stop::wrong(
                "--image-opts, -f, and -l require a filename argument.",
            ));
        }
        let contents = match (length, name) {
            (None, None) => return Err(Stop::wrong("Either --size N or one filename must be specified.")),
            (Some(_), Some(_)) => {
                return Err(Stop::wrong("--size N cannot be used together with a filename."));
            }
            (Some(length), None) => Contents::Empty(length),
            (None, Some(name)) => {
                let image = Source::new(name, format, image_opts)?;
                Contents::Image { image, snapshot }
            }
        };
        Ok(Self {
            contents,
            target_format: target_format.unwrap_or_else(|| "raw".to_owned()),
            options: options.list,
            output,
            force_share,
            objects,
        })
    }
}

/// Reads the words of `measure` and does it.
///
/// # Errors
/// What is wrong with the words.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    Args::parse(words)?;
    Err(unavailable(&COMMAND))
}
