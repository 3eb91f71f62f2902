//! Encrypted containers (`encrcdsa`, version 2): a disk image of macOS in encrypted blocks.
//!
//! ```text
//!   |header|key|key|...        |block|block|block|...
//!
//!   passphrase --PBKDF2--> triple DES key --> wrapped key: AES key, HMAC key, "CKIE"
//!   block n    --AES-CBC with the initialisation vector HMAC(n)--> 512 bytes of the image
//! ```
//!
//! Numbers are big-endian. Each key entry wraps the same two keys: for a passphrase, or for a certificate. What is
//! decrypted is an image with or without a trailer, read as if it were in a file of its own.

use std::sync::Arc;

use diskimage_core::{
    Device, Error, ErrorKind, Limits, Objects, ReadOnlyView, Result, View, align_up, to_index,
};
use hmac::{Hmac, KeyInit, Mac};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::encryption::{BlockCipher, CipherAlg, HashAlg, Zeroizing, cbc, derive, keyed, triple_des};
use crate::luks::options::passphrase;

const MAGIC: &[u8; 8] = b"encrcdsa";
const VERSION: u32 = 2;
/// The end of a container of version 1, whose header is there.
const MAGIC_1: &[u8; 8] = b"cdsaencr";
/// `CSSM_ALGID_AES`.
const AES: u32 = 0x8000_0001;
/// `CSSM_ALGMODE_CBC_IV8` and `CSSM_ALGMODE_CBCPadIV8`.
const CBC: [u32; 2] = [5, 6];
/// The kind of a key entry for a passphrase.
const PASSPHRASE: u32 = 1;
/// `CSSM_ALGID_PKCS5_PBKDF2`.
const PBKDF2: u32 = 103;
/// `CSSM_ALGID_3DES_3KEY_EDE`.
const TRIPLE_DES: u32 = 17;
/// Bytes of the key and of the initialisation vector of triple DES.
const TRIPLE_DES_KEY: usize = 24;
const TRIPLE_DES_BLOCK: usize = 8;
/// Bytes of the key that makes initialisation vectors.
const HMAC_KEY: usize = 20;
/// Follows the keys when they are unwrapped: a wrong passphrase does not give it.
const UNWRAPPED: &[u8] = b"CKIE";
/// Bytes of an AES block.
const AES_BLOCK: usize = 16;

/// Limits of ours: images of macOS have one or two keys of some 250,000 iterations, and blocks of 512 bytes.
const MAX_KEYS: u32 = 32;
/// For all keys together: some seconds.
const MAX_ITERATIONS: u64 = 1 << 24;
const MAX_BLOCK: u32 = 1 << 20;

/// The header.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    iv_size: U32,
    mode: U32,
    cipher: U32,
    key_bits: U32,
    /// The function that makes initialisation vectors and the bits of its key: HMAC-SHA1, 160.
    iv_function: U32,
    iv_key_bits: U32,
    uuid: [u8; 16],
    block_size: U32,
    /// Bytes of the image.
    data_size: U64,
    /// Where the blocks start.
    data_offset: U64,
    keys: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 76);

/// Where a key entry is. They follow the header.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct KeyPointer {
    kind: U32,
    offset: U64,
    size: U64,
}

const _: () = assert!(size_of::<KeyPointer>() == 20);

/// A key entry for a passphrase.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct KeyEntry {
    kdf: U32,
    kdf_function: U32,
    iterations: U32,
    salt_size: U32,
    salt: [u8; 32],
    iv_size: U32,
    iv: [u8; 32],
    key_bits: U32,
    cipher: U32,
    padding: U32,
    mode: U32,
    wrapped_size: U32,
    wrapped: [u8; 64],
}

const _: () = assert!(size_of::<KeyEntry>() == 168);

/// The decrypted image in `file`; `None` if that is not an encrypted container.
///
/// # Errors
/// A container that is damaged or of a kind that is not supported, no passphrase or a wrong one, and a passphrase for a
/// file that is not encrypted.
pub(super) fn open(
    file: &Arc<dyn Device>,
    secret: Option<&str>,
    objects: &Objects,
) -> Result<Option<Arc<dyn Device>>> {
    let mut bytes = [0; size_of::<RawHeader>()];
    file.read_padded(&mut bytes, 0)?;
    let header = RawHeader::read_from_bytes(&bytes).map_err(|_| Error::corrupt("The header is too short"))?;
    if header.magic != *MAGIC {
        refuse_version_1(&**file)?;
        return match secret {
            Some(_) => Err(Error::invalid(
                "The image is not encrypted, but 'key-secret' was given for it",
            )),
            None => Ok(None),
        };
    }
    let cipher = header.check()?;
    let data_end = header.data_offset.get().checked_add(header.stored());
    let is_whole = data_end.is_some_and(|end| end <= file.len());
    if !is_whole {
        return Err(Error::corrupt(format!(
            "The encrypted data at {:#x} of {:#x} bytes reaches beyond the end of the file of {:#x} bytes, which looks \
             truncated",
            header.data_offset.get(),
            header.stored(),
            file.len()
        )));
    }
    let passphrase = passphrase(objects, secret, "key-secret").map_err(|error| match secret {
        Some(_) => error,
        None => error.hint(
            "The image is encrypted. Give its passphrase with '--object secret,id=SEC,file=FILE' and open it with \
             '--image-opts driver=dmg,key-secret=SEC,file.filename=NAME'.",
        ),
    })?;
    let keys = header.unwrap_keys(&**file, passphrase, cipher.key_len())?;
    let (key, iv_key) = keys.split_at(cipher.key_len());
    Ok(Some(Arc::new(ReadOnlyView(Container {
        limits: Limits {
            alignment: 1,
            ..file.limits().clone()
        },
        file: Arc::clone(file),
        start: header.data_offset.get(),
        len: header.data_size.get(),
        block: u64::from(header.block_size.get()),
        cipher: keyed(cipher, key)?,
        vectors: Hmac::new_from_slice(iv_key)
            .map_err(|_| Error::invalid("Key of the vectors has another length"))?,
    }))))
}

/// Refuses a container of version 1, whose header is at the end of the file.
fn refuse_version_1(file: &dyn Device) -> Result<()> {
    let mut end = [0; MAGIC_1.len()];
    if let Some(offset) = file.len().checked_sub(MAGIC_1.len() as u64) {
        file.read_padded(&mut end, offset)?;
    }
    if end == *MAGIC_1 {
        return Err(Error::unsupported(
            "Encrypted disk images of version 1 (cdsaencr) are not supported: convert the image with `hdiutil convert` \
             of Mac OS X 10.5 or later",
        ));
    }
    Ok(())
}

impl RawHeader {
    /// Checks everything that does not depend on the keys, and returns the cipher.
    fn check(&self) -> Result<CipherAlg> {
        let unsupported = |what: &str, value: u32| {
            Error::unsupported(format!("Unsupported encrypted disk image ({what} {value:#x})"))
        };
        if self.version.get() != VERSION {
            return Err(unsupported("version", self.version.get()));
        }
        if self.cipher.get() != AES {
            return Err(unsupported("cipher", self.cipher.get()));
        }
        if !CBC.contains(&self.mode.get()) {
            return Err(unsupported("cipher mode", self.mode.get()));
        }
        let cipher = match self.key_bits.get() {
            128 => CipherAlg::Aes128,
            256 => CipherAlg::Aes256,
            bits => return Err(unsupported("key bits", bits)),
        };
        let iv_size = self.iv_size.get();
        if to_index(iv_size.into())? != AES_BLOCK {
            return Err(unsupported("initialisation vector size", iv_size));
        }
        if to_index(self.iv_key_bits.get().into())? != HMAC_KEY * 8 {
            return Err(unsupported(
                "bits of the key of initialisation vectors",
                self.iv_key_bits.get(),
            ));
        }
        let block = self.block_size.get();
        if block == 0 || block > MAX_BLOCK || !block.is_multiple_of(16) {
            return Err(unsupported("block size", block));
        }
        if self.keys.get() > MAX_KEYS {
            return Err(unsupported("number of keys", self.keys.get()));
        }
        Ok(cipher)
    }

    /// The number of bytes of all blocks.
    fn stored(&self) -> u64 {
        let block = u64::from(self.block_size.get());
        // A size that does not fit saturates: no file is that long.
        self.data_size.get().div_ceil(block).saturating_mul(block)
    }

    /// Unwraps the keys with `passphrase`: an AES key of `key_len` bytes and the key of initialisation vectors.
    fn unwrap_keys(
        &self,
        file: &dyn Device,
        passphrase: &[u8],
        key_len: usize,
    ) -> Result<Zeroizing<Vec<u8>>> {
        let mut iterations = 0;
        let mut offset = size_of::<Self>() as u64;
        let mut others = 0;
        for _ in 0..self.keys.get() {
            let mut bytes = [0; size_of::<KeyPointer>()];
            file.read_whole(&mut bytes, offset)?;
            offset += bytes.len() as u64;
            let pointer =
                KeyPointer::read_from_bytes(&bytes).map_err(|_| Error::corrupt("The key is too short"))?;
            if pointer.kind.get() != PASSPHRASE {
                others += 1;
                continue;
            }
            let mut bytes = [0; size_of::<KeyEntry>()];
            file.read_whole(&mut bytes, pointer.offset.get())?;
            let entry =
                KeyEntry::read_from_bytes(&bytes).map_err(|_| Error::corrupt("The key is too short"))?;
            iterations += u64::from(entry.iterations.get());
            if iterations > MAX_ITERATIONS {
                return Err(Error::unsupported(format!(
                    "More than {MAX_ITERATIONS} PBKDF iterations are not supported"
                )));
            }
            if let Some(keys) = entry.unwrap(passphrase, key_len)? {
                return Ok(keys);
            }
        }
        if others == self.keys.get() {
            return Err(Error::unsupported(
                "The encrypted disk image has no passphrase, only keys for certificates, which are not supported",
            ));
        }
        Err(Error::new(
            ErrorKind::Permission,
            "Invalid password, cannot unlock any key of the encrypted disk image",
        ))
    }
}

impl KeyEntry {
    /// The keys; `None` if `passphrase` is wrong.
    fn unwrap(&self, passphrase: &[u8], key_len: usize) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let is_known = self.kdf.get() == PBKDF2
            && self.cipher.get() == TRIPLE_DES
            && to_index(self.key_bits.get().into())? == TRIPLE_DES_KEY * 8
            && to_index(self.iv_size.get().into())? == TRIPLE_DES_BLOCK;
        if !is_known {
            return Err(Error::unsupported(format!(
                "Unsupported key of an encrypted disk image (key derivation {}, cipher {} with {} bits)",
                self.kdf, self.cipher, self.key_bits
            )));
        }
        let damaged = || Error::corrupt("A key of the encrypted disk image is damaged");
        let salt = self
            .salt
            .get(..to_index(self.salt_size.get().into())?)
            .ok_or_else(damaged)?;
        let wrapped = self
            .wrapped
            .get(..to_index(self.wrapped_size.get().into())?)
            .filter(|wrapped| wrapped.len().is_multiple_of(TRIPLE_DES_BLOCK) && self.iterations.get() > 0)
            .ok_or_else(damaged)?;
        let key = derive(
            HashAlg::Sha1,
            passphrase,
            salt,
            self.iterations.get(),
            TRIPLE_DES_KEY,
        );
        let mut keys = cbc::decrypt(&*triple_des(&key)?, &self.iv[..TRIPLE_DES_BLOCK], wrapped);
        if cbc::remove_padding(&mut keys, TRIPLE_DES_BLOCK).is_err() {
            return Ok(None);
        }
        let len = key_len + HMAC_KEY;
        if !keys.get(len..).is_some_and(|rest| rest.starts_with(UNWRAPPED)) {
            return Ok(None);
        }
        keys.truncate(len);
        Ok(Some(keys))
    }
}

/// The decrypted contents.
struct Container {
    file: Arc<dyn Device>,
    limits: Limits,
    /// Where the blocks start in the file.
    start: u64,
    len: u64,
    block: u64,
    cipher: Box<dyn BlockCipher>,
    /// Makes initialisation vectors.
    vectors: Hmac<sha1::Sha1>,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").finish_non_exhaustive()
    }
}

/// How many bytes are decrypted at once, at least a block.
const CHUNK: u64 = 64 << 10;

impl Container {
    /// The whole blocks around `len` bytes at `offset`, decrypted; `first` is the number of the first one.
    fn decrypted(&self, first: u64, len: u64) -> Result<Zeroizing<Vec<u8>>> {
        let mut stored = vec![0; to_index(len)?];
        self.file
            .read_whole(&mut stored, self.start + first * self.block)?;
        let mut plain = Zeroizing::new(stored.clone());
        self.cipher.decrypt(&mut plain);
        let block = to_index(self.block)?;
        for (number, (plain, stored)) in (first..).zip(plain.chunks_mut(block).zip(stored.chunks(block))) {
            let vector = self.vector(number)?;
            for (byte, before) in plain.iter_mut().zip(vector.iter().chain(stored)) {
                *byte ^= before;
            }
        }
        Ok(plain)
    }

    /// The initialisation vector of block `number`.
    fn vector(&self, number: u64) -> Result<[u8; AES_BLOCK]> {
        let number = u32::try_from(number)
            .map_err(|_| Error::unsupported("Encrypted disk images have at most 2^32 blocks"))?;
        let mut hmac = self.vectors.clone();
        hmac.update(&number.to_be_bytes());
        let mut vector = [0; AES_BLOCK];
        vector.copy_from_slice(&hmac.finalize().into_bytes()[..AES_BLOCK]);
        Ok(vector)
    }
}

impl View for Container {
    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let first = offset / self.block;
            let skip = offset - first * self.block;
            let chunk = align_up(CHUNK, self.block);
            let len = chunk.min(align_up(skip + buf.len() as u64, self.block));
            let plain = self.decrypted(first, len)?;
            let plain = &plain[to_index(skip)?..];
            let taken = plain.len().min(buf.len());
            let (head, tail) = buf.split_at_mut(taken);
            head.copy_from_slice(&plain[..taken]);
            (buf, offset) = (tail, offset + taken as u64);
        }
        Ok(())
    }
}
