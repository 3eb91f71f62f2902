//! `rebase`: changes the backing file of an image.

use std::sync::Arc;

use diskimage::{
    Backing, CacheMode, Image, Objects, OpenOptions, Rebase, ResultExt, check_backing, format_by_name,
    full_backing_name, is_driver, set_backing,
};

use crate::facts::reports_only_length;
use crate::objects::define;
use crate::out::Console;
use crate::source::{open_bare, open_source};
use crate::words::{
    Command, Flag, ImageName, Operand, Parser, Policy, Source, Stop, only_image, source_cache, target_cache,
    text,
};

/// The table of `rebase`.
pub static COMMAND: Command = Command {
    name: "rebase",
    summary: "Change backing file of the image",
    usage: "[-f FMT | --image-opts] [-t CACHE] [-q] [-U] [-p]
        [--untrusted] [--deny-references]
        [-b BACKING_FILENAME [-F BACKING_FMT] [-T BACKING_CACHE]] [-u]
        [--object OBJDEF] [-c] FILENAME
Rebases FILENAME on top of BACKING_FILENAME or no backing file",
    flags: &[
        Flag::HELP,
        Flag::QUIET,
        Flag::switch(Some('p'), &["progress"], &["show progress indicator"]),
        Flag::FILE_FORMAT,
        Flag::IMAGE_OPTS,
        Flag::CACHE,
        Flag::option(
            Some('b'),
            &["backing"],
            "BACKING_FILENAME|\"\"",
            &["rebase onto this file (or no backing file)"],
        ),
        Flag::option(
            Some('F'),
            &["backing-format"],
            "BACKING_FMT",
            &["specify format for BACKING_FILENAME"],
        ),
        Flag::option(
            Some('T'),
            &["backing-cache"],
            "CACHE",
            &["BACKING_FILENAME cache mode (writeback)"],
        ),
        Flag::switch(
            Some('u'),
            &["backing-unsafe"],
            &["do not fail if BACKING_FILENAME can not be read"],
        ),
        Flag::switch(
            Some('c'),
            &["compress"],
            &["compress image (when image supports this)"],
        ),
        Flag::FORCE_SHARE,
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
        "image-opts",
        "force-share",
        "format",
        "cache",
        "compress",
        "backing",
        "backing-format",
        "backing-cache",
        "backing-unsafe",
    ],
    negative_operand: None,
};

/// The arguments of `rebase`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The name of the new backing file; `None` for an image without one.
    pub backing: Option<String>,
    /// The format of the new backing file.
    pub backing_format: Option<String>,
    /// The cache mode of the image.
    pub cache: CacheMode,
    /// The cache mode of the backing images.
    pub backing_cache: CacheMode,
    /// Change the name in the image only (`-u`), even if the guest data changes by that.
    pub only_name: bool,
    /// Write compressed clusters.
    pub compress: bool,
    /// Open the backing images without locks (`-U`).
    pub force_share: bool,
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
        let (mut format, mut image_opts, mut cache, mut backing_cache) = (None, false, None, None);
        let (mut backing, mut backing_format) = (None, None);
        let (mut only_name, mut compress, mut force_share) = (false, false, false);
        let (mut quiet, mut progress) = (false, false);
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "progress" => progress = true,
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "cache" => cache = Some(value),
                "backing" => backing = Some(text(value)),
                "backing-format" => backing_format = Some(text(value)),
                "backing-cache" => backing_cache = Some(value),
                "backing-unsafe" => only_name = true,
                "compress" => compress = true,
                "force-share" => force_share = true,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let image = only_image(words)?;
        if backing.is_none() && !only_name {
            return Err(Stop::misused(
                "Must specify backing file (-b) or use unsafe mode (-u)",
            ));
        }
        Ok(Self {
            cache: target_cache(cache.as_deref(), CacheMode::WRITEBACK)?,
            backing_cache: source_cache(backing_cache.as_deref())?,
            image: Source::new(image, format, image_opts)?,
            backing: backing.filter(|backing| !backing.is_empty()),
            backing_format,
            only_name,
            compress,
            force_share,
            progress: progress && !quiet,
            objects: objects.into(),
            policy,
        })
    }
}

/// Parses the command line of `rebase` and runs the command.
///
/// # Errors
/// The command line is wrong, an image cannot be opened, or reading or writing fails.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let confinement = args.policy.confine(&args.objects, |reach| {
        let reach = reach.writes(&args.image);
        args.backing
            .iter()
            .fold(reach, |reach, backing| reach.reads_below(backing))
    })?;
    let progress = crate::progress::Progress::new(args.progress, console).adding_up();
    progress.begin();
    let options = || args.policy.opening().objects(Arc::clone(&args.objects));
    let image = open_source(
        &args.image,
        options().cache(args.cache).write(true).no_backing(args.only_name),
        console,
    )?;
    // What follows is opened for reading.
    confinement.all_open()?;
    let format = format_by_name(image.layer().format());
    if args.compress && !format.is_some_and(|format| format.properties().has_compression) {
        return Err(no_compression());
    }
    if let Some(format) = args.backing_format.as_deref().filter(|format| !is_driver(format)) {
        return Err(Stop::wrong(format!("Invalid format name: '{format}'")));
    }
    if reports_only_length(image.layer().format()) {
        return Err(Stop::wrong("could not get block driver info"));
    }
    let backing = args.backing.as_ref().map(|name| Backing {
        name: name.as_str().into(),
        format: args.backing_format.clone(),
    });
    if !args.only_name {
        if args.compress && image.layer().encoder(None)?.is_none() {
            return Err(no_compression());
        }
        let new = match &backing {
            Some(backing) => Some(open_new(&args, &image, backing, options(), console)?),
            None => None,
        };
        check_backing(&image, backing.as_ref(), &options())?;
        let report = |done, total| progress.set(done, total);
        let rebase = Rebase {
            image: &image,
            new: new.as_ref(),
            compress: args.compress,
            progress: diskimage::Progress::new(&report),
            steps: progress.shows_steps(),
        };
        rebase.run()?;
    }
    set_backing(&image, backing.as_ref(), &options())?;
    progress.complete();
    Ok(0)
}

fn no_compression() -> Stop {
    Stop::wrong("Compression not supported for this file format")
}

/// Opens the new backing image. A relative name is resolved against the overlay, as later when it is stored in it.
fn open_new(
    args: &Args,
    image: &Image,
    backing: &Backing,
    options: OpenOptions,
    console: &Console,
) -> Result<Arc<Image>, Stop> {
    let source = Source {
        name: ImageName::File(full_backing_name(&image.base_name(), backing.name.text())),
        format: backing.format.clone(),
    };
    let options = options.cache(args.backing_cache).force_share(args.force_share);
    let opened = open_bare(&source, options, console)?;
    Ok(opened.context(|| format!("Could not open new backing file '{}'", backing.name.text()))?)
}
