//! Option tables.

/// A command of the program.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// The name of the command.
    pub name: &'static str,
    /// A summary of the command without a full stop.
    pub summary: &'static str,
    /// The arguments as they follow the name in the help text; further lines have the indentation of that text.
    pub usage: &'static str,
    /// The options in the order of the help text.
    pub flags: &'static [Flag],
    /// The operands in the order of the help text.
    pub operands: &'static [Operand],
    /// The long names that qemu-img has, in the order in which it lists them for an ambiguous abbreviation. Other long
    /// names of [`Self::flags`] are this program's own: an abbreviation matches them only if it matches none of these.
    pub qemu_longs: &'static [&'static str],
    /// The index of the operand that may be a negative number, which looks like an option.
    pub negative_operand: Option<usize>,
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// The letter of the option.
    pub short: Option<char>,
    /// The long names; the first one is shown in the help text, and identifies the option within the command.
    pub longs: &'static [&'static str],
    /// The name of the value, if the option takes one.
    pub value: Option<&'static str>,
    /// The lines of the help text.
    pub help: &'static [&'static str],
}

/// One operand, or several of the same kind.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The name in the help text.
    pub name: &'static str,
    /// The lines of the help text.
    pub help: &'static [&'static str],
}

impl Flag {
    /// `--help` of every command.
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
    /// `-f` with the other wording that some help texts have.
    pub const FILE_FORMAT: Self = Self::option(
        Some('f'),
        &["format"],
        "FMT",
        &["specify FILENAME format explicitly"],
    );
    /// `-t` of commands that change one image.
    pub const CACHE: Self = Self::option(
        Some('t'),
        &["cache"],
        "CACHE",
        &["cache mode for FILENAME (writeback)"],
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
    /// `--untrusted`.
    pub const UNTRUSTED: Self = Self::switch(
        None,
        &["untrusted"],
        &[
            "images come from strangers: they may refer to plain files beneath",
            "their directory only, and the process confines itself",
        ],
    );
    /// `--deny-references`.
    pub const DENY_REFERENCES: Self = Self::switch(
        None,
        &["deny-references"],
        &["refuse images that refer to other files"],
    );
    /// `-q`.
    pub const QUIET: Self = Self::switch(Some('q'), &["quiet"], &["quiet operation"]);
    /// `-q` with the other wording that some help texts have.
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

    /// The first long name, which identifies the option within the command.
    pub fn name(&self) -> &'static str {
        self.longs.first().copied().unwrap_or_default()
    }
}
