//! `--object`: secrets of encrypted images, TLS credentials and throttle groups.

mod throttle;
mod tls;

use std::ffi::OsString;
use std::io::Read;

use base64::engine::{GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine, alphabet};
use diskimage::json::{self, Value};
use diskimage::size::parse_number;
use diskimage::{Object, Objects, Secret, Zeroizing, decrypt_secret, is_identifier, name};

use crate::words::{Stop, text};

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

fn not_accepted(name: &str, value: &str) -> Stop {
    Stop::wrong(format!("Parameter '{name}' does not accept value '{value}'"))
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

/// The parameters of an object: `TYPE,name=value,...` or `{"qom-type": "TYPE", "name": "value"}`.
///
/// Of several errors the first one is reported: parameters in the order in which they are taken, then unknown
/// parameters, then the identifier.
struct Parameters {
    given: Vec<(String, Given)>,
    wants_help: bool,
}

/// The value of a parameter.
enum Given {
    /// Text of `name=value`, for a parameter of any type.
    Word(String),
    /// A value of JSON, which has a type.
    Typed(Value),
}

impl Parameters {
    fn read(text: &str) -> Result<Self, Stop> {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let mut given: Vec<(String, Given)> = Vec::new();
        let mut wants_help = false;
        // A doubled comma is a comma of the value. It is a NUL until the list is split: no parameter contains a NUL.
        let text = text.replace(",,", "\0");
        for (at, item) in text.split(',').enumerate() {
            let item = item.replace('\0', ",");
            match item.split_once('=') {
                Some((name, value)) => {
                    given.retain(|(other, _)| other != name);
                    given.push((name.to_owned(), Given::Word(value.to_owned())));
                }
                None if item.is_empty() => (),
                None if at == 0 => given.push(("qom-type".to_owned(), Given::Word(item))),
                None if matches!(item.as_str(), "help" | "?") => wants_help = true,
                None => return Err(Stop::wrong(format!("Expected '=' after parameter '{item}'"))),
            }
        }
        Ok(Self { given, wants_help })
    }

    fn from_json(text: &str) -> Result<Self, Stop> {
        let Value::Object(members) = json::parse(text)? else {
            return Err(Stop::wrong("Invalid parameter type, expected: object"));
        };
        let mut given = Vec::new();
        for (name, value) in members {
            match value {
                Value::Object(members) if name == "limits" => {
                    let inside = |(member, value)| (format!("{name}.{member}"), Given::Typed(value));
                    given.extend(members.into_iter().map(inside));
                }
                value => given.push((name.into_owned(), Given::Typed(value))),
            }
        }
        Ok(Self {
            given,
            wants_help: false,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.given.iter().any(|(other, _)| other == name)
    }

    fn take(&mut self, name: &str) -> Option<Given> {
        let at = self.given.iter().position(|(other, _)| other == name)?;
        Some(self.given.remove(at).1)
    }

    fn take_text(&mut self, name: &str) -> Result<Option<String>, Stop> {
        match self.take(name) {
            None => Ok(None),
            Some(Given::Word(text) | Given::Typed(Value::Text(text))) => Ok(Some(text)),
            Some(Given::Typed(_)) => Err(wrong_type(name, "string")),
        }
    }

    fn take_flag(&mut self, name: &str) -> Result<Option<bool>, Stop> {
        match self.take(name) {
            None => Ok(None),
            Some(Given::Word(word)) => match word.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(Stop::wrong(format!("Parameter '{name}' expects 'on' or 'off'"))),
            },
            Some(Given::Typed(Value::Bool(flag))) => Ok(Some(flag)),
            Some(Given::Typed(_)) => Err(wrong_type(name, "boolean")),
        }
    }

    fn take_integer(&mut self, name: &str) -> Result<Option<i64>, Stop> {
        let number = match self.take(name) {
            None => return Ok(None),
            Some(Given::Word(word)) => parse_number(&word).ok(),
            Some(Given::Typed(Value::Int(number))) => Some(number),
            Some(Given::Typed(_)) => return Err(wrong_type(name, "integer")),
        };
        let number = number.and_then(|number| i64::try_from(number).ok());
        number
            .map(Some)
            .ok_or_else(|| Stop::wrong(format!("Parameter '{name}' expects integer")))
    }

    fn take_id(&mut self) -> Result<String, Stop> {
        self.take_text("id")?
            .ok_or_else(|| Stop::wrong("Parameter 'id' is missing"))
    }

    /// Refuses parameters that were not taken, and an invalid identifier.
    fn finish(&self, id: &str) -> Result<(), Stop> {
        if let Some((name, _)) = self.given.first() {
            return Err(Stop::wrong(format!("Parameter '{name}' is unexpected")));
        }
        if is_identifier(id) {
            return Ok(());
        }
        Err(Stop::wrong(
            "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ))
    }
}

fn wrong_type(name: &str, expected: &str) -> Stop {
    Stop::wrong(format!(
        "Invalid parameter type for '{name}', expected: {expected}"
    ))
}

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
