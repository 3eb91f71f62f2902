//! The anti-forensic splitter of LUKS: a key becomes many stripes of which every bit counts, so that losing any part of
//! what is on the disk loses the key. ("LUKS On-Disk Format Specification" 1.2.3, section 2.4.)

use zeroize::Zeroizing;

use super::HashAlg;

/// Splits `key` into as many stripes as there are, of which all but the last come in `random`, bytes that nobody can
/// guess: a whole number of keys.
pub(crate) fn split(hash: HashAlg, key: &[u8], random: &[u8]) -> Zeroizing<Vec<u8>> {
    debug_assert!(random.len().is_multiple_of(key.len()), "part of a stripe");
    let last = fold(hash, random, key.len());
    let mut stripes = Zeroizing::new(Vec::with_capacity(random.len() + key.len()));
    stripes.extend_from_slice(random);
    stripes.extend(last.iter().zip(key).map(|(a, b)| a ^ b));
    stripes
}

/// The key of `len` bytes that was split into `stripes`, a whole number of keys.
pub(crate) fn merge(hash: HashAlg, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let (front, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = fold(hash, front, len);
    mix(&mut key, last);
    key
}

/// All stripes mixed and spread one after the other.
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

/// Replaces each piece of the length of the hash by the hash of its number and itself.
fn diffuse(hash: HashAlg, block: &mut [u8]) {
    for (number, piece) in (0u32..).zip(block.chunks_mut(hash.digest_len())) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_split_merges_again_and_every_bit_counts() {
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
