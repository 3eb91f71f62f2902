//! Encoded clusters, most of which are compressed.

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

    /// Decodes the cluster that [`RunKind::Encoded`](crate::RunKind::Encoded) names; `buf` has the length of its
    /// cluster.
    ///
    /// # Errors
    /// Damage in the encoded bytes.
    fn decode(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()>;

    /// The form in which this image stores encoded clusters; `None` if it stores none, or none that another image could.
    fn form(&self) -> Option<EncodedForm> {
        None
    }

    /// As [`Codec::decode`], and replaces `bytes` by the encoded bytes alone, without what may follow them. `false` if
    /// they cannot be stored in another image of the same form; `buf` is filled all the same.
    ///
    /// # Errors
    /// As [`Codec::decode`].
    fn decode_and_keep(&self, encoded: &Encoded, buf: &mut [u8], _bytes: &mut Vec<u8>) -> Result<bool> {
        self.decode(encoded, buf)?;
        Ok(false)
    }

    /// A new encoder for clusters, one for each worker; `None` if this image cannot store encoded clusters.
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
    /// The host offset of its bytes.
    pub offset: u64,
    /// The upper limit of their length.
    pub stored: u64,
    /// The guest range that it decodes to. The last cluster of a disk is decoded whole, beyond the end of the disk.
    pub cluster: ByteRange,
}

/// What encoded clusters look like. Images of one form can take each other's encoded bytes as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodedForm {
    /// The name of the format of the bytes.
    pub codec: &'static str,
    /// The length of a cluster.
    pub cluster: u64,
}

/// Compresses clusters.
pub trait Encoder: Send {
    /// Clears `out` and writes the encoded form of `cluster` to it. `Ok(false)` if the cluster should be stored
    /// unencoded.
    ///
    /// # Errors
    /// A failure of the codec.
    fn encode(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Result<bool>;
}
