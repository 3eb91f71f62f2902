//! The encryption that both versions of qcow had before there was LUKS, and the options that go with encryption.
//!
//! Nothing but a number in the header tells of it: the passphrase is the key, and each sector of guest data is numbered by
//! where it is on the disk. Anybody who knows what some sector holds can try passphrases at the speed of the cipher, and
//! nothing tells a wrong one: what is read with it is garbage. Tables and compressed clusters are not encrypted.

use std::sync::Arc;

use crate::encryption::{CipherAlg, CipherMode, CipherSpec, IvAlg, SECTOR, SectorCipher, Zeroizing};
use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Device, Error, NodeOptions, OpenRequest, Result};

use crate::encryption::encrypted_device::EncryptedDevice;
use crate::luks::options::passphrase;

/// The key of an open image; there is none where only facts are wanted.
#[derive(Clone, Debug)]
pub(crate) struct LegacyAes(Option<Arc<SectorCipher>>);

impl LegacyAes {
    /// The cipher whose key is the passphrase: cut to the key's length, or filled up with zeroes.
    ///
    /// # Errors
    /// None in practice: the key has the length that the cipher wants.
    pub(crate) fn new(passphrase: Option<&[u8]>) -> Result<Self> {
        let spec = CipherSpec {
            cipher: CipherAlg::Aes128,
            mode: CipherMode::Cbc,
            iv: IvAlg::Plain64,
            iv_hash: None,
        };
        let Some(passphrase) = passphrase else {
            return Ok(Self(None));
        };
        let mut key = Zeroizing::new(vec![0; spec.key_len()]);
        for (byte, given) in key.iter_mut().zip(passphrase) {
            *byte = *given;
        }
        SectorCipher::new(spec, &key).map(|cipher| Self(Some(Arc::new(cipher))))
    }

    /// `data` as the guest sees it around the byte that is at `guest` of the disk and at `host` of `data`; `None` if
    /// there is no key.
    pub(crate) fn view(&self, data: &Arc<dyn Device>, guest: u64, host: u64) -> Option<Arc<dyn Device>> {
        const UNIT: u64 = SECTOR as u64;
        let first_sector = (guest / UNIT).wrapping_sub(host / UNIT);
        let cipher = Arc::clone(self.0.as_ref()?);
        Some(Arc::new(EncryptedDevice::new(
            Arc::clone(data),
            0,
            first_sector,
            cipher,
        )))
    }
}

/// The options of a node, below `encrypt`.
const OPTIONS: &[OptionDef] = &[
    OptionDef::new(
        "format",
        OptionKind::Text,
        "Encryption that the image has to have",
    ),
    OptionDef::new(
        "key-secret",
        OptionKind::Text,
        "ID of the secret that provides the passphrase",
    ),
];

/// The option that names the secret.
pub(crate) const KEY_SECRET: &str = "encrypt.key-secret";

/// The passphrase for an image whose header speaks of the encryption `found`; none where it speaks of none, or only facts
/// are wanted.
///
/// # Errors
/// Options that do not fit the image, and no such secret.
pub(crate) fn passphrase_for<'a>(
    found: Option<&str>,
    request: &mut OpenRequest<'a>,
) -> Result<Option<&'a [u8]>> {
    let mut given = request.options.take_node("encrypt");
    let options = given.take_known(OPTIONS)?;
    let format = options.text("format");
    let Some(found) = found else {
        return match format {
            Some(format) => Err(Error::invalid(format!(
                "No encryption in image header, but options specified format '{format}'"
            ))),
            None => Ok(None),
        };
    };
    if let Some(format) = format.filter(|format| *format != found) {
        return Err(Error::invalid(format!(
            "Header reported '{found}' encryption format but options specify '{format}'"
        )));
    }
    if let Some(name) = given.first_unused() {
        return Err(unexpected(name));
    }
    if request.no_data {
        return Ok(None);
    }
    passphrase(request.objects, options.text("key-secret"), KEY_SECRET).map(Some)
}

/// Refuses an option that the encryption does not have.
pub(crate) fn unexpected(name: &str) -> Error {
    Error::invalid(format!("Parameter '{name}' is unexpected"))
}

/// Refuses options of a new image that say nothing about the encryption they are for.
pub(crate) fn no_format() -> Error {
    Error::invalid("Parameter 'encrypt.format' is missing")
}

/// Refuses encryption that there is not.
pub(crate) fn unknown_format(name: &str) -> Error {
    Error::invalid(format!("Parameter 'format' does not accept value '{name}'"))
}

/// What the encryption of a new image is called in the options.
///
/// # Errors
/// Two names for it at once.
pub(crate) fn wanted_format(options: &Options) -> Result<Option<&str>> {
    let format = options.text("encrypt.format");
    match (options.flag("encryption"), format) {
        (Some(true), Some(_)) => Err(Error::invalid(
            "'encrypt.format' and its alias 'encryption' can't be used at the same time",
        )),
        (Some(true), None) => Ok(Some("aes")),
        _ => Ok(format),
    }
}

/// The options to open a new image with.
pub(crate) fn node(options: &Options) -> NodeOptions {
    let mut node = NodeOptions::new();
    if let Some(id) = options.text(KEY_SECRET) {
        node.set(KEY_SECRET, id);
    }
    node
}
