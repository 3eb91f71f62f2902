//! `map`: shows the extents of an image.

use std::sync::Arc;

use diskimage::{ByteRange, Error, ExtentKind, Image, MappedExtent, Objects, map};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{
    Command, Flag, LARGEST, Operand, OutputFormat, Parser, Policy, Source, Stop, only_image, size, text,
};

/// The table of `map`.
pub static COMMAND: Command = Command {
    name: "map",
    summary: "Dump image metadata",
    usage: "[-f FMT | --image-opts] [--object OBJDEF] [--output human|json]
        [--untrusted] [--deny-references]
        [--start-offset OFFSET] [--max-length LENGTH] [-U] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::FORMAT,
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('s'),
            &["start-offset"],
            "OFFSET",
            &["start at this offset of the image (default 0)"],
        ),
        Flag::option(
            Some('l'),
            &["max-length"],
            "LENGTH",
            &["stop after this many bytes (default up to the end)"],
        ),
        Flag::OUTPUT,
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
        "format",
        "output",
        "object",
        "image-opts",
        "force-share",
        "start-offset",
        "max-length",
    ],
    negative_operand: None,
};

/// The arguments of `map`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The guest offset of the first byte.
    pub start_offset: u64,
    /// The largest number of bytes; `None` for all up to the end.
    pub max_length: Option<u64>,
    /// The output format.
    pub output: OutputFormat,
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
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let (mut start_offset, mut max_length) = (0, None);
        let mut output = OutputFormat::default();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "start-offset" => start_offset = size("start offset", &value, 0, LARGEST)?,
                "max-length" => max_length = Some(size("max length", &value, 0, LARGEST)?),
                "output" => output = OutputFormat::read(&value)?,
                "force-share" => force_share = true,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let image = Source::new(only_image(words)?, format, image_opts)?;
        Ok(Self {
            image,
            start_offset,
            max_length,
            output,
            force_share,
            objects: objects.into(),
            policy,
        })
    }
}

/// Parses the command line of `map` and runs the command.
///
/// # Errors
/// The command line is wrong, the image cannot be opened, or its tables are corrupt.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    args.policy
        .confine(&args.objects, |reach| reach.reads(&args.image))?;
    let image = open_source(
        &args.image,
        args.policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .force_share(args.force_share),
        console,
    )?;
    let range = ByteRange::at(args.start_offset, args.max_length.unwrap_or(u64::MAX));
    match args.output {
        OutputFormat::Human => human(&image, range, console)?,
        OutputFormat::Json => json(&image, range, console)?,
    }
    Ok(0)
}

/// Prints a line for each run of data.
fn human(image: &Image, range: ByteRange, console: &Console) -> Result<(), Stop> {
    console.line(&format!(
        "{:<16}{:<16}{:<16}File",
        "Offset", "Length", "Mapped to"
    ));
    let hex = |number: u64| {
        if number == 0 {
            "0".to_owned()
        } else {
            format!("{number:#x}")
        }
    };
    map(image, range, |extent| {
        let data = matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed);
        match &extent.host {
            _ if !data => {}
            Some((device, offset)) => console.line(&format!(
                "{:<16}{:<16}{:<16}{}",
                hex(extent.range.start()),
                hex(extent.range.len()),
                hex(*offset),
                device.name()
            )),
            None => {
                return Err(Error::unsupported(
                    "File contains external, encrypted or compressed clusters.",
                ));
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Prints an object for each extent, or one of length zero for an empty range.
fn json(image: &Image, range: ByteRange, console: &Console) -> Result<(), Stop> {
    console.print("[");
    let mut last: Option<String> = None;
    let outcome = map(image, range, |extent| {
        if let Some(before) = last.replace(json_extent(&extent)) {
            console.print(&before);
            console.print(",\n");
        }
        Ok(())
    });
    if let Some(last) = &last {
        console.print(last);
        // As in qemu-img: another extent follows, whose status is the error.
        console.print(if outcome.is_err() { ",\n" } else { "" });
    }
    outcome?;
    if last.is_none() {
        console.print(&format!(
            "{{ \"start\": {}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \
             \"compressed\": false}}",
            range.start()
        ));
    }
    console.print("]\n");
    Ok(())
}

fn json_extent(extent: &MappedExtent) -> String {
    use ExtentKind::{Compressed, Data, FileHole, PreallocatedZero, Unallocated, UnknownHole};
    let offset = extent
        .host
        .as_ref()
        .map_or_else(String::new, |(_, offset)| format!(", \"offset\": {offset}"));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
         \"compressed\": {}{offset}}}",
        extent.range.start(),
        extent.range.len(),
        extent.depth,
        !matches!(extent.kind, UnknownHole | Unallocated),
        extent.kind.is_zero(),
        matches!(extent.kind, Data | Compressed | FileHole | PreallocatedZero),
        extent.kind == Compressed,
    )
}
