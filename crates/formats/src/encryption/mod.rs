//! Encryption of guest data: ciphers of sectors, keys from passphrases, and the device that decrypts what it reads.
//!
//! * [`encrypted_device`] is a view of a file that decrypts guest data; [`legacy_aes`] is the AES-CBC of qcow and
//!   qcow2.
//!
//! The rest is pure and neither reads nor writes a file:
//!
//! * [`SectorCipher`] encrypts and decrypts runs of sectors of 512 bytes, each with an initialisation vector of its
//!   own;
//! * [`HashAlg`] names the hashes. [`derive()`] uses them to make keys from passphrases; [`split`] and [`merge`] use
//!   them to spread a key over so many bytes that erasing some of them erases the key;
//! * [`decrypt_secret`] reads a secret that is encrypted with another one.
//!
//! ```text
//!   passphrase --derive--> key of a slot --SectorCipher--> split key --merge--> master key --SectorCipher--> sectors
//! ```

mod anti_forensic;
mod block;
pub(crate) mod cbc;
mod cipher;
pub(crate) mod encrypted_device;
mod hash;
mod iv;
mod kdf;
pub(crate) mod legacy_aes;
mod mode;
mod secret;
mod sector;
mod twofish;

pub(crate) use anti_forensic::{merge, split};
pub(crate) use block::{keyed, triple_des};
pub(crate) use cipher::{CipherAlg, CipherMode};
pub(crate) use hash::HashAlg;
pub(crate) use iv::IvAlg;
pub(crate) use kdf::{derive, iterations_per_second};
pub(crate) use mode::SECTOR;
pub use secret::decrypt_secret;
pub(crate) use sector::{CipherSpec, SectorCipher};
pub use zeroize::Zeroizing;

/// A block cipher with its key. Dropping it wipes the key from memory.
///
/// The methods take a batch of blocks, so the cost of the dynamic call does not matter and the cipher sees enough blocks
/// at once to keep the processor's AES units busy.
pub(crate) trait BlockCipher: Send + Sync {
    /// Encrypts each block of `bytes` independently. `bytes` holds whole blocks.
    fn encrypt(&self, bytes: &mut [u8]);

    /// Decrypts each block of `bytes` independently. `bytes` holds whole blocks.
    fn decrypt(&self, bytes: &mut [u8]);
}
