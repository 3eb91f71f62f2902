//! `bitmap`: changes persistent bitmaps.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `bitmap`.
pub static COMMAND: Command = Command {
    name: "bitmap",
    summary: "Perform modifications of the persistent bitmap in the image",
    usage: "( --merge SOURCE | --add | --remove | --clear |
                --enable | --disable ).. [-f FMT | --image-opts]
        [ -b SRC_FILENAME [-F SOURCE_FMT]] [-g SIZE[KMGTPE]] [--object OBJDEF]
        FILENAME BITMAP",
    flags: &[
        Flag::HELP,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify FILENAME format explicitly"],
        ),
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
    original: &[
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

/// Reads the words of `bitmap`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
