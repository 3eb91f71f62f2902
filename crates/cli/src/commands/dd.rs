//! `dd`: copies blocks of one image to another.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `dd`.
pub static COMMAND: Command = Command {
    name: "dd",
    summary: "Copy input to output with optional format conversion",
    usage: "[-f FMT|--image-opts] [-O OUTPUT_FMT] [-U]
        [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    flags: &[
        Flag::HELP,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify format for INPUT explicitly"],
        ),
        Flag::switch(
            None,
            &["image-opts"],
            &[
                "indicates that INPUT is a complete image specification",
                "instead of a file name (incompatible with --format)",
            ],
        ),
        Flag::option(
            Some('O'),
            &["output-format"],
            "OUTPUT_FMT",
            &["format of the OUTPUT (default raw)"],
        ),
        Flag::FORCE_SHARE_ALL,
        Flag::OBJECT,
    ],
    operands: &[
        Operand {
            name: "bs=BLOCK_SIZE[kKMGTP]",
            help: &["size of I/O block (default 512)"],
        },
        Operand {
            name: "count=COUNT",
            help: &["number of blocks to convert (default whole INPUT)"],
        },
        Operand {
            name: "skip=COUNT",
            help: &["number of blocks of INPUT to leave out at its start (default 0)"],
        },
        Operand {
            name: "if=INPUT",
            help: &["input file name (or image specification with --image-opts)"],
        },
        Operand {
            name: "of=OUTPUT",
            help: &["output file name to create"],
        },
    ],
    original: &[
        "help",
        "object",
        "format",
        "output-format",
        "image-opts",
        "force-share",
    ],
    negative_operand: None,
};

/// Reads the words of `dd`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
