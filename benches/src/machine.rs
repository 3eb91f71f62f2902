//! The machine that the figures were measured on.

use std::fs;
use std::path::Path;

use crate::measure::Tool;
use crate::options::Options;
use crate::units::{KIB, mib};

/// The facts of the header, as name and value.
pub(crate) fn facts(options: &Options, stock: &Tool, ours: &Tool, floor: u64) -> Vec<(&'static str, String)> {
    let tool = |tool: &Tool| format!("{} ({})", tool.version, tool.path().display());
    vec![
        ("stock", tool(stock)),
        ("ours", tool(ours)),
        ("processor", format!("{}, {} cores", processor(), cores())),
        ("memory", memory()),
        (
            "system",
            format!(
                "Linux {}, work directory on {}",
                kernel(),
                filesystem(&options.work)
            ),
        ),
        (
            "method",
            format!(
                "input {} MiB, 1 warm-up and {} runs of each side in turn, page cache warm; least time counts",
                options.size / KIB / KIB,
                options.runs
            ),
        ),
        (
            "memory floor",
            format!("{} MiB: no peak below this can be told apart", mib(floor)),
        ),
    ]
}

/// The number of threads that can run at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    field(&text, "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn memory() -> String {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kibibytes = field(&text, "MemTotal").and_then(|value| value.split(' ').next()?.parse::<f64>().ok());
    kibibytes.map_or_else(
        || "unknown".into(),
        |kib| format!("{:.1} GiB", kib / (KIB * KIB) as f64),
    )
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "?".into(), |text| text.trim().to_owned())
}

fn filesystem(directory: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let directory = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
    mount_type(&mounts, &directory).unwrap_or_else(|| "an unknown file system".into())
}

/// The type of the file system of `directory`: that of the longest mount point which is a prefix of it, the last of
/// several.
fn mount_type(mounts: &str, directory: &Path) -> Option<String> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            Some((words.next()?, words.next()?))
        })
        .filter(|(point, _)| directory.starts_with(point))
        .max_by_key(|(point, _)| point.len())
        .map(|(_, kind)| kind.to_owned())
}

/// The value of the first line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_of_a_proc_file() {
        assert_eq!(
            field("a\t: 1\nmodel name\t: EPYC\n", "model name").as_deref(),
            Some("EPYC")
        );
        assert_eq!(field("a: 1\n", "b"), None);
    }

    #[test]
    fn the_longest_mount_point_counts() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/b /tmp/x xfs rw 0 0\n";
        assert_eq!(mount_type(mounts, Path::new("/tmp/x/y")).as_deref(), Some("xfs"));
        assert_eq!(mount_type(mounts, Path::new("/tmpfile")).as_deref(), Some("ext4"));
    }
}
