//! `rebase`: gives an image another backing file.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `rebase`.
pub static COMMAND: Command = Command {
    name: "rebase",
    summary: "Change backing file of the image",
    usage: "[-f FMT | --image-opts] [-t CACHE] [-q] [-U] [-p]
        [-b BACKING_FILENAME [-F BACKING_FMT] [-T BACKING_CACHE]] [-u]
        [--object OBJDEF] [-c] FILENAME
Rebases FILENAME on top of BACKING_FILENAME or no backing file",
    flags: &[
        Flag::HELP,
        Flag::QUIET,
        Flag::switch(Some('p'), &["progress"], &["show progress indicator"]),
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
        Flag::option(
            Some('b'),
            &["backing"],
            "BACKING_FILENAME|\"\"",
            &["rebase onto this file (or no backing file)"],
        ),
        Flag::option(
            Some('F'),
            &["backing-format"],
            "BACKING_FMT",
            &["specify format for BACKING_FILENAME"],
        ),
        Flag::option(
            Some('T'),
            &["backing-cache"],
            "CACHE",
            &["BACKING_FILENAME cache mode (writeback)"],
        ),
        Flag::switch(
            Some('u'),
            &["backing-unsafe"],
            &["do not fail if BACKING_FILENAME can not be read"],
        ),
        Flag::switch(
            Some('c'),
            &["compress"],
            &["compress image (when image supports this)"],
        ),
        Flag::FORCE_SHARE,
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
        "image-opts",
        "force-share",
        "format",
        "cache",
        "compress",
        "backing",
        "backing-format",
        "backing-cache",
        "backing-unsafe",
    ],
    negative_operand: None,
};

/// Reads the words of `rebase`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
