//! Initialisation vectors, made from sector numbers.

use diskimage_core::{Error, Result};

use super::BlockCipher;
use super::block::keyed;
use super::{CipherAlg, HashAlg};

/// How an initialisation vector is made from a sector number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IvAlg {
    /// The lower 32 bits of the sector number.
    Plain,
    /// The sector number.
    Plain64,
    /// The sector number, encrypted with the hash of the data's key.
    Essiv,
}

impl IvAlg {
    /// All algorithms.
    pub(crate) const ALL: [Self; 3] = [Self::Plain, Self::Plain64, Self::Essiv];

    /// The name in options and in headers.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv => "essiv",
        }
    }

    /// The algorithm with this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }
}

/// Checks that `alg` can make vectors for data that is encrypted with `cipher`.
///
/// # Errors
/// `qemu-img`'s message for a combination that does not work.
pub(crate) fn check(alg: IvAlg, hash: Option<HashAlg>, cipher: CipherAlg) -> Result<()> {
    match alg {
        IvAlg::Plain | IvAlg::Plain64 => Ok(()),
        IvAlg::Essiv => essiv_cipher(cipher, essiv_hash(hash)?).map(|_| ()),
    }
}

/// A generator of initialisation vectors.
pub(crate) enum IvGenerator {
    Plain,
    Plain64,
    Essiv(Box<dyn BlockCipher>),
}

impl IvGenerator {
    /// Returns the generator for data that is encrypted with `cipher` and `key`.
    pub(crate) fn new(alg: IvAlg, hash: Option<HashAlg>, cipher: CipherAlg, key: &[u8]) -> Result<Self> {
        Ok(match alg {
            IvAlg::Plain => Self::Plain,
            IvAlg::Plain64 => Self::Plain64,
            IvAlg::Essiv => {
                let hash = essiv_hash(hash)?;
                let essiv = essiv_cipher(cipher, hash)?;
                let salt = hash.digest(&[key]);
                Self::Essiv(keyed(essiv, &salt[..essiv.key_len()])?)
            }
        })
    }

    /// Fills `vectors` with one vector of `block_len` bytes for each sector, from sector number `first` on.
    pub(crate) fn fill(&self, first: u64, vectors: &mut [u8], block_len: usize) {
        for (number, vector) in (0u64..).zip(vectors.chunks_exact_mut(block_len)) {
            let mut number = first.wrapping_add(number);
            if matches!(self, Self::Plain) {
                number &= u64::from(u32::MAX);
            }
            let (head, tail) = vector.split_at_mut(8);
            head.copy_from_slice(&number.to_le_bytes());
            tail.fill(0);
        }
        if let Self::Essiv(cipher) = self {
            cipher.encrypt(vectors);
        }
    }
}

fn essiv_hash(hash: Option<HashAlg>) -> Result<HashAlg> {
    hash.ok_or_else(|| Error::invalid("Missing IV generator hash specification"))
}

/// The cipher with which `essiv` encrypts sector numbers: of the same family as the data's cipher, with a key as long
/// as the digest.
fn essiv_cipher(cipher: CipherAlg, hash: HashAlg) -> Result<CipherAlg> {
    let name = cipher.name();
    if cipher == CipherAlg::Cast5 {
        return Err(Error::unsupported(format!(
            "Cipher {name} not supported with essiv"
        )));
    }
    CipherAlg::from_family(cipher.family(), hash.digest_len()).ok_or_else(|| {
        Error::unsupported(format!(
            "No {} cipher with key size {} available",
            cipher.title(),
            hash.digest_len()
        ))
    })
}
