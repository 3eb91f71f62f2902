//! `commit`: writes the changes of an image to its backing file.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `commit`.
pub static COMMAND: Command = Command {
    name: "commit",
    summary: "Commit image to its backing file",
    usage: "[-f FMT | --image-opts] [-t CACHE_MODE] [-b BASE_IMG] [-d]
        [-r RATE] [--object OBJDEF] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::PROGRESS,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify FILENAME image format explicitly"],
        ),
        Flag::IMAGE_OPTS,
        Flag::option(
            Some('t'),
            &["cache"],
            "CACHE_MODE",
            &["image cache mode (writeback)"],
        ),
        Flag::switch(Some('d'), &["drop"], &["skip emptying FILENAME on completion"]),
        Flag::option(
            Some('b'),
            &["base"],
            "BASE_IMG",
            &[
                "image in the backing chain to which to commit changes",
                "instead of the previous one (implies --drop)",
            ],
        ),
        Flag::option(Some('r'), &["rate"], "RATE", &["I/O rate limit"]),
        Flag::OBJECT,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["name of the image file to operate on"],
    }],
    original: &[
        "help",
        "quiet",
        "object",
        "format",
        "image-opts",
        "cache",
        "drop",
        "base",
        "progress",
        "rate",
    ],
    negative_operand: None,
};

/// Reads the words of `commit`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
