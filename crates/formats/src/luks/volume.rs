//! A LUKS volume: the header and the key slots, at any offset of any file.
//!
//! ```text
//!   offset                                            payload offset (or in another file)
//!   |header|  |slot 0|  |slot 1|  ...  |slot 7|       |-------------- payload --------------|
//! ```
//!
//! A slot holds the master key, split and encrypted with a key derived from a passphrase. Slots change one at a time,
//! and a slot's entry in the header is written alone, so a failed write never damages another slot:
//!
//! ```text
//!   adding    material, flush, slot becomes active, flush
//!   erasing   material overwritten, flush, slot becomes inactive, flush
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::encryption::{SectorCipher, Zeroizing, derive, iterations_per_second, merge, split};
use diskimage_core::{Device, Error, ErrorKind, Result, errno, saturating_index, saturating_u32};

use super::header::{
    DIGEST_LEN, HEADER_LEN, Header, MAX_ITERATIONS, SALT_LEN, SLOTS, STRIPES, Slot, TRIED_ITERATIONS,
    material_len, material_offset, slot_offset,
};
use super::options::Algorithms;
use crate::layer_kit::random::{self, uuid_text};

/// An opened volume.
#[derive(Debug)]
pub(crate) struct Volume {
    device: Arc<dyn Device>,
    /// The offset of the header on the device.
    offset: u64,
    /// Whether the payload is on another device.
    detached: bool,
    header: Mutex<Header>,
    unlocked: Option<Unlocked>,
}

/// The keys of a volume that a passphrase unlocked.
struct Unlocked {
    master_key: Zeroizing<Vec<u8>>,
    cipher: Arc<SectorCipher>,
}

impl std::fmt::Debug for Unlocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unlocked").finish_non_exhaustive()
    }
}

/// Where the header of a volume is.
#[derive(Clone, Debug)]
pub(crate) struct VolumeLocation {
    /// The device with the header.
    pub(crate) device: Arc<dyn Device>,
    /// The offset of the header there.
    pub(crate) offset: u64,
    /// Whether the payload is on another device.
    pub(crate) detached: bool,
}

/// The least number of rounds of a key derivation.
const MIN_ITERATIONS: u64 = 1000;
/// Deriving the digest of the master key takes this fraction of a slot's time.
const DIGEST_SHARE: u64 = 8;

impl Volume {
    /// Opens a volume. Without a passphrase the volume stays locked: only its facts can be read. Slots with more than
    /// `most` iterations are not tried; without it, with more than [`TRIED_ITERATIONS`].
    ///
    /// # Errors
    /// A header that is invalid, a slot with too many iterations, and a passphrase that unlocks no slot.
    pub(crate) fn open(
        location: VolumeLocation,
        passphrase: Option<&[u8]>,
        most: Option<u64>,
    ) -> Result<Self> {
        let mut bytes = [0; HEADER_LEN];
        location.device.read_padded(&mut bytes, location.offset)?;
        let header = Header::parse(&bytes, location.detached)?;
        let mut volume = Self {
            device: location.device,
            offset: location.offset,
            detached: location.detached,
            header: Mutex::new(header),
            unlocked: None,
        };
        if let Some(passphrase) = passphrase {
            volume
                .header()
                .require_iterations(most.unwrap_or(TRIED_ITERATIONS))?;
            volume.unlock(passphrase)?;
        }
        Ok(volume)
    }

    /// The length of the header and the key slots in bytes, which is the payload offset of a new volume.
    pub(crate) fn header_len(algorithms: &Algorithms) -> u64 {
        material_offset(algorithms.spec.key_len(), SLOTS)
    }

    /// Creates a volume with a new master key that `passphrase` unlocks.
    ///
    /// # Errors
    /// Algorithms that cannot be combined, iteration times out of range, failed writes.
    pub(crate) fn create(
        location: VolumeLocation,
        algorithms: &Algorithms,
        passphrase: &[u8],
    ) -> Result<Self> {
        let spec = algorithms.spec;
        let key_len = spec.key_len();
        let mut master_key = Zeroizing::new(vec![0; key_len]);
        random::fill(&mut master_key)?;
        let cipher = Arc::new(SectorCipher::new(spec, &master_key)?);
        let mut digest_salt = [0; SALT_LEN];
        random::fill(&mut digest_salt)?;
        let digest_iterations = iterations(algorithms, DIGEST_LEN, algorithms.iter_time, DIGEST_SHARE)?;
        let digest = derive(
            algorithms.hash,
            &master_key,
            &digest_salt,
            digest_iterations,
            DIGEST_LEN,
        );
        let header = Header {
            spec,
            hash: algorithms.hash,
            payload_offset: if location.detached {
                0
            } else {
                Self::header_len(algorithms)
            },
            digest: digest[..]
                .try_into()
                .map_err(|_| Error::invalid("Digest has another length"))?,
            digest_salt,
            digest_iterations,
            uuid: uuid_text(&random::uuid()?),
            slots: std::array::from_fn(|number| Slot {
                active: false,
                iterations: 0,
                salt: [0; SALT_LEN],
                material: material_offset(key_len, number),
            }),
        };
        location.device.write_at(&header.to_bytes(), location.offset)?;
        let volume = Self {
            device: location.device,
            offset: location.offset,
            detached: location.detached,
            header: Mutex::new(header),
            unlocked: Some(Unlocked { master_key, cipher }),
        };
        volume.fill_slot(0, passphrase, algorithms.iter_time)?;
        Ok(volume)
    }

    /// The cipher of the payload, if the volume is unlocked.
    pub(crate) fn cipher(&self) -> Option<&Arc<SectorCipher>> {
        self.unlocked.as_ref().map(|unlocked| &unlocked.cipher)
    }

    /// The offset of the payload from the start of the header; 0 if the payload is on another device.
    pub(crate) fn payload_offset(&self) -> u64 {
        self.header().payload_offset
    }

    /// Whether the payload is on another device.
    pub(super) fn is_detached(&self) -> bool {
        self.detached
    }

    /// Locks the header as it is in memory.
    pub(super) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unlock(&mut self, passphrase: &[u8]) -> Result<()> {
        for number in 0..SLOTS {
            if let Some(master_key) = self.open_slot(number, passphrase)? {
                let cipher = Arc::new(SectorCipher::new(self.header().spec, &master_key)?);
                self.unlocked = Some(Unlocked { master_key, cipher });
                return Ok(());
            }
        }
        Err(Error::new(
            ErrorKind::Permission,
            "Invalid password, cannot unlock any keyslot",
        ))
    }

    /// Returns the master key if the slot is active and `passphrase` unlocks it.
    ///
    /// # Errors
    /// Failed reads, and an unsupported cipher.
    pub(super) fn open_slot(&self, number: usize, passphrase: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let header = self.header().clone();
        let slot = header.slots[number];
        if !slot.active {
            return Ok(None);
        }
        let key_len = header.spec.key_len();
        let key = derive(header.hash, passphrase, &slot.salt, slot.iterations, key_len);
        let cipher = SectorCipher::new(header.spec, &key)?;
        let mut material = Zeroizing::new(vec![0; material_len(key_len)]);
        self.device
            .read_whole(&mut material, self.offset + slot.material)?;
        cipher.decrypt(0, &mut material);
        let master_key = merge(header.hash, &material[..key_len * STRIPES as usize], key_len);
        let digest = derive(
            header.hash,
            &master_key,
            &header.digest_salt,
            header.digest_iterations,
            DIGEST_LEN,
        );
        Ok((digest[..] == header.digest).then_some(master_key))
    }

    /// Stores the master key in a slot that `passphrase` unlocks. The derivation of the slot's key should take
    /// `iter_time` milliseconds.
    ///
    /// # Errors
    /// A volume that is locked, times out of range, failed writes.
    pub(super) fn fill_slot(&self, number: usize, passphrase: &[u8], iter_time: u64) -> Result<()> {
        let Some(unlocked) = &self.unlocked else {
            return Err(Error::invalid("The volume is locked"));
        };
        let header = self.header().clone();
        let key_len = header.spec.key_len();
        let algorithms = Algorithms {
            spec: header.spec,
            hash: header.hash,
            iter_time,
        };
        let mut slot = Slot {
            active: true,
            iterations: iterations(&algorithms, key_len, iter_time, 1)?,
            ..header.slots[number]
        };
        random::fill(&mut slot.salt)?;
        let key = derive(header.hash, passphrase, &slot.salt, slot.iterations, key_len);
        let cipher = SectorCipher::new(header.spec, &key)?;
        let mut random = Zeroizing::new(vec![0; key_len * (STRIPES as usize - 1)]);
        random::fill(&mut random)?;
        let mut material = split(header.hash, &unlocked.master_key, &random);
        let mut padded = Zeroizing::new(vec![0; material_len(key_len)]);
        padded[..material.len()].copy_from_slice(&material);
        material.clear();
        cipher.encrypt(0, &mut padded);
        self.device.write_at(&padded, self.offset + slot.material)?;
        self.device.flush()?;
        self.write_slot(number, slot)
    }

    /// Destroys the key in a slot and makes the slot inactive.
    ///
    /// # Errors
    /// Failed writes.
    pub(super) fn erase_slot(&self, number: usize) -> Result<()> {
        let (slot, key_len) = {
            let header = self.header();
            (header.slots[number], header.spec.key_len())
        };
        let mut garbage = vec![0; material_len(key_len)];
        random::fill(&mut garbage)?;
        self.device.write_at(&garbage, self.offset + slot.material)?;
        self.device.flush()?;
        self.write_slot(number, slot.erased())
    }

    fn write_slot(&self, number: usize, slot: Slot) -> Result<()> {
        self.device
            .write_at(&slot.to_bytes(), self.offset + slot_offset(number))?;
        self.device.flush()?;
        self.header().slots[number] = slot;
        Ok(())
    }
}

/// How many rounds this machine does in `milliseconds`, divided by `share`.
fn iterations(algorithms: &Algorithms, len: usize, milliseconds: u64, share: u64) -> Result<u32> {
    let rate = iterations_per_second(algorithms.hash, len);
    let out_of_range = |message: String| Err(Error::from_errno(errno::ERANGE).context(message));
    let Some(total) = rate.checked_mul(milliseconds) else {
        return out_of_range(format!("PBKDF iterations {rate} too large to scale"));
    };
    let count = (total / 1000 / share).max(MIN_ITERATIONS);
    match u32::try_from(count) {
        // Not more than are tried when the volume is opened.
        Ok(count) if count <= MAX_ITERATIONS => {
            Ok(count.min(saturating_u32(saturating_index(TRIED_ITERATIONS))))
        }
        _ => out_of_range(format!("PBKDF iterations {count} larger than {MAX_ITERATIONS}")),
    }
}
