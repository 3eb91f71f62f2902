//! Decodes and encodes compressed clusters.

use diskimage_core::errno;
use diskimage_core::{CompressionLevel, Encoded, EncodedForm, Encoder, Error, Event, Result};

use super::Qcow2;
use super::header::Compression;
use crate::codec;

impl Qcow2 {
    /// Decodes one cluster.
    pub(super) fn decode_impl(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        codec::with_buffer(|bytes| self.decode_and_keep_impl(encoded, buf, bytes)).map(drop)
    }

    /// Decodes one cluster and keeps the bytes of its stream.
    pub(super) fn decode_and_keep_impl(
        &self,
        encoded: &Encoded,
        buf: &mut [u8],
        bytes: &mut Vec<u8>,
    ) -> Result<bool> {
        let damaged = || Error::from_errno(errno::EIO);
        // The file may end before the sector padding of its last compressed cluster. Decoding shows whether more is
        // missing.
        let in_file = self.file.len().saturating_sub(encoded.offset).min(encoded.stored);
        // The entry's sector count bounds this to two clusters.
        bytes.resize(usize::try_from(in_file).map_err(|_| damaged())?, 0);
        self.file.event(Event::READ_COMPRESSED);
        if in_file > 0 {
            self.file.read_at(bytes, encoded.offset)?;
        }
        let decoded = match self.header.compression {
            Compression::Zlib => codec::deflate::decode(bytes, buf),
            Compression::Zstd => codec::zstd::decode(bytes, buf),
        };
        let Ok(len) = decoded else {
            self.file.require(encoded.offset, encoded.stored)?;
            // As in qemu-img: any damage of a stream is an I/O error.
            return Err(damaged());
        };
        // A stream that is not shorter than its cluster is none that an encoder stores.
        let kept = len.filter(|&len| len < buf.len());
        bytes.truncate(kept.unwrap_or(0));
        Ok(kept.is_some())
    }

    /// Checks that the file contains the `stored` bytes of an encoded cluster. The padding to a sector may be missing.
    pub(super) fn require_stream(&self, offset: u64, stored: u64) -> Result<()> {
        let padded_len = self.file.len().next_multiple_of(512);
        match offset.checked_add(stored) {
            Some(end) if end <= padded_len => Ok(()),
            _ => self.file.require(offset, stored),
        }
    }

    /// The form of the clusters that this image stores.
    pub(super) fn form_impl(&self) -> EncodedForm {
        EncodedForm {
            codec: match self.header.compression {
                Compression::Zlib => codec::DEFLATE,
                Compression::Zstd => codec::ZSTD,
            },
            cluster: self.header.geometry.cluster_size(),
        }
    }

    /// Returns a new encoder.
    pub(super) fn encoder_impl(&self, level: Option<CompressionLevel>) -> Result<Box<dyn Encoder>> {
        match self.header.compression {
            Compression::Zlib => codec::deflate::encoder(level),
            Compression::Zstd => codec::zstd::encoder(level),
        }
    }
}
