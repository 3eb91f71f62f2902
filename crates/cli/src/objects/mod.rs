//! `--object`: secrets of encrypted images, TLS credentials and throttle groups.

mod parameters;
mod throttle;
mod tls;

use std::ffi::OsString;
use std::io::Read;

use base64::engine::{GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine, alphabet};
use diskimage::{Object, Objects, Secret, Zeroizing, decrypt_secret, name};

use crate::words::{Stop, text};
use parameters::{Parameters, not_accepted};

/// Adds the object that the value of one `--object` defines.
///
/// # Errors
/// The type is unknown or not available, a parameter is wrong, or a file cannot be read. [`Stop::Text`] for `help`.
pub fn define(objects: &mut Objects, value: OsString) -> Result<(), Stop> {
    let (id, object) = read(&text(value), objects)?;
    Ok(objects.add(id, object)?)
}

fn read(text: &str, objects: &Objects) -> Result<(String, Object), Stop> {
    let mut parameters = Parameters::read(text)?;
    match parameters.take_text("qom-type")?.as_deref() {
        Some("help" | "?") => {
            return Err(Stop::Text(
                "List of user creatable objects:\n  secret\n  throttle-group\n  tls-creds-anon\n  tls-creds-psk\n  tls-creds-x509\n".to_owned(),
            ));
        }
        Some("secret") => (),
        Some(throttle::TYPE) => return throttle::read(parameters),
        Some(kind) if tls::TYPES.contains(&kind) => return tls::read(kind, parameters),
        Some(other) if OTHER_TYPES.contains(&other) => {
            return Err(Stop::wrong(format!(
                "Objects of type '{other}' are not available in this build"
            )));
        }
        Some(other) => return Err(not_accepted("qom-type", other)),
        None => return Err(Stop::wrong("Parameter 'qom-type' is missing")),
    }
    if parameters.wants_help {
        return Err(Stop::Text(SECRET_HELP.to_owned()));
    }
    let id = parameters.take_id()?;
    let secret = SecretParameters {
        is_base64: match parameters.take_text("format")?.as_deref() {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => return Err(not_accepted("format", other)),
        },
        keyid: parameters.take_text("keyid")?,
        iv: parameters.take_text("iv")?,
        data: parameters.take_text("data")?,
        file: parameters.take_text("file")?,
    };
    parameters.finish(&id)?;
    Ok((id, Object::Secret(secret.load(objects)?)))
}

/// The parameters of a secret.
struct SecretParameters {
    is_base64: bool,
    keyid: Option<String>,
    iv: Option<String>,
    data: Option<String>,
    file: Option<String>,
}

impl SecretParameters {
    /// Loads the secret. An encrypted one is decrypted with another secret that was defined before.
    fn load(self, objects: &Objects) -> Result<Secret, Stop> {
        let bytes = match (self.data, self.file) {
            (Some(_), Some(_)) => return Err(Stop::wrong("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Stop::wrong("Either 'file' or 'data' must be provided")),
            (Some(data), None) => {
                let data = Zeroizing::new(data);
                Zeroizing::new(name::to_bytes(&data).into_owned())
            }
            (None, Some(file)) => Zeroizing::new(read_file(&file)?),
        };
        let Some(keyid) = self.keyid else {
            return Ok(Secret::new(if self.is_base64 {
                base64(&bytes)?
            } else {
                bytes.to_vec()
            }));
        };
        let key = objects.secret(&keyid)?.bytes();
        if key.len() != SECRET_KEY_LEN {
            return Err(Stop::wrong(format!(
                "Key should be {SECRET_KEY_LEN} bytes in length"
            )));
        }
        let iv = self
            .iv
            .ok_or_else(|| Stop::wrong("IV is required to decrypt secret"))?;
        let iv = base64(iv.as_bytes())?;
        let bytes = if self.is_base64 {
            Zeroizing::new(base64(&bytes)?)
        } else {
            bytes
        };
        Ok(Secret::new(decrypt_secret(key, &iv, &bytes)?.to_vec()))
    }
}

/// The length in bytes of a secret that decrypts another.
const SECRET_KEY_LEN: usize = 32;

const OTHER_TYPES: [&str; 7] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
];

const SECRET_HELP: &str = "secret options:
  data=<string>
  file=<string>
  format=<QCryptoSecretFormat>
  iv=<string>
  keyid=<string>
";

/// The largest size of a secret's file; a limit of this program, so that reading a device file ends.
const LARGEST_SECRET: u64 = 1 << 20;

fn read_file(name: &str) -> Result<Vec<u8>, Stop> {
    let failed = |what: &'static str| {
        move |error: std::io::Error| {
            let error = diskimage::Error::from(error);
            Stop::wrong(format!(
                "Unable to read {name}: {what} file \u{201c}{}\u{201d}: {error}",
                // As GLib shows names.
                name::lossy(name)
            ))
        }
    };
    let mut bytes = Vec::new();
    let mut file = name::open(&name::to_path(name))
        .map_err(failed("Failed to open"))?
        .take(LARGEST_SECRET + 1);
    file.read_to_end(&mut bytes).map_err(failed("Error reading"))?;
    if bytes.len() as u64 > LARGEST_SECRET {
        return Err(Stop::wrong(format!(
            "Unable to read {name}: Larger than {LARGEST_SECRET} bytes"
        )));
    }
    Ok(bytes)
}

/// Decodes base64. Line ends are skipped. As in qemu-img, digits at the end that are no whole group of four are
/// ignored.
fn base64(text: &[u8]) -> Result<Vec<u8>, Stop> {
    if text.contains(&0) {
        return Err(Stop::wrong("Base64 data contains embedded NUL characters"));
    }
    let mut digits: Zeroizing<Vec<u8>> =
        Zeroizing::new(text.iter().copied().filter(|byte| *byte != b'\n').collect());
    let whole = digits.len() / 4 * 4;
    let engine = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
    );
    // The ignored digits must be of the alphabet too.
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=".contains(byte);
    let invalid = || Stop::wrong("Base64 data contains invalid characters");
    if !digits.iter().all(is_digit) {
        return Err(invalid());
    }
    digits.truncate(whole);
    engine.decode(&*digits).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Vec<u8> {
        let mut objects = Objects::default();
        define(&mut objects, text.into()).unwrap();
        objects.secret("a").unwrap().bytes().to_vec()
    }

    #[test]
    fn secrets_are_raw_or_base64() {
        assert_eq!(bytes("secret,id=a,data=x,,y"), b"x,y");
        assert_eq!(
            bytes("secret,id=a,data=aGVsbG8gd29ybGQ=,format=base64"),
            b"hello world"
        );
        assert_eq!(bytes("qom-type=secret,id=b,id=a,data="), b"");
    }

    #[test]
    fn wrong_objects_are_refused_with_the_messages_of_qemu_img() {
        for (text, message) in [
            ("foo,id=a", "Parameter 'qom-type' does not accept value 'foo'"),
            ("id=a", "Parameter 'qom-type' is missing"),
            ("secret", "Parameter 'id' is missing"),
            ("secret,id=a", "Either 'file' or 'data' must be provided"),
            (
                "secret,id=a,data=x,file=y",
                "'file' and 'data' are mutually exclusive",
            ),
            ("secret,id=a,data=x,foo=1", "Parameter 'foo' is unexpected"),
            ("secret,foo", "Expected '=' after parameter 'foo'"),
            (
                "secret,id=a,data=x,format=foo",
                "Parameter 'format' does not accept value 'foo'",
            ),
            (
                "main-loop,id=a",
                "Objects of type 'main-loop' are not available in this build",
            ),
        ] {
            assert_eq!(
                define(&mut Objects::new(), text.into()),
                Err(Stop::wrong(message)),
                "{text}"
            );
        }
    }

    #[test]
    fn an_identifier_is_defined_once() {
        let mut objects = Objects::default();
        define(&mut objects, "secret,id=a,data=x".into()).unwrap();
        assert_eq!(
            define(&mut objects, "secret,id=a,data=y".into()),
            Err(Stop::wrong(
                "attempt to add duplicate property 'a' to object (type 'container')"
            ))
        );
    }
}
