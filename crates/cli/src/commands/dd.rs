//! `dd`: copies blocks of one image to another.

use std::ffi::OsStr;
use std::sync::Arc;

use diskimage::{Blocks, Creation, Device, ErrorKind, Objects, dd, format_of_new, name};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{
    Command, Flag, ImageName, LARGEST, Operand, Parser, Policy, Source, Stop, count, size, text,
};

/// The table of `dd`.
pub static COMMAND: Command = Command {
    name: "dd",
    summary: "Copy input to output with optional format conversion",
    usage: "[-f FMT|--image-opts] [-O OUTPUT_FMT] [-U]
        [--untrusted] [--deny-references]
        [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    flags: &[
        Flag::HELP,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify format for INPUT explicitly"],
        ),
        Flag::switch(
            None,
            &["image-opts"],
            &[
                "indicates that INPUT is a complete image specification",
                "instead of a file name (incompatible with --format)",
            ],
        ),
        Flag::option(
            Some('O'),
            &["output-format"],
            "OUTPUT_FMT",
            &["format of the OUTPUT (default raw)"],
        ),
        Flag::FORCE_SHARE_ALL,
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[
        Operand {
            name: "bs=BLOCK_SIZE[kKMGTP]",
            help: &["size of I/O block (default 512)"],
        },
        Operand {
            name: "count=COUNT",
            help: &["number of blocks to convert (default whole INPUT)"],
        },
        Operand {
            name: "skip=COUNT",
            help: &["number of blocks of INPUT to leave out at its start (default 0)"],
        },
        Operand {
            name: "if=INPUT",
            help: &["input file name (or image specification with --image-opts)"],
        },
        Operand {
            name: "of=OUTPUT",
            help: &["output file name to create"],
        },
    ],
    qemu_longs: &[
        "help",
        "object",
        "format",
        "output-format",
        "image-opts",
        "force-share",
    ],
    negative_operand: None,
};

/// The arguments of `dd`.
#[derive(Debug)]
pub struct Args {
    /// The image to read.
    pub input: Source,
    /// The image to create.
    pub output: String,
    /// The format of the output.
    pub output_format: String,
    /// The part of the input to copy.
    pub blocks: Blocks,
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
        let mut output_format = "raw".to_owned();
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "format" => format = Some(text(value)),
                "output-format" => output_format = text(value),
                "image-opts" => image_opts = true,
                "force-share" => force_share = true,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let mut blocks = Blocks {
            size: 512,
            count: None,
            skip: 0,
        };
        let (mut input, mut output) = (None, None);
        let policy = words.policy();
        for word in words.operands() {
            let word = text(word);
            let Some((name, value)) = word.split_once('=') else {
                return Err(Stop::wrong(format!("unrecognized operand {word}")));
            };
            let number = OsStr::new(value);
            match name {
                "bs" => blocks.size = size("bs", number, 1, LARGEST_BLOCK)?,
                "count" => blocks.count = Some(count("count", number, 0, LARGEST)?),
                "skip" => blocks.skip = count("skip", number, 0, LARGEST)?,
                "if" => input = Some(value.to_owned()),
                "of" => output = Some(value.to_owned()),
                other => return Err(Stop::wrong(format!("unrecognized operand {other}"))),
            }
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err(Stop::wrong("Must specify both input and output files"));
        };
        Ok(Self {
            input: Source::new(name::to_path(&input).into(), format, image_opts)?,
            output,
            output_format,
            blocks,
            force_share,
            objects: objects.into(),
            policy,
        })
    }
}

const LARGEST_BLOCK: u64 = i32::MAX.unsigned_abs() as u64;

/// Parses the command line of `dd` and runs the command.
///
/// # Errors
/// The command line is wrong, an image cannot be opened or created, or reading or writing fails.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let confinement = args.policy.confine(&args.objects, |reach| {
        reach.reads(&args.input).makes(&args.output, None, None)
    })?;
    let options = || args.policy.opening().objects(Arc::clone(&args.objects));
    let source = open_source(&args.input, options().force_share(args.force_share), console)?;
    format_of_new(&args.output_format).map_err(|error| match error.kind() {
        // As in qemu-img, without the name.
        ErrorKind::NotFound => Stop::wrong("Unknown file format"),
        _ => error.into(),
    })?;
    let part = args.blocks.of(source.len());
    let range = part.unwrap_or((source.len(), 0));
    let new = Creation::new(&args.output, &args.output_format)
        .opening(options())
        .apart_from(std::slice::from_ref(&source))
        .exact_size(range.1)
        .prepare()?
        .write()
        .map_err(|error| {
            let output = &args.output;
            error.context(format!("{output}: error while creating output image"))
        })?;
    let target = Source {
        name: ImageName::File(args.output),
        format: Some(args.output_format),
    };
    let opening = options().write(true).resize(true).new_files(new.files());
    let target = open_source(&target, opening, console)?;
    confinement.all_open()?;
    if part.is_none() {
        let message = format!("{}: cannot skip to specified offset", args.input.name.shown());
        console.error(&message);
    }
    let outcome = dd(&source, range, args.blocks.size, &target);
    drop(target);
    // What was read before an error is kept.
    new.publish()?;
    outcome?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Args, Stop> {
        let words = words.split_whitespace().map(Into::into).collect();
        Args::parse(Parser::new(&COMMAND, words, false))
    }

    #[test]
    fn operands_are_names_and_values() {
        let args = parse("bs=1M count=3 -O qcow2 skip=0x10 if=a=b of=c").expect("right");
        assert_eq!(
            args.blocks,
            Blocks {
                size: 1 << 20,
                count: Some(3),
                skip: 16
            }
        );
        assert_eq!(args.input.name.shown(), "a=b");
        assert_eq!(args.output, "c");
    }

    #[test]
    fn wrong_operands_are_refused() {
        for (words, message) in [
            ("if=a", "Must specify both input and output files"),
            ("isize=1 if=a of=b", "unrecognized operand isize"),
            ("bs if=a of=b", "unrecognized operand bs"),
            ("bs= if=a of=b", "Invalid bs specified: ''."),
            (
                "bs=2G if=a of=b",
                "Invalid bs specified. Must be between 1 and 2147483647.",
            ),
        ] {
            assert_eq!(parse(words).map(|_| ()), Err(Stop::wrong(message)), "{words}");
        }
    }
}
