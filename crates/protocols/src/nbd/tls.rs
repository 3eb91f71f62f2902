//! Encryption of connections with certificates.
//!
//! The files of credentials are those of QEMU's documentation: in one directory `ca-cert.pem`, whom we believe,
//! `ca-crl.pem`, whom not any more, and `client-cert.pem` with `client-key.pem`, who we are. The last three may be missing.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{Error, ErrorKind, Result, ResultExt, TlsCreds, TlsKind};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use super::address::Socket;
use super::connection::Channel;

/// Who we are and whom we believe, read from the files.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    config: Arc<ClientConfig>,
    verify_peer: bool,
}

/// Larger than any file of credentials.
const MAX_FILE: u64 = 4 << 20;

impl Credentials {
    /// Reads the files that `creds` names.
    ///
    /// # Errors
    /// Credentials of a server, kinds that there is no support for, and files that cannot be read.
    pub(super) fn load(creds: &TlsCreds) -> Result<Self> {
        if creds.is_server {
            return Err(Error::invalid("Expected TLS credentials for a client endpoint"));
        }
        let password_id = match &creds.kind {
            TlsKind::X509 { password_id } => password_id,
            TlsKind::Psk { .. } => return Err(unavailable("TLS with pre-shared keys is")),
            TlsKind::Anon => return Err(unavailable("TLS with anonymous credentials is")),
        };
        if password_id.is_some() {
            return Err(unavailable("Encrypted keys for TLS are"));
        }
        if creds.priority.is_some() {
            return Err(unavailable("Priority strings for TLS are"));
        }
        let dir = creds
            .dir
            .as_deref()
            .ok_or_else(|| Error::invalid("Missing 'dir' property value"))?;
        let config = configure(Path::new(dir), creds.verify_peer)?;
        Ok(Self {
            config: Arc::new(config),
            verify_peer: creds.verify_peer,
        })
    }

    /// Encrypts a connection. `host` is who the other side should be.
    ///
    /// # Errors
    /// `TLS handshake failed`, and what is wrong with the other side's certificate.
    pub(super) fn secure(&self, socket: Socket, host: Option<&str>) -> Result<Channel> {
        if self.verify_peer && host.is_none() {
            return Err(Error::invalid("No hostname for certificate validation"));
        }
        // Without a check any name will do; it is not sent, for it is an address.
        let host = host.unwrap_or("127.0.0.1");
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::invalid(format!("Certificate does not match the hostname {host}")))?;
        let session =
            ClientConnection::new(Arc::clone(&self.config), name).map_err(|error| failed(&error, host))?;
        let session = Arc::new(Mutex::new(session));
        shake_hands(&session, &socket, host)?;
        let mut lines = [socket.try_clone()?, socket.try_clone()?].into_iter();
        let (Some(reading), Some(writing)) = (lines.next(), lines.next()) else {
            return Err(Error::invalid("No connection"));
        };
        Ok(Channel {
            socket,
            reader: Box::new(TlsReader {
                session: Arc::clone(&session),
                socket: reading,
                raw: vec![0; RAW],
                there: 0..0,
            }),
            writer: Box::new(TlsWriter {
                session,
                socket: writing,
                raw: Vec::new(),
            }),
        })
    }
}

fn unavailable(what: &str) -> Error {
    Error::unsupported(format!("{what} not available in this build"))
}

fn configure(dir: &Path, verify_peer: bool) -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let ca = dir.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    let bad_list = || Error::corrupt(format!("Unable to import CA certificate list {}", ca.display()));
    for certificate in certificates(&ca, &require(&ca)?)? {
        roots.add(certificate).map_err(|_| bad_list())?;
    }
    if roots.is_empty() {
        return Err(bad_list());
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::unsupported(format!("Cannot use TLS: {error}")))?;
    let builder = if verify_peer {
        let crl = dir.join("ca-crl.pem");
        let revoked = match read(&crl)? {
            Some(pem) => CertificateRevocationListDer::pem_slice_iter(&pem)
                .collect::<std::result::Result<Vec<_>, _>>()
                .map_err(|error| bad_file(&crl, &error))?,
            None => Vec::new(),
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| Error::corrupt(format!("Unable to use {}: {error}", ca.display())))?;
        builder.with_webpki_verifier(verifier)
    } else {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
    };
    let (cert, key) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
    match (read(&cert)?, read(&key)?) {
        // As there: one without the other is of no use.
        (None, _) | (_, None) => Ok(builder.with_no_client_auth()),
        (Some(certificate), Some(private)) => {
            let chain = certificates(&cert, &certificate)?;
            let private = PrivateKeyDer::from_pem_slice(&private).map_err(|error| bad_file(&key, &error))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| {
                Error::corrupt(format!(
                    "Unable to load certificate {} & key {}: {error}",
                    cert.display(),
                    key.display()
                ))
            })
        }
    }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| bad_file(path, &error))
}

fn bad_file(path: &Path, error: &rustls::pki_types::pem::Error) -> Error {
    Error::corrupt(format!(
        "Unable to import CA certificate list {}: {error}",
        path.display()
    ))
}

fn require(path: &Path) -> Result<Vec<u8>> {
    read(path)?.ok_or_else(|| missing(path))
}

fn missing(path: &Path) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!(
            "Unable to access credentials {}: No such file or directory",
            path.display()
        ),
    )
}

/// The file's bytes; none if there is no file.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let words = || format!("Unable to access credentials {}", path.display());
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(words),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).context(words)?;
    Ok(Some(bytes))
}

/// Believes anybody to be the server, as `verify-peer=off` asks for; that the other side has the key to the certificate
/// that it shows is still checked.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn lock(session: &Mutex<ClientConnection>) -> MutexGuard<'_, ClientConnection> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shake_hands(session: &Mutex<ClientConnection>, socket: &Socket, host: &str) -> Result<()> {
    let mut session = lock(session);
    let mut raw = vec![0; RAW];
    while session.is_handshaking() || session.wants_write() {
        let mut out = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut out)?;
        }
        let mut line = socket;
        line.write_all(&out).map_err(|error| broken_off(&error))?;
        if !session.is_handshaking() {
            break;
        }
        let len = line.read(&mut raw).map_err(|error| broken_off(&error))?;
        if len == 0 {
            return Err(broken_off(&io::ErrorKind::UnexpectedEof.into()));
        }
        let mut rest = &raw[..len];
        while !rest.is_empty() {
            session.read_tls(&mut rest)?;
            if let Err(error) = session.process_new_packets() {
                // The other side is told why.
                let mut out = Vec::new();
                while session.wants_write() {
                    session.write_tls(&mut out)?;
                }
                let _ = line.write_all(&out);
                return Err(failed(&error, host));
            }
        }
    }
    Ok(())
}

fn broken_off(error: &io::Error) -> Error {
    let reason = match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            UNCLEAN_END.to_owned()
        }
        _ => error.to_string(),
    };
    Error::new(ErrorKind::Io, format!("TLS handshake failed: {reason}"))
}

pub(super) const UNCLEAN_END: &str = "The TLS connection was non-properly terminated.";

fn failed(error: &rustls::Error, host: &str) -> Error {
    let words = match error {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            // An issuer of the same name with another key is another issuer.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "The certificate hasn't got a known issuer".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("Certificate does not match the hostname {host}")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "The certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "The certificate is not yet activated".to_owned()
            }
            CertificateError::Revoked => "The certificate has been revoked".to_owned(),
            other => format!("The certificate is not trusted: {other:?}"),
        },
        other => format!("TLS handshake failed: {other}"),
    };
    Error::new(ErrorKind::Permission, words)
}

/// How many encrypted bytes are read at once.
const RAW: usize = 64 << 10;

/// The receiving side.
struct TlsReader {
    session: Arc<Mutex<ClientConnection>>,
    socket: Socket,
    raw: Vec<u8>,
    /// What of `raw` has not been decrypted yet.
    there: std::ops::Range<usize>,
}

impl Read for TlsReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut session = lock(&self.session);
                match session.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                if !self.there.is_empty() {
                    let mut rest = &self.raw[self.there.clone()];
                    let taken = session.read_tls(&mut rest)?;
                    self.there.start += taken;
                    session.process_new_packets().map_err(io::Error::other)?;
                    continue;
                }
            }
            // Waiting for the server with nothing locked.
            let len = (&self.socket).read(&mut self.raw)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.there = 0..len;
        }
    }
}

/// The sending side. What the session has to say of itself, new keys for one, goes out with the next request.
struct TlsWriter {
    session: Arc<Mutex<ClientConnection>>,
    socket: Socket,
    raw: Vec<u8>,
}

impl Write for TlsWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.raw.clear();
        let taken = {
            let mut session = lock(&self.session);
            let taken = session.writer().write(buf)?;
            while session.wants_write() {
                session.write_tls(&mut self.raw)?;
            }
            taken
        };
        (&self.socket).write_all(&self.raw)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
