//! CBC over one run of blocks of any length, for what is not divided into sectors: secrets, wrapped keys, and the
//! blocks of encrypted disk images of macOS.

use zeroize::Zeroizing;

use super::BlockCipher;

/// Decrypts each block of `bytes`, whose length is a multiple of the length of `iv`, which is that of a cipher's block.
pub(crate) fn decrypt(cipher: &dyn BlockCipher, iv: &[u8], bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut plain = Zeroizing::new(bytes.to_vec());
    cipher.decrypt(&mut plain);
    // The initialisation vector takes the role of the block before the first.
    for (byte, before) in plain.iter_mut().zip(iv.iter().chain(bytes)) {
        *byte ^= before;
    }
    plain
}

/// Removes the padding of PKCS #7 for blocks of `block_len` bytes.
///
/// # Errors
/// The number of padding bytes that the last byte states, if the padding is not valid.
pub(crate) fn remove_padding(plain: &mut Zeroizing<Vec<u8>>, block_len: usize) -> Result<(), u8> {
    let padding = plain.last().copied().unwrap_or(0);
    let count = usize::from(padding);
    let kept = plain
        .len()
        .checked_sub(count)
        .filter(|_| (1..=block_len).contains(&count))
        .ok_or(padding)?;
    if plain[kept..].iter().any(|byte| *byte != padding) {
        return Err(padding);
    }
    plain.truncate(kept);
    Ok(())
}
