//! Secrets that are encrypted with another secret: AES-256 in CBC mode with the padding of PKCS #7.

use diskimage_core::{Error, Result};
use zeroize::Zeroizing;

use super::block::keyed;
use super::{CipherAlg, cbc};

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
    let mut plain = cbc::decrypt(&*keyed(CipherAlg::Aes256, key)?, iv, bytes);
    cbc::remove_padding(&mut plain, BLOCK).map_err(|padding| {
        Error::invalid(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        ))
    })?;
    Ok(plain)
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
