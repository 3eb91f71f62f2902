//! Option tables.

/// A command of the program.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// The word it is called by.
    pub name: &'static str,
    /// What it does, without a full stop.
    pub summary: &'static str,
    /// The words it takes, as they follow its name in the help text; more lines are indented like the text.
    pub usage: &'static str,
    /// Its options in the order of the help text.
    pub flags: &'static [Flag],
    /// What it takes besides options.
    pub operands: &'static [Operand],
    /// The long names that the original knows, in the order in which it lists them where an abbreviation is
    /// ambiguous. Long names of [`Self::flags`] that are missing here are ours: an abbreviation finds them only
    /// where it abbreviates none of the original's.
    pub original: &'static [&'static str],
    /// The place among the operands that takes a negative number although it looks like an option.
    pub negative_operand: Option<usize>,
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// Its letter.
    pub short: Option<char>,
    /// Its long names; the first is the one shown, and identifies the option within the command.
    pub longs: &'static [&'static str],
    /// What its value is called, if it takes one.
    pub value: Option<&'static str>,
    /// What it does, in lines.
    pub help: &'static [&'static str],
}

/// One operand, or several of the same kind.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// What it is called.
    pub name: &'static str,
    /// What it is, in lines.
    pub help: &'static [&'static str],
}

impl Flag {
    /// `--help`, which every command has.
    pub const HELP: Self = Self::switch(Some('h'), &["help"], &["print this help and exit"]);
    /// `--object`.
    pub const OBJECT: Self = Self::option(
        None,
        &["object"],
        "OBJDEF",
        &["QEMU user-creatable object (eg encryption key)"],
    );
    /// `--output`.
    pub const OUTPUT: Self = Self::option(
        None,
        &["output"],
        "human|json",
        &["specify output format name (default human)"],
    );
    /// `--image-opts` of commands with one image.
    pub const IMAGE_OPTS: Self = Self::switch(
        None,
        &["image-opts"],
        &[
            "indicates that FILENAME is a complete image specification",
            "instead of a file name (incompatible with --format)",
        ],
    );
    /// `-f` of commands with one image.
    pub const FORMAT: Self = Self::option(
        Some('f'),
        &["format"],
        "FMT",
        &["specify FILENAME image format explicitly"],
    );
    /// `-U` of commands with one image.
    pub const FORCE_SHARE: Self = Self::switch(
        Some('U'),
        &["force-share"],
        &["open image in shared mode for concurrent access"],
    );
    /// `-U` of commands with several images.
    pub const FORCE_SHARE_ALL: Self = Self::switch(
        Some('U'),
        &["force-share"],
        &["open images in shared mode for concurrent access"],
    );
    /// `-q`.
    pub const QUIET: Self = Self::switch(Some('q'), &["quiet"], &["quiet operation"]);
    /// `-q`, as some help texts have it.
    pub const QUIET_ALL: Self = Self::switch(Some('q'), &["quiet"], &["quiet operations"]);
    /// `-p`.
    pub const PROGRESS: Self = Self::switch(Some('p'), &["progress"], &["show operation progress"]);

    /// An option without a value.
    pub const fn switch(
        short: Option<char>,
        longs: &'static [&'static str],
        help: &'static [&'static str],
    ) -> Self {
        Self {
            short,
            longs,
            value: None,
            help,
        }
    }

    /// An option with a value.
    pub const fn option(
        short: Option<char>,
        longs: &'static [&'static str],
        value: &'static str,
        help: &'static [&'static str],
    ) -> Self {
        Self {
            short,
            longs,
            value: Some(value),
            help,
        }
    }

    /// What identifies it within its command.
    pub fn name(&self) -> &'static str {
        self.longs.first().copied().unwrap_or_default()
    }
}
