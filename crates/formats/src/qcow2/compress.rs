//! Compressed clusters: decoding, encoding and where they go.

use diskimage_core::errno;
use diskimage_core::{Encoded, Encoder, Error, Event, Result};

use super::Qcow2;
use super::header::Compression;
use crate::codec;

impl Qcow2 {
    /// Decodes one cluster.
    pub(super) fn decode_cluster(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        if encoded.offset >= self.file.len() {
            return Err(beyond_end(encoded));
        }
        // The entry's field for sectors holds no more than two clusters.
        let mut bytes = vec![0; usize::try_from(encoded.stored).map_err(|_| beyond_end(encoded))?];
        // The last compressed cluster of a file is not padded to a sector.
        self.file.event(Event::READ_COMPRESSED);
        self.file.read_padded(&mut bytes, encoded.offset)?;
        let decoded = match self.header.compression {
            Compression::Zlib => codec::deflate::decode(&bytes, buf),
            Compression::Zstd => codec::zstd::decode(&bytes, buf),
        };
        // One word for all that can be wrong with a stream, the original's.
        decoded.map_err(|_| Error::from_errno(errno::EIO))
    }

    /// A new encoder.
    pub(super) fn new_encoder(&self) -> Result<Box<dyn Encoder>> {
        match self.header.compression {
            Compression::Zlib => codec::deflate::encoder(),
            Compression::Zstd => codec::zstd::encoder(),
        }
    }
}

fn beyond_end(encoded: &Encoded) -> Error {
    Error::corrupt(format!(
        "Compressed data at offset {:#x} lies beyond the end of the file",
        encoded.offset
    ))
}
