//! Encryption of guest data, with LUKS or with the older AES.
//!
//! ```text
//!   LUKS   header extension ──▶ |header|slots| in allocated clusters
//!          a sector's number is its host offset in sectors
//!   AES    only a number in the header; the passphrase is the key
//!          a sector's number is its guest offset in sectors
//! ```
//!
//! Guest data is read and written through an encrypting view of its file, so all other code is independent of
//! encryption. Tables and compressed clusters are not encrypted.
//!
//! For AES see `legacy_aes`.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{CreateRequest, Detail, DetailValue, Device, Error, OpenRequest, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U64;

use super::Qcow2;
use super::header::extension::{CryptoExtension, kind};
use super::header::rewrite::FirstCluster;
use super::header::{CryptMethod, Header};
use crate::encryption::encrypted_device::EncryptedDevice;
use crate::encryption::legacy_aes::{
    KEY_SECRET, LegacyAes, no_format, passphrase_for, unexpected, unknown_format,
};
use crate::layer_kit::offset::{GuestOffset, HostOffset};
use crate::luks::options::{Algorithms, VolumeOptions, passphrase};
use crate::luks::volume::{Volume, VolumeLocation};

/// The encryption of an open image.
#[derive(Clone, Debug)]
pub(super) enum Encrypted {
    /// AES, whose key is the passphrase.
    Aes(LegacyAes),
    /// A LUKS volume; it is locked if the image was opened without its data.
    Luks(Arc<Volume>),
}

impl Encrypted {
    /// Opens the image's encryption; `None` if it is not encrypted.
    ///
    /// # Errors
    /// Options that do not fit the image, a wrong passphrase, damage in the LUKS header.
    pub(super) fn open(header: &Header, request: &mut OpenRequest<'_>) -> Result<Option<Self>> {
        let found = match header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        };
        let given = passphrase_for(found, request)?;
        let (passphrase, most) = given.map_or((None, None), |(passphrase, most)| (Some(passphrase), most));
        match header.crypt {
            CryptMethod::None => return Ok(None),
            CryptMethod::Aes => return LegacyAes::new(passphrase).map(|aes| Some(Self::Aes(aes))),
            CryptMethod::Luks => {}
        }
        let extension = header
            .extensions
            .crypto
            .ok_or_else(|| Error::corrupt("Missing CRYPTO header for crypt method 2"))?;
        let location = VolumeLocation {
            device: Arc::clone(&request.file),
            offset: extension.offset.get(),
            detached: false,
        };
        Volume::open(location, passphrase, most).map(|volume| Some(Self::Luks(Arc::new(volume))))
    }

    /// Returns a decrypted view of `data` for the mapping of `guest` to `host`; `None` without a key.
    pub(super) fn view(
        &self,
        data: &Arc<dyn Device>,
        guest: GuestOffset,
        host: HostOffset,
    ) -> Option<Arc<dyn Device>> {
        match self {
            Self::Aes(aes) => aes.view(data, guest, host),
            Self::Luks(volume) => {
                let cipher = Arc::clone(volume.cipher()?);
                Some(Arc::new(EncryptedDevice::new(Arc::clone(data), 0, 0, cipher)))
            }
        }
    }

    /// The facts that `info` prints.
    pub(super) fn details(&self) -> Detail {
        let (name, mut details) = match self {
            Self::Aes(_) => ("aes", Vec::new()),
            Self::Luks(volume) => ("luks", volume.details()),
        };
        let at = details
            .iter()
            .position(|detail| detail.name == "cipher-mode")
            .unwrap_or(details.len());
        details.insert(at, Detail::text("format", name));
        Detail {
            name: "encrypt",
            value: DetailValue::Group(details),
        }
    }
}

/// The encryption of a new image.
#[derive(Clone, Copy, Debug)]
pub(super) enum Encryption {
    Aes,
    Luks(Algorithms),
}

impl Encryption {
    /// Reads the options for `format`.
    ///
    /// # Errors
    /// Options that cannot be combined, and unsupported algorithms.
    pub(super) fn read(format: Option<&str>, options: &Options) -> Result<Option<Self>> {
        let luks_option = LUKS_ONLY.iter().find(|name| options.is_given(name));
        match format {
            None if luks_option.is_some() || options.is_given(KEY_SECRET) => Err(no_format()),
            None => Ok(None),
            Some("aes") => match luks_option {
                Some(name) => Err(unexpected(name)),
                None => Ok(Some(Self::Aes)),
            },
            Some("luks") => Ok(Some(Self::Luks(
                VolumeOptions::read(options, "encrypt.")?.algorithms()?,
            ))),
            Some(other) => Err(unknown_format(other)),
        }
    }

    /// The bytes that encryption needs in a measured image. Only LUKS needs any, so qemu-img ignores all other options.
    ///
    /// # Errors
    /// As [`Encryption::read`], and a missing secret.
    pub(super) fn measure(options: &Options) -> Result<u64> {
        if options.text("encrypt.format") != Some("luks") {
            return Ok(0);
        }
        if options.text(KEY_SECRET).is_none() {
            return Err(Error::invalid(format!(
                "Parameter '{KEY_SECRET}' is required for cipher"
            )));
        }
        let algorithms = VolumeOptions::read(options, "encrypt.")?.algorithms()?;
        Ok(Volume::header_len(&algorithms))
    }

    /// The encryption method in the header of a minimal image. LUKS is set later, once its header has clusters.
    pub(super) fn first_crypt_method(encryption: Option<&Self>) -> u32 {
        match encryption {
            Some(Self::Aes) => 1,
            Some(Self::Luks(_)) | None => 0,
        }
    }
}

/// The options that only LUKS has, in the order in which qemu-img checks them.
const LUKS_ONLY: [&str; 6] = [
    "encrypt.cipher-alg",
    "encrypt.iter-time",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.hash-alg",
    "encrypt.ivgen-hash-alg",
];

impl Qcow2 {
    /// Creates a LUKS volume in newly allocated clusters of this new image, then writes the header that refers to it.
    ///
    /// # Errors
    /// An unknown secret, failed writes.
    pub(super) fn make_volume(&self, algorithms: &Algorithms, request: &CreateRequest<'_>) -> Result<()> {
        let passphrase = passphrase(request.objects, request.options.text(KEY_SECRET), KEY_SECRET)?;
        let len = Volume::header_len(algorithms);
        let clusters = len.div_ceil(self.header.geometry.cluster_size());
        let mut state = self.lock();
        let offset = self.allocate(&mut state, clusters, None)?.get();
        let end = offset + clusters * self.header.geometry.cluster_size();
        if self.file.len() < end {
            self.file.resize(end, diskimage_core::Preallocation::Off)?;
        }
        let location = VolumeLocation {
            device: Arc::clone(&self.file),
            offset,
            detached: false,
        };
        Volume::create(location, algorithms, passphrase)?;
        self.write_back(&mut state)?;
        let old = self.first_cluster()?;
        let mut cluster = FirstCluster::read(&old)?;
        let extension = CryptoExtension {
            offset: U64::new(offset),
            length: U64::new(len),
        };
        cluster.set_extension(kind::CRYPTO, Some(extension.as_bytes()));
        cluster.set_crypt_method(2);
        self.write_first_cluster(&old, &cluster.to_bytes()?)
    }

    /// Whether a new image has L2 tables: it has all of them or none, so the first decides.
    pub(super) fn has_tables(&self) -> bool {
        let mut state = self.lock();
        let l1 = state.l1;
        l1.len > 0 && state.metadata.cache.number(l1, 0).is_ok_and(|entry| entry != 0)
    }
}
