//! `bench`: measures how fast requests to an image are.

use super::refuse;
use crate::out::Console;
use crate::words::{Command, Flag, Operand, Parser, Stop};

/// The table of `bench`.
pub static COMMAND: Command = Command {
    name: "bench",
    summary: "Run simple image benchmark",
    usage: "[-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH]
        [-o OFFSET] [-s BUFFER_SIZE] [-S STEP_SIZE] [-i AIO] [-n]
        [-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]]
        [-q] [-U] FILENAME",
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
        Flag::option(
            Some('t'),
            &["cache"],
            "CACHE",
            &["cache mode for FILENAME (writeback)"],
        ),
        Flag::option(
            Some('c'),
            &["count"],
            "COUNT",
            &["number of I/O requests to perform"],
        ),
        Flag::option(
            Some('s'),
            &["buffer-size"],
            "BUFFER_SIZE",
            &["size of each I/O request"],
        ),
        Flag::option(
            Some('d'),
            &["depth"],
            "DEPTH",
            &["number of requests to perform in parallel"],
        ),
        Flag::option(
            Some('o'),
            &["offset"],
            "OFFSET",
            &["start first request at this OFFSET"],
        ),
        Flag::option(
            Some('S'),
            &["step-size"],
            "STEP_SIZE",
            &["each next request offset increment"],
        ),
        Flag::option(
            Some('i'),
            &["aio"],
            "AIO",
            &["async-io backend (threads, native, io_uring)"],
        ),
        Flag::switch(Some('n'), &["native"], &["use native AIO backend if possible"]),
        Flag::switch(Some('w'), &["write"], &["perform write test (default is read)"]),
        Flag::option(
            None,
            &["pattern"],
            "PATTERN",
            &["write this pattern byte instead of zero"],
        ),
        Flag::option(
            None,
            &["flush-interval"],
            "FLUSH_INTERVAL",
            &["issue flush after this number of requests"],
        ),
        Flag::switch(
            None,
            &["no-drain"],
            &["do not wait when flushing pending requests"],
        ),
        Flag::FORCE_SHARE_ALL,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    original: &[
        "help",
        "format",
        "image-opts",
        "cache",
        "count",
        "depth",
        "offset",
        "buffer-size",
        "step-size",
        "aio",
        "native",
        "write",
        "pattern",
        "flush-interval",
        "no-drain",
        "force-share",
    ],
    negative_operand: None,
};

/// Reads the words of `bench`, which cannot be done yet.
///
/// # Errors
/// What is wrong with the words, or that.
pub fn run(words: Parser, _console: &Console) -> Result<u8, Stop> {
    refuse(words, &COMMAND)
}
