//! `create`: creates an image.

use std::ffi::OsString;
use std::sync::Arc;

use diskimage::errno;
use diskimage::options::{create_help, create_help_with_protocol};
use diskimage::{Creation, Objects, Prepared, file_options, protocol_options};

use crate::objects::define;
use crate::out::Console;
use crate::source::Notes;
use crate::words::{Command, CreateOptions, Flag, LARGEST, Operand, Parser, Policy, Stop, size, text};

/// The table of `create`.
pub static COMMAND: Command = Command {
    name: "create",
    summary: "Create and format new image file",
    usage: "[-f FMT] [-o FMT_OPTS] [-b BACKING_FILENAME [-F BACKING_FMT]]
        [--untrusted] [--deny-references]
        [--object OBJDEF] [-u] FILENAME [SIZE[bkKMGTPE]]",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specifies format of the new image, default is raw"],
        ),
        Flag::option(
            Some('o'),
            &["options"],
            "FMT_OPTS",
            &["format-specific options ('-o help' for list)"],
        ),
        Flag::option(
            Some('b'),
            &["backing"],
            "BACKING_FILENAME",
            &[
                "stack new image on top of BACKING_FILENAME",
                "(for formats which support stacking)",
            ],
        ),
        Flag::option(
            Some('F'),
            &["backing-format"],
            "BACKING_FMT",
            &["specify format of BACKING_FILENAME"],
        ),
        Flag::switch(
            Some('u'),
            &["backing-unsafe"],
            &["do not fail if BACKING_FMT can not be read"],
        ),
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[
        Operand {
            name: "FILENAME",
            help: &["image file to create.  It will be overridden if exists"],
        },
        Operand {
            name: "SIZE",
            help: &[
                "image size with optional suffix (multiplies in 1024)",
                "SIZE is required unless BACKING_IMG is specified,",
                "in which case it will be the same as size of BACKING_IMG",
            ],
        },
    ],
    qemu_longs: &[
        "help",
        "quiet",
        "object",
        "format",
        "backing",
        "backing-format",
        "backing-unsafe",
        "options",
    ],
    negative_operand: None,
};

/// A parsed command line.
#[derive(Debug)]
pub enum Request {
    /// List the options of a format, and those of its file if one is named.
    OptionHelp {
        /// The format.
        format: String,
        /// The file.
        name: Option<OsString>,
    },
    /// Create an image.
    Create(Args),
}

/// The arguments of `create`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub name: OsString,
    /// The size in bytes; if not given, that of the options or of the backing file.
    pub size: Option<u64>,
    /// The format.
    pub format: String,
    /// The list of options, for [`diskimage::options::Options::parse`].
    pub options: Option<String>,
    /// The backing file.
    pub backing: Option<OsString>,
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// The backing file need not exist.
    pub backing_unsafe: bool,
    /// Print only errors.
    pub quiet: bool,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

impl Request {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let mut format = None;
        let mut options = CreateOptions::default();
        let (mut backing, mut backing_format, mut backing_unsafe) = (None, None, false);
        let mut quiet = false;
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "format" => format = Some(text(value)),
                "options" => options.add(value)?,
                "backing" => backing = Some(value),
                "backing-format" => backing_format = Some(text(value)),
                "backing-unsafe" => backing_unsafe = true,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let format = format.unwrap_or_else(|| "raw".to_owned());
        let policy = words.policy();
        let mut operands = words.operands().into_iter();
        let name = operands.next();
        if options.wants_help {
            return Ok(Self::OptionHelp { format, name });
        }
        let name = name.ok_or_else(|| Stop::misused("Expecting image file name"))?;
        let size = match operands.next() {
            Some(value) => Some(size("image size", &value, 0, LARGEST)?),
            None => None,
        };
        if let Some(extra) = operands.next() {
            return Err(Stop::misused(format!("Unexpected argument: {}", text(extra))));
        }
        Ok(Self::Create(Args {
            name,
            size,
            format,
            options: options.list,
            backing,
            backing_format,
            backing_unsafe,
            quiet,
            objects: objects.into(),
            policy,
        }))
    }
}

/// Parses the command line of `create` and runs the command.
///
/// # Errors
/// The command line is wrong, or the image cannot be created.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = match Request::parse(words)? {
        Request::OptionHelp { format, name } => {
            return Err(Stop::Text(option_help(&format, name.as_deref())?));
        }
        Request::Create(args) => args,
    };
    let name = text(args.name);
    let backing = args.backing.map(text);
    args.policy.confine(&args.objects, |reach| {
        reach.makes(&name, backing.as_deref(), args.options.as_deref())
    })?;
    let image = |error: diskimage::Error| Stop::from(error.context(name.clone()));
    let mut creation = Creation::new(&name, &args.format)
        .opening(args.policy.opening().objects(args.objects))
        .trust_backing(args.backing_unsafe);
    if let Some(size) = args.size {
        creation = creation.size(size);
    }
    if let Some(options) = args.options {
        creation = creation.options(options);
    }
    if let Some(backing) = backing {
        creation = creation.backing_file(backing);
    }
    if let Some(format) = args.backing_format {
        creation = creation.backing_format(format);
    }
    let notes = Notes::default();
    let prepared = creation.on_note(notes.receiver()).prepare();
    notes.print(console);
    let prepared = prepared.map_err(image)?;
    if !args.quiet {
        let line = format!("Formatting '{name}', {}", prepared.summary());
        console.line(line.trim_end());
        // As in qemu-img, the line is printed before the creation, which may take long or fail.
        console.flush();
    }
    prepared.create().map_err(|error| match error.errno() {
        Some(errno::EFBIG) => image(too_large(&args.format, &prepared)),
        _ => image(error),
    })?;
    Ok(0)
}

/// The message of qemu-img for every `EFBIG`.
fn too_large(format: &str, prepared: &Prepared) -> diskimage::Error {
    let hint = if prepared.has_option("cluster_size") {
        " (try using a larger cluster size)"
    } else {
        ""
    };
    diskimage::Error::unsupported(format!(
        "The image size is too large for file format '{format}'{hint}"
    ))
}

/// The output of `-o help`: the options of the format, and those of its file if one is named.
///
/// # Errors
/// The format is unknown.
pub(super) fn option_help(format: &str, name: Option<&std::ffi::OsStr>) -> Result<String, Stop> {
    let found = diskimage::format_of_new(format)?;
    // The options of a protocol are those of the file.
    let own = if found.name() == format {
        found.create_options()
    } else {
        protocol_options(format)
    };
    Ok(match name {
        Some(name) => create_help_with_protocol(own, file_options(&text(name.to_owned()))?),
        None => create_help(format, own),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Request, Stop> {
        Request::parse(Parser::new(
            &COMMAND,
            words.iter().map(OsString::from).collect(),
            false,
        ))
    }

    #[test]
    fn the_command_line_becomes_arguments() {
        let Ok(Request::Create(args)) =
            parse(&["-fqcow2", "a", "1.5G", "-b", "b", "-Fraw", "-o", "x=1", "-oy"])
        else {
            panic!("not a request to create");
        };
        assert_eq!(args.format, "qcow2");
        assert_eq!(args.size, Some(1_610_612_736));
        assert_eq!(args.backing, Some("b".into()));
        assert_eq!(args.backing_format.as_deref(), Some("raw"));
        assert_eq!(args.options.as_deref(), Some("x=1,y"));
    }

    #[test]
    fn help_on_options_needs_no_file() {
        let Ok(Request::OptionHelp { format, name: None }) = parse(&["-o", "help"]) else {
            panic!("not a request for help");
        };
        assert_eq!(format, "raw");
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for (words, stop) in [
            (&[][..], Stop::misused("Expecting image file name")),
            (&["x", "1", "2"], Stop::misused("Unexpected argument: 2")),
            (
                &["x", "1Q", "2"],
                Stop::wrong("Invalid image size specified: '1Q'."),
            ),
            (
                &["x", "8E"],
                Stop::wrong("Invalid image size specified. Must be between 0 and 9223372036854775807."),
            ),
            (&["-o", ","], Stop::wrong("Invalid option list: ,")),
        ] {
            assert_eq!(parse(words).err(), Some(stop), "{words:?}");
        }
    }
}
