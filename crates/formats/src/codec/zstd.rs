//! Zstandard.

use std::cell::RefCell;

use diskimage_core::{CompressionLevel, Encoder, Error, ErrorKind, Result};
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, find_frame_compressed_size};

use super::damaged;

/// The library's default level, which qemu-img uses.
const LEVEL: i32 = 3;

/// The levels of the library that stand for ours. Between its seventh and its thirteenth, clusters of 64 KiB get hardly
/// shorter. The last one is the last that the library does not call "ultra".
const LEVELS: [i32; 9] = [1, 2, 3, 4, 5, 6, 9, 14, 19];

/// The largest window that a streamed frame may ask for, as a power of two. A frame that is longer than its cluster
/// must be streamed; no cluster is longer than 2 MiB.
const MAX_WINDOW_LOG: u32 = 21;

thread_local! {
    static CONTEXT: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Fills `cluster` from the frames at the start of `bytes`. Returns their length if the last one ends with the cluster.
pub(crate) fn decode(bytes: &[u8], cluster: &mut [u8]) -> Result<Option<usize>> {
    CONTEXT.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = DCtx::try_create();
        }
        let context = slot.as_mut().ok_or_else(no_memory)?;
        let (len, mut bytes, mut rest) = (bytes.len(), bytes, cluster);
        while !rest.is_empty() {
            let len = find_frame_compressed_size(bytes).map_err(|_| damaged())?;
            let frame = bytes
                .get(..len)
                .filter(|frame| !frame.is_empty())
                .ok_or_else(damaged)?;
            // A one-shot call allocates no window, whatever window size the frame claims.
            let Ok(done) = context.decompress(rest, frame) else {
                return stream(context, bytes, rest).map(|()| None);
            };
            rest = rest.get_mut(done..).ok_or_else(damaged)?;
            bytes = &bytes[len..];
        }
        Ok(Some(len - bytes.len()))
    })
}

/// Fills `cluster` from a stream that may be longer than the cluster.
fn stream(context: &mut DCtx<'_>, bytes: &[u8], cluster: &mut [u8]) -> Result<()> {
    context
        .reset(ResetDirective::SessionOnly)
        .map_err(|_| damaged())?;
    context
        .set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))
        .map_err(|_| damaged())?;
    let mut input = InBuffer::around(bytes);
    let mut output = OutBuffer::around(cluster);
    while output.pos() < output.capacity() {
        let before = (input.pos(), output.pos());
        context
            .decompress_stream(&mut output, &mut input)
            .map_err(|_| damaged())?;
        if before == (input.pos(), output.pos()) {
            return Err(damaged());
        }
    }
    Ok(())
}

fn no_memory() -> Error {
    Error::new(ErrorKind::Limit, "Cannot allocate memory")
}

/// Returns an encoder of clusters. Without a level, that of [`LEVEL`].
pub(crate) fn encoder(level: Option<CompressionLevel>) -> Result<Box<dyn Encoder>> {
    let level = level.map_or(LEVEL, |level| LEVELS[level.index()]);
    let context = zstd::bulk::Compressor::new(level).map_err(|_| no_memory())?;
    Ok(Box::new(ClusterZstd { context }))
}

/// Compresses clusters, each into one frame.
struct ClusterZstd {
    context: zstd::bulk::Compressor<'static>,
}

impl Encoder for ClusterZstd {
    fn encode(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        out.resize(cluster.len().saturating_sub(1), 0);
        // The buffer is one byte shorter than the cluster, so the only failure is that the cluster does not get
        // smaller.
        let done = self.context.compress_to_buffer(cluster, out.as_mut_slice());
        out.truncate(*done.as_ref().unwrap_or(&0));
        Ok(done.is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_frames_fill_one_cluster() {
        let cluster: Vec<u8> = (0..4096_u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        let mut bytes = Vec::new();
        for part in cluster.chunks(5000) {
            bytes.extend(zstd::bulk::compress(part, 1).unwrap());
        }
        bytes.extend_from_slice(&[0; 100]);
        let mut back = vec![0; cluster.len()];
        decode(&bytes, &mut back).unwrap();
        assert_eq!(back, cluster);
    }

    #[test]
    fn a_frame_longer_than_the_cluster_stops_at_its_end() {
        let bytes = zstd::bulk::compress(&[9; 70000], 1).unwrap();
        let mut back = vec![0; 65536];
        assert_eq!(decode(&bytes, &mut back).unwrap(), None);
        assert_eq!(back, vec![9; 65536]);
    }
}
