//! LZFSE.

use diskimage_core::Result;
use lzfse_rust::LzfseRingDecoder;

/// Fills `block` from the stream at the start of `bytes`. The stream must end where the block ends.
pub(crate) fn decode(bytes: &[u8], block: &mut [u8]) -> Result<()> {
    super::fill(LzfseRingDecoder::default().reader_bytes(bytes), block)
}
