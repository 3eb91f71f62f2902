//! `--object`: secrets for images that are encrypted, credentials for connections that are.

mod tls;

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;

use diskimage::{Object, Objects, Secret, is_identifier};

use crate::words::{Stop, text};

/// Adds the object that the value of one `--object` defines.
///
/// # Errors
/// A type that does not exist or is not available, parameters that do not fit, a file that cannot be read; and
/// [`Stop::Text`] where help is asked for.
pub fn define(objects: &mut Objects, value: OsString) -> Result<(), Stop> {
    let (id, object) = read(&text(value)?)?;
    Ok(objects.add(id, object)?)
}

fn read(text: &str) -> Result<(String, Object), Stop> {
    if text.starts_with('{') {
        return Err(Stop::wrong(
            "Objects in JSON form are not available in this build",
        ));
    }
    let mut parameters = Parameters::read(text)?;
    match parameters.take("qom-type").as_deref() {
        Some("help" | "?") => {
            return Err(Stop::Text(
                "List of user creatable objects:\n  secret\n".to_owned(),
            ));
        }
        Some("secret") => (),
        Some(kind) if tls::TYPES.contains(&kind) => return tls::read(kind, parameters),
        Some(other) if OTHER_TYPES.contains(&other) => {
            return Err(Stop::wrong(format!(
                "Objects of type '{other}' are not available in this build"
            )));
        }
        Some(other) => {
            return Err(Stop::wrong(format!(
                "Parameter 'qom-type' does not accept value '{other}'"
            )));
        }
        None => return Err(Stop::wrong("Parameter 'qom-type' is missing")),
    }
    if parameters.wants_help {
        return Err(Stop::Text(SECRET_HELP.to_owned()));
    }
    let id = parameters
        .take("id")
        .ok_or_else(|| Stop::wrong("Parameter 'id' is missing"))?;
    check_id(&id)?;
    let (data, file) = (parameters.take("data"), parameters.take("file"));
    let (format, keyid) = (parameters.take("format"), parameters.take("keyid"));
    let iv = parameters.take("iv");
    if let Some((name, _)) = parameters.given.first() {
        return Err(Stop::wrong(format!("Parameter '{name}' is unexpected")));
    }
    if keyid.is_some() || iv.is_some() {
        return Err(Stop::wrong(
            "Secrets encrypted with another secret are not available in this build",
        ));
    }
    let bytes = match (data, file) {
        (Some(_), Some(_)) => return Err(Stop::wrong("'file' and 'data' are mutually exclusive")),
        (None, None) => return Err(Stop::wrong("Either 'file' or 'data' must be provided")),
        (Some(data), None) => data.into_bytes(),
        (None, Some(file)) => read_file(&file)?,
    };
    let bytes = match format.as_deref() {
        None | Some("raw") => bytes,
        Some("base64") => {
            base64(&bytes).ok_or_else(|| Stop::wrong(format!("Secret '{id}' is not valid base64")))?
        }
        Some(other) => {
            return Err(Stop::wrong(format!(
                "Parameter 'format' does not accept value '{other}'"
            )));
        }
    };
    Ok((id, Object::Secret(Secret::new(bytes))))
}

/// `TYPE,name=value,...`
struct Parameters {
    given: Vec<(String, String)>,
    wants_help: bool,
}

impl Parameters {
    fn read(text: &str) -> Result<Self, Stop> {
        let mut given: Vec<(String, String)> = Vec::new();
        let mut wants_help = false;
        // A doubled comma stands for one; no parameter holds the byte that takes its place meanwhile.
        let text = text.replace(",,", "\0");
        for (at, item) in text.split(',').enumerate() {
            let item = item.replace('\0', ",");
            match item.split_once('=') {
                Some((name, value)) => {
                    given.retain(|(other, _)| other != name);
                    given.push((name.to_owned(), value.to_owned()));
                }
                None if item.is_empty() => (),
                None if at == 0 => given.push(("qom-type".to_owned(), item)),
                None if matches!(item.as_str(), "help" | "?") => wants_help = true,
                None => return Err(Stop::wrong(format!("Expected '=' after parameter '{item}'"))),
            }
        }
        Ok(Self { given, wants_help })
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.given.iter().position(|(other, _)| other == name)?;
        Some(self.given.remove(at).1)
    }
}

const OTHER_TYPES: [&str; 8] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "throttle-group",
];

const SECRET_HELP: &str = "secret options:
  data=<string>
  file=<string>
  format=<QCryptoSecretFormat>
";

/// Longer than any password or key; keeps a device file from being read for ever.
const LARGEST_SECRET: u64 = 1 << 20;

fn read_file(name: &str) -> Result<Vec<u8>, Stop> {
    let failed = |error: std::io::Error| {
        let error = diskimage_core::Error::from(error);
        Stop::wrong(format!(
            "Unable to read {name}: Failed to open file \u{201c}{name}\u{201d}: {error}"
        ))
    };
    let mut bytes = Vec::new();
    let mut file = File::open(name).map_err(failed)?.take(LARGEST_SECRET + 1);
    file.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LARGEST_SECRET {
        return Err(Stop::wrong(format!(
            "Unable to read {name}: Larger than {LARGEST_SECRET} bytes"
        )));
    }
    Ok(bytes)
}

fn check_id(id: &str) -> Result<(), Stop> {
    if is_identifier(id) {
        return Ok(());
    }
    Err(Stop::wrong(
        "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
    ))
}

/// Decodes base64; white space between digits is skipped.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut digits: Vec<u8> = text
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    for _ in 0..2 {
        if digits.last() == Some(&b'=') {
            digits.pop();
        }
    }
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    let (mut window, mut bits) = (0u32, 0);
    for digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        window = (window << 6 | u32::from(value)) & 0xffff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(((window >> bits) & 0xff) as u8);
        }
    }
    Some(bytes)
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
    fn wrong_objects_are_refused_in_the_originals_words() {
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
                "throttle-group,id=a",
                "Objects of type 'throttle-group' are not available in this build",
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
