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
//! AES is what images had before there was LUKS. Anybody who knows what some sector holds can try passphrases at the speed
//! of the cipher, and nothing tells a wrong one: what is read with it is garbage.

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{CreateRequest, Detail, DetailValue, Device, Error, NodeOptions, OpenRequest, Result};
use diskimage_crypto::{CipherAlg, CipherMode, CipherSpec, IvAlg, SECTOR, SectorCipher, Zeroizing};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U64;

use super::Qcow2;
use super::extension::{CryptoExtension, kind};
use super::first_cluster::FirstCluster;
use super::header::{CryptMethod, Header};
use crate::decrypted::Decrypted;
use crate::luks::options::{Algorithms, Choice, passphrase};
use crate::luks::volume::{Place, Volume};

/// What encrypts the guest data of an open image.
#[derive(Clone, Debug)]
pub(super) enum Encrypted {
    /// A key that is the passphrase; there is none where only facts are wanted.
    Aes(Option<Arc<SectorCipher>>),
    /// A volume, unlocked unless only facts are wanted.
    Luks(Arc<Volume>),
}

impl Encrypted {
    /// What the image that is opened is encrypted with; `None` if it is not encrypted.
    ///
    /// # Errors
    /// Options that do not fit the image, a passphrase that opens nothing, damage in the volume's header.
    pub(super) fn open(header: &Header, request: &mut OpenRequest<'_>) -> Result<Option<Self>> {
        let mut given = request.options.take_node("encrypt");
        let options = given.absorb(OPTIONS)?;
        let found = match header.crypt {
            CryptMethod::None => {
                return match options.text("format") {
                    Some(format) => Err(Error::invalid(format!(
                        "No encryption in image header, but options specified format '{format}'"
                    ))),
                    None => Ok(None),
                };
            }
            CryptMethod::Aes => "aes",
            CryptMethod::Luks => "luks",
        };
        if let Some(format) = options.text("format").filter(|format| *format != found) {
            return Err(Error::invalid(format!(
                "Header reported '{found}' encryption format but options specify '{format}'"
            )));
        }
        refuse_others(&given)?;
        let passphrase = match options.text("key-secret") {
            _ if request.no_data => None,
            id => Some(passphrase(request.objects, id, KEY_SECRET)?),
        };
        if header.crypt == CryptMethod::Aes {
            let cipher = passphrase.map(aes).transpose()?;
            return Ok(Some(Self::Aes(cipher.map(Arc::new))));
        }
        let place = header
            .extensions
            .crypto
            .ok_or_else(|| Error::corrupt("Missing CRYPTO header for crypt method 2"))?;
        let place = Place {
            device: Arc::clone(&request.file),
            offset: place.offset.get(),
            detached: false,
        };
        Volume::open(place, passphrase).map(|volume| Some(Self::Luks(Arc::new(volume))))
    }

    /// `data` as the guest sees it around the byte that is at `guest` of the disk and at `host` of `data`; `None` if
    /// there is no key.
    pub(super) fn view(&self, data: &Arc<dyn Device>, guest: u64, host: u64) -> Option<Arc<dyn Device>> {
        const UNIT: u64 = SECTOR as u64;
        let (cipher, first_sector) = match self {
            Self::Aes(cipher) => (cipher.as_ref()?, (guest / UNIT).wrapping_sub(host / UNIT)),
            Self::Luks(volume) => (volume.cipher()?, 0),
        };
        let view = Decrypted::new(Arc::clone(data), 0, first_sector, Arc::clone(cipher));
        Some(Arc::new(view))
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

const KEY_SECRET: &str = "encrypt.key-secret";

fn refuse_others(options: &NodeOptions) -> Result<()> {
    match options.left_over() {
        Some(name) => Err(unexpected(name)),
        None => Ok(()),
    }
}

fn unexpected(name: &str) -> Error {
    Error::invalid(format!("Parameter '{name}' is unexpected"))
}

/// The cipher whose key is the passphrase: cut to the key's length, or filled up with zeroes.
fn aes(passphrase: &[u8]) -> Result<SectorCipher> {
    let spec = CipherSpec {
        cipher: CipherAlg::Aes128,
        mode: CipherMode::Cbc,
        iv: IvAlg::Plain64,
        iv_hash: None,
    };
    let mut key = Zeroizing::new(vec![0; spec.key_len()]);
    for (byte, given) in key.iter_mut().zip(passphrase) {
        *byte = *given;
    }
    SectorCipher::new(spec, &key)
}

/// How a new image is to be encrypted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Encryption {
    Aes,
    Luks(Algorithms),
}

impl Encryption {
    /// What the format of the encryption is called in the options.
    ///
    /// # Errors
    /// Two names for it at once.
    pub(super) fn format(options: &Options) -> Result<Option<&str>> {
        let format = options.text("encrypt.format");
        match (options.flag("encryption"), format) {
            (Some(true), Some(_)) => Err(Error::invalid(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
            )),
            (Some(true), None) => Ok(Some("aes")),
            _ => Ok(format),
        }
    }

    /// Reads the options that go with `format`.
    ///
    /// # Errors
    /// Options that do not go together, and encryption that cannot be made.
    pub(super) fn read(format: Option<&str>, options: &Options) -> Result<Option<Self>> {
        let of_luks = LUKS_ONLY.iter().find(|name| options.is_given(name));
        match format {
            None if of_luks.is_some() || options.is_given(KEY_SECRET) => {
                Err(Error::invalid("Parameter 'encrypt.format' is missing"))
            }
            None => Ok(None),
            Some("aes") => match of_luks {
                Some(name) => Err(unexpected(name)),
                None => Ok(Some(Self::Aes)),
            },
            Some("luks") => Ok(Some(Self::Luks(Choice::read(options, "encrypt.")?.algorithms()?))),
            Some(other) => Err(Error::invalid(format!(
                "Parameter 'format' does not accept value '{other}'"
            ))),
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
        let algorithms = Choice::read(options, "encrypt.")?.algorithms()?;
        Ok(Volume::header_len(&algorithms))
    }

    /// What stands in the header of an image that has no data yet; LUKS has to have its place first.
    pub(super) fn first_crypt_method(encryption: Option<&Self>) -> u32 {
        match encryption {
            Some(Self::Aes) => 1,
            Some(Self::Luks(_)) | None => 0,
        }
    }

    /// The options to open a new image with.
    pub(super) fn node(options: &Options) -> NodeOptions {
        let mut node = NodeOptions::new();
        if let Some(id) = options.text(KEY_SECRET) {
            node.set(KEY_SECRET, id);
        }
        node
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
        l1.len > 0 && state.tables.number(l1, 0).is_ok_and(|entry| entry != 0)
    }
}
