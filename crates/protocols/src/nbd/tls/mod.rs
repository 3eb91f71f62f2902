//! TLS for connections.
//!
//! ```text
//!   Credentials ── secure ──► Channel
//!    ├ x509          certificates: a session of rustls
//!    └ uncertified   pre-shared keys (psk), or anonymous: the program `qemu-img-tls` (helper)
//! ```
//!
//! The credentials files are those of QEMU's documentation, in one directory.

mod channel;
mod directory;
pub mod helper;
mod messages;
mod psk;
mod uncertified;
mod x509;

use diskimage_core::{Error, Result, TlsCreds, TlsKind};

use super::address::Socket;
use super::connection::Channel;
use directory::{Directory, accessible};
pub(super) use messages::UNCLEAN_END;
#[cfg(feature = "fuzzing")]
pub(super) use psk::find_key;
use uncertified::Uncertified;
use x509::Certificates;

/// The own identity and the trusted peers, read from the files.
#[derive(Clone, Debug)]
pub(super) struct Credentials(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Certificates(Certificates),
    Uncertified(Uncertified),
}

/// Checks credentials and their files before they are used for a connection.
///
/// # Errors
/// Credentials that contradict themselves, and files that are missing or that hold something else.
pub fn check_tls_creds(creds: &TlsCreds) -> Result<()> {
    let files: &[&str] = match &creds.kind {
        TlsKind::Psk { username: Some(_) } if creds.is_server => {
            return Err(Error::invalid("username should not be set when endpoint=server"));
        }
        _ if !creds.is_server => return Credentials::load(creds).map(|_| ()),
        TlsKind::X509 { .. } => &["ca-cert.pem", "server-cert.pem", "server-key.pem"],
        TlsKind::Psk { .. } => &["keys.psk"],
        TlsKind::Anon => return Ok(()),
    };
    // The contents of a server's files are not checked here.
    let dir = Directory::of(creds)?;
    files.iter().try_for_each(|file| accessible(&dir.file(file)))
}

impl Credentials {
    /// Reads the files that the credentials of a client name.
    ///
    /// # Errors
    /// Unsupported kinds of credentials, and files that cannot be read.
    pub(super) fn load(creds: &TlsCreds) -> Result<Self> {
        if creds.is_server {
            return Err(Error::invalid("Expected TLS credentials for a client endpoint"));
        }
        if creds.priority.is_some() {
            return Err(unavailable("Priority strings for TLS are"));
        }
        let kind = match &creds.kind {
            TlsKind::X509 { password_id: Some(_) } => return Err(unavailable("Encrypted keys for TLS are")),
            TlsKind::X509 { password_id: None } => {
                Kind::Certificates(Certificates::load(Directory::of(creds)?, creds.verify_peer)?)
            }
            TlsKind::Psk { username } => {
                let key = psk::load(Directory::of(creds)?, username.as_deref())?;
                Kind::Uncertified(Uncertified::with_key(creds.helper.as_deref(), key)?)
            }
            TlsKind::Anon => Kind::Uncertified(Uncertified::anonymous(creds.helper.as_deref())?),
        };
        Ok(Self(kind))
    }

    /// Encrypts a connection. The certificate of the peer must be for `host`.
    ///
    /// # Errors
    /// `TLS handshake failed`, and an invalid certificate of the peer.
    pub(super) fn secure(&self, socket: Socket, host: Option<&str>) -> Result<Channel> {
        match &self.0 {
            Kind::Certificates(certificates) => channel::secure(socket, certificates.session(host)?),
            Kind::Uncertified(uncertified) => uncertified.secure(socket),
        }
    }
}

fn unavailable(what: &str) -> Error {
    Error::unsupported(format!("{what} not available in this build"))
}
