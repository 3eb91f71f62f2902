//! Whether the end of the file is missing, before anything is written to it.
//!
//! New clusters go behind all that is counted. They make a file longer that was cut off, and what was lost would read as
//! zeroes from then on. So such an image is not written to. To look at all tables takes time that most files need not:
//! where nothing is counted beyond the end, nothing is missing there.

use std::sync::Arc;

use diskimage_core::{ByteRange, ErrorKind, Result};

use crate::layer_kit::metadata_cache::Table;
use crate::qcow2::Qcow2;
use crate::qcow2::entry::{Cluster, L2Entry, OFFSET_MASK};

/// Bytes of an L1 table that are read at once.
const CHUNK: u64 = 64 << 10;

impl Qcow2 {
    /// Checks that nothing of the disk, or of what a snapshot keeps of it, lies beyond the end of the file. Other damage is
    /// left to the requests that meet it.
    ///
    /// # Errors
    /// Bytes that are missing, and failures to read.
    pub(in crate::qcow2) fn require_end(&self) -> Result<()> {
        let (l1, size) = {
            let state = self.lock();
            (state.l1, state.size)
        };
        // Each table is a cluster of its own: a damaged image cannot keep this busy for longer than its length allows.
        let mut left = self.file.len() >> self.header.geometry.cluster_bits;
        let (beyond, partly) = self.counts_at_end()?;
        // An external data file is as long as the disk from the start.
        let is_short = !Arc::ptr_eq(&self.data, &self.file) && self.data.len() < size;
        if beyond || partly || is_short {
            self.require_tree(l1, size, &mut left)?;
        }
        if beyond {
            let snapshots = match self.read_snapshots() {
                Err(error) if matches!(error.kind(), ErrorKind::CutOff | ErrorKind::Io) => return Err(error),
                other => other.unwrap_or_default(),
            };
            for snapshot in snapshots {
                if let Ok(l1) = self.snapshot_l1(&snapshot) {
                    self.require_tree(l1, snapshot.info.disk_size, &mut left)?;
                }
            }
        }
        Ok(())
    }

    /// Whether any cluster beyond the end of the file is counted, and whether the one is that it ends in. Counts that
    /// cannot be had may say so.
    fn counts_at_end(&self) -> Result<(bool, bool)> {
        let (size, len) = (self.header.geometry.cluster_size(), self.file.len());
        let mut state = self.lock();
        let beyond = state.metadata.counts_beyond(len.div_ceil(size));
        let partly = match len.is_multiple_of(size) {
            true => Ok(false),
            false => state.metadata.count(len / size).map(|count| count > 0),
        };
        let or_damaged = |known: Result<bool>| match known {
            Err(error) if error.kind() == ErrorKind::Io => Err(error),
            other => Ok(other.unwrap_or(true)),
        };
        Ok((or_damaged(beyond)?, or_damaged(partly)?))
    }

    /// Checks that all is there that the table `l1` leads to, of a disk of `size` bytes.
    fn require_tree(&self, l1: Table, size: u64, left: &mut u64) -> Result<()> {
        let geometry = self.header.geometry;
        self.file.require(l1.offset, l1.len)?;
        let mut table = vec![0; usize::try_from(geometry.cluster_size()).unwrap_or(0)];
        let (mut rest, mut guest) = (ByteRange::at(l1.offset, l1.len), 0_u64);
        while !rest.is_empty() {
            let part = rest.first(CHUNK);
            let mut chunk = vec![0; usize::try_from(part.len()).unwrap_or(0)];
            self.file.read_at(&mut chunk, part.start())?;
            for word in chunk.as_chunks().0 {
                let offset = u64::from_be_bytes(*word) & OFFSET_MASK;
                let disk = ByteRange::at(guest, geometry.l2_coverage()).intersect(ByteRange::new(0, size));
                guest = guest.saturating_add(geometry.l2_coverage());
                if offset == 0 || !offset.is_multiple_of(geometry.cluster_size()) || *left == 0 {
                    continue;
                }
                *left -= 1;
                self.file.read_whole(&mut table, offset)?;
                self.require_clusters(&table, disk)?;
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Checks that all is there that an L2 table for the part `disk` of a disk leads to.
    fn require_clusters(&self, table: &[u8], disk: ByteRange) -> Result<()> {
        let (geometry, version) = (self.header.geometry, self.header.version);
        let step = if geometry.extended_l2 { 2 } else { 1 };
        let mut rest = disk;
        for words in table.as_chunks::<8>().0.chunks_exact(step) {
            let needed = rest.first(geometry.cluster_size()).len();
            rest = rest.skip(needed);
            let word = |i: usize| words.get(i).map_or(0, |bytes| u64::from_be_bytes(*bytes));
            let Ok(entry) = L2Entry::parse([word(0), word(1)], geometry, version, self.has_data_file())
            else {
                continue;
            };
            match entry.kind {
                Cluster::Host(offset) if entry.sub.allocated != 0 => {
                    // Up to the last subcluster that is allocated.
                    let count = 32 - entry.sub.allocated.leading_zeros();
                    let stored = match geometry.extended_l2 {
                        true => u64::from(count) * geometry.subcluster_size(),
                        false => geometry.cluster_size(),
                    };
                    self.data.require(offset, needed.min(stored))?;
                }
                Cluster::Compressed { offset, stored } if needed > 0 => {
                    self.require_stream(offset, stored)?
                }
                _ => {}
            }
        }
        Ok(())
    }
}
