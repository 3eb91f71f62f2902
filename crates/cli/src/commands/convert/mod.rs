//! `convert`: copies one or more images to a new one, which may have another format.

mod copy;

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use diskimage::{CacheMode, Objects, SnapshotSelector};

pub use self::copy::run;
use crate::objects::define;
use crate::words::{
    Command, CreateOptions, Flag, LARGEST, Operand, Parser, Policy, Source, Stop, count, size,
    snapshot_selector, source_cache, target_cache, text,
};

/// The table of `convert`.
pub static COMMAND: Command = Command {
    name: "convert",
    summary: "Copy one image to another with optional format conversion",
    usage: "[-f SRC_FMT|--image-opts] [-T SRC_CACHE] [--bitmaps [--skip-broken-bitmaps]]
        [--untrusted] [--deny-references]
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
    qemu_longs: &[
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

/// The options. The help text of qemu-img has several long names that it does not accept (`--target-format` for
/// `--output-format` and so on). This program accepts both.
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
    Flag::UNTRUSTED,
    Flag::DENY_REFERENCES,
];

/// A parsed command line.
#[derive(Debug)]
pub enum Request {
    /// List the options of a format, and those of its file if one is named.
    OptionHelp {
        /// The format.
        format: String,
        /// The target.
        name: Option<OsString>,
    },
    /// Copy images.
    Convert(Box<Args>),
}

/// The arguments of `convert`.
#[derive(Debug)]
pub struct Args {
    /// The images that are concatenated; at least one.
    pub sources: Vec<Source>,
    /// The cache mode of the sources.
    pub source_cache: CacheMode,
    /// The internal snapshot to copy instead of the current state.
    pub snapshot: Option<SnapshotSelector>,
    /// Open the sources without locks (`-U`).
    pub force_share: bool,
    /// The target. It has a format unless its name is a specification.
    pub target: Source,
    /// The cache mode of the target.
    pub target_cache: CacheMode,
    /// Whether the target exists already.
    pub no_create: bool,
    /// Whether the target reads as zeroes; only with `no_create`.
    pub target_is_zero: bool,
    /// The list of creation options, for [`diskimage::options::Options::parse`]; only without `no_create`.
    pub options: Option<String>,
    /// The backing file of the target.
    pub backing: Option<OsString>,
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// Write compressed clusters.
    pub compress: bool,
    /// The shortest run of zeroes that becomes a hole; 0 for no holes, `None` for the default.
    pub sparse_size: Option<u64>,
    /// Copy persistent bitmaps.
    pub bitmaps: bool,
    /// Leave out inconsistent bitmaps; only with `bitmaps`.
    pub skip_broken_bitmaps: bool,
    /// The limit of bytes per second; 0 is no limit.
    pub rate: u64,
    /// The number of requests in flight, 1 to 16; `None` for the default.
    pub parallel: Option<u64>,
    /// Let the kernel copy; never with `compress`, `sparse_size` or `salvage`.
    pub copy_range: bool,
    /// Write zeroes for sectors that cannot be read.
    pub salvage: bool,
    /// Allocate clusters in any order.
    pub out_of_order: bool,
    /// Print only errors.
    pub quiet: bool,
    /// Show progress.
    pub progress: bool,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

/// The options before they are checked against each other.
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
    policy: Policy,
}

impl Request {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let mut given = Given::default();
        while let Some((flag, value)) = words.next_flag()? {
            given.add(flag, value)?;
        }
        given.policy = words.policy();
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

    /// Checks options that exclude or need each other, in the order of qemu-img.
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
        // A specification has no default format.
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
            target_cache: target_cache(self.target_cache.as_deref(), CacheMode::NEW)?,
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
            policy: self.policy,
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
        assert_eq!(args.sparse_size, Some(4096));
        assert_eq!(args.parallel, Some(16));
        assert!(args.progress);
        assert_eq!(args.source_cache, CacheMode::WRITEBACK);
        assert_eq!(args.target_cache, CacheMode::NEW);
    }

    #[test]
    fn a_specified_target_has_no_default_format() {
        assert_eq!(args("-n --target-image-opts a driver=raw").target.format, None);
        assert_eq!(args("a b").target.format.as_deref(), Some("raw"));
    }

    #[test]
    fn quiet_suppresses_progress() {
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
