//! Pre-shared keys: the file `keys.psk`, as written by `psktool`.
//!
//! A line has a name, a colon and the key in hexadecimal digits. The first line with a name is used.

use diskimage_core::{Error, ErrorKind, Result, ResultExt, name};
use zeroize::Zeroizing;

use super::directory::{Directory, accessible, read};
use super::helper::NamedKey;

/// The default name.
const DEFAULT_NAME: &str = "qemu";
/// GnuTLS, the library of `qemu-img`, accepts no shorter key.
const MIN_KEY: usize = 4;

/// Reads the key of `name` from the file in `dir`.
///
/// # Errors
/// A file that cannot be read, a name that is not in it, and an invalid key.
pub(super) fn load(dir: Directory<'_>, name: Option<&str>) -> Result<NamedKey> {
    let path = dir.file("keys.psk");
    accessible(&path)?;
    let text = read(&path).context(|| format!("Cannot read PSK file {}", name::of_path(&path)))?;
    let name = name.unwrap_or(DEFAULT_NAME);
    let bytes = find_key(&text, name)?.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("Username {name} not found in PSK file {}", name::of_path(&path)),
        )
    })?;
    Ok(NamedKey {
        name: name::to_bytes(name).into_owned(),
        bytes,
    })
}

/// The key of `name` in the text of a file, up to the first NUL if there is one.
///
/// # Errors
/// A key that is too short or not of hexadecimal digits.
pub(in super::super) fn find_key(text: &[u8], name: &str) -> Result<Option<Zeroizing<Vec<u8>>>> {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = name::to_bytes(name);
    let digits = text
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(&*name)?.strip_prefix(b":"));
    let Some(digits) = digits else {
        return Ok(None);
    };
    let unusable = |why| Error::invalid(format!("Cannot set PSK client credentials: {why}"));
    let key = decode_hex(digits).ok_or_else(|| unusable("Error in parsing."))?;
    if key.len() < MIN_KEY {
        return Err(unusable("The request is invalid."));
    }
    Ok(Some(key))
}

fn decode_hex(digits: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    // Allocated in full, because a growing vector frees memory without wiping it.
    let mut bytes = Zeroizing::new(Vec::with_capacity(pairs.len()));
    for [high, low] in pairs {
        let digit = |byte: u8| {
            char::from(byte)
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        bytes.push(digit(*high)? << 4 | digit(*low)?);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &[u8]) -> std::result::Result<Option<Vec<u8>>, String> {
        match find_key(text, "qemu") {
            Ok(key) => Ok(key.map(|key| key.to_vec())),
            Err(error) => Err(error.chain()),
        }
    }

    #[test]
    fn the_first_line_of_a_name_has_its_key() {
        let bytes = Ok(Some(vec![0, 0x1a, 0xB2, 0xff]));
        assert_eq!(key(b"qemu:001aB2fF"), bytes);
        assert_eq!(
            key(b"#qemu\n\xff\nqemux:1\n\nqemu:001ab2ff\nqemu:0011223344\n"),
            bytes
        );
        assert_eq!(key(b"qemu:001ab2ff\0\nx"), bytes);
        assert_eq!(key(b" qemu:001ab2ff\nqemu\n"), Ok(None));
        assert_eq!(key(b"x:\0\nqemu:001ab2ff\n"), Ok(None));
        assert_eq!(key(b""), Ok(None));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let unusable = |why: &str| Err(format!("Cannot set PSK client credentials: {why}"));
        for text in [
            "qemu:a",
            "qemu:0011223g",
            "qemu:00112233\r",
            "qemu: 00112233",
            "qemu:00112233:44",
        ] {
            assert_eq!(key(text.as_bytes()), unusable("Error in parsing."), "{text}");
        }
        for text in ["qemu:", "qemu:001122", "qemu:aa\nqemu:00112233"] {
            assert_eq!(
                key(text.as_bytes()),
                unusable("The request is invalid."),
                "{text}"
            );
        }
    }
}
