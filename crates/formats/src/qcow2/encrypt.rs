//! Encryption: a LUKS volume in clusters of the file, whose payload is the guest's data where it lies.
//!
//! ```text
//!   header extension ──▶ |header|slots| in clusters of their own
//!   guest data           encrypted sector by sector, numbered from the start of the file that holds it
//! ```
//!
//! So guest data is read and written through a view of that file, and nothing else needs to know of it. Tables and
//! compressed clusters are not encrypted.

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{CreateRequest, Detail, DetailValue, Device, Error, OpenRequest, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U64;

use super::Qcow2;
use super::extension::{CryptoExtension, kind};
use super::first_cluster::FirstCluster;
use super::header::{CryptMethod, Header};
use crate::decrypted::Decrypted;
use crate::luks::options::{Algorithms, Choice, passphrase};
use crate::luks::volume::{Place, Volume};

/// The options of a node.
const OPTIONS: &[OptionDef] = &[
    OptionDef {
        name: "encrypt.format",
        kind: OptionKind::Text,
        help: "Encryption that the image has to have",
        default: None,
    },
    OptionDef {
        name: KEY_SECRET,
        kind: OptionKind::Text,
        help: "ID of the secret that provides the passphrase",
        default: None,
    },
];

const KEY_SECRET: &str = "encrypt.key-secret";

/// The volume of the image that is opened, unlocked unless only facts are wanted; `None` if it is not encrypted.
///
/// # Errors
/// Options that do not fit the image, a passphrase that opens nothing, damage in the volume's header.
pub(super) fn open(header: &Header, request: &mut OpenRequest<'_>) -> Result<Option<Volume>> {
    let options = request.options.absorb(OPTIONS)?;
    let found = match header.crypt {
        CryptMethod::None => {
            return match options.text("encrypt.format") {
                Some(format) => Err(Error::invalid(format!(
                    "No encryption in image header, but options specified format '{format}'"
                ))),
                None => Ok(None),
            };
        }
        CryptMethod::Aes => "aes",
        CryptMethod::Luks => "luks",
    };
    if let Some(format) = options.text("encrypt.format").filter(|format| *format != found) {
        return Err(Error::invalid(format!(
            "Header reported '{found}' encryption format but options specify '{format}'"
        )));
    }
    if header.crypt == CryptMethod::Aes {
        return if request.no_data {
            Ok(None)
        } else {
            Err(Error::unsupported(
                "qcow2 images with the legacy encryption 'aes' cannot be read or written yet",
            ))
        };
    }
    let place = header
        .extensions
        .crypto
        .ok_or_else(|| Error::corrupt("Missing CRYPTO header for crypt method 2"))?;
    let passphrase = match options.text(KEY_SECRET) {
        _ if request.no_data => None,
        id => Some(passphrase(request.objects, id, KEY_SECRET)?),
    };
    let place = Place {
        device: Arc::clone(&request.file),
        offset: place.offset.get(),
        detached: false,
    };
    Volume::open(place, passphrase).map(Some)
}

/// `data` as the guest sees it.
pub(super) fn view(data: Arc<dyn Device>, volume: Option<&Volume>) -> Arc<dyn Device> {
    match volume.and_then(Volume::cipher) {
        Some(cipher) => Arc::new(Decrypted::new(data, 0, Arc::clone(cipher))),
        None => data,
    }
}

/// How a new image is to be encrypted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encryption {
    pub(super) algorithms: Algorithms,
}

impl Encryption {
    /// Reads the options; `not_accepted` words a format that there is none of.
    ///
    /// # Errors
    /// Options that do not go together, and encryption that cannot be made.
    pub(super) fn read(
        options: &Options,
        not_accepted: impl Fn(&str, &str) -> Error,
    ) -> Result<Option<Self>> {
        let old = options.is_given("encryption");
        let format = match options.text("encrypt.format") {
            Some(_) if old => {
                return Err(Error::invalid(
                    "'encrypt.format' and its alias 'encryption' can't be used at the same time",
                ));
            }
            Some(format) => format,
            None if options.flag("encryption") == Some(true) => "aes",
            None if options.text(KEY_SECRET).is_some() => {
                return Err(Error::invalid("Parameter 'encrypt.format' is missing"));
            }
            None => return Ok(None),
        };
        if !matches!(format, "aes" | "luks") {
            return Err(not_accepted("format", format));
        }
        if options.text(KEY_SECRET).is_none() {
            return Err(Error::invalid(format!(
                "Parameter '{KEY_SECRET}' is required for cipher"
            )));
        }
        if format == "aes" {
            return Err(Error::unsupported(
                "qcow2 images with the legacy encryption 'aes' cannot be created",
            ));
        }
        Ok(Some(Self {
            algorithms: Choice::read(options, "encrypt.")?.algorithms()?,
        }))
    }

    /// How many bytes the volume's header and slots take.
    pub(super) fn header_len(&self) -> u64 {
        Volume::header_len(&self.algorithms)
    }
}

impl Qcow2 {
    /// Puts a new volume into clusters of this new image, and says so in its header.
    ///
    /// # Errors
    /// No such secret, failures to write.
    pub(super) fn encrypt(&self, encryption: &Encryption, request: &CreateRequest<'_>) -> Result<()> {
        let passphrase = passphrase(request.objects, request.options.text(KEY_SECRET), KEY_SECRET)?;
        let len = encryption.header_len();
        let clusters = len.div_ceil(self.header.geometry.cluster_size());
        let mut state = self.lock();
        let super::State {
            tables, refcounts, ..
        } = &mut *state;
        let offset = refcounts.allocate(tables, clusters)?;
        let end = offset + clusters * self.header.geometry.cluster_size();
        if self.file.len() < end {
            self.file.resize(end, diskimage_core::Preallocation::Off)?;
        }
        let place = Place {
            device: Arc::clone(&self.file),
            offset,
            detached: false,
        };
        Volume::create(place, &encryption.algorithms, passphrase)?;
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
        l1.len > 0 && state.tables.number(l1, 0).is_ok_and(|entry| entry != 0)
    }

    /// What `info` says of the encryption.
    pub(super) fn encryption_details(&self) -> Option<Detail> {
        let mut details = match (&self.volume, self.header.crypt) {
            (_, CryptMethod::None) => return None,
            (Some(volume), _) => volume.details(),
            (None, _) => Vec::new(),
        };
        let name = match self.header.crypt {
            CryptMethod::Luks => "luks",
            _ => "aes",
        };
        let at = details
            .iter()
            .position(|detail| detail.name == "cipher-mode")
            .unwrap_or(details.len());
        details.insert(at, Detail::text("format", name));
        Some(Detail {
            name: "encrypt",
            value: DetailValue::Group(details),
        })
    }
}
