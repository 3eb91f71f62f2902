//! `measure`: calculates the size of the file of a new image.

use std::sync::Arc;

use diskimage::options::Options;
use diskimage::{
    FILE_CREATE_OPTIONS, Measure, MeasureSource, Objects, SnapshotSelector, format_of_new, open_snapshot,
};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{
    Command, CreateOptions, Flag, LARGEST, Operand, OutputFormat, Parser, Policy, Source, Stop, size,
    snapshot_selector, text,
};
use diskimage::json::Value;

/// The table of `measure`.
pub static COMMAND: Command = Command {
    name: "measure",
    summary: "Calculate file size required for a new image",
    usage: "[-f FMT|--image-opts] [-o OPTIONS] [-O OUTPUT_FMT]
       [--untrusted] [--deny-references]
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
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["measure file size required to convert from FILENAME"],
    }],
    qemu_longs: &[
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

/// The arguments of `measure`.
#[derive(Debug)]
pub struct Args {
    /// The contents of the new image.
    pub contents: Contents,
    /// The format of the new image.
    pub target_format: String,
    /// The list of its options, for [`diskimage::options::Options::parse`].
    pub options: Option<String>,
    /// The output format.
    pub output: OutputFormat,
    /// Open the image without locks (`-U`).
    pub force_share: bool,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

/// The contents of a new image.
#[derive(Debug)]
pub enum Contents {
    /// An empty disk of this many bytes.
    Empty(u64),
    /// The contents of an existing image.
    Image {
        /// The image.
        image: Source,
        /// The internal snapshot to measure instead of the current state.
        snapshot: Option<SnapshotSelector>,
    },
}

impl Args {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let (mut target_format, mut options) = (None, CreateOptions::default());
        let (mut snapshot, mut length) = (None, None);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "target-format" => target_format = Some(text(value)),
                "options" => options.add(value)?,
                "size" => length = Some(size("image size", &value, 0, LARGEST)?),
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "snapshot" => snapshot = Some(snapshot_selector(value)?),
                "output" => output = OutputFormat::read(&value)?,
                "force-share" => force_share = true,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
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
            objects: objects.into(),
            policy,
        })
    }
}

/// Parses the command line of `measure` and runs the command.
///
/// # Errors
/// The command line is wrong, or the image cannot be opened or measured.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    args.policy.confine(&args.objects, |reach| match &args.contents {
        Contents::Empty(_) => reach,
        Contents::Image { image, .. } => reach.reads(image),
    })?;
    let source = match &args.contents {
        Contents::Empty(_) => None,
        Contents::Image { image, snapshot } => {
            let image = open_source(
                image,
                args.policy
                    .opening()
                    .objects(Arc::clone(&args.objects))
                    .force_share(args.force_share),
                console,
            )?;
            Some(match snapshot {
                Some(snapshot) => open_snapshot(&image, snapshot)?,
                None => image,
            })
        }
    };
    let format = format_of_new(&args.target_format)?;
    if format.name() != args.target_format {
        return Err(Stop::wrong(format!(
            "Block driver '{}' does not support size measurement",
            args.target_format
        )));
    }
    let mut options = Options::merged(&[format.create_options(), FILE_CREATE_OPTIONS]);
    if let Some(list) = &args.options {
        options.parse(list).map_err(|error| {
            Stop::from(error).and(format!(
                "Invalid options for file format '{}'",
                args.target_format
            ))
        })?;
    }
    let source = match (&source, &args.contents) {
        (Some(image), _) => MeasureSource::Image(image),
        (None, Contents::Empty(size)) => MeasureSource::Size(*size),
        (None, Contents::Image { .. }) => unreachable!("an image is opened above"),
    };
    let measured = format.measure(&options, source, &args.objects)?;
    console.print(&match args.output {
        OutputFormat::Human => human(&measured),
        OutputFormat::Json => json(&measured).pretty(),
    });
    Ok(0)
}

fn human(measured: &Measure) -> String {
    let bitmaps = measured
        .bitmaps
        .map_or_else(String::new, |bytes| format!("bitmaps size: {bytes}\n"));
    format!(
        "required size: {}\nfully allocated size: {}\n{bitmaps}",
        measured.required, measured.fully_allocated
    )
}

fn json(measured: &Measure) -> Value {
    let bitmaps = measured.bitmaps.map(|bytes| ("bitmaps", bytes.into()));
    let sizes = [
        ("required", measured.required.into()),
        ("fully-allocated", measured.fully_allocated.into()),
    ];
    Value::object(bitmaps.into_iter().chain(sizes))
}
