//! `info`: shows information about an image.

use std::collections::HashSet;
use std::sync::Arc;

use diskimage::{
    BackingIdentity, Image, Objects, OpenOptions, ResultExt, backing_not_found, found_backing_name,
    full_backing_name, share_a_file,
};

use crate::facts::Facts;
use crate::objects::define;
use crate::out::Console;
use crate::report;
use crate::source::{open_below, open_source};
use crate::words::{
    Command, Flag, ImageName, Operand, OutputFormat, Parser, Policy, Source, Stop, only_image, text,
};
use diskimage::json::Value;

/// The table of `info`.
pub static COMMAND: Command = Command {
    name: "info",
    summary: "Display information about image",
    usage: "[-f FMT | --image-opts] [-b] [-U] [--object OBJDEF]
        [--references] [--untrusted] [--deny-references]
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
        Flag::switch(
            None,
            &["references"],
            &["list the files that the image names", "(always with --untrusted)"],
        ),
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    qemu_longs: &[
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

/// The arguments of `info`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// Show all images of its chain.
    pub backing_chain: bool,
    /// Show the files that the image names.
    pub references: bool,
    /// Open the image without locks (`-U`).
    pub force_share: bool,
    /// The output format.
    pub output: OutputFormat,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

impl Args {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts) = (None, false);
        let (mut backing_chain, mut force_share, mut references) = (false, false, false);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "backing-chain" => backing_chain = true,
                "force-share" => force_share = true,
                "references" => references = true,
                "output" => output = OutputFormat::read(&value)?,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let image = Source::new(only_image(words)?, format, image_opts)?;
        Ok(Self {
            image,
            backing_chain,
            references,
            force_share,
            output,
            objects: objects.into(),
            policy,
        })
    }

    fn opening(&self) -> OpenOptions {
        self.policy
            .opening()
            .objects(Arc::clone(&self.objects))
            .no_data(true)
            .no_backing(true)
            .force_share(self.force_share)
    }
}

/// Parses the command line of `info` and runs the command.
///
/// # Errors
/// The command line is wrong, or an image cannot be opened.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    args.policy
        .confine(&args.objects, |reach| reach.reads(&args.image))?;
    let chain = open_each(&args, console)?;
    let facts = |image: &Arc<Image>| {
        let facts = Facts::of(image, &args.opening())?;
        match args.references || args.policy.untrusted {
            true => facts.with_references(image),
            false => Ok(facts),
        }
    };
    let facts: Result<Vec<_>, Stop> = chain.iter().map(facts).collect();
    let facts = facts?;
    // What is printed may take as much memory as the images do.
    drop(chain);
    match args.output {
        OutputFormat::Human => {
            for (index, facts) in facts.iter().enumerate() {
                if index > 0 {
                    console.line("");
                }
                facts.print(&mut |line| console.line(line));
            }
        }
        OutputFormat::Json => {
            let mut values: Vec<Value> = facts.into_iter().map(Facts::json).collect();
            let shown = match (args.backing_chain, values.pop()) {
                (false, Some(only)) => only,
                (_, last) => Value::List(values.into_iter().chain(last).collect()),
            };
            report::print_pieces(console, |out| shown.write_pretty(out));
        }
    }
    Ok(0)
}

/// Opens the image, and with `--backing-chain` its backing images one by one, so that an error names the image that
/// cannot be opened.
fn open_each(args: &Args, console: &Console) -> Result<Vec<Arc<Image>>, Stop> {
    let mut source = args.image.clone();
    let mut chain: Vec<Arc<Image>> = Vec::new();
    let mut seen = HashSet::new();
    loop {
        if !seen.insert(source.name.shown()) {
            return Err(endless(&source));
        }
        let options = args.opening();
        let image = match chain.last() {
            None => open_source(&source, options, console)?,
            Some(overlay) => open_backing(overlay, &source, options, console)?,
        };
        let backing = image.layer().backing().filter(|_| args.backing_chain);
        let is_same = |other: &Arc<Image>| {
            share_a_file(other, &image) && other.layer().format() == image.layer().format()
        };
        if chain.iter().any(is_same) {
            return Err(endless(&source));
        }
        let next = match backing {
            Some(backing) => Some(Source {
                name: ImageName::File(
                    found_backing_name(&image, &args.opening())
                        .unwrap_or_else(|| full_backing_name(&image.base_name(), backing.name.text())),
                ),
                format: backing.format,
            }),
            None => None,
        };
        chain.push(image);
        match next {
            Some(next) => source = next,
            None => return Ok(chain),
        }
    }
}

/// Opens the backing image of `overlay`, called `source`.
fn open_backing(
    overlay: &Image,
    source: &Source,
    options: OpenOptions,
    console: &Console,
) -> Result<Arc<Image>, Stop> {
    let opened = open_below(overlay, source, options, console).and_then(|image| {
        if let BackingIdentity::MayHaveChanged(note) = overlay.layer().check_backing(&**image.layer())? {
            console.note(&note);
        }
        Ok(image)
    });
    let opened = opened.map_err(|error| backing_not_found(&**overlay.layer(), error));
    Ok(opened.context(|| format!("Could not open '{}'", source.name.shown()))?)
}

fn endless(source: &Source) -> Stop {
    Stop::wrong(format!(
        "Backing file '{}' creates an infinite loop.",
        source.name.shown()
    ))
}
