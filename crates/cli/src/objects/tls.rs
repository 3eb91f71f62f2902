//! `--object tls-creds-x509`, `tls-creds-psk` and `tls-creds-anon`: TLS credentials.

use std::path::PathBuf;

use diskimage::{Object, TlsCreds, TlsKind, check_tls_creds};

use super::parameters::{Parameters, not_accepted};
use crate::words::Stop;

/// The types of these objects.
pub(super) const TYPES: [&str; 3] = [X509, PSK, ANON];

const X509: &str = "tls-creds-x509";
const PSK: &str = "tls-creds-psk";
const ANON: &str = "tls-creds-anon";

/// Parses the parameters of credentials of type `kind`, and checks the files that they name.
///
/// # Errors
/// A parameter is unknown or has an invalid value, or a file cannot be used. [`Stop::Text`] for `help`.
pub(super) fn read(kind: &str, mut parameters: Parameters) -> Result<(String, Object), Stop> {
    if parameters.wants_help {
        return Err(Stop::Text(help(kind)));
    }
    let id = parameters.take_id()?;
    let verify_peer = parameters.take_flag("verify-peer")?.unwrap_or(true);
    let dir = parameters.take_text("dir")?;
    let is_server = match parameters.take_text("endpoint")?.as_deref() {
        None | Some("client") => false,
        Some("server") => true,
        Some(other) => return Err(not_accepted("endpoint", other)),
    };
    let priority = parameters.take_text("priority")?;
    let kind = match kind {
        X509 => {
            // The TLS library always checks the certificates, so the parameter has no effect.
            parameters.take_flag("sanity-check")?;
            TlsKind::X509 {
                password_id: parameters.take_text("passwordid")?,
            }
        }
        PSK => TlsKind::Psk {
            username: parameters.take_text("username")?,
        },
        _ => TlsKind::Anon,
    };
    parameters.finish(&id)?;
    let creds = TlsCreds {
        kind,
        dir,
        is_server,
        verify_peer,
        helper: helper(),
        priority,
    };
    check_tls_creds(&creds)?;
    Ok((id, Object::TlsCreds(creds)))
}

/// The program for TLS without certificates: beside this one, or where packages put programs that users do not start.
fn helper() -> Option<PathBuf> {
    const NAME: &str = "qemu-img-tls";
    let own = std::env::current_exe().ok()?;
    let directory = own.parent()?;
    let places = [directory.join(NAME), directory.join("../libexec").join(NAME)];
    places.into_iter().find(|place| place.is_file())
}

fn help(kind: &str) -> String {
    let own: &[&str] = match kind {
        X509 => &["passwordid=<string>", "priority=<string>", "sanity-check=<bool>"],
        PSK => &["priority=<string>", "username=<string>"],
        _ => &["priority=<string>"],
    };
    let mut text = format!("{kind} options:\n  dir=<string>\n  endpoint=<QCryptoTLSCredsEndpoint>\n");
    for line in own.iter().chain(&["verify-peer=<bool>"]) {
        text.push_str(&format!("  {line}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<(String, Object), Stop> {
        let mut parameters = Parameters::read(text)?;
        let kind = parameters.take_text("qom-type")?.expect("a type");
        read(&kind, parameters)
    }

    #[test]
    fn invalid_parameters_are_refused_with_the_messages_of_qemu_img() {
        for (text, message) in [
            ("tls-creds-anon", "Parameter 'id' is missing"),
            (
                "tls-creds-anon,id=t,endpoint=foo",
                "Parameter 'endpoint' does not accept value 'foo'",
            ),
            (
                "tls-creds-x509,id=t,verify-peer=x",
                "Parameter 'verify-peer' expects 'on' or 'off'",
            ),
            ("tls-creds-anon,id=t,bogus=1", "Parameter 'bogus' is unexpected"),
            (
                "tls-creds-x509,id=t,endpoint=client",
                "Missing 'dir' property value",
            ),
            (
                "tls-creds-x509,id=t,endpoint=client,dir=/nonexistent",
                "Unable to access credentials /nonexistent/ca-cert.pem: No such file or directory",
            ),
        ] {
            assert_eq!(read_text(text).map(|_| ()), Err(Stop::wrong(message)), "{text}");
        }
    }

    #[test]
    fn help_lists_the_parameters() {
        let Err(Stop::Text(text)) = read_text("tls-creds-psk,help") else {
            panic!("help expected");
        };
        assert_eq!(
            text,
            "tls-creds-psk options:\n  dir=<string>\n  endpoint=<QCryptoTLSCredsEndpoint>\n  priority=<string>\n  \
             username=<string>\n  verify-peer=<bool>\n"
        );
    }
}
