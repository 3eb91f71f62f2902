//! The header of another version, or with another extension, in the same cluster.
//!
//! Sectors behind the first are written and made durable before the first one, in a place that the old header does not
//! use: whichever first sector a crash leaves leads to what belongs to it.

use diskimage_core::{Error, Result};

use super::super::header::{HEADER_LEN, Header, V2_LEN, field};
use super::super::{Qcow2, create::MIN_CLUSTER_FOR_NAMES, extension};

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

impl Qcow2 {
    /// Makes the image one of `version`, whose features are those that all images of it have.
    pub(super) fn rewrite_header(&self, version: u32) -> Result<()> {
        self.replace_header(|old| {
            let names = version >= 3 && old.cluster_len as u64 >= MIN_CLUSTER_FOR_NAMES;
            let mut head = old.head.to_vec();
            head.resize(if version >= 3 { HEADER_LEN } else { V2_LEN }, 0);
            head[4..8].copy_from_slice(&version.to_be_bytes());
            if version >= 3 {
                head[V2_LEN..].fill(0);
                let order = self.header.geometry.refcount_order;
                head[96..100].copy_from_slice(&order.to_be_bytes());
                head[100..104].copy_from_slice(&112u32.to_be_bytes());
            }
            let with = |names| extension::with_names(old.extensions, names);
            (head, vec![with(names), with(false)])
        })
    }

    /// Gives the data file another name, which is not looked for.
    pub(super) fn rename_data_file(&self, name: &str) -> Result<()> {
        self.replace_header(|old| {
            let area = extension::with_data_file(old.extensions, name);
            let short = extension::with_names(&area, false);
            (old.head.to_vec(), vec![area, short])
        })
    }

    /// Writes the header that `change` makes: its fields, and extensions to choose from, the preferred ones first.
    fn replace_header(&self, change: impl FnOnce(&OldHeader<'_>) -> (Vec<u8>, Vec<Vec<u8>>)) -> Result<()> {
        let len = usize::try_from(self.header.geometry.cluster_size()).unwrap_or(0);
        let mut cluster = vec![0; len];
        self.file.read_padded(&mut cluster, 0)?;
        let old = OldHeader::split(&cluster)?;
        let (head, choices) = change(&old);
        let new = choices
            .iter()
            .filter_map(|extensions| layout(&head, extensions, &old))
            .next()
            .ok_or_else(|| Error::from_errno(diskimage_core::errno::ENOSPC))?;
        let (first, rest) = new.split_at(SECTOR.min(new.len()));
        if !rest.is_empty() {
            self.file.write_at(rest, SECTOR as u64)?;
            self.file.flush()?;
        }
        self.file.write_at(first, 0)?;
        self.file.flush()
    }
}

/// The parts of a header cluster.
struct OldHeader<'a> {
    head: &'a [u8],
    extensions: &'a [u8],
    backing: &'a [u8],
    /// Where what is in use ends.
    end: usize,
    cluster: &'a [u8],
    cluster_len: usize,
}

impl<'a> OldHeader<'a> {
    fn split(cluster: &'a [u8]) -> Result<Self> {
        let cut = || Error::corrupt("Could not read qcow2 header");
        let place = Header::places(cluster)?;
        let head = cluster.get(..place.header_len).ok_or_else(cut)?;
        let area_end = match place.backing.start {
            0 => cluster.len(),
            start => start,
        };
        let extensions = cluster.get(place.header_len..area_end).ok_or_else(cut)?;
        let backing = cluster.get(place.backing.clone()).ok_or_else(cut)?;
        // Padding behind the end marker is not in use.
        let used = extension::with_names(extensions, true).len().min(extensions.len());
        Ok(Self {
            head,
            extensions,
            backing,
            end: place.backing.end.max(place.header_len + used),
            cluster,
            cluster_len: cluster.len(),
        })
    }
}

/// The new cluster, if there is a way to put it beside what the old one has behind its first sector.
fn layout(head: &[u8], extensions: &[u8], old: &OldHeader<'_>) -> Option<Vec<u8>> {
    let end = head.len() + extensions.len();
    let spills = old.end > SECTOR;
    if spills && end > SECTOR {
        return None;
    }
    let mut new = head.to_vec();
    new.extend_from_slice(extensions);
    if spills {
        // What is there stays there until the new first sector leads elsewhere.
        new.resize(SECTOR, 0);
        new.extend_from_slice(old.cluster.get(SECTOR..old.end)?);
    }
    if !old.backing.is_empty() {
        let place = new.len();
        new.extend_from_slice(old.backing);
        let offset = u64::try_from(place).ok()?;
        new.get_mut(8..16)?.copy_from_slice(&offset.to_be_bytes());
    }
    if new.len() > old.cluster_len {
        return None;
    }
    new.resize(old.cluster_len, 0);
    Some(new)
}

const _: () = assert!(field::INCOMPATIBLE == V2_LEN as u64 && HEADER_LEN == 112);
