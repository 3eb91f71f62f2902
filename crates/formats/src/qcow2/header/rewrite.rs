//! Rewrites the first cluster: header, extensions and the backing file's name. A crash leaves the old or the new state.
//!
//! ```text
//!   0        header_length          ...                                                     cluster size
//!   | header | extensions, end marker | name of the backing file | zeroes                              |
//! ```
//!
//! The write of one sector is atomic, the write of several is not. If only the name changes beyond the first sector
//! ([`SideBySideRename`]), the new name is written next to the old one, and then the first sector, which points to it.
//! Any other change of more than the first sector takes two steps ([`TwoStepRewrite`]), if the cluster has room. The
//! first step writes an intermediate state that fits into the first sector: it has no feature name table, and the old
//! backing file's name is at the cluster's end, where it does not overlap the new bytes.

use std::borrow::Cow;
use std::ops::Range;

use diskimage_core::{Backing, Error, Result, errno, name, saturating_index, saturating_u32, to_index};

use super::extension::{self, Extension, kind};
use super::feature::Autoclear;
use super::{field, limit};
use crate::qcow2::Qcow2;

/// The parsed first cluster.
#[derive(Clone, Debug)]
pub(in crate::qcow2) struct FirstCluster {
    header: Vec<u8>,
    extensions: Vec<Extension>,
    backing: Option<Vec<u8>>,
    size: usize,
}

const SECTOR: usize = 512;

impl FirstCluster {
    /// Parses the bytes of a cluster.
    ///
    /// # Errors
    /// A header or a name that reaches past the cluster.
    pub(in crate::qcow2) fn read(cluster: &[u8]) -> Result<Self> {
        let cut = || Error::corrupt("Could not read qcow2 header");
        let raw = super::raw(cluster)?;
        let start = raw.len();
        let name_at = name_offset(&raw)?;
        let end = if name_at == 0 { cluster.len() } else { name_at };
        let area = cluster.get(start..end).ok_or_else(cut)?;
        let backing = match name_at {
            0 => None,
            _ => {
                let len = to_index(u64::from(raw.backing_file_size.get()))?;
                let name = cluster.get(name_at..).and_then(|rest| rest.get(..len));
                Some(name.ok_or_else(cut)?.to_vec())
            }
        };
        Ok(Self {
            header: cluster.get(..start).ok_or_else(cut)?.to_vec(),
            extensions: Extension::list(area),
            backing,
            size: cluster.len(),
        })
    }

    /// Sets the autoclear features. A header of version 2 has no such field.
    pub(in crate::qcow2) fn set_autoclear(&mut self, features: u64) {
        // A small constant.
        let at = saturating_index(field::AUTOCLEAR);
        if let Some(bytes) = self.header.get_mut(at..at + 8) {
            bytes.copy_from_slice(&features.to_be_bytes());
        }
    }

    /// Sets the encryption method.
    pub(in crate::qcow2) fn set_crypt_method(&mut self, method: u32) {
        if let Some(bytes) = self.header.get_mut(field::CRYPT_METHOD..field::CRYPT_METHOD + 4) {
            bytes.copy_from_slice(&method.to_be_bytes());
        }
    }

    /// Sets or removes an extension. A new one has the place that [`rank`] gives it. Of several extensions of one kind
    /// only one remains.
    pub(in crate::qcow2) fn set_extension(&mut self, kind: u32, data: Option<&[u8]>) {
        let at = self
            .extensions
            .iter()
            .position(|extension| extension.kind == kind);
        let mut found = false;
        self.extensions
            .retain(|extension| extension.kind != kind || !std::mem::replace(&mut found, true));
        match (at, data) {
            (Some(at), Some(data)) => self.extensions[at].data = data.to_vec(),
            (Some(at), None) => drop(self.extensions.remove(at)),
            (None, Some(data)) => {
                let position = self
                    .extensions
                    .iter()
                    .position(|extension| rank(extension.kind) > rank(kind))
                    .unwrap_or(self.extensions.len());
                self.extensions.insert(
                    position,
                    Extension {
                        kind,
                        data: data.to_vec(),
                    },
                );
            }
            (None, None) => {}
        }
    }

    /// Converts the header to `version`, without optional features and with the refcount order `order`. `names` adds
    /// the feature name table.
    pub(in crate::qcow2) fn set_version(&mut self, version: u32, order: u32, names: bool) {
        let len = if version >= 3 {
            super::HEADER_LEN
        } else {
            super::V2_LEN
        };
        self.header.resize(len, 0);
        self.header[4..8].copy_from_slice(&version.to_be_bytes());
        if let Some(rest) = self
            .header
            .get_mut(super::V2_LEN..)
            .filter(|rest| !rest.is_empty())
        {
            rest.fill(0);
            // The length is one of two small constants.
            let (order, len) = (order.to_be_bytes(), saturating_u32(len).to_be_bytes());
            rest[24..28].copy_from_slice(&order);
            rest[28..32].copy_from_slice(&len);
        }
        let table = names.then(extension::name_table);
        self.set_extension(kind::FEATURE_NAMES, table.as_deref());
    }

    /// Sets or removes the backing file.
    ///
    /// # Errors
    /// A name that is too long.
    pub(in crate::qcow2) fn set_backing(&mut self, backing: Option<&Backing>) -> Result<()> {
        let name = backing.map(|backing| backing.name.to_bytes());
        if name
            .as_ref()
            .is_some_and(|name| name.len() as u64 > u64::from(limit::BACKING_NAME))
        {
            return Err(Error::from_errno(errno::EINVAL));
        }
        let format = backing.and_then(|backing| backing.format.as_deref());
        self.set_extension(kind::BACKING_FORMAT, format.map(name::to_bytes).as_deref());
        self.backing = name.map(Cow::into_owned);
        Ok(())
    }

    /// Encodes the cluster with the name directly behind the extensions.
    ///
    /// # Errors
    /// The cluster is too small for all of it.
    pub(in crate::qcow2) fn to_bytes(&self) -> Result<Vec<u8>> {
        self.with_name_at(self.extensions_end())
    }

    /// The end of the extensions, where the name is by default.
    fn extensions_end(&self) -> usize {
        self.header.len() + self.extensions.iter().map(Extension::len).sum::<usize>() + Extension::END
    }

    /// The range of the name if it starts at `start`.
    fn name_range(&self, start: usize) -> Range<usize> {
        start..start + self.backing.as_ref().map_or(0, Vec::len)
    }

    fn with_name_at(&self, start: usize) -> Result<Vec<u8>> {
        let mut bytes = self.header.clone();
        for extension in &self.extensions {
            extension.put(&mut bytes);
        }
        bytes.resize(bytes.len() + Extension::END, 0);
        let full = || Error::from_errno(errno::ENOSPC);
        if bytes.len() > self.size || bytes.len() > start {
            return Err(full());
        }
        bytes.resize(self.size, 0);
        let name = self.backing.as_deref().unwrap_or_default();
        let (offset, len) = match &self.backing {
            // The name fits in a cluster, which has at most 2 MiB.
            Some(name) => (start as u64, saturating_u32(name.len())),
            None => (0, 0),
        };
        bytes
            .get_mut(start..)
            .and_then(|rest| rest.get_mut(..name.len()))
            .ok_or_else(full)?
            .copy_from_slice(name);
        for (field, value) in [
            (field::BACKING_FILE_OFFSET, &offset.to_be_bytes()[..]),
            (field::BACKING_FILE_SIZE, &len.to_be_bytes()),
        ] {
            bytes
                .get_mut(field..field + value.len())
                .ok_or_else(full)?
                .copy_from_slice(value);
        }
        Ok(bytes)
    }

    /// Encodes the intermediate state of a two-step rewrite: everything but the name is in the first sector, the name
    /// is at the cluster's end. `None` if it does not fit.
    fn compact(&self) -> Option<Vec<u8>> {
        let mut compact = self.clone();
        compact.set_extension(kind::FEATURE_NAMES, None);
        let name = self.backing.as_ref().map_or(0, Vec::len);
        let start = self.size.checked_sub(name)?;
        let bytes = compact.with_name_at(start).ok()?;
        (compact.extensions_end() <= SECTOR && (name == 0 || start >= SECTOR)).then_some(bytes)
    }
}

impl Qcow2 {
    /// Reads the first cluster.
    ///
    /// # Errors
    /// A failed read.
    pub(in crate::qcow2) fn first_cluster(&self) -> Result<Vec<u8>> {
        let mut cluster = vec![0; to_index(self.header.geometry.cluster_size())?];
        self.file.read_padded(&mut cluster, 0)?;
        Ok(cluster)
    }

    /// Sets or removes the backing file's name and format in the header.
    ///
    /// # Errors
    /// A name that is too long, a first cluster without room for it, failed reads and writes.
    pub(in crate::qcow2) fn set_backing_impl(&self, backing: Option<&Backing>) -> Result<()> {
        let mut state = self.lock();
        self.write_back(&mut state)?;
        // The new backing image may lack data that was just written to this one: that data must be durable first.
        state.metadata.cache.sync()?;
        if self.header.features.autoclear.has(Autoclear::DATA_FILE_RAW) && backing.is_some() {
            return Err(Error::from_errno(errno::EINVAL));
        }
        let old = self.first_cluster()?;
        let mut cluster = FirstCluster::read(&old)?;
        cluster.set_backing(backing)?;
        let new = cluster.to_bytes()?;
        match SideBySideRename::new(&old, &cluster)? {
            Some(rename) if only_sector(&old, &new).is_none() => self.write_side_by_side(&rename),
            _ => self.write_first_cluster(&old, &new),
        }
    }

    /// Writes the new name and flushes before it writes the header that points to it.
    fn write_side_by_side(&self, rename: &SideBySideRename) -> Result<()> {
        let SideBySideRename { both_names, new, .. } = rename;
        let write = |bytes: &[u8], range: Range<usize>| {
            let bytes = bytes.get(range.clone()).unwrap_or_default();
            self.file.write_at(bytes, range.start as u64)
        };
        write(both_names, rename.name.clone())?;
        self.file.flush()?;
        write(new, 0..SECTOR)?;
        self.file.flush()?;
        // Erases the old name, to which nothing points any more.
        write(new, rename.old_name.clone())
    }

    /// Writes a new first cluster and flushes it. `old` is the present one. If [`is_atomic_rewrite`] is true for the
    /// two, a crash leaves the state of `old` or of `new`; otherwise the bytes beyond the first sector may be torn.
    ///
    /// # Errors
    /// A failed write.
    pub(in crate::qcow2) fn write_first_cluster(&self, old: &[u8], new: &[u8]) -> Result<()> {
        let file = &*self.file;
        if let Some(sector) = only_sector(old, new) {
            file.write_at(&new[sector.clone()], sector.start as u64)?;
            return file.flush();
        }
        let (head, tail) = new.split_at(SECTOR.min(new.len()));
        let write_tail = |range: Range<usize>| match tail.get(range.clone()) {
            Some(bytes)
                if !bytes.is_empty() && old.get(SECTOR + range.start..SECTOR + range.end) != Some(bytes) =>
            {
                file.write_at(bytes, (SECTOR + range.start) as u64)?;
                file.flush()
            }
            _ => Ok(()),
        };
        match TwoStepRewrite::new(old, new)? {
            Some(TwoStepRewrite { bytes, name }) => {
                file.write_at(&bytes[name..], name as u64)?;
                file.flush()?;
                file.write_at(&bytes[..SECTOR], 0)?;
                file.flush()?;
                write_tail(0..name - SECTOR)?;
                file.write_at(head, 0)?;
                file.flush()?;
                // Erases the old name, to which nothing points any more.
                file.write_at(&new[name..], name as u64)
            }
            None => {
                write_tail(0..tail.len())?;
                file.write_at(head, 0)?;
                file.flush()
            }
        }
    }
}

/// Whether [`Qcow2::write_first_cluster`] replaces `old` with `new` so that a crash leaves one of the two states.
///
/// # Errors
/// An old cluster that cannot be parsed.
pub(in crate::qcow2) fn is_atomic_rewrite(old: &[u8], new: &[u8]) -> Result<bool> {
    Ok(only_sector(old, new).is_some() || TwoStepRewrite::new(old, new)?.is_some())
}

/// The only sector in which the two differ; the first sector if they are equal; `None` if several differ.
fn only_sector(old: &[u8], new: &[u8]) -> Option<Range<usize>> {
    let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
    let mut differing = sectors.filter(|(_, (old, new))| old != new);
    let sector = differing.next().map_or(0, |(sector, _)| sector);
    let start = sector * SECTOR;
    differing
        .next()
        .is_none()
        .then(|| start..(start + SECTOR).min(new.len()))
}

/// A change of the name alone: the new name is next to the old one before the header points to it.
struct SideBySideRename {
    /// The old cluster with the new name added.
    both_names: Vec<u8>,
    new: Vec<u8>,
    /// The new name's range, rounded out to sectors.
    name: Range<usize>,
    /// The old name's range, rounded out to sectors.
    old_name: Range<usize>,
}

impl SideBySideRename {
    /// `None` if more than the name changes beyond the first sector, or if the cluster has no room for both names.
    fn new(old: &[u8], cluster: &FirstCluster) -> Result<Option<Self>> {
        let old_name = FirstCluster::read(old)?.name_range(name_offset(&super::raw(old)?)?);
        let canonical = cluster.extensions_end();
        Ok([canonical, old_name.end.next_multiple_of(8)]
            .into_iter()
            .find_map(|start| {
                let name = cluster.name_range(start);
                let new = cluster.with_name_at(start).ok()?;
                let mut both_names = old.to_vec();
                let free = both_names.get_mut(name.clone())?;
                if name.start < SECTOR || free.iter().any(|byte| *byte != 0) {
                    return None;
                }
                free.copy_from_slice(&new[name.clone()]);
                let mut reached = both_names.clone();
                reached[..SECTOR].copy_from_slice(&new[..SECTOR]);
                reached[SECTOR.min(old_name.end).max(old_name.start)..old_name.end].fill(0);
                (reached == new).then(|| Self {
                    both_names,
                    new,
                    name: whole_sectors(&name),
                    old_name: whole_sectors(&old_name),
                })
            }))
    }
}

fn whole_sectors(range: &Range<usize>) -> Range<usize> {
    range.start / SECTOR * SECTOR..range.end.next_multiple_of(SECTOR)
}

/// The header's offset of the name.
fn name_offset(header: &super::RawHeader) -> Result<usize> {
    to_index(header.backing_file_offset.get())
}

/// The intermediate state of the first cluster between the old and the new one.
struct TwoStepRewrite {
    bytes: Vec<u8>,
    /// The offset of the old name in the intermediate state, rounded down to a sector.
    name: usize,
}

impl TwoStepRewrite {
    /// `None` if the intermediate state does not fit.
    fn new(old: &[u8], new: &[u8]) -> Result<Option<Self>> {
        let cluster = FirstCluster::read(old)?;
        let Some(bytes) = cluster.compact() else {
            return Ok(None);
        };
        let name = bytes.len() - cluster.backing.as_ref().map_or(0, Vec::len);
        // Rounded to sectors, so that the write cannot tear bytes next to the name.
        let name = name / SECTOR * SECTOR;
        let is_free = |bytes: &[u8]| {
            bytes
                .get(name..)
                .is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
        };
        Ok((is_free(old) && is_free(new)).then_some(Self { bytes, name }))
    }
}

/// The position of an extension among the others: qemu-img writes them in this order.
fn rank(kind: u32) -> usize {
    const ORDER: [u32; 5] = [
        kind::BACKING_FORMAT,
        kind::DATA_FILE,
        kind::CRYPTO,
        kind::FEATURE_NAMES,
        kind::BITMAPS,
    ];
    ORDER
        .iter()
        .position(|known| *known == kind)
        .unwrap_or(ORDER.len())
}

#[cfg(test)]
mod tests {
    use super::extension;
    use super::*;

    /// The first cluster of an overlay.
    fn cluster(size: usize) -> FirstCluster {
        let mut header = vec![0; crate::qcow2::header::HEADER_LEN];
        header[..4].copy_from_slice(&crate::qcow2::header::MAGIC.to_be_bytes());
        header[7] = 3;
        header[103] = 112;
        FirstCluster {
            header,
            extensions: Extension::list(&extension::write(true, Some("raw"), None)),
            backing: Some(b"below".to_vec()),
            size,
        }
    }

    #[test]
    fn new_extensions_have_the_order_of_qemu_img() {
        let unknown = 0x1234_5678;
        let all = [
            kind::BACKING_FORMAT,
            kind::DATA_FILE,
            kind::CRYPTO,
            kind::FEATURE_NAMES,
            kind::BITMAPS,
            unknown,
        ];
        for first in 0..all.len() {
            let mut cluster = cluster(4096);
            cluster.extensions.clear();
            for index in (first..all.len()).chain(0..first) {
                cluster.set_extension(all[index], Some(b"data"));
            }
            let found: Vec<u32> = cluster.extensions.iter().map(|one| one.kind).collect();
            assert_eq!(found, all);
        }
    }

    #[test]
    fn an_encoded_cluster_parses() {
        let bytes = cluster(4096).to_bytes().expect("fits");
        let read = FirstCluster::read(&bytes).expect("readable");
        assert_eq!(read.backing.as_deref(), Some(&b"below"[..]));
        assert_eq!(read.extensions, cluster(4096).extensions);
        assert_eq!(read.to_bytes().expect("fits"), bytes);
    }

    #[test]
    fn of_several_extensions_of_one_kind_one_remains() {
        let mut cluster = cluster(4096);
        cluster.extensions.push(Extension {
            kind: kind::BACKING_FORMAT,
            data: b"foo".to_vec(),
        });
        cluster.set_extension(kind::BACKING_FORMAT, Some(b"qcow2"));
        let formats = cluster.extensions.iter();
        let formats: Vec<_> = formats
            .filter(|other| other.kind == kind::BACKING_FORMAT)
            .collect();
        assert_eq!(formats.len(), 1);
        assert_eq!(formats[0].data, b"qcow2");
    }

    #[test]
    fn a_new_format_comes_first_and_an_extension_is_replaced_in_place() {
        let mut cluster = cluster(4096);
        cluster.set_extension(kind::BITMAPS, Some(&[1; 24]));
        cluster.set_backing(None).expect("no name");
        let kinds = |cluster: &FirstCluster| cluster.extensions.iter().map(|e| e.kind).collect::<Vec<_>>();
        assert_eq!(kinds(&cluster), [kind::FEATURE_NAMES, kind::BITMAPS]);
        let backing = Backing {
            name: "x".into(),
            format: Some("qcow2".to_owned()),
        };
        cluster.set_backing(Some(&backing)).expect("a short name");
        cluster.set_extension(kind::FEATURE_NAMES, Some(&[]));
        assert_eq!(
            kinds(&cluster),
            [kind::BACKING_FORMAT, kind::FEATURE_NAMES, kind::BITMAPS]
        );
    }

    fn renamed(old: &[u8], name: &str, format: &str) -> FirstCluster {
        let mut cluster = FirstCluster::read(old).expect("readable");
        let backing = Backing {
            name: name.into(),
            format: Some(format.to_owned()),
        };
        cluster.set_backing(Some(&backing)).expect("a short name");
        cluster
    }

    #[test]
    fn renaming_there_and_back_restores_every_byte() {
        let old = cluster(4096).to_bytes().expect("fits");
        let new = renamed(&old, "elsewhere", "qcow2");
        let rename = SideBySideRename::new(&old, &new)
            .expect("readable")
            .expect("has room");
        let read = |bytes: &[u8]| FirstCluster::read(bytes).expect("readable").backing;
        assert_eq!(read(&rename.both_names).as_deref(), Some(&b"below"[..]));
        assert_eq!(read(&rename.new).as_deref(), Some(&b"elsewhere"[..]));
        let again = SideBySideRename::new(&rename.new, &renamed(&rename.new, "below", "raw"));
        let again = again.expect("readable").expect("has room");
        assert_eq!(again.new, old, "every byte of the old state");
    }

    #[test]
    fn a_torn_erasure_of_the_old_name_keeps_the_new_one() {
        let old = cluster(4096).to_bytes().expect("fits");
        let new = renamed(&old, "elsewhere", "qcow2");
        let rename = SideBySideRename::new(&old, &new)
            .expect("readable")
            .expect("has room");
        // The new header points to the new name, however much of the old name was erased.
        let mut torn = rename.both_names.clone();
        torn[..SECTOR].copy_from_slice(&rename.new[..SECTOR]);
        assert_eq!(
            FirstCluster::read(&torn).expect("readable").backing.as_deref(),
            Some(&b"elsewhere"[..])
        );
    }

    #[test]
    fn a_rename_that_moves_extensions_is_not_side_by_side() {
        let old = cluster(4096).to_bytes().expect("fits");
        let new = renamed(&old, "elsewhere", &"x".repeat(100));
        assert!(SideBySideRename::new(&old, &new).expect("readable").is_none());
    }

    #[test]
    fn clusters_and_names_that_do_not_fit_are_refused() {
        assert!(cluster(512).to_bytes().is_err());
        let long = Backing {
            name: "x".repeat(1024).into(),
            format: None,
        };
        assert!(cluster(4096).set_backing(Some(&long)).is_err());
    }
}
