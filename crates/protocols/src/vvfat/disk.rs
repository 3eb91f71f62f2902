//! The layout of the disk, and reading it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{
    Device, Error, Limits, Node, OpenContext, Origin, Permissions, Result, ResultExt, View, name,
    saturating_index, saturating_u32,
};

use super::entry::Label;
use super::geometry::{CLUSTER, FatType, Sector};
use super::tree::{ClusterRun, Content, Tree};

/// A directory of the host as a disk.
pub(super) struct Disk {
    node: Node,
    master_boot_record: Sector,
    boot_sector: Sector,
    tree: Tree,
    context: OpenContext,
    files: OpenFiles,
    limits: Limits,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Disk {
    #[expect(clippy::needless_pass_by_value, reason = "the label is not needed afterwards")]
    pub(super) fn new(node: Node, label: Label, tree: Tree, context: OpenContext) -> Self {
        Self {
            node,
            master_boot_record: tree.geometry.master_boot_record(),
            boot_sector: tree.geometry.boot_sector_bytes(&label),
            tree,
            context,
            files: OpenFiles::default(),
            limits: Limits::default(),
        }
    }

    /// Fills the start of `buf` with the bytes at `offset`. Returns their number, which is not 0 for an offset inside
    /// the disk.
    fn read_some(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let geometry = &self.tree.geometry;
        let (boot_sector, fats, root) = (geometry.boot_sector(), geometry.fats(), geometry.root());
        if offset < boot_sector {
            let len = clamp_len(buf, boot_sector - offset);
            fill(&mut buf[..len], &self.master_boot_record, offset);
            Ok(len)
        } else if offset < fats {
            let len = clamp_len(buf, fats - offset);
            fill(&mut buf[..len], &self.boot_sector, offset - boot_sector);
            Ok(len)
        } else if offset < root {
            let at = (offset - fats) % geometry.fat_len();
            let len = clamp_len(buf, geometry.fat_len() - at);
            for (at, byte) in (at..).zip(&mut buf[..len]) {
                *byte = self.fat_byte(at);
            }
            Ok(len)
        } else {
            self.read_cluster(buf, offset - root)
        }
    }

    /// The byte of a FAT at offset `at`.
    fn fat_byte(&self, at: u64) -> u8 {
        let entry = |index: u64| u32::try_from(index).map_or(0, |index| self.tree.fat_entry(index));
        let pick = |value: u32, at: u64| (value >> (8 * at)).to_le_bytes()[0];
        match self.tree.geometry.fat {
            FatType::Fat12 => {
                // FAT12 packs two entries into three bytes.
                let pair = at / 3 * 2;
                pick(entry(pair) | (entry(pair + 1) << 12), at % 3)
            }
            FatType::Fat16 => pick(entry(at / 2), at % 2),
            FatType::Fat32 => pick(entry(at / 4), at % 4),
        }
    }

    /// As [`Disk::read_some`], with `offset` from the start of cluster 0.
    fn read_cluster(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let cluster = saturating_u32(offset / CLUSTER);
        let Some((index, run)) = self.tree.run(cluster) else {
            buf.fill(0);
            return Ok(buf.len());
        };
        let start = u64::from(run.begin) * CLUSTER;
        let len = clamp_len(buf, u64::from(run.end) * CLUSTER - offset);
        let (buf, at) = (&mut buf[..len], offset - start);
        match &run.content {
            Content::Directory(entries) => fill(buf, entries, at),
            Content::File { len, .. } => {
                let data_len = clamp_len(buf, u64::from(*len).saturating_sub(at));
                let (bytes, rest) = buf.split_at_mut(data_len);
                rest.fill(0);
                if !bytes.is_empty() {
                    self.file(index, run)?.read_at(bytes, at)?;
                }
            }
        }
        Ok(len)
    }

    /// The file of a run, which is opened if it is not in the cache.
    fn file(&self, index: usize, run: &ClusterRun) -> Result<Arc<dyn Device>> {
        let Content::File { path, .. } = &run.content else {
            return Err(Error::invalid("A directory is no file"));
        };
        if let Some(file) = self.files.find(index) {
            return Ok(file);
        }
        let name = name::of_path(path);
        // The user names the directory.
        let opened = self
            .context
            .open_data(&name, &name, Origin::STATED, Permissions::FORCE_SHARE);
        let file = opened.context(|| format!("Could not read '{name}'"))?;
        self.files.keep(index, Arc::clone(&file));
        Ok(file)
    }
}

/// The smaller one of the length of `buf` and `bytes`.
fn clamp_len(buf: &[u8], bytes: u64) -> usize {
    saturating_index(bytes).min(buf.len())
}

/// Fills `buf` with the bytes of `from` from `offset` on, and with zeroes after their end.
fn fill(buf: &mut [u8], from: &[u8], offset: u64) {
    let source = usize::try_from(offset)
        .ok()
        .and_then(|at| from.get(at..))
        .unwrap_or(&[]);
    let len = source.len().min(buf.len());
    buf[..len].copy_from_slice(&source[..len]);
    buf[len..].fill(0);
}

/// A cache of the files that were opened last, by the index of their run.
#[derive(Debug, Default)]
struct OpenFiles(Mutex<VecDeque<(usize, Arc<dyn Device>)>>);

impl OpenFiles {
    /// The limit, which is the default number of requests in flight.
    const MOST: usize = 8;

    fn find(&self, run: usize) -> Option<Arc<dyn Device>> {
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = files.iter().find(|(index, _)| *index == run)?;
        Some(Arc::clone(&found.1))
    }

    fn keep(&self, run: usize, file: Arc<dyn Device>) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if files.len() >= Self::MOST {
            files.pop_front();
        }
        files.push_back((run, file));
    }
}

impl View for Disk {
    fn len(&self) -> u64 {
        self.tree.geometry.len()
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            done += self.read_some(&mut buf[done..], offset + done as u64)?;
        }
        Ok(())
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}
