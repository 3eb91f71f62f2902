//! `snapshot`: lists and changes internal snapshots.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `snapshot`.
pub static COMMAND: Command = Command {
    name: "snapshot",
    summary: "List or manipulate snapshots within image",
    usage: "[-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT]
        [-U] [--object OBJDEF] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify FILENAME format explicitly"],
        ),
        Flag::IMAGE_OPTS,
        Flag::FORCE_SHARE,
        Flag::OBJECT,
        Flag::switch(
            Some('l'),
            &["list"],
            &["list snapshots in FILENAME (the default)"],
        ),
        Flag::option(Some('c'), &["create"], "SNAPSHOT", &["create named snapshot"]),
        Flag::option(
            Some('a'),
            &["apply"],
            "SNAPSHOT",
            &["apply named snapshot to the base"],
        ),
        Flag::option(Some('d'), &["delete"], "SNAPSHOT", &["delete named snapshot"]),
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    original: &[
        "help",
        "quiet",
        "object",
        "format",
        "image-opts",
        "force-share",
        "list",
        "apply",
        "create",
        "delete",
    ],
    negative_operand: None,
};

/// Reads the words of `snapshot`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
