//! Initialisation vectors from the numbers of sectors.

use diskimage_core::{Error, Result};

use super::block::{BlockCipher, keyed};
use super::{CipherAlg, HashAlg};

/// How initialisation vectors come from the numbers of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IvAlg {
    /// The lower 32 bits of the number.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted with a key that is the hash of the key.
    Essiv,
}

impl IvAlg {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Plain, Self::Plain64, Self::Essiv];

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv => "essiv",
        }
    }

    /// The generator of this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }
}

/// Checks that vectors can be made for data encrypted with `cipher`.
///
/// # Errors
/// The original's words for what does not go together.
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
    /// The generator for data encrypted with `cipher` and `key`.
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

    /// Puts the vector of each sector from number `first` on into `vectors`, blocks of `block_len` bytes.
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

/// The cipher that `essiv` encrypts numbers with: of the family of that of the data, with a key as long as the hash.
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
