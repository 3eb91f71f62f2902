//! `compare`: compares the guest data of two images.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use diskimage::{CacheMode, CompareError, Comparison, Device, Difference, Objects, Verdict};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{Command, Flag, Operand, Parser, Policy, Source, Stop, source_cache, text};

/// The table of `compare`.
pub static COMMAND: Command = Command {
    name: "compare",
    summary: "Check if two images have the same contents",
    usage: "[--image-opts | [-f FMT] [-F FMT]] [-s]
        [--untrusted] [--deny-references]
        [-T CACHE] [-U] [--object OBJDEF] FILENAME1 FILENAME2",
    flags: &[
        Flag::HELP,
        Flag::QUIET,
        Flag::PROGRESS,
        Flag::option(
            Some('f'),
            &["a-format", "left-format"],
            "FMT",
            &["specify FILENAME1 image format explicitly"],
        ),
        Flag::option(
            Some('F'),
            &["b-format", "right-format"],
            "FMT",
            &["specify FILENAME2 image format explicitly"],
        ),
        Flag::switch(
            None,
            &["image-opts"],
            &[
                "indicates that FILENAMEs are complete image specifications",
                "instead of file names (incompatible with --a-format and --b-format)",
            ],
        ),
        Flag::switch(
            Some('s'),
            &["strict"],
            &["strict mode, also check if sizes are equal"],
        ),
        Flag::option(
            Some('T'),
            &["cache"],
            "CACHE_MODE",
            &["images caching mode (writeback)"],
        ),
        Flag::FORCE_SHARE_ALL,
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME1, FILENAME2",
        help: &["image files (or specifications) to compare"],
    }],
    qemu_longs: &[
        "help",
        "quiet",
        "object",
        "cache",
        "image-opts",
        "a-format",
        "left-format",
        "b-format",
        "right-format",
        "force-share",
        "strict",
        "progress",
    ],
    negative_operand: None,
};

/// The arguments of `compare`.
#[derive(Debug)]
pub struct Args {
    /// The first image.
    pub first: Source,
    /// The second image.
    pub second: Source,
    /// The cache mode of the images.
    pub cache: CacheMode,
    /// Report different sizes as a difference, even if the rest of the longer image is zero.
    pub strict: bool,
    /// Print only errors.
    pub quiet: bool,
    /// Show progress.
    pub progress: bool,
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
        let (mut first_format, mut second_format, mut image_opts) = (None, None, false);
        let (mut cache, mut strict, mut force_share) = (None, false, false);
        let (mut quiet, mut progress) = (false, false);
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "progress" => progress = true,
                "a-format" => first_format = Some(text(value)),
                "b-format" => second_format = Some(text(value)),
                "image-opts" => image_opts = true,
                "strict" => strict = true,
                "cache" => cache = Some(value),
                "force-share" => force_share = true,
                "object" => define(&mut objects, value).map_err(as_error)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let Ok([first, second]) = <[_; 2]>::try_from(words.operands()) else {
            return Err(Stop::misused("Expecting two image file names"));
        };
        let cache = source_cache(cache.as_deref()).map_err(as_error)?;
        Ok(Self {
            first: Source::new(first, first_format, image_opts).map_err(as_error)?,
            second: Source::new(second, second_format, image_opts).map_err(as_error)?,
            cache,
            strict,
            quiet,
            progress: progress && !quiet,
            force_share,
            objects: objects.into(),
            policy,
        })
    }
}

/// Sets the exit status of an error: 1 would mean that the images differ. As in qemu-img, unknown options keep 1.
fn as_error(stop: Stop) -> Stop {
    stop.with_status(2)
}

/// Parses the command line of `compare` and runs the command.
///
/// # Errors
/// The command line is wrong, or an image cannot be opened or read.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    args.policy
        .confine(&args.objects, |reach| {
            reach.reads(&args.first).reads(&args.second)
        })
        .map_err(as_error)?;
    let progress = crate::progress::Progress::new(args.progress, console).adding_up();
    let open = |source| {
        let options = args
            .policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .cache(args.cache)
            .force_share(args.force_share);
        open_source(source, options, console).map_err(as_error)
    };
    let (first, second) = (open(&args.first)?, open(&args.second)?);
    progress.begin();
    let common = first.len().min(second.len());
    let is_warned = AtomicBool::new(false);
    let warn = || {
        if !args.quiet && !is_warned.swap(true, Ordering::Relaxed) {
            progress.suspend(|| console.print(SIZES_DIFFER));
        }
    };
    let report = |done, total| {
        // As in qemu-img, the warning precedes the first step in the rest of the longer image.
        if done > common && progress.shows_steps() {
            warn();
        }
        progress.set(done, total);
    };
    let comparison = Comparison {
        first: &first,
        second: &second,
        names: [&args.first.name.shown(), &args.second.name.shown()],
        strict: args.strict,
        progress: diskimage::Progress::new(&report),
        steps: progress.shows_steps(),
    };
    let verdict = comparison.run().map_err(|error| {
        let (failure, status) = match error {
            CompareError::Status(failure) => (failure, 3),
            CompareError::Read(failure) => (failure, 4),
            CompareError::Memory(error) => return Stop::from(error).with_status(2),
        };
        if failure.in_rest {
            warn();
        }
        if status == 4 {
            return Stop::from(failure.error).with_status(status);
        }
        // As in qemu-img, without the reason.
        let mut stop = Stop::wrong(failure.error.to_string()).with_status(status);
        if let Stop::Wrong(wrong) = &mut stop {
            wrong.notice = failure.error.preceding_note().cloned();
        }
        stop
    })?;
    if verdict.sizes_differ {
        warn();
    }
    if !args.quiet {
        progress.suspend(|| console.print(&shown(&verdict)));
    }
    Ok(u8::from(verdict.difference.is_some()))
}

/// Printed before any result about the rest of the longer image.
const SIZES_DIFFER: &str = "Warning: Image size mismatch!\n";

fn shown(verdict: &Verdict) -> String {
    let outcome = match verdict.difference {
        None => "Images are identical.".to_owned(),
        Some(Difference::Content(offset)) => format!("Content mismatch at offset {offset}!"),
        Some(Difference::Status(offset)) => format!("Strict mode: Offset {offset} block status mismatch!"),
        Some(Difference::Size) => "Strict mode: Image size mismatch!".to_owned(),
    };
    format!("{outcome}\n")
}
