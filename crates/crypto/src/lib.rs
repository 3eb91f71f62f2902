//! What encrypted disk images need of cryptography. Pure functions: nothing here reads or writes a file.
//!
//! * [`SectorCipher`] encrypts and decrypts runs of sectors of 512 bytes, each with an initialisation vector of its own;
//! * [`HashAlg`] names the hashes, of which [`derive()`] makes keys from passphrases and [`split`] and [`merge`] spread a
//!   key over so many bytes that erasing some of them erases it;
//! * [`decrypt_secret`] reads a secret that is encrypted with another one.
//!
//! ```text
//!   passphrase --derive--> key of a slot --SectorCipher--> split key --merge--> master key --SectorCipher--> sectors
//! ```

mod anti_forensic;
mod block;
mod cipher;
mod hash;
mod iv;
mod kdf;
mod mode;
mod secret;
mod sector;

pub use anti_forensic::{merge, split};
pub use cipher::{CipherAlg, CipherMode};
pub use hash::HashAlg;
pub use iv::IvAlg;
pub use kdf::{derive, iterations_per_second};
pub use secret::decrypt_secret;
pub use sector::{CipherSpec, SECTOR, SectorCipher};
pub use zeroize::Zeroizing;
