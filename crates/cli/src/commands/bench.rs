//! `bench`: measures the speed of requests to an image.

use diskimage::{Aio, Bench, CacheMode, Objects, Requests};

use crate::out::Console;
use crate::source::open_source;
use crate::words::{
    Command, Flag, LARGEST, Operand, Parser, Policy, Source, Stop, count, only_image, size, text,
};

/// The table of `bench`.
pub static COMMAND: Command = Command {
    name: "bench",
    summary: "Run simple image benchmark",
    usage: "[-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH]
        [--untrusted] [--deny-references]
        [-o OFFSET] [-s BUFFER_SIZE] [-S STEP_SIZE] [-i AIO] [-n]
        [-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]]
        [-q] [-U] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::FILE_FORMAT,
        Flag::IMAGE_OPTS,
        Flag::CACHE,
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
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    qemu_longs: &[
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

/// The arguments of `bench`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The cache mode of the image.
    pub cache: CacheMode,
    /// Open the image without locks (`-U`).
    pub force_share: bool,
    /// The requests.
    pub bench: Bench,
    /// What the images may bring about.
    pub policy: Policy,
}

impl Args {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let (mut cache, mut aio, mut native) = (CacheMode::WRITEBACK, Aio::Threads, false);
        let (mut requests, mut depth, mut buffer, mut step, mut offset) = (75_000, 64, 4096, 0, 0);
        let (mut write, mut pattern, mut flush_interval, mut drain) = (false, 0, 0, true);
        while let Some((flag, value)) = words.next_flag()? {
            match flag {
                // As in qemu-img, the option has no effect: the output is the purpose of this command.
                "quiet" => {}
                "format" => format = Some(text(value)),
                "image-opts" => image_opts = true,
                "cache" => {
                    cache = CacheMode::from_name(&text(value))
                        .ok_or_else(|| Stop::wrong("Invalid cache mode"))?;
                }
                "count" => requests = count("request count", &value, 1, LARGEST_NUMBER)?,
                "depth" => depth = count("queue depth", &value, 1, LARGEST_NUMBER)?,
                "buffer-size" => buffer = size("buffer size", &value, 1, LARGEST_NUMBER)?,
                "step-size" => step = size("step size", &value, 0, LARGEST_NUMBER)?,
                "offset" => offset = size("offset", &value, 0, LARGEST)?,
                "aio" => {
                    let name = text(value);
                    aio = Aio::from_name(&name)
                        .ok_or_else(|| Stop::wrong(format!("Invalid aio option: {name}")))?;
                }
                "native" => native = true,
                "write" => write = true,
                "pattern" => pattern = count("pattern byte", &value, 0, u8::MAX.into())?,
                "flush-interval" => flush_interval = count("flush interval", &value, 0, LARGEST_NUMBER)?,
                "no-drain" => drain = false,
                "force-share" => force_share = true,
                _ => unreachable!("every option of the table is listed"),
            }
        }
        let policy = words.policy();
        let image = Source::new(only_image(words)?, format, image_opts)?;
        if !write && flush_interval > 0 {
            return Err(Stop::wrong("--flush-interval is only available in write tests"));
        }
        if flush_interval > 0 && flush_interval < depth {
            return Err(Stop::wrong("Flush interval can't be smaller than depth"));
        }
        cache.aio = if native { Aio::Native } else { aio };
        Ok(Self {
            image,
            cache,
            force_share,
            bench: Bench {
                requests: if write {
                    Requests::Write {
                        pattern: u8::try_from(pattern).unwrap_or(0),
                        flush_interval,
                        drain,
                    }
                } else {
                    Requests::Read
                },
                count: requests,
                depth,
                size: buffer,
                offset,
                step: if step == 0 { buffer } else { step },
            },
            policy,
        })
    }
}

/// The largest number of a C `int`.
const LARGEST_NUMBER: u64 = i32::MAX.unsigned_abs() as u64;

/// Parses the command line of `bench` and runs the command.
///
/// # Errors
/// The command line is wrong, the image cannot be opened, or a request fails: the first failure.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let Args {
        image,
        cache,
        force_share,
        bench,
        policy,
    } = Args::parse(words)?;
    let (kind, flush_interval) = match bench.requests {
        Requests::Read => ("read", 0),
        Requests::Write { flush_interval, .. } => ("write", flush_interval),
    };
    let confinement = policy.confine(&Objects::default(), |reach| reach.with(&image, kind == "write"))?;
    let options = policy
        .opening()
        .write(kind == "write")
        .cache(cache)
        .force_share(force_share);
    let image = open_source(&image, options, console)?;
    confinement.all_open()?;
    console.print(&format!(
        "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
        bench.count, bench.size, bench.depth, bench.offset, bench.step
    ));
    if flush_interval > 0 {
        console.print(&format!("Sending flush every {flush_interval} requests\n"));
    }
    let took = bench
        .run(&image)
        .map_err(|error| error.context("Failed request"))?;
    console.print(&format!("Run completed in {:.3} seconds.\n", took.as_secs_f64()));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Args, Stop> {
        let words = words.split_whitespace().map(Into::into).collect();
        Args::parse(Parser::new(&COMMAND, words, false))
    }

    #[test]
    fn arguments_become_requests() {
        let args =
            parse("-w --pattern 0x41 -s 1.5k -c 0x10 -i io_uring -t none --no-drain x").expect("right");
        assert_eq!(args.bench.count, 16);
        assert_eq!(args.bench.size, 1536);
        assert_eq!(args.bench.step, 1536);
        assert_eq!(
            args.cache,
            CacheMode {
                aio: Aio::Uring,
                ..CacheMode::NONE
            }
        );
        let expected = Requests::Write {
            pattern: 0x41,
            flush_interval: 0,
            drain: false,
        };
        assert_eq!(args.bench.requests, expected);
        assert_eq!(
            parse("-i threads -n x").map(|args| args.cache.aio),
            Ok(Aio::Native)
        );
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for (words, message) in [
            ("-t foo -i bar x", "Invalid cache mode"),
            ("-i bar x", "Invalid aio option: bar"),
            (
                "--flush-interval 64 x",
                "--flush-interval is only available in write tests",
            ),
            (
                "-w --flush-interval 63 x",
                "Flush interval can't be smaller than depth",
            ),
            (
                "-c 0 x",
                "Invalid request count specified. Must be between 1 and 2147483647.",
            ),
            (
                "--pattern 256 x",
                "Invalid pattern byte specified. Must be between 0 and 255.",
            ),
        ] {
            assert_eq!(parse(words).map(|_| ()), Err(Stop::wrong(message)), "{words}");
        }
    }
}
