//! Confinement of paths, by Landlock.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use diskimage::name;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::Reach;

/// The newest interface of the kernel that the rules are meant for. Of older ones they use what there is.
const KNOWN: ABI = ABI::V7;

/// How many processors the process may use, and the user's time zone.
const SYSTEM: &[&str] = &[
    "/proc/self/cgroup",
    "/proc/self/mountinfo",
    "/sys/fs/cgroup",
    "/etc/localtime",
    "/usr/share/zoneinfo",
];

/// The variables that name the directory of time zones, or the file of one.
const ZONES: &[&str] = &["TZDIR", "TZ"];

/// What the C library reads to resolve the name of a server.
const RESOLVER: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ld.so.cache",
    "/run/systemd/resolve",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];

/// What may be done beneath the directories of images that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writes {
    /// Files are made, written and removed.
    All,
    /// Open files get their names, and others lose theirs; no file is opened for writing.
    Names,
}

/// Why nothing is confined.
#[derive(Debug)]
pub(super) enum Unconfined {
    NoLandlock,
    Failed(RulesetError),
}

impl fmt::Display for Unconfined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLandlock => f.write_str("no Landlock"),
            Self::Failed(error) => write!(f, "Landlock: {error}"),
        }
    }
}

/// Confines the thread to the files of `reach`: reads beneath the directories of all, writes beneath those of the written.
///
/// # Errors
/// What is missing, if nothing is confined.
pub(super) fn confine(reach: &Reach, writes: Writes) -> Result<(), Unconfined> {
    match restrict(reach, writes).map_err(Unconfined::Failed)? {
        RulesetStatus::NotEnforced => Err(Unconfined::NoLandlock),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

fn restrict(reach: &Reach, writes: Writes) -> Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?;
    if !reach.has_network() {
        ruleset = ruleset.handle_access(AccessNet::from_all(KNOWN))?;
    }
    let mut rules = ruleset.create()?;
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let naming = AccessFs::MakeReg | AccessFs::RemoveFile;
    let writing = match writes {
        Writes::All => AccessFs::WriteFile | AccessFs::Truncate,
        Writes::Names => BitFlags::EMPTY,
    };
    for directory in directories_of(reach.read().iter().chain(reach.written())) {
        rules = allow(rules, &directory, reading)?;
    }
    for directory in directories_of(reach.written()) {
        rules = allow(rules, &directory, reading | naming | writing)?;
    }
    // The files themselves: links in the user's names lead out of those directories.
    for file in reach.read() {
        rules = allow(rules, file, AccessFs::ReadFile | AccessFs::IoctlDev)?;
    }
    for file in reach.written() {
        rules = allow(rules, file, writing | AccessFs::ReadFile | AccessFs::IoctlDev)?;
    }
    let resolver = RESOLVER.iter().filter(|_| reach.has_network());
    for path in SYSTEM.iter().chain(resolver) {
        rules = allow(rules, &name::to_path(path), reading)?;
    }
    for zone in ZONES.iter().filter_map(std::env::var_os) {
        let zone = name::from_os_string(zone);
        let path = zone.strip_prefix(':').unwrap_or(&zone);
        if path.starts_with('/') {
            rules = allow(rules, &name::to_path(path), reading)?;
        }
    }
    Ok(rules.restrict_self()?.ruleset)
}

/// The directories of `files`, those of links and those that the links lead to.
fn directories_of<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> BTreeSet<PathBuf> {
    let mut directories = BTreeSet::new();
    for file in files {
        if is_device(file) {
            continue;
        }
        let directory = directory_of(file);
        match (file.canonicalize(), file.read_link()) {
            (Ok(real), Ok(_)) => drop(directories.insert(directory_of(&real))),
            // It leads to a file that is going to be made.
            (Err(_), Ok(link)) => drop(directories.insert(directory_of(&directory.join(link)))),
            (_, Err(_)) => {}
        }
        directories.insert(directory);
    }
    directories
}

fn directory_of(file: &Path) -> PathBuf {
    match file.parent() {
        // `fat:/` and the like: a directory is itself the disk.
        _ if file.is_dir() => file.to_owned(),
        Some(directory) if !directory.as_os_str().is_empty() => directory.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether nothing beside `file` belongs to an image: a device, or a file that the kernel names by its descriptor.
fn is_device(file: &Path) -> bool {
    file.starts_with("/dev") || file.starts_with("/proc")
}

/// Allows `access` beneath `path`, as far as there is such a file and the access makes sense for it.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: impl Into<BitFlags<AccessFs>>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(handle) = PathFd::new(path) else {
        return Ok(rules);
    };
    let access = access.into();
    let access = match path.is_dir() {
        true => access & !AccessFs::IoctlDev,
        false => access & AccessFs::from_file(KNOWN),
    };
    rules.add_rule(PathBeneath::new(handle, access))
}
