//! The header of a LUKS volume of version 1. ("LUKS On-Disk Format Specification" 1.2.3, section 3.)
//!
//! ```text
//!     0  magic            "LUKS" 0xba 0xbe
//!     6  version          16 bits, 1
//!     8  cipher name      32 bytes, padded with NUL: "aes"
//!    40  cipher mode      32 bytes: "xts-plain64", "cbc-essiv:sha256"
//!    72  hash             32 bytes: "sha256"
//!   104  payload offset   32 bits, sectors of 512 bytes
//!   108  key bytes        32 bits
//!   112  digest of the master key   20 bytes, salt 32 bytes, iterations 32 bits
//!   168  UUID             40 bytes, as text
//!   208  eight key slots of 48 bytes:
//!            state 32 bits, iterations 32 bits, salt 32 bytes, offset of the material 32 bits, stripes 32 bits
//! ```
//!
//! All numbers are big-endian. Parsing is a pure function; a header that it returns has no slot that overlaps another
//! slot, the header or the payload.

use crate::encryption::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvAlg, SECTOR};
use diskimage_core::{ByteRange, Error, ErrorKind, Result, align_up, to_index};

/// The length of the header in bytes.
pub(super) const HEADER_LEN: usize = 592;
/// The number of key slots.
pub(super) const SLOTS: usize = 8;
/// The number of stripes into which a slot splits its key.
pub(super) const STRIPES: u32 = 4000;
/// The length of the master key's digest in bytes.
pub(super) const DIGEST_LEN: usize = 20;
/// The length of a salt in bytes.
pub(super) const SALT_LEN: usize = 32;
/// The most rounds that are accepted. The limit is ours: more rounds would take minutes to reject a wrong passphrase.
pub(super) const MAX_ITERATIONS: u32 = 1 << 30;

/// The most rounds of a slot that are tried unless the user allows more: some seconds. The limit is ours.
pub(super) const TRIED_ITERATIONS: u64 = 12_000_000;

const MAGIC: &[u8] = b"LUKS\xba\xbe";
const SLOT_OFFSET: usize = 208;
const SLOT_LEN: usize = 48;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// The alignment of key material in new volumes.
const MATERIAL_ALIGNMENT: u64 = 4096;

/// Whether a file that starts with `head` has a header of version 1.
pub(super) fn is_luks(head: &[u8]) -> bool {
    head.starts_with(MAGIC) && head.get(6..8) == Some(&[0, 1])
}

/// A parsed header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// How the payload and the key slots are encrypted.
    pub(super) spec: CipherSpec,
    /// The hash for key derivation and for the anti-forensic splitter.
    pub(super) hash: HashAlg,
    /// The offset of the payload in bytes. 0 if the payload is in another file.
    pub(super) payload_offset: u64,
    /// The digest by which a derived master key is verified.
    pub(super) digest: [u8; DIGEST_LEN],
    /// The salt of the digest.
    pub(super) digest_salt: [u8; SALT_LEN],
    /// The rounds of the digest.
    pub(super) digest_iterations: u32,
    /// The UUID, as text.
    pub(super) uuid: String,
    /// The key slots.
    pub(super) slots: [Slot; SLOTS],
}

/// A key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Whether the slot holds the master key.
    pub(super) active: bool,
    /// The rounds of deriving the slot's key from a passphrase.
    pub(super) iterations: u32,
    /// The salt of the derivation.
    pub(super) salt: [u8; SALT_LEN],
    /// The offset of the split and encrypted master key in bytes.
    pub(super) material: u64,
}

impl Slot {
    /// Returns the slot without its key.
    pub(super) fn erased(self) -> Self {
        Self {
            active: false,
            iterations: 0,
            salt: [0; SALT_LEN],
            ..self
        }
    }

    /// The slot's entry in the header.
    pub(super) fn to_bytes(self) -> [u8; SLOT_LEN] {
        let mut bytes = [0; SLOT_LEN];
        let state = if self.active { ACTIVE } else { INACTIVE };
        bytes[..4].copy_from_slice(&state.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.iterations.to_be_bytes());
        bytes[8..40].copy_from_slice(&self.salt);
        bytes[40..44].copy_from_slice(&sectors(self.material).to_be_bytes());
        bytes[44..].copy_from_slice(&STRIPES.to_be_bytes());
        bytes
    }
}

/// The offset of a slot's entry in the header.
pub(super) fn slot_offset(slot: usize) -> u64 {
    (SLOT_OFFSET + slot * SLOT_LEN) as u64
}

/// The length of the key material of a key of `key_len` bytes, rounded up to sectors.
pub(super) fn material_len(key_len: usize) -> usize {
    (key_len * STRIPES as usize).next_multiple_of(SECTOR)
}

/// The offset of the material of `slot` in a new volume; for `slot == SLOTS`, the offset of the payload.
pub(super) fn material_offset(key_len: usize, slot: usize) -> u64 {
    let each = align_up(material_len(key_len) as u64, MATERIAL_ALIGNMENT);
    MATERIAL_ALIGNMENT + each * slot as u64
}

/// An offset in sectors. It saturates, which no parsed header and no new volume needs: both have 32-bit sector numbers.
fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR as u64).unwrap_or(u32::MAX)
}

impl Header {
    /// Parses a header. With `detached` the payload is in another file.
    ///
    /// # Errors
    /// `qemu-img`'s message for the first field that is wrong.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN], detached: bool) -> Result<Self> {
        if !bytes.starts_with(MAGIC) {
            return Err(Error::invalid("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            return Err(Error::unsupported(format!(
                "LUKS version {version} is not supported"
            )));
        }
        let cipher = text(bytes, 8, "cipher name")?;
        let mode = text(bytes, 40, "cipher mode")?;
        let hash = text(bytes, 72, "hash spec")?;
        let payload_offset = u64::from(number_32(bytes, 104)) * SECTOR as u64;
        if !detached && payload_offset < HEADER_LEN as u64 {
            return Err(Error::corrupt("LUKS payload is overlapping with the header"));
        }
        let digest_iterations = number_32(bytes, 164);
        if digest_iterations == 0 {
            return Err(Error::corrupt("LUKS key iteration count is zero"));
        }
        let key_len = number_32(bytes, 108);
        let slots = parse_slots(bytes, u64::from(key_len), payload_offset, detached)?;
        let (spec, hash) = algorithms(&cipher, &mode, &hash, key_len)?;
        let iterations = slots.iter().map(|slot| slot.iterations);
        if iterations
            .chain([digest_iterations])
            .any(|count| count > MAX_ITERATIONS)
        {
            return Err(Error::unsupported(format!(
                "More than {MAX_ITERATIONS} PBKDF iterations are not supported"
            )));
        }
        Ok(Self {
            spec,
            hash,
            payload_offset,
            digest: part(bytes, 112),
            digest_salt: part(bytes, 132),
            digest_iterations,
            uuid: until_nul(&bytes[168..208]),
            slots,
        })
    }

    /// Refuses slots that need more than `most` iterations: a crafted header would have a passphrase tried for hours.
    ///
    /// # Errors
    /// The number of iterations, and how to allow it.
    pub(super) fn require_iterations(&self, most: u64) -> Result<()> {
        let active = self.slots.iter().filter(|slot| slot.active);
        let needed = active.map(|slot| slot.iterations).chain([self.digest_iterations]);
        let needed = u64::from(needed.max().unwrap_or(0));
        if needed <= most {
            return Ok(());
        }
        let text = format!("A key slot needs {needed} PBKDF iterations, more than {most}");
        Err(Error::new(ErrorKind::Limit, text).hint(format!(
            "If the image is trusted, give the node option 'max-iterations={needed}' ('encrypt.max-iterations' for \
             qcow2) with --image-opts."
        )))
    }

    /// The header's bytes on disk.
    pub(super) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, MAGIC);
        put(6, &1u16.to_be_bytes());
        put(8, self.spec.cipher.family().as_bytes());
        put(40, self.mode_text().as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &sectors(self.payload_offset).to_be_bytes());
        // A key has at most 64 bytes.
        let key_len = u32::try_from(self.spec.key_len()).unwrap_or(u32::MAX);
        put(108, &key_len.to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, self.uuid.as_bytes());
        for (number, slot) in self.slots.iter().enumerate() {
            put(SLOT_OFFSET + number * SLOT_LEN, &slot.to_bytes());
        }
        bytes
    }

    fn mode_text(&self) -> String {
        let (mode, iv) = (self.spec.mode.name(), self.spec.iv.name());
        match self.spec.iv_hash {
            Some(hash) => format!("{mode}-{iv}:{}", hash.name()),
            None => format!("{mode}-{iv}"),
        }
    }
}

fn parse_slots(
    bytes: &[u8; HEADER_LEN],
    key_len: u64,
    payload_offset: u64,
    detached: bool,
) -> Result<[Slot; SLOTS]> {
    let header = ByteRange::new(0, HEADER_LEN as u64);
    let material = |number: usize| {
        let start = u64::from(number_32(bytes, SLOT_OFFSET + number * SLOT_LEN + 40)) * SECTOR as u64;
        let len = (key_len * u64::from(STRIPES)).next_multiple_of(SECTOR as u64);
        ByteRange::at(start, len)
    };
    let mut slots = [None; SLOTS];
    for (number, slot) in slots.iter_mut().enumerate() {
        let at = SLOT_OFFSET + number * SLOT_LEN;
        let corrupt = |what: String| Err(Error::corrupt(format!("Keyslot {number} {what}")));
        let stripes = number_32(bytes, at + 44);
        if stripes != STRIPES {
            return corrupt(format!("is corrupted (stripes {stripes} != {STRIPES})"));
        }
        let range = material(number);
        let active = match number_32(bytes, at) {
            ACTIVE => true,
            INACTIVE => false,
            _ if range.start() < header.end() => {
                return corrupt("is overlapping with the LUKS header".to_owned());
            }
            _ => return corrupt("state (active/disable) is corrupted".to_owned()),
        };
        if range.start() < header.end() {
            return corrupt("is overlapping with the LUKS header".to_owned());
        }
        let iterations = number_32(bytes, at + 4);
        if active && iterations == 0 {
            return corrupt("iteration count is zero".to_owned());
        }
        if !detached && range.end() > payload_offset {
            return corrupt("is overlapping with the encrypted payload".to_owned());
        }
        for other in number + 1..SLOTS {
            if !range.intersect(material(other)).is_empty() {
                return Err(Error::corrupt(format!(
                    "Keyslots {number} and {other} are overlapping in the header"
                )));
            }
        }
        *slot = Some(Slot {
            active,
            iterations,
            salt: part(bytes, at + 8),
            material: range.start(),
        });
    }
    Ok(slots.map(|slot| slot.expect("every slot was filled in above")))
}

/// Looks up the algorithms by their names in the header.
fn algorithms(cipher: &str, mode: &str, hash: &str, key_len: u32) -> Result<(CipherSpec, HashAlg)> {
    let hash_of = |name: &str| {
        HashAlg::from_name(name)
            .ok_or_else(|| Error::unsupported(format!("Hash algorithm '{name}' not supported")))
    };
    let Some((mode, iv)) = mode.split_once('-') else {
        return Err(Error::unsupported(format!(
            "Unexpected cipher mode string format '{mode}'"
        )));
    };
    let mode = CipherMode::from_name(mode)
        .ok_or_else(|| Error::unsupported(format!("Cipher mode '{mode}' not supported")))?;
    let key_len = to_index(u64::from(key_len))? / mode.keys();
    let cipher = CipherAlg::from_family(cipher, key_len).ok_or_else(|| {
        Error::unsupported(format!(
            "Algorithm '{cipher}' with key size {key_len} bytes not supported"
        ))
    })?;
    let (iv, iv_hash) = match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(hash_of(hash)?)),
        None => (iv, None),
    };
    let hash = hash_of(hash)?;
    let iv = IvAlg::from_name(iv)
        .ok_or_else(|| Error::unsupported(format!("IV generator '{iv}' not supported")))?;
    let spec = CipherSpec {
        cipher,
        mode,
        iv,
        iv_hash,
    };
    spec.check_vectors()?;
    Ok((spec, hash))
}

fn number_32(bytes: &[u8; HEADER_LEN], offset: usize) -> u32 {
    u32::from_be_bytes(part(bytes, offset))
}

fn part<const N: usize>(bytes: &[u8; HEADER_LEN], offset: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[offset..offset + N]);
    part
}

fn text(bytes: &[u8; HEADER_LEN], offset: usize, what: &str) -> Result<String> {
    let field = &bytes[offset..offset + 32];
    if field.contains(&0) {
        Ok(until_nul(field))
    } else {
        Err(Error::corrupt(format!(
            "LUKS header {what} is not NUL terminated"
        )))
    }
}

fn until_nul(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let slot = |number| Slot {
            active: number == 0,
            iterations: u32::from(number == 0) * 1000,
            salt: [3; SALT_LEN],
            material: material_offset(64, number),
        };
        Header {
            spec: CipherSpec {
                cipher: CipherAlg::Aes256,
                mode: CipherMode::Xts,
                iv: IvAlg::Plain64,
                iv_hash: None,
            },
            hash: HashAlg::Sha256,
            payload_offset: material_offset(64, SLOTS),
            digest: [1; DIGEST_LEN],
            digest_salt: [2; SALT_LEN],
            digest_iterations: 1000,
            uuid: "e261cedf-ee6f-4d3c-9e68-8823cd87a142".to_owned(),
            slots: std::array::from_fn(slot),
        }
    }

    fn message(pokes: &[(usize, &[u8])]) -> String {
        let mut bytes = header().to_bytes();
        for (offset, with) in pokes {
            bytes[*offset..*offset + with.len()].copy_from_slice(with);
        }
        Header::parse(&bytes, false).map_or_else(|error| error.chain(), |_| "fine".to_owned())
    }

    #[test]
    fn a_written_header_parses() {
        let bytes = header().to_bytes();
        let again = Header::parse(&bytes, false).unwrap();
        assert_eq!(again.to_bytes(), bytes);
        assert_eq!(again.payload_offset, 2_068_480);
        assert_eq!(again.slots[7].material, 1_810_432);
    }

    #[test]
    fn slots_with_too_many_iterations_are_not_tried_unless_allowed() {
        let mut header = header();
        assert!(header.require_iterations(1000).is_ok());
        header.slots[1].iterations = 99_000_000;
        assert!(header.require_iterations(1000).is_ok(), "inactive");
        header.slots[1].active = true;
        let error = header.require_iterations(TRIED_ITERATIONS).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit);
        assert_eq!(
            error.to_string(),
            "A key slot needs 99000000 PBKDF iterations, more than 12000000"
        );
        assert!(header.require_iterations(99_000_000).is_ok());
        header.digest_iterations = 99_000_001;
        assert!(header.require_iterations(99_000_000).is_err());
    }

    #[test]
    fn wrong_headers_are_refused_with_qemu_imgs_messages() {
        for (pokes, expected) in [
            (&[(0, &b"X"[..])][..], "Volume is not in LUKS format"),
            (&[(6, &[0, 2])], "LUKS version 2 is not supported"),
            (
                &[(8, &[b'y'; 32])],
                "LUKS header cipher name is not NUL terminated",
            ),
            (
                &[(104, &[0, 0, 0, 1])],
                "LUKS payload is overlapping with the header",
            ),
            (
                &[(104, &[0, 0, 0, 15])],
                "Keyslot 0 is overlapping with the encrypted payload",
            ),
            (&[(164, &[0; 4])], "LUKS key iteration count is zero"),
            (
                &[(208, &[0, 0, 0, 1])],
                "Keyslot 0 state (active/disable) is corrupted",
            ),
            (&[(212, &[0; 4])], "Keyslot 0 iteration count is zero"),
            (&[(248, &[0; 4])], "Keyslot 0 is overlapping with the LUKS header"),
            (
                &[(248, &[0xff; 4])],
                "Keyslot 0 is overlapping with the encrypted payload",
            ),
            (
                &[(108, &[0xff; 4])],
                "Keyslot 0 is overlapping with the encrypted payload",
            ),
            (
                &[(252, &[0, 0, 0, 1])],
                "Keyslot 0 is corrupted (stripes 1 != 4000)",
            ),
            (
                &[(296, &[0, 0, 0, 9])],
                "Keyslots 0 and 1 are overlapping in the header",
            ),
            (
                &[(108, &[0; 4])],
                "Algorithm 'aes' with key size 0 bytes not supported",
            ),
            (
                &[(8, b"foo\0")],
                "Algorithm 'foo' with key size 32 bytes not supported",
            ),
            (&[(40, b"xts\0")], "Unexpected cipher mode string format 'xts'"),
            (&[(40, b"foo-plain\0")], "Cipher mode 'foo' not supported"),
            (&[(40, b"xts-foo\0")], "IV generator 'foo' not supported"),
            (&[(40, b"xts-essiv\0")], "Missing IV generator hash specification"),
            (&[(40, b"xts-essiv:foo\0")], "Hash algorithm 'foo' not supported"),
            (
                &[(40, b"xts-essiv:sha1\0")],
                "No AES cipher with key size 20 available",
            ),
            (&[(72, b"foo\0")], "Hash algorithm 'foo' not supported"),
            (
                &[(164, &[0xff; 4])],
                "More than 1073741824 PBKDF iterations are not supported",
            ),
        ] {
            assert_eq!(message(pokes), expected);
        }
    }
}
