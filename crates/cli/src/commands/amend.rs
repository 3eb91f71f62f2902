//! `amend`: changes options of an image.

use std::sync::Arc;

use diskimage::options::{OptionDef, OptionError, Options, amend_help};
use diskimage::{AmendRequest, CacheMode, Format, Objects, format_by_name, is_driver};

use crate::objects::define;
use crate::out::Console;
use crate::progress::Progress;
use crate::source::open_source;
use crate::words::{Command, CreateOptions, Flag, Operand, Parser, Policy, Source, Stop, target_cache, text};

/// The table of `amend`.
pub static COMMAND: Command = Command {
    name: "amend",
    summary: "Update format-specific options of the image",
    usage: "[-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q]
        [--untrusted] [--deny-references]
        [--object OBJDEF] -o OPTIONS FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET,
        Flag::switch(Some('p'), &["progress"], &["show progress"]),
        Flag::FILE_FORMAT,
        Flag::IMAGE_OPTS,
        Flag::CACHE,
        Flag::switch(None, &["force"], &["allow certain unsafe operations"]),
        Flag::option(
            Some('o'),
            &["options"],
            "OPTIONS",
            &["format-specific options to change ('-o help' for list)"],
        ),
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    qemu_longs: &[
        "help",
        "quiet",
        "progress",
        "object",
        "format",
        "cache",
        "options",
        "image-opts",
        "force",
    ],
    negative_operand: None,
};

/// The arguments of `amend`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The options and their new values.
    pub options: String,
    /// Allow unsafe changes.
    pub force: bool,
    /// The cache mode of the image.
    pub cache: CacheMode,
    /// Show progress.
    pub progress: bool,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

/// A parsed command line.
#[derive(Debug)]
pub enum Request {
    /// Change options.
    Amend(Args),
    /// List the options of the image's format.
    HelpFor(Args),
    /// List the options of this format.
    Help(String),
}

impl Request {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts, mut force) = (None, false, false);
        let (mut quiet, mut progress, mut cache) = (false, false, None);
        let mut options = CreateOptions::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "progress" => progress = true,
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "cache" => cache = Some(value),
                "force" => force = true,
                "options" => options.add(value)?,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let Some(list) = options.list else {
            return Err(Stop::misused("Must specify options (-o)"));
        };
        if let Some(format) = format.as_ref().filter(|_| options.wants_help && !image_opts) {
            return Ok(Self::Help(format.clone()));
        }
        let policy = words.policy();
        let mut operands = words.operands().into_iter();
        let (Some(image), None) = (operands.next(), operands.next()) else {
            return Err(Stop::wrong("Expecting one image file name"));
        };
        let args = Args {
            image: Source::new(image, format, image_opts)?,
            options: list,
            force,
            cache: target_cache(cache.as_deref(), CacheMode::WRITEBACK)?,
            progress: progress && !quiet,
            objects: objects.into(),
            policy,
        };
        Ok(if options.wants_help {
            Self::HelpFor(args)
        } else {
            Self::Amend(args)
        })
    }
}

/// Parses the command line of `amend` and runs the command.
///
/// # Errors
/// The command line is wrong, the image cannot be opened, or an option cannot be changed.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let (args, help) = match Request::parse(words)? {
        Request::Help(format) => {
            let found = format_by_name(&format).ok_or_else(|| {
                if is_driver(&format) {
                    not_amended(&format)
                } else {
                    Stop::wrong(format!("Unknown file format '{format}'"))
                }
            })?;
            return Err(Stop::Text(amend_help(&format, amend_table(found)?)));
        }
        Request::HelpFor(args) => (args, true),
        Request::Amend(args) => (args, false),
    };
    let confinement = args
        .policy
        .confine(&args.objects, |reach| reach.writes(&args.image))?;
    let progress = Progress::new(args.progress, console);
    let options = args
        .policy
        .opening()
        .objects(Arc::clone(&args.objects))
        .cache(args.cache)
        .write(true);
    let image = open_source(&args.image, options, console)?;
    confinement.all_open()?;
    let format = format_by_name(image.layer().format());
    let format = format.ok_or_else(|| not_amended(image.layer().format()))?;
    let table = amend_table(format)?;
    if help {
        return Err(Stop::Text(amend_help(format.name(), table)));
    }
    let mut options = Options::new(table);
    options
        .parse(&args.options)
        .map_err(|error| only_when_created(&error, &args.options, format))?;
    progress.set(0, 1);
    progress.restart();
    let report = |done, total| progress.set(done, total);
    let outcome = image.amend(&AmendRequest {
        force: args.force,
        ..AmendRequest::new(&options, &args.objects, &diskimage::Progress::new(&report))
    });
    // As in qemu-img, after a failure too.
    progress.complete();
    outcome?;
    Ok(0)
}

fn amend_table(format: &'static dyn Format) -> Result<&'static [OptionDef], Stop> {
    format
        .properties()
        .amend_options
        .ok_or_else(|| not_amended(format.name()))
}

fn not_amended(format: &str) -> Stop {
    Stop::wrong(format!(
        "Format driver '{format}' does not support option amendment"
    ))
}

/// Adds a line to the error if the options are valid for creating an image: not all of those can be amended.
fn only_when_created(error: &OptionError, list: &str, format: &dyn Format) -> Stop {
    match Options::new(format.create_options()).parse(list) {
        Ok(()) => {
            Stop::wrong(error.message()).with_hints(["This option is only supported for image creation"])
        }
        Err(_) => Stop::from(error.clone()),
    }
}
