//! Clusters that are stored in encoded form: compressed, as a rule.

use std::fmt::Debug;

use crate::{ByteRange, Result};

/// A layer that stores clusters in encoded form.
pub trait Codec: Debug + Send + Sync {
    /// Checks that the file has all bytes of what [`RunKind::Encoded`](crate::RunKind::Encoded) names.
    ///
    /// # Errors
    /// Bytes that are missing.
    fn require_encoded(&self, _encoded: &Encoded) -> Result<()> {
        Ok(())
    }

    /// Decodes the cluster that [`RunKind::Encoded`](crate::RunKind::Encoded) names; `buf` has the length of its cluster.
    ///
    /// # Errors
    /// Damage in the encoded bytes.
    fn decode(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()>;

    /// A new encoder for clusters, one for each worker; `None` if this image has to store them as they are.
    ///
    /// # Errors
    /// Compression that this build lacks.
    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>>;

    /// Stores the encoded bytes of the one cluster that starts at guest offset `offset`.
    ///
    /// # Errors
    /// As for writing.
    fn write_encoded(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Whether the disk can be written only as the encoded form of whole clusters.
    fn needs_encoding(&self) -> bool {
        false
    }
}

/// Where an encoded cluster is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Offset of its bytes in the file.
    pub offset: u64,
    /// How many bytes at most.
    pub stored: u64,
    /// The guest bytes that it decodes to. The last cluster of a disk is decoded whole, past the disk's end.
    pub cluster: ByteRange,
}

/// Compresses clusters.
pub trait Encoder: Send {
    /// Puts the encoded form of `cluster` into `out`, emptied first. `Ok(false)` if the cluster is better stored as it is.
    ///
    /// # Errors
    /// A failure of the codec.
    fn encode(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Result<bool>;
}
