//! Encoded clusters, most of which are compressed.

use std::fmt::Debug;
use std::ops::Range;

use crate::options::{OptionDef, Options};
use crate::{ByteRange, Error, Result};

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

    /// A new encoder for clusters, one for each worker; `None` if this image cannot store encoded clusters. Without a
    /// level it makes clusters about as short as `qemu-img` does.
    ///
    /// # Errors
    /// Compression that this build lacks.
    fn encoder(&self, level: Option<CompressionLevel>) -> Result<Option<Box<dyn Encoder>>>;

    /// Allocates storage for the encoded form of clusters, which are given in guest order, at least one. Until
    /// [`EncodedPlan::finish`] nothing refers to it; a drop frees it.
    ///
    /// # Errors
    /// As for writing.
    fn plan_encoded(&self, clusters: &[EncodedCluster]) -> Result<Box<dyn EncodedPlan + '_>>;

    /// Whether the disk can be written only as the encoded form of whole clusters.
    fn needs_encoding(&self) -> bool {
        false
    }
}

/// The encoded form of a cluster that is to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedCluster {
    /// The guest offset of the cluster.
    pub offset: u64,
    /// Its bytes, as a range of the buffer that [`EncodedPlan::finish`] gets.
    pub bytes: Range<usize>,
}

/// Allocated storage for encoded clusters.
pub trait EncodedPlan {
    /// Writes the clusters, whose bytes are in `buf`, and makes them part of the image.
    ///
    /// # Errors
    /// As for writing.
    fn finish(self: Box<Self>, buf: &[u8]) -> Result<()>;
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

/// How hard an encoder tries to make clusters shorter: from 1, the fastest, to 9, with the shortest output. Images do not
/// store it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressionLevel(u8);

impl CompressionLevel {
    /// The name of the creation option.
    pub const OPTION: &'static str = OptionDef::COMPRESSION_LEVEL.name;

    /// Reads the creation option; `None` if it is not given.
    ///
    /// # Errors
    /// A number that is not from 1 to 9.
    pub fn from_options(options: &Options) -> Result<Option<Self>> {
        let Some(number) = options.number(Self::OPTION) else {
            return Ok(None);
        };
        match u8::try_from(number) {
            Ok(level @ 1..=9) => Ok(Some(Self(level))),
            _ => Err(Error::invalid("Compression level must be between 1 and 9")),
        }
    }

    /// Refuses the creation option where nothing is encoded.
    ///
    /// # Errors
    /// The option is given.
    pub fn require_absent(options: &Options, why: &str) -> Result<()> {
        match Self::from_options(options)? {
            Some(_) => Err(Error::invalid(format!("{} has no effect: {why}", Self::OPTION))),
            None => Ok(()),
        }
    }

    /// The number, 1 to 9.
    pub fn get(self) -> u8 {
        self.0
    }

    /// Its index in a table of nine.
    pub fn index(self) -> usize {
        usize::from(self.0) - 1
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn level(list: &str) -> Result<Option<CompressionLevel>> {
        let mut options = Options::new(&[OptionDef::COMPRESSION_LEVEL]);
        options.parse(list)?;
        CompressionLevel::from_options(&options)
    }

    #[test]
    fn levels_are_one_to_nine() {
        assert_eq!(level("").expect("no level"), None);
        for number in 1..=9 {
            let level = level(&format!("compression_level={number}")).expect("a level");
            assert_eq!(level.map(CompressionLevel::get), Some(number));
        }
        for wrong in ["0", "10", "-1", "257"] {
            let error = level(&format!("compression_level={wrong}")).expect_err(wrong);
            assert_eq!(error.to_string(), "Compression level must be between 1 and 9");
        }
    }
}
