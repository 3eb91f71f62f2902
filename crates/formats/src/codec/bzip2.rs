//! bzip2.

use bzip2::read::BzDecoder;
use diskimage_core::Result;

/// Fills `block` from the stream at the start of `bytes`. The stream must end where the block ends.
pub(crate) fn decode(bytes: &[u8], block: &mut [u8]) -> Result<()> {
    super::fill(BzDecoder::new(bytes), block)
}
