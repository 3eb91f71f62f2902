//! The AES-CBC encryption that qcow and qcow2 had before LUKS, and the options of encrypted images.
//!
//! A number in the header marks the image as encrypted. The passphrase is the key, and a sector's number is its guest
//! offset in sectors. The format is weak: an attacker with the plain text of one sector can try passphrases at the
//! speed of the cipher. A wrong passphrase is not detected; guest data then reads as garbage. Tables and compressed
//! clusters are not encrypted.

use std::sync::Arc;

use crate::encryption::{CipherAlg, CipherMode, CipherSpec, IvAlg, SECTOR, SectorCipher, Zeroizing};
use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Device, Error, NodeOptions, OpenRequest, Result};

use crate::encryption::encrypted_device::EncryptedDevice;
use crate::layer_kit::offset::{GuestOffset, HostOffset};
use crate::luks::options::{MAX_ITERATIONS, passphrase};

/// The key of an open image; `None` if the image was opened without its data.
#[derive(Clone, Debug)]
pub(crate) struct LegacyAes(Option<Arc<SectorCipher>>);

impl LegacyAes {
    /// Makes the cipher. Its key is the passphrase, truncated or zero-padded to the key's length.
    ///
    /// # Errors
    /// None in practice: the key has the length that the cipher needs.
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

    /// Returns a decrypted view of `data` for the mapping of `guest` to `host`; `None` without a key.
    pub(crate) fn view(
        &self,
        data: &Arc<dyn Device>,
        guest: GuestOffset,
        host: HostOffset,
    ) -> Option<Arc<dyn Device>> {
        const UNIT: u64 = SECTOR as u64;
        let first_sector = guest.unit(UNIT).wrapping_sub(host.unit(UNIT));
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
    MAX_ITERATIONS,
];

/// The option that asks for this encryption.
pub(crate) const ENCRYPTION: OptionDef = OptionDef::new(
    "encryption",
    OptionKind::Flag,
    "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
);
/// The option that names the secret.
pub(crate) const KEY_SECRET: &str = "encrypt.key-secret";

/// Returns the passphrase for an image whose header names the encryption `found`, and the most iterations that may be tried
/// with it if the user says so; `None` if the image is not encrypted or is opened without its data.
///
/// # Errors
/// Options that do not fit the image, and a missing secret.
pub(crate) fn passphrase_for<'a>(
    found: Option<&str>,
    request: &mut OpenRequest<'a>,
) -> Result<Option<(&'a [u8], Option<u64>)>> {
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
    let most = options.number(MAX_ITERATIONS.name);
    if most.is_some() && found != "luks" {
        return Err(unexpected(MAX_ITERATIONS.name));
    }
    if request.no_data {
        return Ok(None);
    }
    let passphrase = passphrase(&request.context.objects, options.text("key-secret"), KEY_SECRET)?;
    Ok(Some((passphrase, most)))
}

/// The error for an option that the encryption does not have.
pub(crate) fn unexpected(name: &str) -> Error {
    Error::invalid(format!("Parameter '{name}' is unexpected"))
}

/// The error for encryption options of a new image without `encrypt.format`.
pub(crate) fn no_format() -> Error {
    Error::invalid("Parameter 'encrypt.format' is missing")
}

/// The error for an unknown encryption format.
pub(crate) fn unknown_format(name: &str) -> Error {
    Error::invalid(format!("Parameter 'format' does not accept value '{name}'"))
}

/// The encryption format that the options of a new image ask for.
///
/// # Errors
/// Both `encrypt.format` and its alias are given.
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

/// The node options with which a new image is opened.
pub(crate) fn node(options: &Options) -> NodeOptions {
    let mut node = NodeOptions::new();
    if let Some(id) = options.text(KEY_SECRET) {
        node.set(KEY_SECRET, id);
    }
    node
}
