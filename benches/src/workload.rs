//! The table of workloads.

/// One command that both programs run on the same files.
///
/// Names in braces are files: the name of a fixture is that input; `{out}` and `{top}` are files of the side that runs.
/// Only `{out}` is compared, and its size is reported.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// The steps before each run, which are not measured: they create the files that `command` changes.
    pub(crate) before: &'static [Step],
    /// The command that is measured.
    pub(crate) command: &'static str,
    /// What only this program gets, behind the command: options that the stock program does not have.
    pub(crate) ours_only: &'static str,
    /// The number of runs of one measurement. A command of a few milliseconds is run many times, and the sum of the
    /// times is reported.
    pub(crate) repeat: u32,
    /// A command of the stock program that fails if our `{out}` is wrong; `{stock}` is the output of the stock program.
    pub(crate) verify: Option<&'static str>,
}

/// One preparation of a run.
#[derive(Debug)]
pub(crate) enum Step {
    /// Copies an input to a file of the run.
    Copy(&'static str, &'static str),
    /// Runs a command of the stock program.
    Stock(&'static str),
}

impl Workload {
    const fn once(name: &'static str, command: &'static str) -> Self {
        Self::repeated(name, 1, command)
    }

    const fn repeated(name: &'static str, repeat: u32, command: &'static str) -> Self {
        Self {
            name,
            before: &[],
            command,
            ours_only: "",
            repeat,
            verify: None,
        }
    }

    /// A command that changes the files that `before` creates.
    const fn changing(name: &'static str, before: &'static [Step], command: &'static str) -> Self {
        Self {
            before,
            ..Self::once(name, command)
        }
    }

    const fn with(self, ours_only: &'static str) -> Self {
        Self { ours_only, ..self }
    }

    const fn times(self, repeat: u32) -> Self {
        Self { repeat, ..self }
    }

    const fn verified(self, command: &'static str) -> Self {
        Self {
            verify: Some(command),
            ..self
        }
    }

    /// The command for this program. What it has converted is on disk when it ends, unless `-t unsafe` is said; the stock
    /// program does not wait for the disk unless it is told to by `-t`. Both do the same here.
    pub(crate) fn ours(&self) -> String {
        let waits = !self.command.starts_with("convert ") || self.command.contains(" -t ");
        let cache = if waits { "" } else { " -t unsafe" };
        format!("{}{}{cache}", self.command, self.ours_only)
    }

    /// The fixtures that a run needs, by name.
    pub(crate) fn fixtures(&self) -> impl Iterator<Item = &'static str> {
        let prepared = self.before.iter().flat_map(|step| match step {
            Step::Copy(from, _) => vec![*from],
            Step::Stock(command) => fixtures_of(command).collect(),
        });
        prepared
            .chain(fixtures_of(self.command))
            .chain(self.verify.into_iter().flat_map(fixtures_of))
    }
}

/// The workload on which the stock program is compared with itself, to show the ratio that noise alone produces.
pub(crate) const NOISE: Workload =
    Workload::once("noise: stock and stock", "convert -f raw -O qcow2 {raw} {out}");

const SAME_RAW: &str = "compare -q -f raw -F raw {stock} {out}";
const SAME_QCOW2: &str = "compare -q -f qcow2 -F qcow2 {stock} {out}";
/// For images of other formats, which are probed.
const SAME_PROBED: &str = "compare -q {stock} {out}";
const CLEAN: &str = "check -q -f qcow2 {out}";

/// An image with metadata for a terabyte, without and with a snapshot.
const METADATA: &[Step] = &[Step::Copy("metadata", "out")];
const SNAPSHOT: &[Step] = &[
    Step::Copy("metadata", "out"),
    Step::Stock("snapshot -q -c first {out}"),
];
const OVERLAY: &[Step] = &[Step::Copy("overlay", "out")];
const EMPTY_OVERLAY: &[Step] = &[Step::Copy("empty-overlay", "out")];
/// An overlay on a copy of its base, which may be changed.
const BASE_AND_TOP: &[Step] = &[
    Step::Copy("qcow2", "out"),
    Step::Copy("overlay", "top"),
    Step::Stock("rebase -u -f qcow2 -b {out} -F qcow2 {top}"),
];
const BITMAPS: &[Step] = &[Step::Copy("bitmaps", "out")];

pub(crate) const WORKLOADS: &[Workload] = &[
    Workload::once("raw-qcow2", "convert -f raw -O qcow2 {raw} {out}").verified(SAME_QCOW2),
    Workload::once("qcow2-raw", "convert -f qcow2 -O raw {qcow2} {out}").verified(SAME_RAW),
    Workload::once("qcow2-qcow2", "convert -f qcow2 -O qcow2 {qcow2} {out}").verified(SAME_QCOW2),
    Workload::once("durable-raw-qcow2", "convert -t writeback -f raw -O qcow2 {raw} {out}").verified(SAME_QCOW2),
    Workload::once("durable-qcow2-raw", "convert -t writeback -f qcow2 -O raw {qcow2} {out}").verified(SAME_RAW),
    Workload::once("durable-raw-zstd", "convert -t writeback -f raw -O qcow2 -c -o compression_type=zstd {raw} {out}")
        .verified(SAME_QCOW2),
    Workload::once("raw-zlib", "convert -f raw -O qcow2 -c {raw} {out}").verified(SAME_QCOW2),
    Workload::once(
        "raw-zstd",
        "convert -f raw -O qcow2 -c -o compression_type=zstd {raw} {out}",
    )
    .verified(SAME_QCOW2),
    Workload::once("raw-zlib-1", "convert -f raw -O qcow2 -c {raw} {out}")
        .with(" -o compression_level=1")
        .verified(SAME_QCOW2),
    Workload::once(
        "raw-zstd-1",
        "convert -f raw -O qcow2 -c -o compression_type=zstd {raw} {out}",
    )
    .with(" -o compression_level=1")
    .verified(SAME_QCOW2),
    Workload::once("zlib-raw", "convert -f qcow2 -O raw {zlib} {out}").verified(SAME_RAW),
    Workload::once("zstd-raw", "convert -f qcow2 -O raw {zstd} {out}").verified(SAME_RAW),
    Workload::once("zlib-zlib", "convert -f qcow2 -O qcow2 -c {zlib} {out}").verified(SAME_QCOW2),
    Workload::once("raw-vmdk", "convert -f raw -O vmdk {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("vmdk-raw", "convert -f vmdk -O raw {vmdk} {out}").verified(SAME_RAW),
    Workload::once("raw-stream", "convert -f raw -O vmdk -o subformat=streamOptimized {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("raw-stream-1", "convert -f raw -O vmdk -o subformat=streamOptimized {raw} {out}")
        .with(" -o compression_level=1")
        .verified(SAME_PROBED),
    Workload::once("stream-raw", "convert -f vmdk -O raw {stream} {out}").verified(SAME_RAW),
    Workload::once(
        "stream-stream",
        "convert -f vmdk -O vmdk -o subformat=streamOptimized {stream} {out}",
    )
    .verified(SAME_PROBED),
    Workload::once("raw-vdi", "convert -f raw -O vdi {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("vdi-raw", "convert -f vdi -O raw {vdi} {out}").verified(SAME_RAW),
    Workload::once("raw-vpc", "convert -f raw -O vpc -o force_size=on {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("vpc-raw", "convert -f vpc -O raw {vpc} {out}").verified(SAME_RAW),
    Workload::once("raw-vhdx", "convert -f raw -O vhdx {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("vhdx-raw", "convert -f vhdx -O raw {vhdx} {out}").verified(SAME_RAW),
    Workload::once("raw-qed", "convert -f raw -O qed {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("qed-raw", "convert -f qed -O raw {qed} {out}").verified(SAME_RAW),
    Workload::once("raw-qcow", "convert -f raw -O qcow {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("qcow-raw", "convert -f qcow -O raw {qcow} {out}").verified(SAME_RAW),
    Workload::once("raw-qcow-zlib", "convert -f raw -O qcow -c {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("qcow-zlib-raw", "convert -f qcow -O raw {qcow-zlib} {out}").verified(SAME_RAW),
    Workload::once("raw-parallels", "convert -f raw -O parallels {raw} {out}")
        .verified(SAME_PROBED),
    Workload::once("parallels-raw", "convert -f parallels -O raw {parallels} {out}").verified(SAME_RAW),
    Workload::repeated("create-small", 50, "create -q -f qcow2 {out} 64M"),
    Workload::repeated("create-1T", 50, "create -q -f qcow2 {out} 1T"),
    Workload::once(
        "create-metadata",
        "create -q -f qcow2 -o preallocation=metadata {out} {x1024}",
    )
    .verified(CLEAN),
    Workload::repeated("info", 50, "info {qcow2}"),
    Workload::repeated("info-json", 50, "info --output=json {large}"),
    Workload::once("check-large", "check -q {large}"),
    Workload::once("check-metadata", "check -q {metadata}"),
    Workload::repeated("check-data", 10, "check -q {qcow2}"),
    Workload::once("map-fragmented", "map {fragmented}"),
    Workload::once("map-fragmented-json", "map --output=json {fragmented}"),
    Workload::once("compare-raw-qcow2", "compare -q -f raw -F qcow2 {raw} {qcow2}"),
    Workload::once(
        "compare-qcow2-qcow2",
        "compare -q -f qcow2 -F qcow2 {qcow2} {second}",
    ),
    Workload::repeated("measure-raw", 10, "measure -f raw -O qcow2 {raw}"),
    Workload::repeated("measure-fragmented", 5, "measure -f qcow2 -O qcow2 {fragmented}"),
    Workload::changing(
        "resize",
        &[Step::Stock("create -q -f qcow2 {out} 1G")],
        "resize -q -f qcow2 {out} 4T",
    )
    .times(20),
    Workload::changing("snapshot-create", METADATA, "snapshot -q -c first {out}").verified(CLEAN),
    Workload::changing("snapshot-apply", SNAPSHOT, "snapshot -q -a first {out}").verified(CLEAN),
    Workload::changing("snapshot-delete", SNAPSHOT, "snapshot -q -d first {out}").verified(CLEAN),
    Workload::changing("commit", BASE_AND_TOP, "commit -q -f qcow2 {top}").verified(SAME_QCOW2),
    Workload::changing("commit-keep", BASE_AND_TOP, "commit -q -d -f qcow2 {top}").verified(SAME_QCOW2),
    Workload::changing(
        "rebase-same",
        EMPTY_OVERLAY,
        "rebase -q -f qcow2 -b {second} -F qcow2 {out}",
    )
    .verified(SAME_QCOW2),
    Workload::changing(
        "rebase-other",
        EMPTY_OVERLAY,
        "rebase -q -f qcow2 -b {blank} -F qcow2 {out}",
    )
    .verified(SAME_QCOW2),
    Workload::changing("rebase-none", EMPTY_OVERLAY, "rebase -q -f qcow2 -b '' {out}").verified(SAME_QCOW2),
    Workload::changing(
        "rebase-unsafe",
        EMPTY_OVERLAY,
        "rebase -q -u -f qcow2 -b {second} -F qcow2 {out}",
    )
    .times(20)
    .verified(SAME_QCOW2),
    Workload::changing("amend-down", OVERLAY, "amend -q -f qcow2 -o compat=0.10 {out}").verified(SAME_QCOW2),
    Workload::changing(
        "amend-up",
        &[
            Step::Copy("large", "out"),
            Step::Stock("amend -q -f qcow2 -o compat=0.10 {out}"),
        ],
        "amend -q -f qcow2 -o compat=1.1 {out}",
    )
    .times(5)
    .verified(CLEAN),
    Workload::changing(
        "amend-refcount-bits",
        &[Step::Copy("large", "out")],
        "amend -q -f qcow2 -o refcount_bits=64 {out}",
    )
    .verified(CLEAN),
    Workload::once("dd-512", "dd -f raw -O raw if={part} of={out}").verified(SAME_RAW),
    Workload::once("dd-512-qcow2", "dd -f raw -O qcow2 if={part} of={out}").verified(SAME_QCOW2),
    Workload::once("dd-64k", "dd -f raw -O raw bs=64k if={raw} of={out}").verified(SAME_RAW),
    Workload::once("dd-64k-qcow2", "dd -f raw -O qcow2 bs=64k if={raw} of={out}").verified(SAME_QCOW2),
    Workload::once("dd-1M", "dd -f raw -O raw bs=1M if={raw} of={out}").verified(SAME_RAW),
    Workload::once("dd-1M-qcow2", "dd -f raw -O qcow2 bs=1M if={raw} of={out}").verified(SAME_QCOW2),
    Workload::changing("bitmap-add", BITMAPS, "bitmap --add -g 512 -f qcow2 {out} third")
        .times(5)
        .verified(CLEAN),
    Workload::changing("bitmap-merge", BITMAPS, "bitmap --merge first -f qcow2 {out} second")
        .times(5)
        .verified(CLEAN),
    Workload::once(
        "raw-luks",
        "convert -f raw -O luks --object secret,id=key,file={key} -o key-secret=key,iter-time=10 {raw} {out}",
    )
    .verified(
        "compare -q --object secret,id=key,file={key} --image-opts driver=luks,key-secret=key,file.filename={stock} \
         driver=luks,key-secret=key,file.filename={out}",
    ),
    Workload::once(
        "luks-raw",
        "convert -O raw --object secret,id=key,file={key} \
         --image-opts driver=luks,key-secret=key,file.filename={luks} {out}",
    )
    .verified(SAME_RAW),
    Workload::once(
        "raw-qcow2-luks",
        "convert -f raw -O qcow2 --object secret,id=key,file={key} \
         -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 {raw} {out}",
    )
    .verified(
        "compare -q --object secret,id=key,file={key} \
         --image-opts driver=qcow2,encrypt.key-secret=key,file.filename={stock} \
         driver=qcow2,encrypt.key-secret=key,file.filename={out}",
    ),
    Workload::once(
        "qcow2-luks-raw",
        "convert -O raw --object secret,id=key,file={key} \
         --image-opts driver=qcow2,encrypt.key-secret=key,file.filename={qcow2-luks} {out}",
    )
    .verified(SAME_RAW),
];

/// Names in braces that are not fixtures: files of a run, the fixture that is being created, and lengths.
const NOT_FIXTURES: &[&str] = &["out", "top", "stock", "this", "x16", "x1024"];

/// The names of the fixtures that a command reads.
pub(crate) fn fixtures_of(command: &str) -> impl Iterator<Item = &str> {
    tokens(command).filter_map(|token| match token {
        Token::Name(name) if !NOT_FIXTURES.contains(&name) => Some(name),
        _ => None,
    })
}

/// A token of a command: text, or a name that is replaced.
#[derive(Debug, PartialEq)]
pub(crate) enum Token<'a> {
    Text(&'a str),
    Name(&'a str),
}

/// Splits a command, or a word of it, at the braces.
pub(crate) fn tokens(text: &str) -> impl Iterator<Item = Token<'_>> {
    text.split_inclusive('}').flat_map(|part| {
        let (text, name) = match part.strip_suffix('}').and_then(|part| part.split_once('{')) {
            Some((text, name)) => (text, Some(Token::Name(name))),
            None => (part, None),
        };
        std::iter::once(Token::Text(text)).chain(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::FIXTURES;

    #[test]
    fn names_are_unique() {
        for (index, workload) in WORKLOADS.iter().enumerate() {
            assert!(
                WORKLOADS[..index].iter().all(|other| other.name != workload.name),
                "{}",
                workload.name
            );
        }
    }

    #[test]
    fn both_programs_wait_for_the_disk_or_neither() {
        let command = |command| Workload::once("x", command).with(" -c").ours();
        assert_eq!(command("convert {raw} {out}"), "convert {raw} {out} -c -t unsafe");
        assert_eq!(command("convert -t writeback a b"), "convert -t writeback a b -c");
        assert_eq!(command("dd if={raw} of={out}"), "dd if={raw} of={out} -c");
    }

    #[test]
    fn every_file_read_is_a_fixture() {
        for workload in WORKLOADS.iter().chain([&NOISE]) {
            for name in workload.fixtures() {
                assert!(
                    FIXTURES.iter().any(|fixture| fixture.name == name),
                    "{}: {name}",
                    workload.name
                );
            }
        }
    }

    #[test]
    fn names_in_braces_are_found_within_words() {
        assert_eq!(
            tokens("if={raw},x").collect::<Vec<_>>(),
            [Token::Text("if="), Token::Name("raw"), Token::Text(",x")]
        );
        assert_eq!(fixtures_of("dd if={raw} of={out}").collect::<Vec<_>>(), ["raw"]);
    }
}
