//! Refuses to write to an image whose file was cut off.
//!
//! New clusters are allocated behind all clusters in use. They would grow a file that was cut off, and the lost data
//! would read as zeroes from then on. Walking all tables takes time, so it is done only if a cluster at or beyond the
//! end of the file has a refcount above zero.

use std::sync::Arc;

use diskimage_core::{ByteRange, ErrorKind, Result, to_index};

use crate::layer_kit::metadata_cache::Table;
use crate::layer_kit::offset::HostOffset;
use crate::qcow2::Qcow2;
use crate::qcow2::entry::{Cluster, L2Entry, OFFSET_MASK};

/// Bytes of an L1 table that are read at once.
const CHUNK: u64 = 64 << 10;

impl Qcow2 {
    /// Checks that no data and no table of the disk or of a snapshot is beyond the end of the file. Other damage is
    /// left to the requests that find it.
    ///
    /// # Errors
    /// Missing bytes, and failed reads.
    pub(in crate::qcow2) fn require_end(&self) -> Result<()> {
        let (l1, size) = {
            let state = self.lock();
            (state.l1, state.size)
        };
        // Valid L2 tables are distinct clusters. This bounds the time for a damaged image by the file's length.
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

    /// Whether any cluster beyond the end of the file has a refcount above zero, and whether the cluster that contains
    /// the end has. Damaged refcounts count as above zero.
    fn counts_at_end(&self) -> Result<(bool, bool)> {
        let bits = self.header.geometry.cluster_bits;
        let file_end = HostOffset::new(self.file.len());
        let (last, beyond) = (file_end.cluster(bits), file_end.cluster_end(bits));
        let mut state = self.lock();
        let is_counted_beyond = state.metadata.counts_beyond(beyond);
        let partly = match last == beyond {
            true => Ok(false),
            false => state.metadata.count(last).map(|count| count > 0),
        };
        let or_damaged = |known: Result<bool>| match known {
            Err(error) if error.kind() == ErrorKind::Io => Err(error),
            other => Ok(other.unwrap_or(true)),
        };
        Ok((or_damaged(is_counted_beyond)?, or_damaged(partly)?))
    }

    /// Checks that the file contains the whole tree of the table `l1`, for a disk of `size` bytes.
    fn require_tree(&self, l1: Table, size: u64, left: &mut u64) -> Result<()> {
        let geometry = self.header.geometry;
        self.file.require(l1.offset, l1.len)?;
        let mut table = vec![0; to_index(geometry.cluster_size())?];
        let (mut rest, mut guest) = (l1.range(), 0_u64);
        while !rest.is_empty() {
            let part = rest.first(CHUNK);
            let mut chunk = vec![0; to_index(part.len())?];
            self.file.read_at(&mut chunk, part.start())?;
            for entry in chunk.as_chunks().0 {
                let offset = u64::from_be_bytes(*entry) & OFFSET_MASK;
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

    /// Checks that the files contain all clusters of an L2 table that maps the guest range `disk`.
    fn require_clusters(&self, table: &[u8], disk: ByteRange) -> Result<()> {
        let (geometry, version) = (self.header.geometry, self.header.version);
        let step = if geometry.extended_l2 { 2 } else { 1 };
        let mut rest = disk;
        for numbers in table.as_chunks::<8>().0.chunks_exact(step) {
            let needed = rest.first(geometry.cluster_size()).len();
            rest = rest.skip(needed);
            let number = |i: usize| numbers.get(i).map_or(0, |bytes| u64::from_be_bytes(*bytes));
            let Ok(entry) = L2Entry::parse([number(0), number(1)], geometry, version, self.has_data_file())
            else {
                continue;
            };
            match entry.kind {
                Cluster::Host(offset) if entry.sub.allocated != 0 => {
                    // Up to the last allocated subcluster.
                    let count = 32 - entry.sub.allocated.leading_zeros();
                    let stored = match geometry.extended_l2 {
                        true => u64::from(count) * geometry.subcluster_size(),
                        false => geometry.cluster_size(),
                    };
                    self.data.require(offset.get(), needed.min(stored))?;
                }
                Cluster::Compressed { offset, stored } if needed > 0 => {
                    self.require_stream(offset.get(), stored)?
                }
                _ => {}
            }
        }
        Ok(())
    }
}
