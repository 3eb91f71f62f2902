//! The anti-forensic splitter of LUKS: it expands a key into many stripes. The key depends on every bit of the stripes,
//! so overwriting any part of them on the disk destroys the key. ("LUKS On-Disk Format Specification" 1.2.3, section
//! 2.4.)

use zeroize::Zeroizing;

use super::HashAlg;

/// Splits `key` into stripes of its length. `random` holds all stripes but the last: unpredictable bytes, a multiple of
/// the key's length.
pub(crate) fn split(hash: HashAlg, key: &[u8], random: &[u8]) -> Zeroizing<Vec<u8>> {
    debug_assert!(random.len().is_multiple_of(key.len()), "part of a stripe");
    let last = fold(hash, random, key.len());
    let mut stripes = Zeroizing::new(Vec::with_capacity(random.len() + key.len()));
    stripes.extend_from_slice(random);
    stripes.extend(last.iter().zip(key).map(|(a, b)| a ^ b));
    stripes
}

/// Returns the key of `len` bytes that was split into `stripes`. Their length is a multiple of `len`.
pub(crate) fn merge(hash: HashAlg, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let (front, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = fold(hash, front, len);
    mix(&mut key, last);
    key
}

/// Mixes the stripes one after the other into a block, and diffuses the block after each.
fn fold(hash: HashAlg, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; len]);
    for stripe in stripes.chunks_exact(len) {
        mix(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    block
}

fn mix(block: &mut [u8], stripe: &[u8]) {
    for (a, b) in block.iter_mut().zip(stripe) {
        *a ^= b;
    }
}

/// Replaces each chunk of the digest's length by the hash of the chunk's number and the chunk.
fn diffuse(hash: HashAlg, block: &mut [u8]) {
    for (number, chunk) in (0u32..).zip(block.chunks_mut(hash.digest_len())) {
        let digest = hash.digest(&[&number.to_be_bytes(), chunk]);
        chunk.copy_from_slice(&digest[..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_and_merge_round_trip_and_one_flipped_bit_loses_the_key() {
        let key: Vec<u8> = (0..64).collect();
        let random: Vec<u8> = (0..64 * 9u32)
            .map(|n| n.wrapping_mul(89).to_le_bytes()[0])
            .collect();
        for hash in HashAlg::ALL {
            let mut stripes = split(hash, &key, &random);
            assert_eq!(stripes.len(), 640);
            assert_eq!(merge(hash, &stripes, 64)[..], key);
            stripes[3] ^= 1;
            assert_ne!(merge(hash, &stripes, 64)[..], key);
        }
    }
}
