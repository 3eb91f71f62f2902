//! The directories and files of the host, and their clusters.
//!
//! Directories are read breadth first, in the order of the host. Clusters are allocated in the order of the queue:
//! first for a directory, later for its entries. So the runs are in ascending order.
//!
//! ```text
//!   queue   root ─► a/  f  b/ ─► a/x  b/y ...        pop: read, allocate a run, write its start into the parent's entry
//!   runs    [root][a/][f][b/][a/x][b/y] ...
//! ```

use std::collections::VecDeque;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use diskimage_core::{Budget, Error, ErrorKind, Note, OpenContext, Reservation, Result, name};

use super::entry::{self, ENTRY, Label, Stamp, Times, long_name, set_cluster};
use super::geometry::{CLUSTER, FatType, Geometry, ROOT_ENTRIES};
use super::name::ShortNames;

/// A scan of a directory, with its parameters.
#[derive(Debug)]
pub(super) struct DirectoryScan<'a> {
    pub(super) dir: &'a Path,
    pub(super) geometry: Geometry,
    pub(super) label: &'a Label,
    pub(super) context: &'a OpenContext,
}

/// All directories and files that have clusters.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) geometry: Geometry,
    /// In the order of their clusters, without gaps.
    runs: Vec<ClusterRun>,
    /// The reserved memory.
    _claimed: Vec<Reservation>,
}

/// The contiguous clusters of one directory or file.
#[derive(Debug)]
pub(super) struct ClusterRun {
    pub(super) begin: u32,
    /// The first cluster after the run.
    pub(super) end: u32,
    pub(super) content: Content,
}

/// The contents of a run, followed by zeroes up to its end.
#[derive(Debug)]
pub(super) enum Content {
    /// The entries of a directory.
    Directory(Vec<u8>),
    /// A file of the host.
    File { path: PathBuf, len: u32 },
}

/// A directory or file that has no clusters yet.
struct QueuedEntry {
    path: PathBuf,
    /// The run of the parent directory and the offset of the entry in it; `None` for the root.
    parent_entry: Option<(usize, usize)>,
    /// `None` for a directory.
    len: Option<u32>,
}

/// The entries of a directory, and the offsets of those that need clusters, with path and length.
struct Listing {
    entries: Vec<u8>,
    children: Vec<(usize, PathBuf, Option<u32>)>,
}

impl Tree {
    /// Reads a directory and its subdirectories.
    ///
    /// # Errors
    /// Directories that cannot be read, more data than fits the disk, and more than the memory budget.
    pub(super) fn read(scan: &DirectoryScan<'_>) -> Result<Self> {
        let geometry = scan.geometry;
        let mut claim = MemoryClaim::new(&scan.context.budget);
        let mut runs: Vec<ClusterRun> = Vec::new();
        let mut queue = VecDeque::from([QueuedEntry {
            path: scan.dir.to_owned(),
            parent_entry: None,
            len: None,
        }]);
        while let Some(QueuedEntry {
            path,
            parent_entry,
            len,
        }) = queue.pop_front()
        {
            let index = runs.len();
            let begin = runs.last().map_or(0, |last| last.end);
            let content = match len {
                Some(len) => Content::File { path, len },
                None => {
                    let listing = scan.list(&path, parent_entry.is_none(), &mut claim)?;
                    queue.extend(listing.children.into_iter().map(|(at, path, len)| QueuedEntry {
                        path,
                        parent_entry: Some((index, at)),
                        len,
                    }));
                    Content::Directory(listing.entries)
                }
            };
            let bytes = match &content {
                Content::File { len, .. } => u64::from(*len),
                // The root directory has a fixed size, except on FAT32.
                Content::Directory(_) if parent_entry.is_none() && geometry.fat != FatType::Fat32 => {
                    2 * CLUSTER
                }
                Content::Directory(entries) => entries.len() as u64,
            };
            // Each queued entry needs at least one cluster: this bounds the queue.
            let end = u32::try_from(bytes.div_ceil(CLUSTER))
                .ok()
                .and_then(|clusters| begin.checked_add(clusters))
                .filter(|end| u64::from(*end) + queue.len() as u64 <= u64::from(geometry.end_cluster()))
                .ok_or_else(|| Error::new(ErrorKind::NoSpace, geometry.does_not_fit()))?;
            runs.push(ClusterRun { begin, end, content });
            if let Some((parent, at)) = parent_entry {
                link(&mut runs, index, parent, at);
            }
        }
        Ok(Self {
            geometry,
            runs,
            _claimed: claim.taken,
        })
    }

    /// The run of a cluster, and its index.
    pub(super) fn run(&self, cluster: u32) -> Option<(usize, &ClusterRun)> {
        let index = self.runs.partition_point(|run| run.end <= cluster);
        Some((index, self.runs.get(index)?))
    }

    /// The FAT entry of a cluster.
    pub(super) fn fat_entry(&self, cluster: u32) -> u32 {
        match cluster {
            0 => return self.geometry.media_entry(),
            // On FAT32 cluster 1 can belong to the root directory; qemu-img ends the chain all the same.
            1 => return self.geometry.fat.end_of_chain(),
            _ => {}
        }
        match self.run(cluster) {
            Some((_, run)) if cluster + 1 == run.end => self.geometry.fat.end_of_chain(),
            Some(_) => cluster + 1,
            None => 0,
        }
    }
}

/// Writes the first cluster of a run into its entry in the parent directory and, for a directory, into `.` and `..`.
fn link(runs: &mut [ClusterRun], index: usize, parent: usize, at: usize) {
    let begin = runs[index].begin;
    let parent_begin = runs[parent].begin;
    if let Content::Directory(entries) = &mut runs[parent].content {
        set_cluster(&mut entries[at..at + ENTRY], begin);
    }
    if let Content::Directory(entries) = &mut runs[index].content {
        let (itself, others) = entries.split_at_mut(ENTRY);
        set_cluster(itself, begin);
        set_cluster(&mut others[..ENTRY], parent_begin);
    }
}

impl DirectoryScan<'_> {
    /// Reads one directory.
    fn list(&self, path: &Path, is_root: bool, claim: &mut MemoryClaim<'_>) -> Result<Listing> {
        let unreadable = || format!("Could not read directory {}", name::of_path(path));
        let opened = path
            .read_dir()
            .map_err(|_| Error::new(ErrorKind::NotFound, unreadable()))?;
        let mut names = ShortNames::default();
        let mut entries = Vec::new();
        if is_root {
            names = ShortNames::with_label(self.label);
            entries.extend(self.label.entry());
        } else {
            for dots in [".", ".."] {
                // As in qemu-img, a failed stat does not omit the entry.
                let times = path
                    .join(dots)
                    .metadata()
                    .map_or_else(|_| self.times_of(None), |metadata| self.times_of(Some(&metadata)));
                let mut name = [b' '; 11];
                name[..dots.len()].copy_from_slice(dots.as_bytes());
                entries.extend(entry::entry(name, &times, None));
            }
        }
        let mut children = Vec::new();
        for found in opened {
            let found = found.map_err(|_| Error::new(ErrorKind::Io, unreadable()))?;
            let name = found.file_name();
            let file = path.join(&name);
            // Symbolic links are followed. Dangling and too deeply nested ones are omitted.
            let Ok(metadata) = file.metadata() else {
                continue;
            };
            let is_directory = metadata.is_dir();
            // Only regular files have contents: reading a pipe could block.
            let len = if metadata.is_file() { metadata.len() } else { 0 };
            let Some(len) = u32::try_from(len).ok().filter(|len| *len <= MAX_FILE) else {
                return Err(Error::new(ErrorKind::NoSpace, unreadable())
                    .notice(format!("File {} is larger than 2GB", name::of_path(&file))));
            };
            claim.take(name.len() * 2 * ENTRY / 13 + PER_ENTRY + file.as_os_str().len())?;
            let short = names.add(name.as_bytes())?;
            match name.to_str() {
                Some(name) => entries.extend(long_name(name, &short).concat()),
                None => self.context.tell(&Note::Line(format!(
                    "vvfat: invalid UTF-8 name: {}",
                    name::from_os(&name)
                ))),
            }
            let at = entries.len();
            let times = self.times_of(Some(&metadata));
            entries.extend(entry::entry(short, &times, (!is_directory).then_some(len)));
            if is_root && entries.len() > usize::from(ROOT_ENTRIES) * ENTRY {
                return Err(
                    Error::new(ErrorKind::NoSpace, unreadable()).notice("Too many entries in root directory")
                );
            }
            if entries.len() > MAX_DIRECTORY {
                return Err(Error::new(ErrorKind::Limit, unreadable()).notice(format!(
                    "More than {} entries in a directory",
                    MAX_DIRECTORY / ENTRY
                )));
            }
            if is_directory {
                children.push((at, file, None));
            } else if len > 0 {
                children.push((at, file, Some(len)));
            }
        }
        Ok(Listing { entries, children })
    }

    fn times_of(&self, metadata: Option<&Metadata>) -> Times {
        let stamp = |seconds: Option<i64>| Stamp::new(self.context.local_time.at(seconds.unwrap_or(0)));
        Times {
            created: stamp(metadata.map(MetadataExt::ctime)),
            accessed: stamp(metadata.map(MetadataExt::atime)),
            written: stamp(metadata.map(MetadataExt::mtime)),
        }
    }
}

/// The limit of `qemu-img` for the length of a file; a FAT allows twice as much.
const MAX_FILE: u32 = 0x7fff_ffff;

/// The limit of the entries of one directory in bytes: the size of the largest disk.
const MAX_DIRECTORY: usize = 504 << 20;

/// The memory for an entry besides its names: the entry, the short name in two tables, and the queue.
const PER_ENTRY: usize = 256;

/// Memory for directory entries, reserved from the budget in large chunks.
struct MemoryClaim<'a> {
    budget: &'a Budget,
    taken: Vec<Reservation>,
    left: usize,
}

impl<'a> MemoryClaim<'a> {
    const CHUNK: usize = 1 << 20;

    fn new(budget: &'a Budget) -> Self {
        Self {
            budget,
            taken: Vec::new(),
            left: 0,
        }
    }

    fn take(&mut self, bytes: usize) -> Result<()> {
        if self.left < bytes {
            let chunk = bytes.max(Self::CHUNK);
            self.taken.push(self.budget.reserve(chunk as u64)?);
            self.left = chunk;
        }
        self.left -= bytes;
        Ok(())
    }
}
