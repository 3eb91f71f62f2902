//! The keyed block ciphers behind the trait [`BlockCipher`].

use cipher::array::Array;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use diskimage_core::{Error, Result};

use super::twofish::Twofish;
use super::{BlockCipher, CipherAlg};

/// Returns the cipher `alg` with `key`, whose length must be that of the cipher's key.
pub(crate) fn keyed(alg: CipherAlg, key: &[u8]) -> Result<Box<dyn BlockCipher>> {
    match alg {
        CipherAlg::Aes128 => boxed::<aes::Aes128>(key),
        CipherAlg::Aes192 => boxed::<aes::Aes192>(key),
        CipherAlg::Aes256 => boxed::<aes::Aes256>(key),
        CipherAlg::Cast5 => boxed::<cast5::Cast5>(key),
        CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => {
            boxed::<serpent::Serpent>(key)
        }
        CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => {
            Ok(Box::new(Twofish::new(key)?))
        }
    }
}

/// Returns triple DES with `key`, which has 24 bytes: only for keys that are wrapped with it, no disk is encrypted so.
pub(crate) fn triple_des(key: &[u8]) -> Result<Box<dyn BlockCipher>> {
    boxed::<des::TdesEde3>(key)
}

pub(super) fn boxed<C>(key: &[u8]) -> Result<Box<dyn BlockCipher>>
where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync + 'static,
{
    let cipher = C::new_from_slice(key)
        .map_err(|_| Error::invalid(format!("Key of {} bytes does not fit its cipher", key.len())))?;
    Ok(Box::new(Keyed(cipher)))
}

struct Keyed<C>(C);

impl<C> BlockCipher for Keyed<C>
where
    C: BlockSizeUser + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn encrypt(&self, bytes: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(bytes);
        debug_assert!(rest.is_empty(), "part of a block");
        self.0.encrypt_blocks(blocks);
    }

    fn decrypt(&self, bytes: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(bytes);
        debug_assert!(rest.is_empty(), "part of a block");
        self.0.decrypt_blocks(blocks);
    }
}
