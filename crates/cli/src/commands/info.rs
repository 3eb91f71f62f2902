//! `info`: shows what is known of an image.

use diskimage::{Image, OpenOptions};

use super::only_image;
use crate::facts::Facts;
use crate::json::Value;
use crate::objects::Objects;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{Command, Flag, Operand, OutputFormat, Parser, Source, Stop, text};

/// The table of `info`.
pub static COMMAND: Command = Command {
    name: "info",
    summary: "Display information about image",
    usage: "[-f FMT | --image-opts] [-b] [-U] [--object OBJDEF]
        [--output human|json] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::FORMAT,
        Flag::IMAGE_OPTS,
        Flag::switch(
            Some('b'),
            &["backing-chain"],
            &[
                "display information about backing chain",
                "(in case the image is stacked)",
            ],
        ),
        Flag::FORCE_SHARE,
        Flag::OBJECT,
        Flag::OUTPUT,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    original: &[
        "help",
        "format",
        "output",
        "backing-chain",
        "object",
        "image-opts",
        "force-share",
    ],
    negative_operand: None,
};

/// What to show.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// All images of its chain.
    pub backing_chain: bool,
    /// Take no locks that others could mind.
    pub force_share: bool,
    /// How.
    pub output: OutputFormat,
    /// Secrets.
    pub objects: Objects,
}

impl Args {
    /// Reads the words.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts) = (None, false);
        let (mut backing_chain, mut force_share) = (false, false);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "format" => format = Some(text(value)?),
                "image-opts" => image_opts = true,
                "backing-chain" => backing_chain = true,
                "force-share" => force_share = true,
                "output" => output = OutputFormat::read(&value)?,
                "object" => objects.add(value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let image = Source::new(only_image(words)?, format, image_opts)?;
        Ok(Self {
            image,
            backing_chain,
            force_share,
            output,
            objects,
        })
    }
}

/// Reads the words of `info` and does it.
///
/// # Errors
/// What is wrong with the words, and images that cannot be opened.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let options = OpenOptions::new()
        .no_data(true)
        .no_backing(!args.backing_chain)
        .force_share(args.force_share);
    let top = open_source(&args.image, options, console)?;
    let chain: Vec<&Image> =
        std::iter::successors(Some(&*top), |image| image.backing().map(|below| &**below)).collect();
    match args.output {
        OutputFormat::Human => {
            let texts: Result<Vec<_>, Stop> =
                chain.iter().map(|image| Ok(Facts::of(image)?.text())).collect();
            console.print(&texts?.join("\n"));
        }
        OutputFormat::Json => {
            let values: Result<Vec<_>, Stop> =
                chain.iter().map(|image| Ok(Facts::of(image)?.json())).collect();
            let mut values = values?;
            let shown = match (args.backing_chain, values.pop()) {
                (false, Some(only)) => only,
                (_, last) => Value::List(values.into_iter().chain(last).collect()),
            };
            console.print(&shown.pretty());
        }
    }
    Ok(0)
}
