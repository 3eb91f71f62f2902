//! Runs `convert`: opens the sources, creates the target, copies the data and the bitmaps.

use std::num::NonZeroU32;
use std::sync::Arc;

use diskimage::options::Options;
use diskimage::{
    CompressionLevel, Conversion, Creation, DEFAULT_SPARSE, Device, FILE_CREATE_OPTIONS, Filling, Format,
    Image, Layer, NewImage, NodeOptions, OpenFiles, ambiguous_snapshot, check_bitmaps, copy_bitmaps, flush,
    format_by_name, format_of_new, is_encrypted, open_snapshot, total_len,
};

use super::super::create::option_help;
use super::{Args, Request};
use crate::confinement::Reach;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{ImageName, Parser, Source, Stop, text};

/// Parses the command line of `convert` and runs the command.
///
/// # Errors
/// The command line is wrong, an image cannot be opened or created, or reading or writing fails.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = match Request::parse(words)? {
        Request::OptionHelp { format, name } => {
            return Err(Stop::Text(option_help(&format, name.as_deref())?));
        }
        Request::Convert(args) => args,
    };
    let confinement = args
        .policy
        .confine(&args.objects, |reach| reach_of(&args, reach))?;
    let progress = crate::progress::Progress::new(args.progress, console);
    progress.begin();
    let (sources, bitmap_source) = open_sources(&args, console)?;
    let target = Target::prepare(&args, &sources)?;
    // Unless it is published, a new image is gone with all its files.
    let new = target.create(&args)?;
    let image = target.open(&args, new.as_ref(), console)?;
    confinement.all_open()?;
    if bitmap_source.is_some() && image.layer().bitmaps().is_none() {
        return Err(Stop::wrong(format!(
            "Format driver '{}' does not support bitmaps",
            image.layer().format()
        )));
    }
    copy(&args, &sources, &target, &image, &progress, console)?;
    if let Some(source) = &bitmap_source {
        copy_all_bitmaps(&**source, &image, console)?;
    }
    drop(image);
    if let Some(new) = new {
        new.publish()?;
    }
    Ok(0)
}

/// The files that the command uses.
fn reach_of(args: &Args, reach: Reach) -> Reach {
    let reach = args.sources.iter().fold(reach, Reach::reads);
    match &args.target.name {
        ImageName::File(name) if !args.no_create => {
            let backing = args.backing.clone().map(text);
            reach.makes(name, backing.as_deref(), args.options.as_deref())
        }
        _ => reach.writes(&args.target),
    }
}

/// The images to copy, and the layer whose bitmaps are copied too. A snapshot has no bitmaps, so this is the image's
/// layer.
type Sources = (Vec<Arc<Image>>, Option<Arc<dyn Layer>>);

fn open_sources(args: &Args, console: &Console) -> Result<Sources, Stop> {
    let options = || {
        args.policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .cache(args.source_cache)
            .force_share(args.force_share)
            .exclusive(!args.force_share)
    };
    let open = |source| open_source(source, options(), console);
    let mut sources: Vec<_> = args.sources.iter().map(open).collect::<Result<_, _>>()?;
    let bitmap_source = match &sources[..] {
        _ if !args.bitmaps => None,
        [image] => Some(Arc::clone(image.layer())),
        _ => {
            return Err(Stop::wrong("Copying bitmaps only possible with single source"));
        }
    };
    if let Some(layer) = &bitmap_source {
        check_bitmaps(&**layer, args.skip_broken_bitmaps)?;
    }
    if let Some(snapshot) = &args.snapshot {
        let [image] = &mut sources[..] else {
            return Err(Stop::wrong("No support for concatenating multiple snapshot"));
        };
        if let Some(warning) = ambiguous_snapshot(image, snapshot).filter(|_| !args.quiet) {
            console.warning(&warning);
        }
        *image = open_snapshot(image, snapshot)?;
    }
    Ok((sources, bitmap_source))
}

/// Copies the bitmaps. Called after the data has been written, which would mark it dirty.
fn copy_all_bitmaps(source: &dyn Layer, target: &Image, console: &Console) -> Result<(), Stop> {
    let skipped = |name: &str| {
        console.warning(&format!("Skipping inconsistent bitmap '{}'", name));
    };
    Ok(copy_bitmaps(source, &**target.layer(), &skipped)?)
}

/// The target of the copy.
struct Target {
    name: String,
    format: Option<String>,
    /// `None` for an existing target.
    creation: Option<Creation>,
    /// The creation options that opening the target needs as well.
    keys: NodeOptions,
    compression_level: Option<CompressionLevel>,
    /// The backing image that the user gives the new image.
    backing: Option<String>,
}

impl Target {
    /// Checks everything that can be checked before a file is created.
    fn prepare(args: &Args, sources: &[Arc<Image>]) -> Result<Self, Stop> {
        let name = args.target.name.shown();
        let format = args.target.format.clone();
        let driver = match format.as_deref() {
            Some(name) if args.no_create => format_by_name(name),
            Some(name) => Some(format_of_new(name)?),
            None => None,
        };
        let options = TargetOptions::read(args, driver)?;
        let needs_backing = args.backing.is_some() && !args.no_create;
        if let Some(driver) = driver.filter(|driver| needs_backing && !driver.properties().has_backing) {
            return Err(Stop::wrong(format!(
                "Backing file not supported for file format '{}'",
                format.as_deref().unwrap_or(driver.name())
            )));
        }
        if sources.len() > 1 && options.is_named {
            return Err(Stop::wrong(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        if options.is_named && !options.has_format && !args.no_create {
            return Err(Stop::wrong(
                "Use of backing file requires explicit backing format",
            ));
        }
        if args.backing.is_some() && args.target_is_zero {
            return Err(Stop::wrong(
                "Cannot use --target-is-zero when the destination image has a backing file",
            ));
        }
        let mut target = Self {
            name,
            format,
            creation: None,
            keys: NodeOptions::new(),
            compression_level: None,
            backing: None,
        };
        let Some(driver) = driver else { return Ok(target) };
        if !args.no_create {
            let name = target.format.as_deref().unwrap_or(driver.name());
            let mut creation = Creation::new(&target.name, name)
                .opening(args.policy.opening().objects(Arc::clone(&args.objects)))
                .apart_from(sources)
                .exact_size(total_len(sources))
                .filling(match args.compress {
                    true => Filling::Encoded,
                    false => Filling::Plain,
                });
            if let Some(list) = &args.options {
                creation = creation.options(list.as_str());
            }
            if let Some(backing) = &args.backing {
                creation = creation.backing_file(text(backing.clone()));
            }
            // The backing image is opened with the target.
            creation = creation.trust_backing(true);
            if let Some(format) = &args.backing_format {
                creation = creation.backing_format(format);
            }
            target.creation = Some(creation);
            target.keys = options.keys;
            target.compression_level = options.compression_level;
            target.backing = options.backing;
        }
        if args.compress && !driver.properties().has_compression {
            return Err(Stop::wrong("Compression not supported for this file format"));
        }
        Ok(target)
    }

    /// Writes the new image, without data yet; `None` if the target exists already.
    fn create(&self, args: &Args) -> Result<Option<NewImage>, Stop> {
        let Some(creation) = &self.creation else {
            return Ok(None);
        };
        let format = self.format.as_deref().unwrap_or_default();
        let failed = |error: diskimage::Error| {
            Stop::from(error.context(format!("{}: error while converting {format}", self.name)))
        };
        let prepared = creation.clone().cache(args.target_cache).prepare()?;
        let is_encrypted =
            prepared.option("encrypt.format").is_some() || prepared.flag("encryption") == Some(true);
        if args.compress && is_encrypted {
            return Err(Stop::wrong(
                "Compression and encryption not supported at the same time",
            ));
        }
        if args.compress && prepared.option("preallocation").is_some_and(|mode| mode != "off") {
            return Err(Stop::wrong(
                "Compression and preallocation not supported at the same time",
            ));
        }
        prepared.write().map(Some).map_err(failed)
    }

    fn open(&self, args: &Args, new: Option<&NewImage>, console: &Console) -> Result<Arc<Image>, Stop> {
        let source = Source {
            name: args.target.name.clone(),
            format: self.format.clone(),
        };
        let options = args
            .policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .write(true)
            .resize(!args.no_create)
            .node_options(self.keys.clone())
            .own_backing(self.backing.clone())
            .new_files(new.map_or_else(OpenFiles::default, NewImage::files))
            .cache(match new {
                Some(_) => args.target_cache,
                None => args.target_cache.for_existing(),
            });
        open_source(&source, options, console)
    }
}

/// The creation options of the target that are needed before it is created.
struct TargetOptions {
    /// Whether a backing file is given.
    is_named: bool,
    /// Whether the format of the backing file is given.
    has_format: bool,
    /// See [`Target::keys`].
    keys: NodeOptions,
    compression_level: Option<CompressionLevel>,
    /// See [`Target::backing`].
    backing: Option<String>,
}

impl TargetOptions {
    fn read(args: &Args, driver: Option<&dyn Format>) -> Result<Self, Stop> {
        let tables = driver.map_or(&[][..], |driver| driver.create_options());
        let mut options = Options::merged(&[tables, FILE_CREATE_OPTIONS]);
        options.parse(args.options.as_deref().unwrap_or_default())?;
        let backing = match &args.backing {
            Some(backing) => Some(text(backing.clone())),
            None => options.text("backing_file").map(str::to_owned),
        };
        Ok(Self {
            is_named: args.backing.is_some() || options.is_given("backing_file"),
            backing,
            has_format: args.backing_format.is_some() || options.is_given("backing_fmt"),
            keys: keys(&options),
            compression_level: CompressionLevel::from_options(&options)?,
        })
    }
}

/// The options that opening an encrypted image needs; they are among those for creating it.
fn keys(options: &Options) -> NodeOptions {
    let mut keys = NodeOptions::new();
    for name in ["key-secret", "encrypt.format", "encrypt.key-secret"] {
        if let Some(value) = options.text(name) {
            keys.set(name, value.to_owned());
        }
    }
    keys
}

fn copy(
    args: &Args,
    sources: &[Arc<Image>],
    target: &Target,
    image: &Image,
    progress: &crate::progress::Progress<'_>,
    console: &Console,
) -> Result<(), Stop> {
    let report = |done, total| progress.set(done, total);
    let on_lost = |error: &diskimage::Error| {
        if let Some(notice) = error.preceding_note() {
            console.note(notice);
        }
        if !args.quiet {
            console.warning(&error.chain());
        }
    };
    let mut conversion = Conversion::new(sources, image);
    conversion.sparse = args.sparse_size.unwrap_or(DEFAULT_SPARSE);
    conversion.compress = args.compress || image.layer().needs_encoding();
    conversion.compression_level = target.compression_level;
    conversion.out_of_order = args.out_of_order;
    conversion.parallel = args
        .parallel
        .and_then(|most| u32::try_from(most).ok())
        .and_then(NonZeroU32::new);
    conversion.rate = Some(args.rate).filter(|rate| *rate > 0);
    conversion.copy_offload = args.copy_range;
    conversion.salvage = args.salvage;
    let target_backing = image.backing().map(|backing| backing.len());
    conversion.backing_len = match (&target.creation, &args.backing) {
        (Some(_), _) => target_backing,
        // As in qemu-img, a target without a backing image takes what is above the source's backing image, too.
        (None, Some(_)) => target_backing.or(Some(total_len(sources))),
        (None, None) => None,
    };
    conversion.target_is_zero = if args.no_create {
        if args.target_is_zero && is_encrypted(image)? {
            return Err(Stop::wrong(
                "--target-is-zero is not possible for an encrypted target: what was never written there does not read as \
                 zeroes",
            ));
        }
        args.target_is_zero
    } else {
        conversion.target_is_zero
    };
    conversion.existing_target = args.no_create;
    conversion.on_lost = Some(&on_lost);
    conversion.progress = diskimage::Progress::new(&report);
    conversion.data_steps = progress.shows_steps();
    conversion.run()?;
    flush(image)?;
    progress.complete();
    Ok(())
}
