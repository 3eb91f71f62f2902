//! `convert`: copies one or more images to another, with its own format.

mod copy;

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use diskimage::{CacheMode, Objects, SnapshotSelector};

pub use self::copy::run;
use super::LARGEST;
use crate::objects::define;
use crate::words::{
    Command, CreateOptions, Flag, Operand, Parser, Source, Stop, count, size, snapshot_selector,
    source_cache, target_cache, text,
};

/// The table of `convert`.
pub static COMMAND: Command = Command {
    name: "convert",
    summary: "Copy one image to another with optional format conversion",
    usage: "[-f SRC_FMT|--image-opts] [-T SRC_CACHE] [--bitmaps [--skip-broken-bitmaps]]
        [-o TGT_OPTS|--target-image-opts] [-t TGT_CACHE] [-n]
        [-B BACKING_FILENAME [-F BACKING_FMT]]
        SRC_FILENAME [SRC_FILENAME2 [...]] TGT_FILENAME",
    flags: FLAGS,
    operands: &[
        Operand {
            name: "SRC_FILENAME",
            help: &["source image file name (or specification with --image-opts)"],
        },
        Operand {
            name: "TGT_FILENAME",
            help: &["target (output) image file name"],
        },
    ],
    original: &[
        "help",
        "quiet",
        "object",
        "image-opts",
        "source-image-opts",
        "source-format",
        "source-cache",
        "snapshot",
        "sparse-size",
        "output-format",
        "options",
        "output-cache",
        "backing",
        "backing-format",
        "force-share",
        "target-image-opts",
        "salvage",
        "target-is-zero",
        "bitmaps",
        "skip-broken-bitmaps",
        "rate",
        "parallel",
        "oob-writes",
        "copy-range-offloading",
    ],
    negative_operand: None,
};

/// The original's help names several long options that it does not take (`--target-format` for `--output-format` and
/// so on). Both names work here.
const FLAGS: &[Flag] = &[
    Flag::HELP,
    Flag::QUIET_ALL,
    Flag::PROGRESS,
    Flag::option(
        Some('f'),
        &["source-format"],
        "SRC_FMT",
        &["specify SRC_FILENAME source image format explicitly"],
    ),
    Flag::switch(
        None,
        &["source-image-opts", "image-opts"],
        &[
            "indicates that SRC_FILENAME is a complete image specification",
            "instead of a file name (incompatible with --source-format)",
        ],
    ),
    Flag::option(
        Some('l'),
        &["source-snapshot", "snapshot"],
        "SNAPSHOT_PARAMS",
        &["specify source snapshot parameters"],
    ),
    Flag::option(
        Some('T'),
        &["source-cache"],
        "SRC_CACHE",
        &["source image(s) cache mode (writeback)"],
    ),
    Flag::option(
        Some('O'),
        &["target-format", "output-format"],
        "TGT_FMT",
        &["specify TGT_FILENAME image format (default is raw)"],
    ),
    Flag::switch(
        None,
        &["target-image-opts"],
        &[
            "indicates that TGT_FILENAME is a complete image specification",
            "instead of a file name (incompatible with --target-format)",
        ],
    ),
    Flag::option(
        Some('o'),
        &["target-options", "options"],
        "TGT_OPTS",
        &["TGT_FMT-specific options"],
    ),
    Flag::switch(
        Some('c'),
        &["compress"],
        &["create compressed output image (qcow and qcow2 format only)"],
    ),
    Flag::option(
        Some('t'),
        &["target-cache", "output-cache"],
        "TGT_CACHE",
        &["cache mode when opening output image (unsafe)"],
    ),
    Flag::option(
        Some('B'),
        &["backing"],
        "BACKING_FILENAME",
        &["create output to be a CoW on top of BACKING_FILENAME"],
    ),
    Flag::option(
        Some('F'),
        &["backing-format"],
        "BACKING_FMT",
        &["specify BACKING_FILENAME image format explicitly"],
    ),
    Flag::switch(
        Some('n'),
        &["no-create"],
        &["omit target volume creation (eg on rbd)"],
    ),
    Flag::switch(
        None,
        &["target-is-zero"],
        &[
            "assume that the target reads as zeroes, and do not write zeroes to it",
            "(requires -n)",
        ],
    ),
    Flag::option(
        Some('S'),
        &["sparse-size"],
        "SPARSE_SIZE",
        &[
            "leave holes in the target for runs of at least this many zero bytes",
            "(default 4k; 0 fully allocates the target)",
        ],
    ),
    Flag::switch(
        None,
        &["bitmaps"],
        &["also copy any persistent bitmaps present in source"],
    ),
    Flag::switch(
        None,
        &["skip-broken-bitmaps"],
        &["skip (do not error out) any broken bitmaps"],
    ),
    Flag::FORCE_SHARE_ALL,
    Flag::option(Some('r'), &["rate"], "RATE", &["I/O rate limit"]),
    Flag::option(
        Some('m'),
        &["parallel"],
        "NUM_COROUTINES",
        &["specify parallelism (default 8)"],
    ),
    Flag::switch(
        Some('C'),
        &["copy-range-offloading"],
        &["use copy_range offloading"],
    ),
    Flag::switch(
        None,
        &["salvage"],
        &["treat what cannot be read from the source as zeroes, and go on"],
    ),
    Flag::switch(
        Some('W'),
        &["oob-writes"],
        &["enable out-of-order writes to improve performance"],
    ),
    Flag::OBJECT,
];

/// What the words ask for.
#[derive(Debug)]
pub enum Request {
    /// The list of options of a format, and of the protocol of a file if one is named.
    OptionHelp {
        /// The format.
        format: String,
        /// The target.
        name: Option<OsString>,
    },
    /// A copy.
    Convert(Box<Args>),
}

/// What to copy.
#[derive(Debug)]
pub struct Args {
    /// The images whose contents follow one another in the target; at least one.
    pub sources: Vec<Source>,
    /// How they are cached.
    pub source_cache: CacheMode,
    /// The internal snapshot that counts instead of the present state.
    pub snapshot: Option<SnapshotSelector>,
    /// Take no locks on the sources that others could mind.
    pub force_share: bool,
    /// Where the copy goes. Its format is given, but for a specification.
    pub target: Source,
    /// How it is cached.
    pub target_cache: CacheMode,
    /// Whether the target is there already.
    pub no_create: bool,
    /// Whether the target reads as zeroes; only if it is there already.
    pub target_is_zero: bool,
    /// The list of its options, for [`diskimage::options::Options::parse`]; only if it is made.
    pub options: Option<String>,
    /// Its backing file.
    pub backing: Option<OsString>,
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// Compress what is written.
    pub compress: bool,
    /// The shortest run of zeroes to leave a hole for, 0 to leave none; nothing for the default.
    pub sparse_size: Option<u64>,
    /// Copy persistent bitmaps.
    pub bitmaps: bool,
    /// Leave out bitmaps that cannot be trusted; only with `bitmaps`.
    pub skip_broken_bitmaps: bool,
    /// The rate limit in bytes per second; 0 is none.
    pub rate: u64,
    /// How many requests are in flight, 1 to 16; nothing for the default.
    pub parallel: Option<u64>,
    /// Have the kernel copy; never with `compress`, `sparse_size` or `salvage`.
    pub copy_range: bool,
    /// Take zeroes for what cannot be read.
    pub salvage: bool,
    /// Write in any order.
    pub out_of_order: bool,
    /// Print only errors.
    pub quiet: bool,
    /// Show progress.
    pub progress: bool,
    /// Secrets.
    pub objects: Arc<Objects>,
}

/// The words before they are checked against each other.
#[derive(Default)]
struct Given {
    source_format: Option<String>,
    image_opts: bool,
    source_cache: Option<OsString>,
    snapshot: Option<SnapshotSelector>,
    force_share: bool,
    target_format: Option<String>,
    target_image_opts: bool,
    target_cache: Option<OsString>,
    no_create: bool,
    target_is_zero: bool,
    options: CreateOptions,
    backing: Option<OsString>,
    backing_format: Option<String>,
    compress: bool,
    sparse_size: Option<u64>,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    rate: u64,
    parallel: Option<u64>,
    copy_range: bool,
    salvage: bool,
    out_of_order: bool,
    quiet: bool,
    progress: bool,
    objects: Objects,
}

impl Request {
    /// Reads the words.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let mut given = Given::default();
        while let Some((flag, value)) = words.next_flag()? {
            given.add(flag, value)?;
        }
        given.check()?;
        given.finish(words.operands())
    }
}

impl Given {
    fn add(&mut self, flag: &str, value: OsString) -> Result<(), Stop> {
        match flag {
            "quiet" => self.quiet = true,
            "progress" => self.progress = true,
            "source-format" => self.source_format = Some(text(value)),
            "source-image-opts" => self.image_opts = true,
            "source-snapshot" => self.snapshot = Some(snapshot_selector(value)?),
            "source-cache" => self.source_cache = Some(value),
            "target-format" => self.target_format = Some(text(value)),
            "target-image-opts" => self.target_image_opts = true,
            "target-options" => self.options.add(value)?,
            "compress" => self.compress = true,
            "target-cache" => self.target_cache = Some(value),
            "backing" => self.backing = Some(value),
            "backing-format" => self.backing_format = Some(text(value)),
            "no-create" => self.no_create = true,
            "target-is-zero" => self.target_is_zero = true,
            "sparse-size" => self.sparse_size = Some(sparse_size(&value)?),
            "bitmaps" => self.bitmaps = true,
            "skip-broken-bitmaps" => self.skip_broken_bitmaps = true,
            "force-share" => self.force_share = true,
            "rate" => self.rate = size("rate limit", &value, 0, LARGEST)?,
            "parallel" => self.parallel = Some(count("number of coroutines", &value, 1, 16)?),
            "copy-range-offloading" => self.copy_range = true,
            "salvage" => self.salvage = true,
            "oob-writes" => self.out_of_order = true,
            "object" => define(&mut self.objects, value)?,
            _ => unreachable!("every option of the table is listed"),
        }
        Ok(())
    }

    /// Options that exclude or need each other, in the original's order.
    fn check(&self) -> Result<(), Stop> {
        let conflicts = [
            (
                self.skip_broken_bitmaps && !self.bitmaps,
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            (
                self.copy_range && self.compress,
                "Cannot enable copy offloading when -c is used",
            ),
            (
                self.copy_range && self.sparse_size.is_some(),
                "Cannot enable copy offloading when -S is used",
            ),
            (
                self.copy_range && self.salvage,
                "Cannot use copy offloading in salvaging mode",
            ),
            (
                self.target_image_opts && !self.no_create,
                "--target-image-opts requires use of -n flag",
            ),
            (
                self.target_is_zero && !self.no_create,
                "--target-is-zero requires use of -n flag",
            ),
            (
                self.no_create && self.options.list.is_some(),
                "-o has no effect when skipping image creation",
            ),
        ];
        match conflicts.into_iter().find(|(conflict, _)| *conflict) {
            Some((_, message)) => Err(Stop::wrong(message)),
            None => Ok(()),
        }
    }

    fn finish(self, mut operands: Vec<OsString>) -> Result<Request, Stop> {
        let target = if operands.len() > 1 { operands.pop() } else { None };
        if self.options.wants_help {
            let format = self.target_format.unwrap_or_else(|| "raw".to_owned());
            return Ok(Request::OptionHelp { format, name: target });
        }
        let Some(target) = target else {
            return Err(Stop::wrong("Must specify image file name"));
        };
        let source_cache = source_cache(self.source_cache.as_deref())?;
        let source = |word| Source::new(word, self.source_format.clone(), self.image_opts);
        let sources = operands.into_iter().map(source).collect::<Result<_, _>>()?;
        // The default format is for a file name only.
        let target_format = match self.target_format {
            None if !self.target_image_opts => Some("raw".to_owned()),
            format => format,
        };
        Ok(Request::Convert(Box::new(Args {
            sources,
            source_cache,
            snapshot: self.snapshot,
            force_share: self.force_share,
            target: Source::new(target, target_format, self.target_image_opts)?,
            target_cache: target_cache(self.target_cache.as_deref(), CacheMode::UNSAFE)?,
            no_create: self.no_create,
            target_is_zero: self.target_is_zero,
            options: self.options.list,
            backing: self.backing,
            backing_format: self.backing_format,
            compress: self.compress,
            sparse_size: self.sparse_size,
            bitmaps: self.bitmaps,
            skip_broken_bitmaps: self.skip_broken_bitmaps,
            rate: self.rate,
            parallel: self.parallel,
            copy_range: self.copy_range,
            salvage: self.salvage,
            out_of_order: self.out_of_order,
            quiet: self.quiet,
            progress: self.progress && !self.quiet,
            objects: self.objects.into(),
        })))
    }
}

fn sparse_size(value: &OsStr) -> Result<u64, Stop> {
    const LARGEST_SPARSE: u64 = 16 << 20;
    let size = size("buffer size for sparse output", value, 0, LARGEST)?;
    if !size.is_multiple_of(512) || size > LARGEST_SPARSE {
        return Err(Stop::wrong(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {LARGEST_SPARSE}. \
             Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::ImageName;

    fn parse(words: &str) -> Result<Request, Stop> {
        let words = words.split_whitespace().map(OsString::from).collect();
        Request::parse(Parser::new(&COMMAND, words, false))
    }

    fn args(words: &str) -> Args {
        match parse(words) {
            Ok(Request::Convert(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_last_operand_is_the_target() {
        let args = args("-pOqcow2 -S 4k a b -m 16 c");
        assert_eq!(args.sources.len(), 2);
        assert_eq!(args.target.name, ImageName::File("c".into()));
        assert_eq!(args.target.format.as_deref(), Some("qcow2"));
        assert_eq!(
            (args.sparse_size, args.parallel, args.progress),
            (Some(4096), Some(16), true)
        );
        assert_eq!(
            (args.source_cache, args.target_cache),
            (CacheMode::WRITEBACK, CacheMode::UNSAFE)
        );
    }

    #[test]
    fn a_specified_target_has_no_default_format() {
        assert_eq!(args("-n --target-image-opts a driver=raw").target.format, None);
        assert_eq!(args("a b").target.format.as_deref(), Some("raw"));
    }

    #[test]
    fn quiet_forbids_progress() {
        assert!(!args("-p -q a b").progress);
    }

    #[test]
    fn options_that_exclude_each_other_are_refused() {
        for (words, message) in [
            ("a", "Must specify image file name"),
            ("-C -S 0 -c a b", "Cannot enable copy offloading when -c is used"),
            (
                "-C --salvage -S 0 a b",
                "Cannot enable copy offloading when -S is used",
            ),
            ("-C --salvage a b", "Cannot use copy offloading in salvaging mode"),
            (
                "--target-image-opts --target-is-zero a b",
                "--target-image-opts requires use of -n flag",
            ),
            (
                "--target-is-zero -o help",
                "--target-is-zero requires use of -n flag",
            ),
            ("-n -o a=b a", "-o has no effect when skipping image creation"),
            (
                "-n -O raw --target-image-opts a b",
                "--image-opts and --format are mutually exclusive",
            ),
            (
                "--skip-broken-bitmaps a b",
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            ("-T foo -t bar a b", "Invalid source cache option: foo"),
            ("-t bar a b", "Invalid cache option: bar"),
            (
                "-S 1000 a b",
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. \
                 Select 0 to disable sparse detection (fully allocates output).",
            ),
        ] {
            assert_eq!(parse(words).err(), Some(Stop::wrong(message)), "{words}");
        }
    }
}
