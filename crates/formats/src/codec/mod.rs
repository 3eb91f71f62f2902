//! Codecs of compressed clusters, shared by the formats that have them.
//!
//! A decoder fills exactly one cluster and stops: it never writes beyond the destination, whatever the stream claims,
//! and it ignores bytes after the stream's end (formats store a length rounded up to sectors). It returns the length of
//! the stream, if that ends with the cluster. An encoder returns
//! `false` for a cluster that does not get smaller. Contexts are expensive to make, so each thread keeps its own.

/// The names of the formats of encoded clusters that several images can take: raw deflate, frames of Zstandard, and
/// zlib streams.
pub(crate) const DEFLATE: &str = "deflate";
pub(crate) const ZSTD: &str = "zstd";
pub(crate) const ZLIB: &str = "zlib";

/// Why the level of compression is refused when the size of a new image is measured.
pub(crate) const NOT_MEASURED: &str = "The measured size is that of an image that is not compressed";

pub(crate) mod adc;
pub(crate) mod bzip2;
pub(crate) mod deflate;
pub(crate) mod lzfse;
pub(crate) mod xz;
#[cfg(feature = "zstd")]
pub(crate) mod zstd;

use std::cell::RefCell;
use std::io::Read;

use diskimage_core::{Error, Result};

/// Replaces the codec in builds without zstd: every call fails.
#[cfg(not(feature = "zstd"))]
pub(crate) mod zstd {
    use diskimage_core::{CompressionLevel, Encoder, Error, Result};

    pub(crate) fn decode(_bytes: &[u8], _cluster: &mut [u8]) -> Result<Option<usize>> {
        Err(missing())
    }

    pub(crate) fn encoder(_level: Option<CompressionLevel>) -> Result<Box<dyn Encoder>> {
        Err(missing())
    }

    fn missing() -> Error {
        Error::unsupported("This build cannot handle clusters compressed with zstd")
    }
}

thread_local! {
    static ENCODED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Has `decode` use a buffer of the thread for the encoded bytes of a cluster. It holds anything; a buffer that was
/// allocated and zeroed for each cluster would take time.
pub(crate) fn with_buffer<T>(decode: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut buffer = ENCODED.take();
    let result = decode(&mut buffer);
    ENCODED.set(buffer);
    result
}

/// Fills `block` from `stream`, which must end where the block ends.
fn fill(mut stream: impl Read, block: &mut [u8]) -> Result<()> {
    stream.read_exact(block).map_err(|_| damaged())?;
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        _ => Err(damaged()),
    }
}

/// The error for a stream that does not fill its cluster.
fn damaged() -> Error {
    Error::corrupt("Compressed cluster is damaged")
}

#[cfg(test)]
mod tests {
    use diskimage_core::options::{OptionDef, Options};
    use diskimage_core::{CompressionLevel, Encoder, Result};

    use super::{deflate, zstd};

    const CLUSTER: usize = 65536;

    type Decode = fn(&[u8], &mut [u8]) -> Result<Option<usize>>;
    type NewEncoder = fn(Option<CompressionLevel>) -> Result<Box<dyn Encoder>>;

    fn codecs() -> impl Iterator<Item = (&'static str, Decode, NewEncoder)> {
        let all: [(_, Decode, NewEncoder); 2] = [
            ("deflate", deflate::decode, deflate::encoder),
            ("zstd", zstd::decode, zstd::encoder),
        ];
        all.into_iter()
            .filter(|(name, ..)| *name != "zstd" || cfg!(feature = "zstd"))
    }

    /// Text of words from a small vocabulary: it compresses, but not to almost nothing.
    fn text(len: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut out = Vec::with_capacity(len + 16);
        while out.len() < len {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            out.extend_from_slice(format!("word{} ", state >> 20).as_bytes());
        }
        out.truncate(len);
        out
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn encoded_clusters_decode_despite_trailing_bytes() {
        for (codec, decode, encoder) in codecs() {
            let mut encoder = encoder(None).unwrap();
            let mut bytes = vec![1, 2, 3];
            for cluster in [text(CLUSTER), vec![7; CLUSTER], text(512), text(2 << 20)] {
                assert!(encoder.encode(&cluster, &mut bytes).unwrap(), "{codec}");
                assert!(bytes.len() < cluster.len());
                let mut padded = bytes.clone();
                padded.extend_from_slice(&[0xa5; 300]);
                let mut back = vec![0; cluster.len()];
                assert_eq!(decode(&padded, &mut back).unwrap(), Some(bytes.len()), "{codec}");
                assert_eq!(back, cluster, "{codec}");
            }
        }
    }

    #[test]
    fn the_level_of_an_image_decides_on_the_encoder() {
        let mut options = Options::new(&[OptionDef::COMPRESSION_LEVEL]);
        let words = text(CLUSTER);
        for (codec, decode, encoder) in codecs() {
            let lens = ["1", "5", "9"].map(|level| {
                options.set(CompressionLevel::OPTION, level).unwrap();
                let level = CompressionLevel::from_options(&options).unwrap();
                let (mut bytes, mut back) = (Vec::new(), vec![0; CLUSTER]);
                assert!(encoder(level).unwrap().encode(&words, &mut bytes).unwrap());
                decode(&bytes, &mut back).unwrap();
                assert!(back == words, "{codec}");
                bytes.len()
            });
            assert!(lens.is_sorted_by(|a, b| a > b), "{codec}: {lens:?}");
        }
    }

    #[test]
    fn noise_is_not_compressed() {
        for (_, _, encoder) in codecs() {
            let mut out = Vec::new();
            assert!(!encoder(None).unwrap().encode(&noise(CLUSTER), &mut out).unwrap());
        }
    }

    #[test]
    fn short_streams_are_damage() {
        for (_, decode, encoder) in codecs() {
            let mut bytes = Vec::new();
            encoder(None).unwrap().encode(&text(CLUSTER), &mut bytes).unwrap();
            let mut back = vec![0; CLUSTER];
            assert!(decode(&bytes[..bytes.len() / 2], &mut back).is_err());
            assert!(decode(&[], &mut back).is_err());
            assert!(
                decode(&bytes, &mut vec![0; CLUSTER + 1]).is_err(),
                "the stream is shorter than the cluster"
            );
        }
    }

    #[test]
    fn mutated_streams_never_panic() {
        for (_, decode, encoder) in codecs() {
            let mut bytes = Vec::new();
            encoder(None).unwrap().encode(&text(8192), &mut bytes).unwrap();
            let positions = noise(4000);
            let mut back = vec![0; 8192];
            for (at, pair) in positions.chunks(2).enumerate() {
                let mut mutated = bytes.clone();
                let index = (at * 7 + usize::from(pair[0])) % mutated.len();
                mutated[index] = pair[1];
                // Only the absence of a panic matters: some changes decode to other bytes.
                drop(decode(&mutated, &mut back));
            }
            for garbage in positions.chunks(100) {
                drop(decode(garbage, &mut back));
            }
        }
    }
}
