//! Keys from passphrases: PBKDF2 (RFC 8018) with HMAC.

use std::time::{Duration, Instant};

use pbkdf2::pbkdf2_hmac;
use zeroize::Zeroizing;

use super::HashAlg;

/// Derives a key of `len` bytes from `passphrase` in `iterations` rounds.
pub(crate) fn derive(
    hash: HashAlg,
    passphrase: &[u8],
    salt: &[u8],
    iterations: u32,
    len: usize,
) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    match hash {
        HashAlg::Md5 => pbkdf2_hmac::<md5::Md5>(passphrase, salt, iterations, &mut key),
        HashAlg::Sha1 => pbkdf2_hmac::<sha1::Sha1>(passphrase, salt, iterations, &mut key),
        HashAlg::Sha224 => pbkdf2_hmac::<sha2::Sha224>(passphrase, salt, iterations, &mut key),
        HashAlg::Sha256 => pbkdf2_hmac::<sha2::Sha256>(passphrase, salt, iterations, &mut key),
        HashAlg::Sha384 => pbkdf2_hmac::<sha2::Sha384>(passphrase, salt, iterations, &mut key),
        HashAlg::Sha512 => pbkdf2_hmac::<sha2::Sha512>(passphrase, salt, iterations, &mut key),
        HashAlg::Ripemd160 => pbkdf2_hmac::<ripemd::Ripemd160>(passphrase, salt, iterations, &mut key),
        HashAlg::Sm3 => pbkdf2_hmac::<sm3::Sm3>(passphrase, salt, iterations, &mut key),
    }
    key
}

/// Measures how many iterations this machine does in a second for a key of `len` bytes, with a short trial. The speed
/// does not depend on the passphrase and the salt.
pub(crate) fn iterations_per_second(hash: HashAlg, len: usize) -> u64 {
    let mut iterations = 1 << 10;
    loop {
        let start = Instant::now();
        derive(hash, b"trial passphrase", b"trial salt", iterations, len);
        let spent = start.elapsed();
        if spent >= TRIAL || iterations >= 1 << 30 {
            let nanoseconds = spent.as_nanos().max(1);
            let rate = u128::from(iterations) * 1_000_000_000 / nanoseconds;
            // A rate beyond 64 bits saturates: the caller multiplies it with a check.
            return u64::try_from(rate).unwrap_or(u64::MAX);
        }
        iterations *= 2;
    }
}

/// A trial that takes less time is repeated with twice the iterations.
const TRIAL: Duration = Duration::from_millis(40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_key_matches_rfc_6070() {
        let key = derive(HashAlg::Sha1, b"password", b"salt", 4096, 20);
        assert_eq!(
            key[..],
            [
                0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65, 0x48, 0x9a, 0xbe, 0xad, 0x49, 0xd9, 0x26, 0xf7, 0x21,
                0xd0, 0x65, 0xa4, 0x29, 0xc1
            ]
        );
    }

    #[test]
    fn derived_key_matches_rfc_7914() {
        let key = derive(HashAlg::Sha256, b"passwd", b"salt", 1, 64);
        assert_eq!(key[..8], [0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f]);
        assert_eq!(key[60..], [0xd3, 0xa1, 0x97, 0x83][..]);
    }
}
