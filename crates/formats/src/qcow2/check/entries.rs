//! The entries of an L2 table: what they refer to, and what is wrong with them.

use std::sync::Arc;

use diskimage_core::{ByteRange, Encoded, Repair, Result};

use super::Check;
use crate::qcow2::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::qcow2::header::feature::Incompatible;

/// Bits of a standard entry that are zero.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// How a table is walked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    /// Where the table is.
    pub(super) table: u64,
    /// References that it stands for.
    pub(super) times: u64,
    /// The part of a disk that the table is for, as far as the disk goes.
    pub(super) disk: ByteRange,
    /// Whether its clusters are in the statistics.
    pub(super) active: bool,
    /// Whether what is wrong was said before.
    pub(super) silent: bool,
}

/// What a standard entry's cluster is, as far as its words tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No host cluster.
    None,
    /// A host cluster with data in it.
    Data,
    /// A host cluster set aside; it reads as zero or is not used yet.
    Preallocated,
}

impl Check<'_> {
    pub(super) fn has_data_file(&self) -> bool {
        self.header.features.incompatible.has(Incompatible::DATA_FILE)
    }

    /// The kind of a standard entry.
    pub(super) fn kind(&self, word: u64, bitmap: u64) -> Kind {
        let host = word & OFFSET_MASK != 0 || (self.has_data_file() && word & COPIED != 0);
        let data = if self.geometry.extended_l2 {
            bitmap & u64::from(u32::MAX) != 0
        } else {
            word & ZERO == 0
        };
        match (host, data) {
            (false, _) => Kind::None,
            (true, true) => Kind::Data,
            (true, false) => Kind::Preallocated,
        }
    }

    /// Reads the L2 table at `offset` into the buffer, which is handed out and given back by assigning `self.buf`. None
    /// if it lies beyond the file and thus reads as zeroes.
    pub(super) fn take_l2(&mut self, offset: u64) -> Result<Option<Vec<u8>>> {
        if offset >= self.file_len {
            return Ok(None);
        }
        let mut table = std::mem::take(&mut self.buf);
        table.resize(usize::try_from(self.geometry.cluster_size()).unwrap_or(0), 0);
        self.file.read_padded(&mut table, offset)?;
        Ok(Some(table))
    }

    /// Counts what an L2 table refers to.
    pub(super) fn count_l2(&mut self, walk: &Walk) -> Result<()> {
        let Some(table) = self.take_l2(walk.table)? else {
            return Ok(());
        };
        let said = self.said;
        if walk.silent {
            // Beyond the limit of lines nothing is said.
            self.said = super::MAX_NOTES + 1;
        }
        let outcome = self.count_entries(&table, walk);
        if walk.silent {
            self.said = said;
        }
        self.buf = table;
        outcome
    }

    fn count_entries(&mut self, table: &[u8], walk: &Walk) -> Result<()> {
        // Where the next cluster would follow the one before.
        let mut next = 0;
        let (words, _) = table.as_chunks::<8>();
        let step = usize::try_from(self.geometry.l2_entry_size() / 8).unwrap_or(1);
        // Nearly all entries of nearly all images: a whole cluster of data in this file.
        let plain = !self.geometry.extended_l2 && !self.has_data_file() && walk.times == 1;
        let odd = !(OFFSET_MASK | COPIED) | (self.geometry.cluster_size() - 1);
        let bits = self.geometry.cluster_bits;
        for (index, entry) in words.chunks_exact(step).enumerate() {
            let word = u64::from_be_bytes(entry[0]);
            let bitmap = entry.get(1).map_or(0, |bytes| u64::from_be_bytes(*bytes));
            if word == 0 && bitmap & u64::from(u32::MAX) == 0 {
                continue;
            }
            let host = word & OFFSET_MASK;
            let is_inside = host.saturating_add(self.geometry.cluster_size()) <= self.file_len;
            if plain && word & odd == 0 && host != 0 && is_inside {
                if self.counts.add(host >> bits, 1)? > 0 {
                    // Counted nothing: say so.
                    self.region(host, 1 << bits, 1)?;
                }
                self.in_use(host, walk, &mut next);
            } else {
                self.count_entry(index, [word, bitmap], walk, &mut next)?;
            }
        }
        Ok(())
    }

    /// A cluster of the active disk that is allocated.
    #[inline]
    fn in_use(&mut self, host: u64, walk: &Walk, next: &mut u64) {
        if walk.active {
            self.report.allocated_clusters += 1;
            if *next != 0 && *next != host {
                self.report.fragmented_clusters += 1;
            }
            *next = host + self.geometry.cluster_size();
        }
    }

    fn count_entry(
        &mut self,
        index: usize,
        [word, bitmap]: [u64; 2],
        walk: &Walk,
        next: &mut u64,
    ) -> Result<()> {
        if word & COMPRESSED != 0 {
            return self.count_compressed(index, [word, bitmap], walk);
        }
        if word & RESERVED != 0 {
            self.corruption(format!("ERROR found l2 entry with reserved bits set: {word:x}"));
        }
        let host = word & OFFSET_MASK;
        let (allocated, zero) = (bitmap & u64::from(u32::MAX), bitmap >> 32);
        let kind = self.kind(word, bitmap);
        if kind == Kind::None {
            if word & COPIED != 0 {
                self.corruption("ERROR offset=0: Data cluster lies in the header; L2 entry corrupted.");
            }
            if allocated != 0 {
                self.corruption("ERROR: Unallocated cluster has non-zero subcluster allocation map");
            }
            return Ok(());
        }
        if allocated & zero != 0 {
            self.corruption(format!(
                "ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if !host.is_multiple_of(self.geometry.cluster_size()) {
            let preallocated = kind == Kind::Preallocated;
            let noun = if preallocated { "Preallocated" } else { "Data" };
            let fix = preallocated && self.repair == Repair::All && self.may_mend_l2(walk.table)?;
            self.corruption_or_fix(
                fix,
                &format!("offset={host:x}: {noun} cluster is not properly aligned; L2 entry corrupted."),
            );
            if fix {
                // It reads as zero, or as what is below, as before; only the place set aside is given up.
                let plain = if self.geometry.extended_l2 { 0 } else { ZERO };
                let at = index as u64 * self.geometry.l2_entry_size();
                return self.file.write_at(&plain.to_be_bytes(), walk.table + at);
            }
        }
        self.in_use(host, walk, next);
        let needed = self.needed(index, bitmap, walk);
        if self.has_data_file() {
            // A check need not have opened it.
            let data = Some(&self.image.data).filter(|data| !Arc::ptr_eq(data, &self.image.file));
            let is_short = data.is_some_and(|data| host.saturating_add(needed) > data.len());
            if kind == Kind::Data && is_short {
                self.corruption(format!(
                    "ERROR: data cluster offset={host:#x} reaches beyond the end of the data file"
                ));
            }
            return Ok(());
        }
        if kind == Kind::Data {
            self.require_whole("data cluster", host, needed);
        }
        self.region(host, self.geometry.cluster_size(), walk.times)
    }

    /// How many bytes of the cluster in entry `index` a disk has data in. The rest is padding, which a file may lack.
    fn needed(&self, index: usize, bitmap: u64, walk: &Walk) -> u64 {
        let size = self.geometry.cluster_size();
        let start = walk.disk.start().saturating_add(index as u64 * size);
        let inside = ByteRange::at(start, size).intersect(walk.disk).len();
        if !self.geometry.extended_l2 {
            return inside;
        }
        // Up to the last subcluster that is allocated.
        let count = 32 - (bitmap & u64::from(u32::MAX)).leading_zeros().saturating_sub(32);
        inside.min(u64::from(count) * self.geometry.subcluster_size())
    }

    fn count_compressed(&mut self, index: usize, [word, bitmap]: [u64; 2], walk: &Walk) -> Result<()> {
        let shift = 62 - (self.geometry.cluster_bits - 8);
        let offset = word & ((1 << shift) - 1);
        if word & COPIED != 0 {
            self.corruption(format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        let entry = word & !COPIED;
        if self.has_data_file() {
            self.corruption(format!(
                "ERROR compressed cluster {index} with data file, entry={entry:#x}"
            ));
            return Ok(());
        }
        if self.geometry.extended_l2 && bitmap != 0 {
            self.corruption(format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            ));
            return Ok(());
        }
        let sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1;
        let stored = sectors * 512 - offset % 512;
        self.region(offset, stored, walk.times)?;
        self.require_stream(index, offset, stored, walk)?;
        if walk.active {
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            // The original counts every compressed cluster as a fragment.
            self.report.fragmented_clusters += 1;
        }
        Ok(())
    }

    /// Tells of a compressed cluster at the end of the file that is not all there. What lacks may be padding: only the
    /// stream knows.
    fn require_stream(&mut self, index: usize, offset: u64, stored: u64, walk: &Walk) -> Result<()> {
        let size = self.geometry.cluster_size();
        let end = offset.saturating_add(stored);
        // One that reaches further has been told of.
        if end <= self.file_len || end >= self.file_len.saturating_add(size) {
            return Ok(());
        }
        let _memory = self.image.budget.reserve(size)?;
        let mut cluster = vec![0; usize::try_from(size).unwrap_or(0)];
        let encoded = Encoded {
            offset,
            stored,
            cluster: ByteRange::at(walk.disk.start().saturating_add(index as u64 * size), size),
        };
        if self.image.decode_cluster(&encoded, &mut cluster).is_err() {
            self.beyond_end("compressed cluster", offset);
        }
        Ok(())
    }
}
