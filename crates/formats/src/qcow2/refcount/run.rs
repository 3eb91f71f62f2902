//! Counting many clusters at once: one look-up for each page of a refcount block, not one for each cluster.

use diskimage_core::{ByteRange, Error, ErrorKind, Result, errno};

use super::{Refcounts, block};
use crate::layer_kit::metadata_cache::{MetadataCache, Table};
use crate::layer_kit::metadata_guard::Kinds;
use crate::qcow2::header::limit;

/// What happens to counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum RefcountChange {
    /// One more use.
    Up,
    /// One less.
    Down,
}

impl Refcounts {
    /// Checks that `count` clusters from `first` on are counted, and have room for one more use if that is the change.
    ///
    /// # Errors
    /// Those that are not, and have not.
    pub(in crate::qcow2) fn check_run(
        &self,
        tables: &mut MetadataCache,
        first: u64,
        count: u64,
        change: RefcountChange,
    ) -> Result<()> {
        let (order, max) = (self.geometry.refcount_order, self.geometry.max_refcount());
        let mut at = first;
        while at < first + count {
            let (table, place, len) = self.piece(tables, at, first + count - at)?;
            let bytes = tables.bytes(table, place.byte)?;
            for i in 0..len {
                let (skip, place) = self.place_in(at + i, place);
                let used = bytes
                    .get(skip..)
                    .and_then(|bytes| block::read(bytes, place, order))
                    .unwrap_or(0);
                if used == 0 {
                    // Metadata would be allocated: the guard has the words for that.
                    let start = (at + i) << self.geometry.cluster_bits;
                    tables.admit(ByteRange::at(start, self.geometry.cluster_size()), Kinds::NONE)?;
                    return Err(not_counted(at + i));
                }
                changed(used, change, max, at + i)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Changes the counts of `count` clusters from `first` on; `freed` is told which are free then, in order.
    ///
    /// # Errors
    /// As [`Refcounts::check_run`]; the clusters before the one that is wrong are changed.
    pub(in crate::qcow2) fn change_run(
        &mut self,
        tables: &mut MetadataCache,
        first: u64,
        count: u64,
        change: RefcountChange,
        mut freed: impl FnMut(u64),
    ) -> Result<()> {
        let (order, max) = (self.geometry.refcount_order, self.geometry.max_refcount());
        let mut gone = Vec::new();
        let mut at = first;
        while at < first + count {
            let (table, place, len) = self.piece(tables, at, first + count - at)?;
            let bytes = tables.bytes_mut(table, place.byte)?;
            for i in 0..len {
                let (skip, place) = self.place_in(at + i, place);
                let bytes = bytes.get_mut(skip..).unwrap_or(&mut []);
                let used = block::read(bytes, place, order).unwrap_or(0);
                let mut new = changed(used, change, max, at + i)?;
                match change {
                    RefcountChange::Up => self.references.add(at + i),
                    // References that the count has left out keep it from becoming less than they are.
                    RefcountChange::Down => {
                        new = new.max(self.references.remove(at + i).unwrap_or(0).min(used))
                    }
                }
                block::write(bytes, place, order, new)
                    .ok_or_else(|| Error::corrupt("Refcount block too short"))?;
                if new == 0 {
                    gone.push(at + i);
                }
            }
            for cluster in gone.drain(..) {
                self.note_free(tables, cluster);
                freed(cluster);
            }
            at += len;
        }
        Ok(())
    }

    /// The block and place that count `cluster`, and how many of `most` clusters from there on its page counts.
    fn piece(
        &self,
        tables: &mut MetadataCache,
        cluster: u64,
        most: u64,
    ) -> Result<(Table, block::Slot, u64)> {
        let table = self
            .block(tables, cluster)?
            .ok_or_else(|| self.no_block(cluster))?;
        let index = cluster % self.entries_per_block();
        let order = self.geometry.refcount_order;
        let place = block::Slot::new(index, order);
        let bytes = tables.bytes(table, place.byte)?.len() as u64;
        // From the first entry of that byte on, which need not be this one.
        let entries = (bytes * 8) >> order;
        let before = index - ((place.byte * 8) >> order);
        Ok((table, place, most.min(entries.saturating_sub(before)).max(1)))
    }

    /// The error for a cluster in use that no block counts, with the words in which the original ends: it makes the
    /// block and says that the caller should come again, unless no table can lead to that block.
    fn no_block(&self, cluster: u64) -> Error {
        let entry = cluster / self.entries_per_block() * 8;
        Error::from_errno(if entry < limit::REFCOUNT_TABLE_BYTES {
            errno::EAGAIN
        } else {
            errno::EFBIG
        })
    }

    /// Where the count of `cluster` is in bytes that begin at the byte of `start`, a place in the same block.
    fn place_in(&self, cluster: u64, start: block::Slot) -> (usize, block::Slot) {
        let place = block::Slot::new(cluster % self.entries_per_block(), self.geometry.refcount_order);
        (
            usize::try_from(place.byte - start.byte).unwrap_or(usize::MAX),
            place,
        )
    }
}

fn changed(used: u64, change: RefcountChange, max: u64, cluster: u64) -> Result<u64> {
    match change {
        _ if used == 0 => Err(not_counted(cluster)),
        // The words with which the original ends here.
        RefcountChange::Up if used >= max => Err(Error::new(ErrorKind::Invalid, "Invalid argument")),
        RefcountChange::Up => Ok(used + 1),
        RefcountChange::Down => Ok(used - 1),
    }
}

fn not_counted(cluster: u64) -> Error {
    Error::corrupt(format!("Cluster {cluster:#x} is in use but not counted"))
}
