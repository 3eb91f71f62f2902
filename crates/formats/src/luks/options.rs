//! The options of a new volume. qcow2 has the same options with the prefix `encrypt.`.

use crate::encryption::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvAlg};
use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Error, ErrorKind, Objects, Result};

// The options that describe an encryption; qcow2 has them with a prefix.
pub(crate) const CIPHER_ALG: OptionDef = OptionDef::new(
    "cipher-alg",
    OptionKind::Text,
    "Name of encryption cipher algorithm",
);
pub(crate) const CIPHER_MODE: OptionDef =
    OptionDef::new("cipher-mode", OptionKind::Text, "Name of encryption cipher mode");
pub(crate) const IVGEN_ALG: OptionDef =
    OptionDef::new("ivgen-alg", OptionKind::Text, "Name of IV generator algorithm");
pub(crate) const IVGEN_HASH_ALG: OptionDef = OptionDef::new(
    "ivgen-hash-alg",
    OptionKind::Text,
    "Name of IV generator hash algorithm",
);
pub(crate) const HASH_ALG: OptionDef =
    OptionDef::new("hash-alg", OptionKind::Text, "Name of encryption hash algorithm");
pub(crate) const ITER_TIME: OptionDef = OptionDef::new(
    "iter-time",
    OptionKind::Number,
    "Time to spend in PBKDF in milliseconds",
);

pub(crate) const MAX_ITERATIONS: OptionDef = OptionDef::new(
    "max-iterations",
    OptionKind::Number,
    "Most PBKDF iterations of a key slot that are tried (default 12000000)",
);

/// The options of `create`.
pub(super) const CREATE_OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::new(
        "key-secret",
        OptionKind::Text,
        "ID of the secret that provides the keyslot passphrase",
    ),
    CIPHER_ALG,
    CIPHER_MODE,
    IVGEN_ALG,
    IVGEN_HASH_ALG,
    HASH_ALG,
    ITER_TIME,
    OptionDef::new(
        "detached-header",
        OptionKind::Flag,
        "Create a detached LUKS header",
    ),
];

/// The algorithms of a new volume.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Algorithms {
    /// How the payload is encrypted.
    pub(crate) spec: CipherSpec,
    /// The hash for key derivation.
    pub(crate) hash: HashAlg,
    /// How many milliseconds the derivation of a key should take.
    pub(crate) iter_time: u64,
}

/// The default of `iter-time`, in milliseconds.
pub(super) const DEFAULT_ITER_TIME: u64 = 2000;

/// The parsed options of a new volume. Whether this program supports the combination is checked in
/// [`VolumeOptions::algorithms`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct VolumeOptions<'a> {
    cipher: &'a str,
    mode: CipherMode,
    iv: IvAlg,
    iv_hash: Option<HashAlg>,
    hash: HashAlg,
    iter_time: u64,
}

impl<'a> VolumeOptions<'a> {
    /// Reads the options whose names start with `prefix`: none for LUKS itself, `encrypt.` for qcow2.
    ///
    /// # Errors
    /// Values that an option does not accept.
    pub(crate) fn read(options: &'a Options, prefix: &str) -> Result<Self> {
        let value = |name: &str| options.text(&format!("{prefix}{name}"));
        let cipher = value("cipher-alg").unwrap_or("aes-256");
        if CipherAlg::from_name(cipher).is_none() && !UNSUPPORTED.contains(&cipher) {
            return Err(not_accepted("cipher-alg", cipher));
        }
        let mode = one_of(value("cipher-mode"), "cipher-mode", CipherMode::from_name)?;
        let iv = one_of(value("ivgen-alg"), "ivgen-alg", IvAlg::from_name)?;
        let iv_hash = one_of(value("ivgen-hash-alg"), "ivgen-hash-alg", HashAlg::from_name)?;
        let hash = one_of(value("hash-alg"), "hash-alg", HashAlg::from_name)?;
        let iter_time = options.number(&format!("{prefix}iter-time"));
        Ok(Self {
            cipher,
            mode: mode.unwrap_or(CipherMode::Xts),
            iv: iv.unwrap_or(IvAlg::Plain64),
            iv_hash,
            hash: hash.unwrap_or(HashAlg::Sha256),
            iter_time: iter_time.unwrap_or(DEFAULT_ITER_TIME),
        })
    }

    /// Returns the algorithms.
    ///
    /// # Errors
    /// Ciphers that LUKS does not support, and combinations that do not work.
    pub(crate) fn algorithms(self) -> Result<Algorithms> {
        let cipher = CipherAlg::from_name(self.cipher)
            .ok_or_else(|| Error::unsupported(format!("Algorithm '{}' not supported", self.cipher)))?;
        let spec = CipherSpec {
            cipher,
            mode: self.mode,
            iv: self.iv,
            iv_hash: match self.iv {
                IvAlg::Essiv => self.iv_hash.or(Some(HashAlg::Sha256)),
                _ => self.iv_hash,
            },
        };
        spec.check()?;
        Ok(Algorithms {
            spec,
            hash: self.hash,
            iter_time: self.iter_time,
        })
    }
}

fn one_of<T>(given: Option<&str>, option: &str, find: impl Fn(&str) -> Option<T>) -> Result<Option<T>> {
    given
        .map(|name| find(name).ok_or_else(|| not_accepted(option, name)))
        .transpose()
}

fn not_accepted(option: &str, value: &str) -> Error {
    Error::invalid(format!("Parameter '{option}' does not accept value '{value}'"))
}

/// Ciphers whose names the option accepts, but which LUKS does not support.
const UNSUPPORTED: [&str; 3] = ["des", "3des", "sm4"];

/// Returns the passphrase: the secret whose ID is `key_secret`. `option` is the option's full name, for the message.
///
/// # Errors
/// An unknown secret, and no ID at all.
pub(crate) fn passphrase<'a>(
    objects: &'a Objects,
    key_secret: Option<&str>,
    option: &str,
) -> Result<&'a [u8]> {
    match key_secret {
        Some(id) => {
            let bytes = objects.secret(id)?.bytes();
            match std::str::from_utf8(bytes) {
                Ok(text) if !text.contains('\0') => Ok(bytes),
                _ => Err(Error::invalid(format!(
                    "Data from secret {id} is not valid UTF-8"
                ))),
            }
        }
        None => Err(Error::new(
            ErrorKind::Invalid,
            format!("Parameter '{option}' is required for cipher"),
        )),
    }
}
