//! `resize`: changes the size of an image.

use std::ffi::OsStr;
use std::sync::Arc;

use diskimage::options::read_size;

use diskimage::{Device, Objects, Preallocation, Resize, ShrinkPolicy, name};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{Command, Flag, LARGEST, Operand, Parser, Policy, Source, Stop, text};

/// The table of `resize`.
pub static COMMAND: Command = Command {
    name: "resize",
    summary: "Resize the image to the new size",
    usage: "[-f FMT | --image-opts] [--preallocation PREALLOC] [--shrink]
        [--untrusted] [--deny-references]
        [--object OBJECTDEF] [-q] FILENAME [+-]SIZE[bkKMGTPE]",
    flags: &[
        Flag::HELP,
        Flag::QUIET,
        Flag::FILE_FORMAT,
        Flag::IMAGE_OPTS,
        Flag::switch(
            None,
            &["shrink"],
            &["allow operation when new size is smaller than original"],
        ),
        Flag::option(
            None,
            &["preallocation"],
            "PREALLOC",
            &["specify preallocation type for the new areas"],
        ),
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[
        Operand {
            name: "FILENAME",
            help: &["image file (specification) to resize"],
        },
        Operand {
            name: "[+-]SIZE[bkKMGTPE]",
            help: &[
                "new image size or amount by which to shrink/grow,",
                "with optional suffix (1024-based multiplies)",
            ],
        },
    ],
    qemu_longs: &[
        "help",
        "quiet",
        "object",
        "format",
        "image-opts",
        "preallocation",
        "shrink",
    ],
    negative_operand: Some(1),
};

/// The arguments of `resize`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The new size.
    pub size: NewSize,
    /// The preallocation mode of the range that is added.
    pub preallocation: Preallocation,
    /// Allow a smaller size, which discards data.
    pub shrink: bool,
    /// Print only errors.
    pub quiet: bool,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

/// A size, or a difference to the current one, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This size.
    Exactly(u64),
    /// The current size plus this.
    More(u64),
    /// The current size minus this.
    Less(u64),
}

impl NewSize {
    fn read(value: &OsStr) -> Result<Self, Stop> {
        let value = name::from_os(value);
        let read = |text: &str| read_size("size", text).map_err(Stop::from);
        match value.as_bytes().first() {
            Some(b'+') => read(&value[1..]).map(Self::More),
            Some(b'-') => read(&value[1..]).map(Self::Less),
            _ => read(&value).map(Self::Exactly),
        }
    }

    /// The new size of an image of `present` bytes; `None` if it is not positive or has more than 63 bits.
    pub fn apply(self, present: u64) -> Option<u64> {
        let size = match self {
            Self::Exactly(size) => size,
            Self::More(size) => present.checked_add(size)?,
            Self::Less(size) => present.checked_sub(size)?,
        };
        (1..=LARGEST).contains(&size).then_some(size)
    }
}

impl Args {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts) = (None, false);
        let (mut preallocation, mut shrink, mut quiet) = (Preallocation::default(), false, false);
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "quiet" => quiet = true,
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "shrink" => shrink = true,
                "preallocation" => preallocation = read_preallocation(&text(value))?,
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let mut operands = words.operands().into_iter();
        let (Some(image), Some(size)) = (operands.next(), operands.next()) else {
            return Err(Stop::misused("Expecting image file name and size"));
        };
        if operands.next().is_some() {
            return Err(Stop::misused("Extra argument(s) in command line"));
        }
        let size = NewSize::read(&size)?;
        let image = Source::new(image, format, image_opts)?;
        Ok(Self {
            image,
            size,
            preallocation,
            shrink,
            quiet,
            objects: objects.into(),
            policy,
        })
    }
}

fn read_preallocation(value: &str) -> Result<Preallocation, Stop> {
    Preallocation::from_name(value)
        .ok_or_else(|| Stop::wrong(format!("Invalid preallocation mode '{value}'")))
}

/// Parses the command line of `resize` and runs the command.
///
/// # Errors
/// The command line is wrong, the image cannot be opened, or it cannot be resized.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    args.policy
        .confine(&args.objects, |reach| reach.writes(&args.image))?;
    let image = open_source(
        &args.image,
        args.policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .write(true)
            .resize(true),
        console,
    )?;
    let present = image.len();
    let Some(size) = args.size.apply(present) else {
        return Err(Stop::wrong("New image size must be positive"));
    };
    let policy = if args.shrink {
        ShrinkPolicy::Allow
    } else {
        ShrinkPolicy::Refuse
    };
    let resize = Resize::new(size)
        .preallocation(args.preallocation)
        .policy(policy)
        .opening(&args.policy.opening());
    if let Err(error) = resize.run(&image) {
        let stop = Stop::from(error);
        let refused = size < present && args.preallocation == Preallocation::Off && !args.shrink;
        return Err(if refused { stop.and(SHRINK_WARNING) } else { stop });
    }
    if !args.quiet {
        console.print("Image resized.\n");
    }
    Ok(0)
}

/// The warning of qemu-img about a smaller size.
const SHRINK_WARNING: &str = "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before \
                              performing such an operation, make sure there is no important data there.";

#[cfg(test)]
mod tests {
    use super::*;

    fn size(words: &[&str]) -> Result<NewSize, Stop> {
        let words = words.iter().map(std::ffi::OsString::from).collect();
        Args::parse(Parser::new(&COMMAND, words, false)).map(|args| args.size)
    }

    #[test]
    fn sizes_are_absolute_or_relative() {
        assert_eq!(size(&["x", "1M"]), Ok(NewSize::Exactly(1 << 20)));
        assert_eq!(size(&["x", "+1.5K"]), Ok(NewSize::More(1536)));
        assert_eq!(size(&["x", "-5", "--shrink"]), Ok(NewSize::Less(5)));
        assert_eq!(size(&["--", "x", "-+1"]), Ok(NewSize::Less(1)));
        assert_eq!(
            size(&["x", "+-1"]),
            Err(Stop::wrong("Value '-1' is out of range for parameter 'size'"))
        );
        assert_eq!(
            size(&["x", "1", "2"]),
            Err(Stop::misused("Extra argument(s) in command line"))
        );
    }

    #[test]
    fn differences_are_relative_to_the_current_size() {
        assert_eq!(NewSize::Less(512).apply(1024), Some(512));
        assert_eq!(NewSize::Less(1024).apply(1024), None);
        assert_eq!(NewSize::More(u64::MAX).apply(1024), None);
        assert_eq!(NewSize::Exactly(1 << 63).apply(0), None);
    }
}
