//! The first cluster: header, extensions, and the name of the backing file. What has to be moved in it is moved so that a
//! crash leaves the old or the new state.
//!
//! ```text
//!   0        header_length          ...                                                     cluster size
//!   | header | extensions, end marker | name of the backing file | zeroes                              |
//! ```
//!
//! A sector is written whole or not at all, several need not be. So where another name is all that changes behind the
//! first sector, it is written beside the old one, and the first sector then leads to it. Any other change that concerns
//! more than the first sector takes a detour over a state that fits into it, if there is room: without the names of
//! features, and with the old backing file's name at the cluster's end, out of the way of everything new.

use std::borrow::Cow;
use std::ops::Range;

use diskimage_core::{Backing, Error, Result, errno, name};

use super::extension::{self, Extension, kind};
use super::feature::Autoclear;
use super::{field, limit};
use crate::qcow2::Qcow2;

/// The first cluster taken apart.
#[derive(Clone, Debug)]
pub(in crate::qcow2) struct FirstCluster {
    header: Vec<u8>,
    extensions: Vec<Extension>,
    backing: Option<Vec<u8>>,
    size: usize,
}

const SECTOR: usize = 512;

impl FirstCluster {
    /// Takes the bytes of a cluster apart.
    ///
    /// # Errors
    /// A header, or a name, that reaches past the cluster.
    pub(in crate::qcow2) fn read(cluster: &[u8]) -> Result<Self> {
        let cut = || Error::corrupt("Could not read qcow2 header");
        let raw = super::raw(cluster)?;
        let start = raw.len();
        let place = name_offset(&raw);
        let end = if place == 0 { cluster.len() } else { place };
        let area = cluster.get(start..end).ok_or_else(cut)?;
        let backing = match place {
            0 => None,
            _ => {
                let len = usize::try_from(raw.backing_file_size.get()).unwrap_or(usize::MAX);
                let name = cluster.get(place..).and_then(|rest| rest.get(..len));
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

    /// Sets the features that writers who do not know them have to disclaim. Version 2 has none.
    pub(in crate::qcow2) fn set_autoclear(&mut self, features: u64) {
        let at = usize::try_from(field::AUTOCLEAR).unwrap_or(usize::MAX);
        if let Some(word) = self.header.get_mut(at..at + 8) {
            word.copy_from_slice(&features.to_be_bytes());
        }
    }

    /// Sets how guest data is encrypted.
    pub(in crate::qcow2) fn set_crypt_method(&mut self, method: u32) {
        if let Some(word) = self.header.get_mut(field::CRYPT_METHOD..field::CRYPT_METHOD + 4) {
            word.copy_from_slice(&method.to_be_bytes());
        }
    }

    /// Sets or takes away an extension; a new one comes last, but the backing file's format first. Of several of a kind,
    /// which readers tell apart by their order at best, one stays.
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
                let place = match kind {
                    kind::BACKING_FORMAT => 0,
                    _ => self.extensions.len(),
                };
                self.extensions.insert(
                    place,
                    Extension {
                        kind,
                        data: data.to_vec(),
                    },
                );
            }
            (None, None) => {}
        }
    }

    /// Makes it the first cluster of an image of `version` without optional features, with refcounts as wide as `order`
    /// says and, if wanted, the names of features.
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
            let (order, len) = (order.to_be_bytes(), u32::try_from(len).unwrap_or(0).to_be_bytes());
            rest[24..28].copy_from_slice(&order);
            rest[28..32].copy_from_slice(&len);
        }
        let table = names.then(extension::name_table);
        self.set_extension(kind::FEATURE_NAMES, table.as_deref());
    }

    /// Names another backing file, or none.
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

    /// The bytes of the cluster, the name right behind the extensions.
    ///
    /// # Errors
    /// No room for all of it.
    pub(in crate::qcow2) fn to_bytes(&self) -> Result<Vec<u8>> {
        self.with_name_at(self.place())
    }

    /// Where extensions end, and the name belongs.
    fn place(&self) -> usize {
        self.header.len() + self.extensions.iter().map(Extension::len).sum::<usize>() + Extension::END
    }

    /// Where the name is in the bytes of a cluster that has it at `place`.
    fn name_at(&self, place: usize) -> Range<usize> {
        place..place + self.backing.as_ref().map_or(0, Vec::len)
    }

    fn with_name_at(&self, place: usize) -> Result<Vec<u8>> {
        let mut bytes = self.header.clone();
        for extension in &self.extensions {
            extension.put(&mut bytes);
        }
        bytes.resize(bytes.len() + Extension::END, 0);
        let full = || Error::from_errno(errno::ENOSPC);
        if bytes.len() > self.size || bytes.len() > place {
            return Err(full());
        }
        bytes.resize(self.size, 0);
        let name = self.backing.as_deref().unwrap_or_default();
        let (offset, len) = match &self.backing {
            Some(name) => (place as u64, u32::try_from(name.len()).unwrap_or(u32::MAX)),
            None => (0, 0),
        };
        bytes
            .get_mut(place..)
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

    /// The same in a form of which everything but the name is in the first sector, and the name at the cluster's end.
    fn compact(&self) -> Option<Vec<u8>> {
        let mut compact = self.clone();
        compact.set_extension(kind::FEATURE_NAMES, None);
        let name = self.backing.as_ref().map_or(0, Vec::len);
        let place = self.size.checked_sub(name)?;
        let bytes = compact.with_name_at(place).ok()?;
        (compact.place() <= SECTOR && (name == 0 || place >= SECTOR)).then_some(bytes)
    }
}

impl Qcow2 {
    /// The first cluster as it is in the file.
    ///
    /// # Errors
    /// As reading the file.
    pub(in crate::qcow2) fn first_cluster(&self) -> Result<Vec<u8>> {
        let mut cluster = vec![0; usize::try_from(self.header.geometry.cluster_size()).unwrap_or(0)];
        self.file.read_padded(&mut cluster, 0)?;
        Ok(cluster)
    }

    /// Names another backing file, or none.
    ///
    /// # Errors
    /// A name without a format or with one that is too long, no room in the first cluster.
    pub(in crate::qcow2) fn name_backing(&self, backing: Option<&Backing>) -> Result<()> {
        let mut state = self.lock();
        self.write_back(&mut state)?;
        // What is said of the image below relies on what was written to this one.
        state.metadata.cache.sync()?;
        if self.header.features.autoclear.has(Autoclear::DATA_FILE_RAW) && backing.is_some() {
            return Err(Error::from_errno(errno::EINVAL));
        }
        let old = self.first_cluster()?;
        let mut cluster = FirstCluster::read(&old)?;
        cluster.set_backing(backing)?;
        let new = cluster.to_bytes()?;
        match SideBySideRename::between(&old, &cluster)? {
            Some(ahead) if only_sector(&old, &new).is_none() => self.write_ahead(&ahead),
            _ => self.write_first_cluster(&old, &new),
        }
    }

    /// Writes the name, durably, before the header that leads to it.
    fn write_ahead(&self, ahead: &SideBySideRename) -> Result<()> {
        let SideBySideRename { between, new, .. } = ahead;
        let write = |bytes: &[u8], range: Range<usize>| {
            let bytes = bytes.get(range.clone()).unwrap_or_default();
            self.file.write_at(bytes, range.start as u64)
        };
        write(between, ahead.name.clone())?;
        self.file.flush()?;
        write(new, 0..SECTOR)?;
        self.file.flush()?;
        // Only to leave nothing behind.
        write(new, ahead.old_name.clone())
    }

    /// Writes a new first cluster, durably. A crash leaves what `old`, the present one, says or what `new` says if
    /// [`is_replaced_at_once`] does; otherwise what stands behind the first sector may be torn.
    ///
    /// # Errors
    /// As writing the file.
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
        match TwoStepRewrite::between(old, new)? {
            Some(TwoStepRewrite { bytes, name }) => {
                file.write_at(&bytes[name..], name as u64)?;
                file.flush()?;
                file.write_at(&bytes[..SECTOR], 0)?;
                file.flush()?;
                write_tail(0..name - SECTOR)?;
                file.write_at(head, 0)?;
                file.flush()?;
                // Only to leave nothing behind.
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

/// Whether [`Qcow2::write_first_cluster`] leaves nothing between `old` and `new` to a crash.
///
/// # Errors
/// An old state that does not hold together.
pub(in crate::qcow2) fn is_replaced_at_once(old: &[u8], new: &[u8]) -> Result<bool> {
    Ok(only_sector(old, new).is_some() || TwoStepRewrite::between(old, new)?.is_some())
}

/// The sector in which alone the two differ; the first one if they are the same.
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

/// A change of the name alone: the new one stands beside the old one before the header leads to it.
struct SideBySideRename {
    /// The old state, and the new name in it.
    between: Vec<u8>,
    new: Vec<u8>,
    /// The whole sectors that the new name is in, and those that the old one was in.
    name: Range<usize>,
    old_name: Range<usize>,
}

impl SideBySideRename {
    /// `None` if more than the name changes behind the first sector, or if there is no room beside the old name.
    fn between(old: &[u8], cluster: &FirstCluster) -> Result<Option<Self>> {
        let old_name = FirstCluster::read(old)?.name_at(name_offset(&super::raw(old)?));
        let canonical = cluster.place();
        Ok([canonical, old_name.end.next_multiple_of(8)]
            .into_iter()
            .find_map(|place| {
                let name = cluster.name_at(place);
                let new = cluster.with_name_at(place).ok()?;
                let mut between = old.to_vec();
                let free = between.get_mut(name.clone())?;
                if name.start < SECTOR || free.iter().any(|byte| *byte != 0) {
                    return None;
                }
                free.copy_from_slice(&new[name.clone()]);
                let mut reached = between.clone();
                reached[..SECTOR].copy_from_slice(&new[..SECTOR]);
                reached[SECTOR.min(old_name.end).max(old_name.start)..old_name.end].fill(0);
                (reached == new).then(|| Self {
                    between,
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

/// Where a header says that the name is.
fn name_offset(header: &super::RawHeader) -> usize {
    usize::try_from(header.backing_file_offset.get()).unwrap_or(usize::MAX)
}

/// What stands in the first cluster between the old state and the new one.
struct TwoStepRewrite {
    bytes: Vec<u8>,
    /// Where the old name is meanwhile.
    name: usize,
}

impl TwoStepRewrite {
    /// `None` if there is no room for it.
    fn between(old: &[u8], new: &[u8]) -> Result<Option<Self>> {
        let cluster = FirstCluster::read(old)?;
        let Some(bytes) = cluster.compact() else {
            return Ok(None);
        };
        let name = bytes.len() - cluster.backing.as_ref().map_or(0, Vec::len);
        // In whole sectors, so that nothing beside it is torn.
        let name = name / SECTOR * SECTOR;
        let is_free = |bytes: &[u8]| {
            bytes
                .get(name..)
                .is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
        };
        Ok((is_free(old) && is_free(new)).then_some(Self { bytes, name }))
    }
}

#[cfg(test)]
mod tests {
    use super::extension;
    use super::*;

    /// The first cluster of an image on top of another.
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
    fn what_is_written_is_read() {
        let bytes = cluster(4096).to_bytes().expect("fits");
        let read = FirstCluster::read(&bytes).expect("readable");
        assert_eq!(read.backing.as_deref(), Some(&b"below"[..]));
        assert_eq!(read.extensions, cluster(4096).extensions);
        assert_eq!(read.to_bytes().expect("fits"), bytes);
    }

    #[test]
    fn of_several_extensions_of_a_kind_one_stays() {
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
    fn a_new_format_comes_first_and_an_extension_is_replaced_where_it_is() {
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
    fn another_name_goes_beside_the_old_one_and_back() {
        let old = cluster(4096).to_bytes().expect("fits");
        let new = renamed(&old, "elsewhere", "qcow2");
        let ahead = SideBySideRename::between(&old, &new)
            .expect("readable")
            .expect("has room");
        let read = |bytes: &[u8]| FirstCluster::read(bytes).expect("readable").backing;
        assert_eq!(read(&ahead.between).as_deref(), Some(&b"below"[..]));
        assert_eq!(read(&ahead.new).as_deref(), Some(&b"elsewhere"[..]));
        let again = SideBySideRename::between(&ahead.new, &renamed(&ahead.new, "below", "raw"));
        let again = again.expect("readable").expect("has room");
        assert_eq!(again.new, old, "the old state, in every byte");
    }

    #[test]
    fn a_header_never_leads_to_half_a_name() {
        let old = cluster(4096).to_bytes().expect("fits");
        let new = renamed(&old, "elsewhere", "qcow2");
        let ahead = SideBySideRename::between(&old, &new)
            .expect("readable")
            .expect("has room");
        // Whatever of the sectors with the old name is wiped, the new header finds the new one.
        let mut torn = ahead.between.clone();
        torn[..SECTOR].copy_from_slice(&ahead.new[..SECTOR]);
        assert_eq!(
            FirstCluster::read(&torn).expect("readable").backing.as_deref(),
            Some(&b"elsewhere"[..])
        );
    }

    #[test]
    fn a_name_with_extensions_that_move_does_not_go_ahead() {
        let old = cluster(4096).to_bytes().expect("fits");
        let new = renamed(&old, "elsewhere", &"x".repeat(100));
        assert!(SideBySideRename::between(&old, &new).expect("readable").is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(cluster(512).to_bytes().is_err());
        let long = Backing {
            name: "x".repeat(1024).into(),
            format: None,
        };
        assert!(cluster(4096).set_backing(Some(&long)).is_err());
    }
}
