//! Runs of sectors, encrypted and decrypted in place.

use std::fmt;

use diskimage_core::{Error, Result};
use zeroize::{Zeroize, Zeroizing};

use super::BlockCipher;
use super::block::keyed;
use super::iv::{self, IvGenerator};
use super::mode::{self, BATCH, MAX_BLOCK, SECTOR};
use super::{CipherAlg, CipherMode, HashAlg, IvAlg};

/// A cipher, its mode and how its initialisation vectors are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CipherSpec {
    /// The cipher.
    pub(crate) cipher: CipherAlg,
    /// How the blocks of a sector are chained.
    pub(crate) mode: CipherMode,
    /// How initialisation vectors are made. `ecb` does not use them.
    pub(crate) iv: IvAlg,
    /// The hash for [`IvAlg::Essiv`].
    pub(crate) iv_hash: Option<HashAlg>,
}

impl CipherSpec {
    /// The length of the key in bytes.
    pub(crate) fn key_len(&self) -> usize {
        self.cipher.key_len() * self.mode.keys()
    }

    /// Checks that cipher, mode and initialisation vectors can be combined.
    ///
    /// # Errors
    /// `qemu-img`'s message for a combination that does not work.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_vectors()?;
        if self.mode == CipherMode::Xts && self.cipher.block_len() != MAX_BLOCK {
            return Err(Error::unsupported("Unsupported cipher mode xts"));
        }
        Ok(())
    }

    /// Checks that the initialisation vectors can be made with this cipher.
    ///
    /// # Errors
    /// `qemu-img`'s message for a combination that does not work.
    pub(crate) fn check_vectors(&self) -> Result<()> {
        iv::check(self.iv, self.iv_hash, self.cipher)
    }
}

/// Encrypts and decrypts runs of sectors. Many threads may use it at once. Dropping it wipes the keys from memory.
pub(crate) struct SectorCipher {
    spec: CipherSpec,
    data: Box<dyn BlockCipher>,
    /// The cipher with which XTS makes its tweaks.
    tweak: Option<Box<dyn BlockCipher>>,
    vectors: IvGenerator,
}

impl SectorCipher {
    /// Makes the cipher that `spec` describes, with `key`.
    ///
    /// # Errors
    /// A key of the wrong length, and a combination that does not work.
    pub(crate) fn new(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        spec.check()?;
        if key.len() != spec.key_len() {
            return Err(Error::invalid(format!(
                "Cipher key length {} should be {}",
                key.len(),
                spec.key_len()
            )));
        }
        let (first, second) = key.split_at(spec.cipher.key_len());
        Ok(Self {
            spec,
            data: keyed(spec.cipher, first)?,
            tweak: match spec.mode {
                CipherMode::Xts => Some(keyed(spec.cipher, second)?),
                _ => None,
            },
            vectors: IvGenerator::new(spec.iv, spec.iv_hash, spec.cipher, key)?,
        })
    }

    /// Encrypts `buf` in place. It holds whole sectors; the first one has the number `first_sector`.
    pub(crate) fn encrypt(&self, first_sector: u64, buf: &mut [u8]) {
        self.run(first_sector, buf, true);
    }

    /// Decrypts `buf` in place. It holds whole sectors; the first one has the number `first_sector`.
    pub(crate) fn decrypt(&self, first_sector: u64, buf: &mut [u8]) {
        self.run(first_sector, buf, false);
    }

    fn run(&self, first_sector: u64, buf: &mut [u8], encrypt: bool) {
        assert!(buf.len().is_multiple_of(SECTOR), "part of a sector");
        let block_len = self.spec.cipher.block_len();
        let mut space = Zeroizing::new([0; BATCH * MAX_BLOCK]);
        let mut sector = first_sector;
        for bytes in buf.chunks_mut(BATCH * SECTOR) {
            let count = bytes.len() / SECTOR;
            let vectors = &mut space[..count * block_len];
            if self.spec.mode != CipherMode::Ecb {
                self.vectors.fill(sector, vectors, block_len);
            }
            match (self.spec.mode, &self.tweak) {
                (CipherMode::Xts, Some(tweak)) => mode::xts(&*self.data, &**tweak, vectors, bytes, encrypt),
                (CipherMode::Ctr, _) => mode::ctr(&*self.data, vectors, bytes, block_len),
                (CipherMode::Cbc, _) if encrypt => {
                    mode::cbc_encrypt(&*self.data, vectors, bytes, block_len);
                }
                (CipherMode::Cbc, _) => mode::cbc_decrypt(&*self.data, vectors, bytes, block_len),
                _ if encrypt => self.data.encrypt(bytes),
                _ => self.data.decrypt(bytes),
            }
            sector = sector.wrapping_add(count as u64);
        }
        space.zeroize();
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher(alg: CipherAlg, mode: CipherMode, iv: IvAlg, key: &[u8]) -> SectorCipher {
        let spec = CipherSpec {
            cipher: alg,
            mode,
            iv,
            iv_hash: Some(HashAlg::Sha256),
        };
        SectorCipher::new(spec, key).unwrap()
    }

    fn sectors(count: usize) -> Vec<u8> {
        (0..=255).cycle().take(count * SECTOR).collect()
    }

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn xts_matches_ieee_1619() {
        // Vector 4: a data unit of 512 bytes, sector 0.
        let key = unhex("2718281828459045235360287471352631415926535897932384626433832795");
        let cipher = cipher(CipherAlg::Aes128, CipherMode::Xts, IvAlg::Plain64, &key);
        let mut bytes = sectors(1);
        cipher.encrypt(0, &mut bytes);
        assert_eq!(bytes[..16], unhex("27a7479befa1d476489f308cd4cfa6e2"));
        assert_eq!(bytes[496..], unhex("0a282df920147beabe421ee5319d0568"));
        cipher.decrypt(0, &mut bytes);
        assert_eq!(bytes, sectors(1));
    }

    #[test]
    fn xts_with_a_long_key_matches_ieee_1619() {
        // Vector 10: sector 0xff.
        let key = unhex(
            "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197\
             169399375105820974944592",
        );
        let cipher = cipher(CipherAlg::Aes256, CipherMode::Xts, IvAlg::Plain64, &key);
        let mut bytes = sectors(1);
        cipher.encrypt(0xff, &mut bytes);
        assert_eq!(bytes[..16], unhex("1c3b3a102f770386e4836c99e370cf9b"));
    }

    #[test]
    fn blocks_match_the_published_test_vectors() {
        // FIPS 197 appendix C, RFC 2144 appendix B.1, the NESSIE vectors of Serpent, Twofish's paper.
        for (alg, key, plain, encrypted) in [
            (
                CipherAlg::Aes192,
                "000102030405060708090a0b0c0d0e0f1011121314151617",
                "00112233445566778899aabbccddeeff",
                "dda97ca4864cdfe06eaf70a0ec0d7191",
            ),
            (
                CipherAlg::Cast5,
                "0123456712345678234567893456789a",
                "0123456789abcdef",
                "238b4fe5847e44b2",
            ),
            (
                CipherAlg::Serpent256,
                "8000000000000000000000000000000000000000000000000000000000000000",
                "00000000000000000000000000000000",
                "a223aa1288463c0e2be38ebd825616c0",
            ),
            (
                CipherAlg::Twofish128,
                "00000000000000000000000000000000",
                "00000000000000000000000000000000",
                "9f589f5cf6122c32b6bfec2f2ae8c35a",
            ),
        ] {
            let cipher = cipher(alg, CipherMode::Ecb, IvAlg::Plain64, &unhex(key));
            let mut bytes = unhex(plain).repeat(SECTOR / alg.block_len());
            cipher.encrypt(0, &mut bytes);
            assert_eq!(bytes[..alg.block_len()], unhex(encrypted), "{alg:?}");
        }
    }

    #[test]
    fn a_run_encrypted_at_once_decrypts_sector_by_sector() {
        let key: Vec<u8> = (0..64u8).map(|n| n.wrapping_mul(7)).collect();
        for alg in CipherAlg::ALL {
            for mode in CipherMode::ALL {
                for iv in IvAlg::ALL {
                    let spec = CipherSpec {
                        cipher: alg,
                        mode,
                        iv,
                        iv_hash: Some(HashAlg::Sha256),
                    };
                    if alg == CipherAlg::Cast5 && (mode == CipherMode::Xts || iv == IvAlg::Essiv) {
                        assert!(SectorCipher::new(spec, &key[..spec.key_len()]).is_err());
                        continue;
                    }
                    let cipher = SectorCipher::new(spec, &key[..spec.key_len()]).unwrap();
                    let mut bytes = sectors(70);
                    cipher.encrypt(5, &mut bytes);
                    let (front, back) = bytes.split_at_mut(33 * SECTOR);
                    assert_ne!(front, &sectors(33));
                    cipher.decrypt(38, back);
                    for (number, sector) in (5..).zip(front.chunks_mut(SECTOR)) {
                        cipher.decrypt(number, sector);
                    }
                    assert_eq!(bytes, sectors(70), "{spec:?}");
                }
            }
        }
    }

    #[test]
    fn plain_uses_32_bits_of_the_sector_number() {
        let key = [1; 32];
        let encrypted = |iv, number| {
            let mut bytes = sectors(1);
            cipher(CipherAlg::Aes256, CipherMode::Cbc, iv, &key).encrypt(number, &mut bytes);
            bytes
        };
        assert_eq!(encrypted(IvAlg::Plain, 1 << 32), encrypted(IvAlg::Plain, 0));
        assert_ne!(encrypted(IvAlg::Plain64, 1 << 32), encrypted(IvAlg::Plain64, 0));
        assert_eq!(encrypted(IvAlg::Plain64, 7), encrypted(IvAlg::Plain, 7));
    }
}
