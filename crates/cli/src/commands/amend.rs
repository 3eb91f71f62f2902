//! `amend`: changes options of an image.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `amend`.
pub static COMMAND: Command = Command {
    name: "amend",
    summary: "Update format-specific options of the image",
    usage: "[-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q]
        [--object OBJDEF] -o OPTIONS FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET,
        Flag::switch(Some('p'), &["progress"], &["show progress"]),
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify FILENAME format explicitly"],
        ),
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('t'),
            &["cache"],
            "CACHE",
            &["cache mode for FILENAME (writeback)"],
        ),
        Flag::switch(None, &["force"], &["allow certain unsafe operations"]),
        Flag::option(
            Some('o'),
            &["options"],
            "OPTIONS",
            &["format-specific options to change ('-o help' for list)"],
        ),
        Flag::OBJECT,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    original: &[
        "help",
        "quiet",
        "progress",
        "object",
        "format",
        "cache",
        "options",
        "image-opts",
        "force",
    ],
    negative_operand: None,
};

/// Reads the words of `amend`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
