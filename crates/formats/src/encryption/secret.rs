//! Secrets that are encrypted with another secret: AES-256 in CBC mode with the padding of PKCS #7.

use diskimage_core::{Error, Result};
use zeroize::Zeroizing;

use super::CipherAlg;
use super::block::keyed;

/// Decrypts `bytes` and removes the padding.
///
/// # Errors
/// The key has not 32 bytes, the initialisation vector has not 16, `bytes` is not a whole number of blocks, or the padding
/// is wrong.
pub fn decrypt_secret(key: &[u8], iv: &[u8], bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    if key.len() != CipherAlg::Aes256.key_len() {
        return Err(Error::invalid("Key should be 32 bytes in length"));
    }
    if iv.len() != BLOCK {
        return Err(Error::invalid(format!(
            "IV should be {BLOCK} bytes in length not {}",
            iv.len()
        )));
    }
    if !bytes.len().is_multiple_of(BLOCK) {
        return Err(Error::invalid(format!(
            "Length {} must be a multiple of block size {BLOCK}",
            bytes.len()
        )));
    }
    let mut plain = Zeroizing::new(bytes.to_vec());
    keyed(CipherAlg::Aes256, key)?.decrypt(&mut plain);
    // The initialisation vector takes the role of the block before the first.
    for (byte, before) in plain.iter_mut().zip(iv.iter().chain(bytes)) {
        *byte ^= before;
    }
    let padding = plain.last().copied().unwrap_or(0);
    let count = usize::from(padding);
    let kept = plain
        .len()
        .checked_sub(count)
        .filter(|_| (1..=BLOCK).contains(&count));
    match kept {
        Some(kept) if plain[kept..].iter().all(|byte| *byte == padding) => {
            plain.truncate(kept);
            Ok(plain)
        }
        _ => Err(Error::invalid(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        ))),
    }
}

const BLOCK: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_encrypted_by_openssl_is_decrypted() {
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
