//! Encryption of guest data, in one of two ways.
//!
//! ```text
//!   LUKS   header extension ──▶ |header|slots| in clusters of their own
//!          guest data, each sector numbered by where it lies in the file that holds it
//!   AES    nothing but a number in the header: the passphrase is the key
//!          guest data, each sector numbered by where it is on the disk
//! ```
//!
//! So guest data is read and written through a view of the file it is in, and nothing else needs to know of it. Tables and
//! compressed clusters are not encrypted.
//!
//! AES is what images had before there was LUKS; see `legacy_aes`.

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
use crate::luks::options::{Algorithms, VolumeOptions, passphrase};
use crate::luks::volume::{Volume, VolumeLocation};

/// What encrypts the guest data of an open image.
#[derive(Clone, Debug)]
pub(super) enum Encrypted {
    /// A key that is the passphrase.
    Aes(LegacyAes),
    /// A volume, unlocked unless only facts are wanted.
    Luks(Arc<Volume>),
}

impl Encrypted {
    /// What the image that is opened is encrypted with; `None` if it is not encrypted.
    ///
    /// # Errors
    /// Options that do not fit the image, a passphrase that opens nothing, damage in the volume's header.
    pub(super) fn open(header: &Header, request: &mut OpenRequest<'_>) -> Result<Option<Self>> {
        let found = match header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        };
        let passphrase = passphrase_for(found, request)?;
        match header.crypt {
            CryptMethod::None => return Ok(None),
            CryptMethod::Aes => return LegacyAes::new(passphrase).map(|aes| Some(Self::Aes(aes))),
            CryptMethod::Luks => {}
        }
        let place = header
            .extensions
            .crypto
            .ok_or_else(|| Error::corrupt("Missing CRYPTO header for crypt method 2"))?;
        let place = VolumeLocation {
            device: Arc::clone(&request.file),
            offset: place.offset.get(),
            detached: false,
        };
        Volume::open(place, passphrase).map(|volume| Some(Self::Luks(Arc::new(volume))))
    }

    /// `data` as the guest sees it around the byte that is at `guest` of the disk and at `host` of `data`; `None` if
    /// there is no key.
    pub(super) fn view(&self, data: &Arc<dyn Device>, guest: u64, host: u64) -> Option<Arc<dyn Device>> {
        match self {
            Self::Aes(aes) => aes.view(data, guest, host),
            Self::Luks(volume) => {
                let cipher = Arc::clone(volume.cipher()?);
                Some(Arc::new(EncryptedDevice::new(Arc::clone(data), 0, 0, cipher)))
            }
        }
    }

    /// What `info` says of it.
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

/// How a new image is to be encrypted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Encryption {
    Aes,
    Luks(Algorithms),
}

impl Encryption {
    /// Reads the options that go with `format`.
    ///
    /// # Errors
    /// Options that do not go together, and encryption that cannot be made.
    pub(super) fn read(format: Option<&str>, options: &Options) -> Result<Option<Self>> {
        let of_luks = LUKS_ONLY.iter().find(|name| options.is_given(name));
        match format {
            None if of_luks.is_some() || options.is_given(KEY_SECRET) => Err(no_format()),
            None => Ok(None),
            Some("aes") => match of_luks {
                Some(name) => Err(unexpected(name)),
                None => Ok(Some(Self::Aes)),
            },
            Some("luks") => Ok(Some(Self::Luks(
                VolumeOptions::read(options, "encrypt.")?.algorithms()?,
            ))),
            Some(other) => Err(unknown_format(other)),
        }
    }

    /// How many bytes encryption takes in an image that is only measured: only LUKS takes any, so the original looks at
    /// nothing else.
    ///
    /// # Errors
    /// As [`Encryption::read`], and no secret.
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

    /// What stands in the header of an image that has no data yet; LUKS has to have its place first.
    pub(super) fn first_crypt_method(encryption: Option<&Self>) -> u32 {
        match encryption {
            Some(Self::Aes) => 1,
            Some(Self::Luks(_)) | None => 0,
        }
    }
}

/// The options of LUKS that AES does not have, in the order in which the original comes upon them.
const LUKS_ONLY: [&str; 6] = [
    "encrypt.cipher-alg",
    "encrypt.iter-time",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.hash-alg",
    "encrypt.ivgen-hash-alg",
];

impl Qcow2 {
    /// Puts a new volume into clusters of this new image, and says so in its header.
    ///
    /// # Errors
    /// No such secret, failures to write.
    pub(super) fn make_volume(&self, algorithms: &Algorithms, request: &CreateRequest<'_>) -> Result<()> {
        let passphrase = passphrase(request.objects, request.options.text(KEY_SECRET), KEY_SECRET)?;
        let len = Volume::header_len(algorithms);
        let clusters = len.div_ceil(self.header.geometry.cluster_size());
        let mut state = self.lock();
        let offset = self.allocate(&mut state, clusters, None)?;
        let end = offset + clusters * self.header.geometry.cluster_size();
        if self.file.len() < end {
            self.file.resize(end, diskimage_core::Preallocation::Off)?;
        }
        let place = VolumeLocation {
            device: Arc::clone(&self.file),
            offset,
            detached: false,
        };
        Volume::create(place, algorithms, passphrase)?;
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

    /// Whether there is a first L2 table: in a new image all tables are there or none.
    pub(super) fn has_tables(&self) -> bool {
        let mut state = self.lock();
        let l1 = state.l1;
        l1.len > 0 && state.metadata.cache.number(l1, 0).is_ok_and(|entry| entry != 0)
    }
}
