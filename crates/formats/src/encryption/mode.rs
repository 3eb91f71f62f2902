//! Modes of operation: how the blocks of a sector are chained. Each function works on up to [`BATCH`] sectors at once,
//! whose initialisation vectors are in `vectors`, one after the other.
//!
//! ```text
//!   vectors  [iv 0][iv 1][iv 2] ...
//!   bytes    [---- sector 0 ----][---- sector 1 ----][---- sector 2 ----] ...
//! ```

use super::BlockCipher;

/// The bytes of a sector, the unit that has an initialisation vector of its own.
pub(crate) const SECTOR: usize = 512;

/// How many sectors one call handles: enough to fill the pipeline of the AES units, and few enough that they and the
/// tweaks stay in the first-level cache.
pub(crate) const BATCH: usize = 32;

/// The length of the longest block of any cipher.
pub(crate) const MAX_BLOCK: usize = 16;

/// XTS (IEEE 1619) without ciphertext stealing: a sector is a whole number of blocks.
pub(crate) fn xts(
    data: &dyn BlockCipher,
    tweak: &dyn BlockCipher,
    vectors: &mut [u8],
    bytes: &mut [u8],
    encrypt: bool,
) {
    const BLOCKS: usize = SECTOR / MAX_BLOCK;
    tweak.encrypt(vectors);
    let mut tweaks = [0u128; BATCH * BLOCKS];
    let tweaks = &mut tweaks[..bytes.len() / MAX_BLOCK];
    for (vector, tweaks) in vectors
        .as_chunks::<MAX_BLOCK>()
        .0
        .iter()
        .zip(tweaks.as_chunks_mut::<BLOCKS>().0)
    {
        let mut power = u128::from_le_bytes(*vector);
        for tweak in tweaks {
            *tweak = power;
            // Multiplies by x modulo x^128 + x^7 + x^2 + x + 1.
            power = (power << 1) ^ ((power >> 127) * 0x87);
        }
    }
    mix(bytes, tweaks);
    if encrypt {
        data.encrypt(bytes);
    } else {
        data.decrypt(bytes);
    }
    mix(bytes, tweaks);
}

fn mix(bytes: &mut [u8], tweaks: &[u128]) {
    for (block, tweak) in bytes.as_chunks_mut::<MAX_BLOCK>().0.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

/// CBC encryption. A block depends on the block before, so the blocks at the same offset of all sectors are encrypted
/// together.
pub(crate) fn cbc_encrypt(data: &dyn BlockCipher, vectors: &mut [u8], bytes: &mut [u8], block_len: usize) {
    // `vectors` holds each sector's previous encrypted block.
    for at in (0..SECTOR).step_by(block_len) {
        let sectors = bytes.chunks_exact(SECTOR);
        for (before, sector) in vectors.chunks_exact_mut(block_len).zip(sectors) {
            xor(before, &sector[at..at + block_len]);
        }
        data.encrypt(vectors);
        let sectors = bytes.chunks_exact_mut(SECTOR);
        for (block, sector) in vectors.chunks_exact(block_len).zip(sectors) {
            sector[at..at + block_len].copy_from_slice(block);
        }
    }
}

/// CBC decryption, in which no block depends on another decrypted block.
pub(crate) fn cbc_decrypt(data: &dyn BlockCipher, vectors: &[u8], bytes: &mut [u8], block_len: usize) {
    let mut encrypted = [0; BATCH * SECTOR];
    let encrypted = &mut encrypted[..bytes.len()];
    encrypted.copy_from_slice(bytes);
    data.decrypt(bytes);
    let sectors = bytes.chunks_exact_mut(SECTOR).zip(encrypted.chunks_exact(SECTOR));
    for ((sector, encrypted), vector) in sectors.zip(vectors.chunks_exact(block_len)) {
        let (first, rest) = sector.split_at_mut(block_len);
        xor(first, vector);
        xor(rest, encrypted);
    }
}

/// CTR: the vector is the first value of a big-endian counter.
pub(crate) fn ctr(data: &dyn BlockCipher, vectors: &[u8], bytes: &mut [u8], block_len: usize) {
    let mut stream = [0; BATCH * SECTOR];
    let stream = &mut stream[..bytes.len()];
    for (vector, sector) in vectors
        .chunks_exact(block_len)
        .zip(stream.chunks_exact_mut(SECTOR))
    {
        let mut number = [0; MAX_BLOCK];
        number[MAX_BLOCK - block_len..].copy_from_slice(vector);
        let first = u128::from_be_bytes(number);
        for (count, block) in (0u128..).zip(sector.chunks_exact_mut(block_len)) {
            let counter = first.wrapping_add(count).to_be_bytes();
            block.copy_from_slice(&counter[MAX_BLOCK - block_len..]);
        }
    }
    data.encrypt(stream);
    xor(bytes, stream);
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    for (a, b) in bytes.iter_mut().zip(with) {
        *a ^= b;
    }
}
