//! The table of workloads: what is run, as data.

/// One command that both programs run on the same files.
///
/// Words in braces are files: a fixture's name is that input, `{out}` the output file of the side that runs.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// Run by the stock program before each run, outside the clock: it makes the file that `command` changes.
    pub(crate) before: Option<&'static str>,
    /// What is timed.
    pub(crate) command: &'static str,
    /// How often it is run for one measurement; a command of a few milliseconds is run many times in a row, and the
    /// times shown are their sum.
    pub(crate) repeat: u32,
}

impl Workload {
    const fn once(name: &'static str, command: &'static str) -> Self {
        Self::repeated(name, 1, command)
    }

    const fn repeated(name: &'static str, repeat: u32, command: &'static str) -> Self {
        Self {
            name,
            before: None,
            command,
            repeat,
        }
    }

    const fn changing(name: &'static str, repeat: u32, before: &'static str, command: &'static str) -> Self {
        Self {
            name,
            before: Some(before),
            command,
            repeat,
        }
    }
}

/// What the stock program is compared with itself on, to show how large a ratio noise alone makes.
pub(crate) const NOISE: Workload =
    Workload::once("noise: stock and stock", "convert -f raw -O qcow2 {raw} {out}");

pub(crate) const WORKLOADS: &[Workload] = &[
    Workload::once("raw-qcow2", "convert -f raw -O qcow2 {raw} {out}"),
    Workload::once("qcow2-raw", "convert -f qcow2 -O raw {qcow2} {out}"),
    Workload::once("qcow2-qcow2", "convert -f qcow2 -O qcow2 {qcow2} {out}"),
    Workload::once("raw-zlib", "convert -f raw -O qcow2 -c {raw} {out}"),
    Workload::once(
        "raw-zstd",
        "convert -f raw -O qcow2 -c -o compression_type=zstd {raw} {out}",
    ),
    Workload::once("zlib-raw", "convert -f qcow2 -O raw {zlib} {out}"),
    Workload::once("zstd-raw", "convert -f qcow2 -O raw {zstd} {out}"),
    Workload::repeated("create-small", 50, "create -q -f qcow2 {out} 64M"),
    Workload::repeated("create-1T", 50, "create -q -f qcow2 {out} 1T"),
    Workload::repeated("info", 50, "info {qcow2}"),
    Workload::repeated("info-json", 50, "info --output=json {large}"),
    Workload::once("check-large", "check -q {large}"),
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
        20,
        "create -q -f qcow2 {out} 1G",
        "resize -q -f qcow2 {out} 4T",
    ),
];

/// The fixtures a command reads, by name.
pub(crate) fn fixtures_of(command: &str) -> impl Iterator<Item = &str> {
    command
        .split(' ')
        .filter_map(placeholder)
        .filter(|name| *name != "out" && *name != "this")
}

/// The name between the braces, if this word stands for a file.
pub(crate) fn placeholder(word: &str) -> Option<&str> {
    word.strip_prefix('{')?.strip_suffix('}')
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
    fn every_file_read_is_a_fixture() {
        for workload in WORKLOADS.iter().chain([&NOISE]) {
            for name in fixtures_of(workload.command) {
                assert!(
                    FIXTURES.iter().any(|fixture| fixture.name == name),
                    "{}: {name}",
                    workload.name
                );
            }
        }
    }

    #[test]
    fn a_word_in_braces_is_a_file() {
        assert_eq!(placeholder("{raw}"), Some("raw"));
        assert_eq!(placeholder("raw"), None);
        assert_eq!(fixtures_of("convert {raw} {out}").collect::<Vec<_>>(), ["raw"]);
    }
}
