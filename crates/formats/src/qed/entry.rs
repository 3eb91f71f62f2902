//! The entries of the tables.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{Device, Error, ErrorKind, Result, errno};

use super::header::{Geometry, Header, feature};
use crate::layer_kit::offset::HostOffset;
use crate::layer_kit::two_level_map::{Cluster, EntryCodec};

/// The encoding of qed's table entries.
#[derive(Debug)]
pub(super) struct Entries {
    pub(super) file: Arc<dyn Device>,
    pub(super) geometry: Geometry,
    /// The host offset behind the header, the first that an entry can have.
    pub(super) first: HostOffset,
    pub(super) header: Mutex<Header>,
    /// Whether the header says that the image has to be checked.
    pub(super) before_first_change: AtomicBool,
}

/// The L2 entry of a cluster that reads as zero.
const ZERO: u64 = 1;

impl Entries {
    /// The header as it is in the file.
    pub(super) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the header, durably.
    pub(super) fn change_header(&self, change: impl FnOnce(&mut Header) -> Result<()>) -> Result<()> {
        let mut header = self.header();
        let mut new = header.clone();
        change(&mut new)?;
        new.write(&*self.file, new.backing != header.backing)?;
        *header = new;
        Ok(())
    }

    fn mark(&self, need_check: bool) -> Result<()> {
        if self.before_first_change.load(Ordering::Relaxed) == need_check {
            return Ok(());
        }
        let mut header = self.header();
        let mut new = header.clone();
        new.set_feature(feature::NEED_CHECK, need_check);
        new.write(&*self.file, false)?;
        *header = new;
        self.before_first_change.store(need_check, Ordering::Relaxed);
        Ok(())
    }

    /// Whether `len` bytes at `offset` are whole clusters behind the header and before `end`.
    fn is_valid(&self, offset: HostOffset, len: u64, end: HostOffset) -> bool {
        offset.is_multiple_of(self.geometry.cluster_size)
            && offset >= self.first
            && offset.checked_plus(len).is_some_and(|last| last <= end)
    }

    /// The error for an entry that refers to `len` bytes at `offset`.
    fn invalid(&self, offset: HostOffset, len: u64) -> Error {
        let placed = offset.is_multiple_of(self.geometry.cluster_size) && offset >= self.first;
        let missing = self.file.require(offset.get(), len).err().filter(|_| placed);
        missing.unwrap_or_else(|| Error::damage(ErrorKind::Invalid, errno::EINVAL))
    }
}

impl EntryCodec for Entries {
    const BIG_ENDIAN: bool = false;
    const TABLES_FIRST: bool = false;

    fn l2_table(&self, entry: u64, end: HostOffset) -> Result<Option<HostOffset>> {
        let offset = HostOffset::new(entry);
        match entry {
            0 => Ok(None),
            _ if self.is_valid(offset, self.geometry.table_len(), end) => Ok(Some(offset)),
            // As in qemu-img, a missing table is the same error as an invalid offset.
            _ => {
                let error = self.invalid(offset, self.geometry.table_len());
                Err(Error::damage(error.kind(), errno::EINVAL))
            }
        }
    }

    fn cluster(&self, entry: u64, end: HostOffset) -> Result<Cluster> {
        let offset = HostOffset::new(entry);
        match entry {
            0 => Ok(Cluster::None),
            ZERO => Ok(Cluster::Zero),
            _ if self.is_valid(offset, self.geometry.cluster_size, end) => Ok(Cluster::Host(offset)),
            _ => Err(self.invalid(offset, self.geometry.cluster_size)),
        }
    }

    fn encode(&self, cluster: Cluster) -> u64 {
        match cluster {
            Cluster::None => 0,
            Cluster::Zero => ZERO,
            Cluster::Host(offset) | Cluster::Encoded { offset, .. } => offset.get(),
        }
    }

    fn zero(&self) -> Option<Cluster> {
        Some(Cluster::Zero)
    }

    fn before_first_change(&self) -> Result<()> {
        self.mark(true)
    }

    fn after_flush(&self) -> Result<()> {
        self.mark(false)
    }
}
