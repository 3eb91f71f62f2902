//! Secrets that are encrypted with another secret: AES-256 in CBC mode, padded as PKCS #7 says.

use diskimage_core::{Error, Result};
use zeroize::Zeroizing;

use crate::CipherAlg;
use crate::block::keyed;

/// Decrypts `bytes`, in place and padding gone.
///
/// # Errors
/// A key that has not 32 bytes, an initialisation vector that has not 16, and bytes that are not whole blocks or not
/// padded as they should be.
pub fn decrypt_secret(key: &[u8], iv: &[u8], bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    const BLOCK: usize = 16;
    let cipher = keyed(CipherAlg::Aes256, key)?;
    let mut plain = Zeroizing::new(bytes.to_vec());
    let blocks = plain.as_chunks_mut::<BLOCK>();
    if !blocks.1.is_empty() {
        return Err(Error::invalid(format!(
            "Ciphertext length {} is not a multiple of block size {BLOCK}",
            bytes.len()
        )));
    }
    cipher.decrypt(&mut plain);
    for (at, byte) in plain.iter_mut().enumerate() {
        // The vector stands where the block before the first would.
        *byte ^= match at.checked_sub(BLOCK) {
            Some(before) => bytes[before],
            None => *iv.get(at).unwrap_or(&0),
        };
    }
    let padding = usize::from(plain.last().copied().unwrap_or(0));
    let kept = plain
        .len()
        .checked_sub(padding)
        .filter(|_| (1..=BLOCK).contains(&padding));
    match kept {
        Some(kept) if plain[kept..].iter().all(|byte| usize::from(*byte) == padding) => {
            plain.truncate(kept);
            Ok(plain)
        }
        _ => Err(Error::invalid(
            "Incorrect number of padding bytes found on decrypted data",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_those_of_openssl() {
        // echo -n letmein | openssl enc -aes-256-cbc -K 00..1f -iv 20..2f
        let key: Vec<u8> = (0..32).collect();
        let iv: Vec<u8> = (32..48).collect();
        let encrypted = [
            0xfb, 0x31, 0x48, 0xe9, 0x16, 0x1d, 0xcb, 0x4b, 0x02, 0xdb, 0x4e, 0x9e, 0x3e, 0xe0, 0x3b, 0x8d,
        ];
        assert_eq!(decrypt_secret(&key, &iv, &encrypted).unwrap()[..], b"letmein"[..]);
        let wrong = [&encrypted[..15], &[0]].concat();
        assert!(decrypt_secret(&key, &iv, &wrong).is_err());
        assert!(decrypt_secret(&key, &iv, &encrypted[..15]).is_err());
        assert!(decrypt_secret(&key[1..], &iv, &encrypted).is_err());
    }
}
