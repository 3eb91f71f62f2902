//! `bitmap`: changes persistent bitmaps.

use std::sync::Arc;

use diskimage::{Error, Image, NewBitmap, Objects, cannot_add_bitmap, flush, merge_bitmap};

use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{Command, Flag, LARGEST, Operand, Parser, Policy, Source, Stop, size, text};

/// The table of `bitmap`.
pub static COMMAND: Command = Command {
    name: "bitmap",
    summary: "Perform modifications of the persistent bitmap in the image",
    usage: "( --merge SOURCE | --add | --remove | --clear |
                --enable | --disable ).. [-f FMT | --image-opts]
        [ -b SRC_FILENAME [-F SOURCE_FMT]] [-g SIZE[KMGTPE]] [--object OBJDEF]
        [--untrusted] [--deny-references]
        FILENAME BITMAP",
    flags: &[
        Flag::HELP,
        Flag::FILE_FORMAT,
        Flag::IMAGE_OPTS,
        Flag::switch(
            None,
            &["add"],
            &["creates BITMAP, enables to record future edits"],
        ),
        Flag::option(
            Some('g'),
            &["granularity"],
            "SIZE[KMGTPE]",
            &["sets non-default bitmap granularity for --add to this size"],
        ),
        Flag::switch(None, &["remove"], &["removes BITMAP"]),
        Flag::switch(None, &["clear"], &["clears BITMAP"]),
        Flag::switch(None, &["enable"], &["starts recording future edits to BITMAP"]),
        Flag::switch(None, &["disable"], &["stops recording future edits to BITMAP"]),
        Flag::option(
            None,
            &["merge"],
            "SOURCE",
            &["merges contents of the bitmap SOURCE into BITMAP"],
        ),
        Flag::option(
            Some('b'),
            &["source-file"],
            "SRC_FILENAME",
            &["select alternative source file for --merge"],
        ),
        Flag::option(
            Some('F'),
            &["source-format"],
            "SRC_FMT",
            &["specify format for SRC_FILENAME explicitly"],
        ),
        Flag::OBJECT,
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[
        Operand {
            name: "FILENAME",
            help: &["image file name (or specification with --image-opts)"],
        },
        Operand {
            name: "BITMAP",
            help: &["name of the bitmap"],
        },
    ],
    qemu_longs: &[
        "help",
        "object",
        "image-opts",
        "add",
        "remove",
        "clear",
        "enable",
        "disable",
        "merge",
        "granularity",
        "source-file",
        "source-format",
    ],
    negative_operand: None,
};

/// A change of the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Add the bitmap.
    Add,
    /// Remove the bitmap.
    Remove,
    /// Clear all bits.
    Clear,
    /// Record later writes.
    Enable,
    /// Do not record later writes.
    Disable,
    /// Merge the bitmap of this name into it.
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// The arguments of `bitmap`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The name of the bitmap.
    pub bitmap: String,
    /// The changes in the given order.
    pub actions: Vec<Action>,
    /// The number of bytes per bit of a new bitmap.
    pub granularity: Option<u64>,
    /// The image with the bitmap to merge, if it is another one.
    pub merge_source: Option<Source>,
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
        let (mut format, mut image_opts) = (None, false);
        let (mut source, mut source_format) = (None, None);
        let (mut actions, mut granularity) = (Vec::new(), None);
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "add" => actions.push(Action::Add),
                "remove" => actions.push(Action::Remove),
                "clear" => actions.push(Action::Clear),
                "enable" => actions.push(Action::Enable),
                "disable" => actions.push(Action::Disable),
                "merge" => actions.push(Action::Merge(text(value))),
                "granularity" => {
                    granularity = Some(size("granularity", &value, 0, LARGEST)?).filter(|size| *size > 0)
                }
                "source-file" => source = Some(value),
                "source-format" => source_format = Some(text(value)),
                "object" => define(&mut objects, value)?,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        if actions.is_empty() {
            return Err(Stop::wrong(
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
            ));
        }
        let policy = words.policy();
        let mut operands = words.operands().into_iter();
        let (Some(image), Some(bitmap), None) = (operands.next(), operands.next(), operands.next()) else {
            return Err(Stop::wrong("Expecting filename and bitmap name"));
        };
        if granularity.is_some() && !actions.contains(&Action::Add) {
            return Err(Stop::wrong("granularity only supported with --add"));
        }
        if source_format.is_some() && source.is_none() {
            return Err(Stop::wrong("-F only supported with -b"));
        }
        if source.is_some() && !actions.iter().any(|action| matches!(action, Action::Merge(_))) {
            return Err(Stop::wrong(
                "Merge bitmap source file only supported with --merge",
            ));
        }
        Ok(Self {
            image: Source::new(image, format, image_opts)?,
            bitmap: text(bitmap),
            actions,
            granularity,
            merge_source: source
                .map(|source| Source::new(source, source_format, false))
                .transpose()?,
            objects: objects.into(),
            policy,
        })
    }
}

/// Parses the command line of `bitmap` and runs the command.
///
/// # Errors
/// The command line is wrong, an image cannot be opened, or a change fails. Earlier changes are kept.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let confinement = args.policy.confine(&args.objects, |reach| {
        let reach = reach.writes(&args.image);
        match &args.merge_source {
            Some(source) => reach.reads(source),
            None => reach,
        }
    })?;
    // Bitmaps belong to one image, so backing images are not opened: one of them may be the image that is changed.
    let options = || {
        args.policy
            .opening()
            .objects(Arc::clone(&args.objects))
            .no_backing(true)
    };
    let image = open_source(&args.image, options().write(true), console)?;
    let merge_source = match &args.merge_source {
        Some(source) => open_source(source, options(), console)?,
        None => Arc::clone(&image),
    };
    confinement.all_open()?;
    for action in &args.actions {
        act(action, &args, &image, &merge_source).map_err(|error| {
            let shown = &args.bitmap;
            error.context(format!("Operation {} on bitmap {shown} failed", action.name()))
        })?;
    }
    flush(&image)?;
    Ok(0)
}

fn act(action: &Action, args: &Args, image: &Image, merge_source: &Image) -> diskimage::Result<()> {
    let name = &args.bitmap;
    let layer = &**image.layer();
    let Some(bitmaps) = layer.bitmaps() else {
        return Err(match action {
            Action::Add => cannot_add_bitmap(image, &new_bitmap(args)),
            Action::Merge(source) => return merge_bitmap(&**merge_source.layer(), source, layer, name),
            _ => Error::invalid(format!("Dirty bitmap '{name}' not found")),
        });
    };
    match action {
        Action::Add => bitmaps.add(&new_bitmap(args)),
        Action::Remove => bitmaps.remove(name),
        Action::Clear => bitmaps.clear(name),
        Action::Enable => bitmaps.set_enabled(name, true),
        Action::Disable => bitmaps.set_enabled(name, false),
        Action::Merge(source) => merge_bitmap(&**merge_source.layer(), source, layer, name),
    }
}

/// The bitmap of `--add`.
fn new_bitmap(args: &Args) -> NewBitmap<'_> {
    NewBitmap {
        name: &args.bitmap,
        granularity: args.granularity,
        enabled: true,
    }
}
