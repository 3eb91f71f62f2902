//! Compressed clusters: decoding, encoding and where they go.

use diskimage_core::errno;
use diskimage_core::{Encoded, Encoder, Error, Event, Result};

use super::Qcow2;
use super::header::Compression;
use crate::codec;

impl Qcow2 {
    /// Decodes one cluster.
    pub(super) fn decode_impl(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        let damaged = || Error::from_errno(errno::EIO);
        // Of the last compressed cluster of a file the padding to a sector may lack. Whether more does, its stream
        // tells.
        let there = self.file.len().saturating_sub(encoded.offset).min(encoded.stored);
        // The entry's field for sectors holds no more than two clusters.
        let mut bytes = vec![0; usize::try_from(there).map_err(|_| damaged())?];
        self.file.event(Event::READ_COMPRESSED);
        if there > 0 {
            self.file.read_at(&mut bytes, encoded.offset)?;
        }
        let decoded = match self.header.compression {
            Compression::Zlib => codec::deflate::decode(&bytes, buf),
            Compression::Zstd => codec::zstd::decode(&bytes, buf),
        };
        decoded.or_else(|_| {
            self.file.require(encoded.offset, encoded.stored)?;
            // One word for all that can be wrong with a stream, the original's.
            Err(damaged())
        })
    }

    /// Checks that the file has the `stored` bytes of an encoded cluster, but for the padding to a sector.
    pub(super) fn require_stream(&self, offset: u64, stored: u64) -> Result<()> {
        let there = self.file.len().next_multiple_of(512);
        match offset.checked_add(stored) {
            Some(end) if end <= there => Ok(()),
            _ => self.file.require(offset, stored),
        }
    }

    /// A new encoder.
    pub(super) fn encoder_impl(&self) -> Result<Box<dyn Encoder>> {
        match self.header.compression {
            Compression::Zlib => codec::deflate::encoder(),
            Compression::Zstd => codec::zstd::encoder(),
        }
    }
}
