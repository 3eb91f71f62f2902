//! Random numbers that identify new images, and the text of UUIDs.

use diskimage_core::{Error, Result};

/// Fills `bytes` with random ones of the system.
///
/// # Errors
/// The system has none.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| Error::unsupported(format!("No random bytes to be had: {error}")))
}

/// A random UUID, version 4 of RFC 9562.
///
/// # Errors
/// As [`fill`].
pub(crate) fn uuid() -> Result<[u8; 16]> {
    let mut uuid = [0; 16];
    fill(&mut uuid)?;
    mark(&mut uuid, 6);
    Ok(uuid)
}

/// A random GUID: a UUID whose first three fields are little-endian.
///
/// # Errors
/// As [`fill`].
pub(crate) fn guid() -> Result<[u8; 16]> {
    let mut guid = [0; 16];
    fill(&mut guid)?;
    mark(&mut guid, 7);
    Ok(guid)
}

/// Sets the version, in the byte `version`, and the variant.
fn mark(id: &mut [u8; 16], version: usize) {
    id[version] = id[version] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
}

/// The usual text of a UUID.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (nth, byte) in uuid.iter().enumerate() {
        if matches!(nth, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_and_variant_have_their_places() {
        let text = uuid_text(&uuid().expect("random bytes"));
        assert_eq!(text.len(), 36);
        assert_eq!(text.as_bytes()[14], b'4');
        assert!(matches!(text.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{text}");
        let guid = guid().expect("random bytes");
        assert_eq!(guid[7] >> 4, 4);
        assert_eq!(guid[8] >> 6, 2);
    }

    #[test]
    fn the_text_has_the_bytes_in_their_order() {
        let id = std::array::from_fn(|i| u8::try_from(i * 16 + 1).expect("small"));
        assert_eq!(uuid_text(&id), "01112131-4151-6171-8191-a1b1c1d1e1f1");
    }
}
