//! The snapshot table as a check reads it: damaged entries are accepted, and excess entries and extra data are cut.

use diskimage_core::{ByteRange, Error, Note, Repair, Result, errno, name, saturating_u32, to_index};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::Check;
use crate::layer_kit::metadata_guard::Kind;
use crate::layer_kit::offset::ClusterRange;
use crate::qcow2::ImageState;
use crate::qcow2::header::{field, limit};
use crate::qcow2::snapshot::{MAX_EXTRA, MAX_TABLE, RawSnapshot, V3_EXTRA, completed};

/// The snapshot table of a check.
#[derive(Debug, Default)]
pub(super) struct CheckedSnapshots {
    pub(super) entries: Vec<SnapshotEntry>,
    /// The length of the stored table in bytes.
    pub(super) len: u64,
    /// A repaired table must be written.
    changed: bool,
}

/// The fields of an entry that a check needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct SnapshotEntry {
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    /// The host offset of the entry.
    at: u64,
    extra_len: u32,
    id_len: u16,
    name_len: u16,
}

/// Bytes of a name that are printed.
const MAX_SHOWN: u64 = 1024;

impl Check<'_> {
    /// Reads the table. Excess entries are dropped and extra data that is too long is cut if `repair` allows all
    /// repairs; otherwise they end the check.
    pub(super) fn read_snapshot_table(&mut self) -> Result<()> {
        let fix = self.repair == Repair::All;
        let mut count = self.header.nb_snapshots;
        if count > limit::SNAPSHOTS {
            let over = count - limit::SNAPSHOTS;
            if !fix {
                let text = "ERROR snapshot table too large".to_owned();
                return self.unusable_unless(text, remove_all(over));
            }
            self.report_line(format!("Discarding {over} overhanging snapshots"));
            self.report.corruptions_fixed += u64::from(over);
            count = limit::SNAPSHOTS;
        }
        let start = self.header.snapshots_offset;
        let end = start.checked_add(u64::from(count) * limit::SNAPSHOT_ENTRY);
        if count > 0
            && (!start.is_multiple_of(self.geometry.cluster_size())
                || end.is_none_or(|end| i64::try_from(end).is_err()))
        {
            return self.unusable("ERROR snapshot table offset invalid".to_owned(), errno::EINVAL);
        }
        self.read_snapshot_entries(count)?;
        // At most `count` entries were read.
        let kept = saturating_u32(self.snapshots.entries.len());
        if kept != self.header.nb_snapshots {
            self.file
                .write_at(U32::new(kept).as_bytes(), field::NB_SNAPSHOTS)?;
            self.file.flush()?;
        }
        self.complete_entries(fix);
        Ok(())
    }

    fn read_snapshot_entries(&mut self, count: u32) -> Result<()> {
        let fix = self.repair == Repair::All;
        let start = self.header.snapshots_offset;
        let mut at = start;
        // The length of the table after the cuts, to which the limit applies.
        let mut kept: u64 = 0;
        for index in 0..count {
            let mut fixed = [0; size_of::<RawSnapshot>()];
            if let Err(error) = self.file.read_whole(&mut fixed, at) {
                return self.unreadable(&error);
            }
            let raw = RawSnapshot::read_from_bytes(&fixed).map_err(|_| Error::from_errno(errno::EINVAL))?;
            let entry = SnapshotEntry {
                l1_offset: raw.l1_table_offset.get(),
                l1_size: raw.l1_size.get(),
                at,
                extra_len: raw.extra_data_size.get(),
                id_len: raw.id_len.get(),
                name_len: raw.name_len.get(),
            };
            if u64::from(entry.extra_len) > MAX_EXTRA {
                if !fix {
                    let text = format!(
                        "ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry {index}"
                    );
                    let hint = "You can force-remove this extra metadata with qemu-img check -r all";
                    return self.unusable_unless(text, hint.to_owned());
                }
                self.report_line(format!(
                    "Discarding too much extra metadata in snapshot table entry {index} ({} > {MAX_EXTRA})",
                    entry.extra_len
                ));
                self.report.corruptions_fixed += 1;
                self.snapshots.changed = true;
            }
            if let Err(error) = self.file.require(at, entry.len()) {
                return self.unreadable(&error);
            }
            let end = at + entry.len();
            let cut = u64::from(entry.extra_len).saturating_sub(MAX_EXTRA);
            kept = kept.next_multiple_of(8) + entry.len() - cut;
            if kept > MAX_TABLE {
                let over = count - index;
                if !fix {
                    let text =
                        "ERROR failed to read the snapshot table: Snapshot table is too big".to_owned();
                    return self.unusable_unless(text, remove_all(over));
                }
                self.report_line(format!(
                    "Discarding {over} overhanging snapshots (snapshot table is too big)"
                ));
                self.report.corruptions_fixed += u64::from(over);
                break;
            }
            self.snapshots.entries.push(entry);
            self.snapshots.len = end - start;
            at = end.next_multiple_of(8);
        }
        Ok(())
    }

    /// Reports entries without the extra data that version 3 requires. They are completed when the table is written.
    fn complete_entries(&mut self, fix: bool) {
        if self.header.version < 3 {
            return;
        }
        for index in 0..self.snapshots.entries.len() {
            if u64::from(self.snapshots.entries[index].extra_len) < V3_EXTRA {
                self.corruption_or_fix(fix, &format!("snapshot table entry {index} is incomplete"));
                self.snapshots.changed |= fix;
            }
        }
    }

    /// Ends the check: without the table, the clusters of snapshots would count as leaked.
    fn unreadable(&mut self, error: &Error) -> Result<()> {
        let text = format!("ERROR failed to read the snapshot table: {error}");
        self.unusable(text, errno::EIO)
    }

    fn unusable(&mut self, text: String, errno: i32) -> Result<()> {
        self.report_note(&Note::Error(text));
        Err(Error::from_errno(errno))
    }

    /// Ends the check of a table that is too large, which can be made smaller as `hint` says.
    fn unusable_unless(&mut self, text: String, hint: String) -> Result<()> {
        self.report_note(&Note::Several(vec![Note::Error(text), Note::Line(hint)]));
        Err(Error::from_errno(errno::EFBIG))
    }

    /// The size of the disk in the snapshot.
    pub(super) fn snapshot_size(&self, entry: &SnapshotEntry) -> Result<u64> {
        if u64::from(entry.extra_len) < V3_EXTRA {
            return Ok(self.header.size);
        }
        let mut size = [0; 8];
        self.file
            .read_padded(&mut size, entry.at + limit::SNAPSHOT_ENTRY + 8)?;
        Ok(u64::from_be_bytes(size))
    }

    /// A snapshot as messages name it: its ID and its name.
    pub(super) fn snapshot_name(&self, entry: &SnapshotEntry) -> Result<String> {
        let start = entry.at + limit::SNAPSHOT_ENTRY + u64::from(entry.extra_len);
        let id = self.text(start, u64::from(entry.id_len))?;
        let name = self.text(start + u64::from(entry.id_len), u64::from(entry.name_len))?;
        Ok(format!("{id} ({name})"))
    }

    /// Reads text from the file and replaces control characters, so that it can be printed.
    fn text(&self, at: u64, len: u64) -> Result<String> {
        let mut bytes = vec![0; to_index(len.min(MAX_SHOWN))?];
        self.file.read_padded(&mut bytes, at)?;
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
        // On some terminals these bytes are control characters as well.
        let is_control = |c: char| c.is_control() || name::byte_of(c).is_some_and(|byte| byte < 0xa0);
        Ok(name::from_bytes(text)
            .chars()
            .map(|c| if is_control(c) { '\u{fffd}' } else { c })
            .collect())
    }

    /// Writes a repaired table to newly allocated clusters, then frees the old one.
    pub(super) fn write_snapshot_table(&mut self, state: &mut ImageState) -> Result<()> {
        if !self.snapshots.changed {
            return Ok(());
        }
        let table = self.encode_snapshots()?;
        let bits = self.geometry.cluster_bits;
        let metadata = &mut state.metadata;
        metadata.refcounts.set_references(self.image.count_references()?);
        let clusters = (table.len() as u64).div_ceil(self.geometry.cluster_size());
        let offset = metadata.allocate(clusters, Some(Kind::SnapshotTable))?;
        self.file.write_at(&table, offset.get())?;
        metadata.cache.write_back()?;
        metadata.cache.sync()?;
        let mut location = [0; 12];
        let count =
            u32::try_from(self.snapshots.entries.len()).map_err(|_| Error::from_errno(errno::EFBIG))?;
        location[..4].copy_from_slice(U32::new(count).as_bytes());
        location[4..].copy_from_slice(U64::new(offset.get()).as_bytes());
        self.file.write_at(&location, field::NB_SNAPSHOTS)?;
        metadata.cache.sync()?;
        let old = self.header.snapshots_offset;
        if old.saturating_add(self.snapshots.len) <= self.file_len {
            for cluster in ClusterRange::touched(ByteRange::at(old, self.snapshots.len), bits) {
                // The clusters of a damaged table may have a refcount of zero.
                if metadata.count(cluster)? > 0 {
                    metadata.release(ClusterRange::at(cluster, 1).bytes(bits))?;
                }
            }
        }
        metadata.cache.write_back()?;
        metadata.cache.sync()
    }

    fn encode_snapshots(&self) -> Result<Vec<u8>> {
        let mut table = Vec::new();
        for entry in &self.snapshots.entries {
            table.resize(table.len().next_multiple_of(8), 0);
            let mut fixed = [0; size_of::<RawSnapshot>()];
            self.file.read_padded(&mut fixed, entry.at)?;
            let mut raw =
                RawSnapshot::read_from_bytes(&fixed).map_err(|_| Error::from_errno(errno::EINVAL))?;
            let extra_len = u64::from(entry.extra_len).min(MAX_EXTRA);
            let mut extra = vec![0; to_index(extra_len)?];
            self.file
                .read_padded(&mut extra, entry.at + limit::SNAPSHOT_ENTRY)?;
            let extra = completed(&raw, extra, self.header.size);
            // The fields that were read first are kept: a table that overlaps other metadata has changed with it.
            raw.l1_table_offset = U64::new(entry.l1_offset);
            raw.l1_size = U32::new(entry.l1_size);
            raw.id_len = U16::new(entry.id_len);
            raw.name_len = U16::new(entry.name_len);
            // The extra data has at most MAX_EXTRA bytes.
            raw.extra_data_size = U32::new(saturating_u32(extra.len()));
            let mut names = vec![0; usize::from(entry.id_len) + usize::from(entry.name_len)];
            let names_at = entry.at + limit::SNAPSHOT_ENTRY + u64::from(entry.extra_len);
            self.file.read_padded(&mut names, names_at)?;
            table.extend_from_slice(raw.as_bytes());
            table.extend_from_slice(&extra);
            table.extend_from_slice(&names);
        }
        Ok(table)
    }
}

impl SnapshotEntry {
    /// The length of the entry in bytes, without padding.
    fn len(&self) -> u64 {
        limit::SNAPSHOT_ENTRY + u64::from(self.extra_len) + u64::from(self.id_len) + u64::from(self.name_len)
    }
}

fn remove_all(count: u32) -> String {
    format!("You can force-remove all {count} overhanging snapshots with qemu-img check -r all")
}
