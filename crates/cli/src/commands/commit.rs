//! `commit`: writes the changes of an image to its backing file.

use std::sync::Arc;

use diskimage::{CacheMode, Commit, Device, ErrorKind, Objects, depth_of, errno};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{
    Command, Flag, LARGEST, Operand, Parser, Policy, Source, Stop, only_image, size, target_cache, text,
};

/// The table of `commit`.
pub static COMMAND: Command = Command {
    name: "commit",
    summary: "Commit image to its backing file",
    usage: "[-f FMT | --image-opts] [-t CACHE_MODE] [-b BASE_IMG] [-d]
        [--untrusted] [--deny-references]
        [-r RATE] [--object OBJDEF] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::PROGRESS,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify FILENAME image format explicitly"],
        ),
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('t'),
            &["cache"],
            "CACHE_MODE",
            &["image cache mode (writeback)"],
        ),
        Flag::switch(Some('d'), &["drop"], &["skip emptying FILENAME on completion"]),
        Flag::option(
            Some('b'),
            &["base"],
            "BASE_IMG",
            &[
                "image in the backing chain to which to commit changes",
                "instead of the previous one (implies --drop)",
            ],
        ),
        Flag::option(Some('r'), &["rate"], "RATE", &["I/O rate limit"]),
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["name of the image file to operate on"],
    }],
    qemu_longs: &[
        "help",
        "quiet",
        "object",
        "format",
        "image-opts",
        "cache",
        "drop",
        "base",
        "progress",
        "rate",
    ],
    negative_operand: None,
};

/// The arguments of `commit`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The image of its chain to commit to; its backing image if not given.
    pub base: Option<String>,
    /// Do not empty the image.
    pub keep: bool,
    /// The cache mode of the images.
    pub cache: CacheMode,
    /// The limit of bytes per second; 0 is no limit.
    pub rate: u64,
    /// Print only errors.
    pub quiet: bool,
    /// Show progress.
    pub progress: bool,
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
        let (mut base, mut keep, mut rate) = (None, false, 0);
        let (mut quiet, mut progress) = (false, false);
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "progress" => progress = true,
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "cache" => cache = Some(value),
                "drop" => keep = true,
                "base" => {
                    base = Some(text(value));
                    // An emptied image would read as the images between it and the base, which have not changed.
                    keep = true;
                }
                "rate" => rate = size("rate limit", &value, 0, LARGEST)?,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let image = only_image(words)?;
        let cache = target_cache(cache.as_deref(), CacheMode::WRITEBACK)?;
        Ok(Self {
            image: Source::new(image, format, image_opts)?,
            base,
            keep,
            cache,
            rate,
            quiet,
            progress: progress && !quiet,
            objects: objects.into(),
            policy,
        })
    }
}

/// Parses the command line of `commit` and runs the command.
///
/// # Errors
/// The command line is wrong, an image cannot be opened, or reading or writing fails.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let confinement = args
        .policy
        .confine(&args.objects, |reach| reach.writes(&args.image))?;
    let options = || {
        args.policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .cache(args.cache)
    };
    let first = match &args.base {
        Some(_) => Some(open_source(&args.image, options().write(true), console)?),
        None => None,
    };
    let started = || {
        let progress = crate::progress::Progress::new(args.progress, console);
        progress.begin();
        progress
    };
    let mut progress = None;
    let depth = match args.base.as_ref().zip(first) {
        None => 1,
        Some((base, image)) => {
            progress = Some(started());
            depth_of(&image, base).ok_or_else(|| {
                let shown = args.image.name.shown();
                Stop::wrong(format!(
                    "Did not find '{}' in the backing chain of '{}'",
                    base, shown
                ))
            })?
        }
    };
    let writing = options().write(true).resize(true).write_below(depth);
    let image = open_source(&args.image, writing, console)?;
    confinement.all_open()?;
    let progress = progress.unwrap_or_else(started);
    let report = |done, total| progress.set(done, total);
    let commit = Commit {
        top: &image,
        depth,
        rate: Some(args.rate).filter(|rate| *rate > 0),
        progress: diskimage::Progress::new(&report),
    };
    commit.run().map_err(|error| {
        // qemu-img does not print the message of a base that cannot grow.
        let unsupported = (error.kind() == ErrorKind::Unsupported).then_some(errno::ENOTSUP);
        match error.errno().or(unsupported) {
            // As in qemu-img, without the offset.
            Some(errno) => error.only_errno(errno).context("Block job failed"),
            None => error,
        }
    })?;
    if !args.keep {
        image.make_empty().map_err(|error| {
            let file = image.layer().file().node().shown_name();
            error.context(format!("Failed to empty {}", file))
        })?;
        image.flush()?;
    }
    progress.complete();
    drop(progress);
    if !args.quiet {
        console.print("Image committed.\n");
    }
    Ok(0)
}
