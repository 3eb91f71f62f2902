//! The entries of the tables.

use std::sync::Arc;

use diskimage_core::{Device, Error, ErrorKind, Result, errno};

use super::header::SECTOR;
use crate::encryption::legacy_aes::LegacyAes;
use crate::layer_kit::offset::{GuestOffset, HostOffset};
use crate::layer_kit::two_level_map::{Cluster, EntryCodec};

/// The encoding of qcow's table entries.
#[derive(Debug)]
pub(super) struct Entries {
    pub(super) file: Arc<dyn Device>,
    pub(super) cluster_bits: u8,
    /// Bytes of an L2 table.
    pub(super) l2_len: u64,
    pub(super) has_backing: bool,
    /// The cipher of the clusters; `None` if they are not encrypted.
    pub(super) aes: Option<LegacyAes>,
}

/// The bit of an L2 entry that marks a compressed cluster.
const COMPRESSED: u64 = 1 << 63;

impl Entries {
    /// The lowest bit of a compressed cluster's length in an L2 entry. The bits under it are the host offset.
    fn length_shift(&self) -> u32 {
        63 - u32::from(self.cluster_bits)
    }

    /// Refuses a table or a cluster of `len` bytes at `offset`, in a file that ends at `end`, if it is not aligned or
    /// not in the file. Unlike qemu-img, which reads zeroes beyond the end: a truncated disk would seem to be empty.
    fn require_stored(&self, offset: HostOffset, len: u64, end: HostOffset) -> Result<()> {
        let behind = offset.checked_plus(len).ok_or_else(damaged)?;
        if !offset.is_multiple_of(SECTOR) {
            return Err(damaged());
        }
        if behind > end {
            self.file.require(offset.get(), len)?;
        }
        Ok(())
    }
}

/// The error for all damage to tables and compressed clusters; qemu-img has the same errno for all of it.
pub(super) fn damaged() -> Error {
    Error::damage(ErrorKind::Invalid, errno::EIO)
}

impl EntryCodec for Entries {
    const BIG_ENDIAN: bool = true;
    const TABLES_FIRST: bool = true;

    fn l2_table(&self, entry: u64, end: HostOffset) -> Result<Option<HostOffset>> {
        if entry == 0 {
            return Ok(None);
        }
        // As in qemu-img, a missing table is the same error as an invalid offset.
        let offset = HostOffset::new(entry);
        self.require_stored(offset, self.l2_len, end.align_up(SECTOR))
            .map_err(|error| Error::damage(error.kind(), errno::EIO))?;
        Ok(Some(offset))
    }

    fn cluster(&self, entry: u64, end: HostOffset) -> Result<Cluster> {
        if entry == 0 {
            Ok(Cluster::None)
        } else if entry & COMPRESSED != 0 {
            let shift = self.length_shift();
            Ok(Cluster::Encoded {
                offset: HostOffset::new(entry & ((1 << shift) - 1)),
                stored: (entry & !COMPRESSED) >> shift,
            })
        } else {
            // The file may have only a part of its last cluster.
            let size = 1 << self.cluster_bits;
            let offset = HostOffset::new(entry);
            self.require_stored(offset, size, end.align_up(size))?;
            Ok(Cluster::Host(offset))
        }
    }

    fn encode(&self, cluster: Cluster) -> u64 {
        match cluster {
            // `Zero` is only encoded in an image without a backing image.
            Cluster::None | Cluster::Zero => 0,
            Cluster::Host(offset) => offset.get(),
            Cluster::Encoded { offset, stored } => COMPRESSED | stored << self.length_shift() | offset.get(),
        }
    }

    fn zero(&self) -> Option<Cluster> {
        (!self.has_backing).then_some(Cluster::None)
    }

    fn encoded_end(&self) -> HostOffset {
        HostOffset::new(1 << self.length_shift())
    }

    fn view(&self, file: &Arc<dyn Device>, guest: GuestOffset, host: HostOffset) -> Arc<dyn Device> {
        self.aes
            .as_ref()
            .and_then(|aes| aes.view(file, guest, host))
            .unwrap_or_else(|| Arc::clone(file))
    }
}
