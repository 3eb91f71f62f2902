//! Deflate, raw and inside zlib streams.

mod encoder;

use std::cell::RefCell;

use diskimage_core::{CompressionLevel, Encoder, Result, to_index};
use zlib_rs::adler32::adler32;
use zlib_rs::{Inflate, InflateFlush, Status};

use super::damaged;
use encoder::{Narrow, Wide};

/// Clusters that were compressed with the full window of RFC 1951 exist, and qemu-img reads them.
const DECODER_WINDOW_BITS: u8 = 15;

thread_local! {
    static INFLATE: RefCell<Inflate> = RefCell::new(Inflate::new(false, DECODER_WINDOW_BITS));
}

/// Fills `cluster` from the stream at the start of `bytes`. Returns its length if it ends with the cluster.
pub(crate) fn decode(bytes: &[u8], cluster: &mut [u8]) -> Result<Option<usize>> {
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(false);
        // Decoding ends when the cluster is full, even if the stream has more output.
        match inflate.decompress(bytes, cluster, InflateFlush::Finish) {
            Ok(status) if inflate.total_out() == cluster.len() as u64 => match status {
                Status::StreamEnd => to_index(inflate.total_in()).map(Some),
                _ => Ok(None),
            },
            _ => Err(damaged()),
        }
    })
}

/// Fills `block` from the zlib stream at the start of `bytes`. The stream must end where the block ends, and its
/// checksum must be right.
pub(crate) fn decode_zlib(bytes: &[u8], block: &mut [u8]) -> Result<()> {
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(true);
        match inflate.decompress(bytes, block, InflateFlush::Finish) {
            Ok(Status::StreamEnd) if inflate.total_out() == block.len() as u64 => Ok(()),
            _ => Err(damaged()),
        }
    })
}

/// Fills `cluster` from the start of a zlib stream, which may be shorter or longer than the cluster. Returns how many
/// bytes were decoded.
pub(crate) fn decode_stream(bytes: &[u8], cluster: &mut [u8]) -> Result<usize> {
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(true);
        match inflate.decompress(bytes, cluster, InflateFlush::Finish) {
            Ok(_) => to_index(inflate.total_out()),
            Err(_) => Err(damaged()),
        }
    })
}

/// `block` as a zlib stream.
#[cfg(test)]
pub(crate) fn encode_zlib(block: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    StreamEncoder::new(None)
        .encode(block, &mut bytes)
        .expect("encodes");
    bytes
}

/// Encodes clusters as zlib streams with the full window, including clusters that get longer.
pub(crate) struct StreamEncoder {
    deflate: Wide,
}

/// Its output is about half a percent shorter than that of zlib's default level, which qemu-img uses.
const STREAM_LEVEL: u8 = 7;

/// The header of a zlib stream (RFC 1950): deflate with a window of 32 KiB, compressed with the default effort.
const ZLIB_HEADER: [u8; 2] = [0x78, 0x9c];

impl StreamEncoder {
    /// Without a level, that of [`STREAM_LEVEL`].
    pub(crate) fn new(level: Option<CompressionLevel>) -> Self {
        Self {
            deflate: Wide::new(level.map_or(STREAM_LEVEL, CompressionLevel::get)),
        }
    }
}

impl Encoder for StreamEncoder {
    fn encode(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        out.extend_from_slice(&ZLIB_HEADER);
        self.deflate.encode(cluster, out, usize::MAX);
        out.extend_from_slice(&adler32(1, cluster).to_be_bytes());
        Ok(true)
    }
}

/// Its output is half a percent longer than that of zlib's default level, which qemu-img uses, and takes a third of
/// the time: measured on 64 KiB clusters of programs, libraries, documents, sources and a database.
const LEVEL: u8 = 6;

/// Returns an encoder of clusters. Without a level, that of [`LEVEL`].
pub(crate) fn encoder(level: Option<CompressionLevel>) -> Result<Box<dyn Encoder>> {
    Ok(Box::new(ClusterDeflate {
        deflate: Narrow::new(level.map_or(LEVEL, CompressionLevel::get)),
    }))
}

/// Compresses clusters. The qcow2 specification documents a window of 4 KiB: a reader may decode with no more than that.
struct ClusterDeflate {
    deflate: Narrow,
}

impl Encoder for ClusterDeflate {
    fn encode(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        let most = cluster.len().saturating_sub(1);
        Ok(self.deflate.encode(cluster, out, most))
    }
}

#[cfg(test)]
mod tests {
    use zlib_rs::{Deflate, DeflateFlush};

    use super::*;

    #[test]
    fn a_match_across_the_full_window_is_decoded() {
        // A match 32 KiB back, which a decoder with a window of 4 KiB could not follow.
        let mut cluster: Vec<u8> = (0..65536_u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        cluster.copy_within(..32768, 32768);
        let mut wide = Deflate::new(9, false, 15);
        let mut bytes = vec![0; 65536];
        assert_eq!(
            wide.compress(&cluster, &mut bytes, DeflateFlush::Finish),
            Ok(Status::StreamEnd)
        );
        let mut back = vec![0; 65536];
        decode(&bytes, &mut back).unwrap();
        assert_eq!(back, cluster);
    }

    #[test]
    fn a_stream_longer_than_the_cluster_stops_at_its_end() {
        let mut bytes = Vec::new();
        assert!(encoder(None).unwrap().encode(&[5; 65536], &mut bytes).unwrap());
        let mut part = [0; 512];
        assert_eq!(decode(&bytes, &mut part).unwrap(), None);
        assert_eq!(part, [5; 512]);
    }
}
