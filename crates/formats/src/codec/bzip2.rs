//! bzip2.

use bzip2::read::BzDecoder;
use diskimage_core::Result;

/// Fills `block` from the stream at the start of `bytes`, which ends with the block.
pub(crate) fn decode(bytes: &[u8], block: &mut [u8]) -> Result<()> {
    super::fill(BzDecoder::new(bytes), block)
}
