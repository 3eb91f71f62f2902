//! `check`: finds and repairs corruption.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskimage::{CacheMode, CheckReport, ErrorKind, Image, Note, Objects, Progress, Repair};

use crate::objects::define;
use crate::out::Console;
use crate::report;
use crate::source::open_source;
use crate::words::{
    Command, Flag, Operand, OutputFormat, Parser, Policy, Source, Stop, only_image, source_cache, text,
};

/// The table of `check`.
pub static COMMAND: Command = Command {
    name: "check",
    summary: "Check basic image integrity",
    usage: "[-f FMT | --image-opts] [-T CACHE_MODE] [-r leaks|all] [-U]
        [--untrusted] [--deny-references]
        [--output human|json] [--object OBJDEF] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specifies format of the image explicitly"],
        ),
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('T'),
            &["cache"],
            "CACHE_MODE",
            &["image cache mode (writeback)"],
        ),
        Flag::FORCE_SHARE,
        Flag::option(None, &["output"], "human|json", &["output format"]),
        Flag::option(
            Some('r'),
            &["repair"],
            "leaks|all",
            &[
                "repair particular aspect of the image",
                "(image will be open in read-write mode, incompatible with --force-share)",
            ],
        ),
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["the image file (or image specification) to operate on"],
    }],
    qemu_longs: &[
        "help",
        "quiet",
        "format",
        "cache",
        "repair",
        "output",
        "object",
        "image-opts",
        "force-share",
    ],
    negative_operand: None,
};

/// The arguments of `check`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The cache mode of the image.
    pub cache: CacheMode,
    /// What to repair.
    pub repair: Repair,
    /// The output format.
    pub output: OutputFormat,
    /// Print only errors.
    pub quiet: bool,
    /// Open the image without locks (`-U`).
    pub force_share: bool,
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
        let (mut format, mut image_opts, mut cache) = (None, false, None);
        let (mut repair, mut quiet, mut force_share) = (Repair::No, false, false);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "cache" => cache = Some(value),
                "force-share" => force_share = true,
                "output" => output = OutputFormat::read(&value)?,
                "repair" => repair = read_repair(&text(value))?,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let image = only_image(words)?;
        let cache = source_cache(cache.as_deref())?;
        let image = Source::new(image, format, image_opts)?;
        Ok(Self {
            image,
            cache,
            repair,
            output,
            quiet,
            force_share,
            objects: objects.into(),
            policy,
        })
    }
}

fn read_repair(value: &str) -> Result<Repair, Stop> {
    match value {
        "leaks" => Ok(Repair::Leaks),
        "all" => Ok(Repair::All),
        _ => Err(Stop::misused(format!(
            "--repair (-r) expects 'leaks' or 'all' not '{value}'"
        ))),
    }
}

/// Parses the command line of `check` and runs the command.
///
/// # Errors
/// The command line is wrong, or the image cannot be opened or checked.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let confinement = args.policy.confine(&args.objects, |reach| {
        reach.with(&args.image, args.repair != Repair::No)
    })?;
    let options = args
        .policy
        .opening()
        .objects(Arc::clone(&args.objects))
        .for_check(true)
        .write(args.repair != Repair::No)
        .cache(args.cache)
        .force_share(args.force_share);
    let image = open_source(&args.image, options, console)?;
    confinement.all_open()?;
    let mut report = match check_once(&image, args.repair, console) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            console.error("This image format does not support checks");
            return Ok(NOT_SUPPORTED);
        }
        other => other.map_err(|error| failed(&error))?,
    };
    let fixed = (report.leaks_fixed, report.corruptions_fixed);
    if fixed != (0, 0) {
        if args.output == OutputFormat::Human && !args.quiet {
            console.print(&report::repaired(&report));
        }
        report = check_once(&image, Repair::No, console).map_err(|error| failed(&error))?;
        (report.leaks_fixed, report.corruptions_fixed) = fixed;
    }
    if !args.quiet {
        console.print(&match args.output {
            OutputFormat::Human => report::summary(&report),
            OutputFormat::Json => {
                report::json(&args.image.name.shown(), image.layer().format(), &report).pretty()
            }
        });
    }
    if report.check_errors > 0 {
        console.error("Check failed");
    }
    Ok(report::status(&report))
}

/// Checks the image once, and prints what the check finds to standard error.
fn check_once(image: &Image, repair: Repair, console: &Console) -> diskimage::Result<CheckReport> {
    let findings = AtomicU64::new(0);
    let print = |note: &Note| {
        let is_finding = matches!(note, Note::Line(_) | Note::Error(_));
        if !is_finding || findings.fetch_add(1, Ordering::Relaxed) < MAX_FINDINGS {
            console.note(note);
        }
    };
    let outcome = image.layer().check(repair, &Progress::none().with_notes(&print));
    let more = findings.into_inner().saturating_sub(MAX_FINDINGS);
    if more > 0 {
        console.error_line(&format!("{more} more findings are not printed"));
    }
    outcome
}

/// The most findings of a check that are printed: an image can have billions.
const MAX_FINDINGS: u64 = 1000;

fn failed(error: &diskimage::Error) -> Stop {
    Stop::wrong(format!("Check failed: {}", error.root()))
}

/// The exit status for formats without checks.
const NOT_SUPPORTED: u8 = 63;
