//! TLS with X.509 certificates.
//!
//! The credentials files are those of QEMU's documentation, in one directory: `ca-cert.pem` with the trusted
//! authorities, `ca-crl.pem` with revoked certificates, and `client-cert.pem` with `client-key.pem`, the identity of
//! the client. The last three are optional.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use diskimage_core::{Error, ErrorKind, Result, name};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, InvalidMessage, RootCertStore,
    SignatureScheme,
};
use zeroize::Zeroizing;

use super::directory::{Directory, accessible, read};
use super::messages::{ALERT, LENGTH, UNDECODABLE, UNEXPECTED, handshake_failed};

/// The own identity and the trusted authorities.
#[derive(Clone, Debug)]
pub(super) struct Certificates {
    config: Arc<ClientConfig>,
    verify_peer: bool,
}

impl Certificates {
    /// Reads the files in `dir`.
    ///
    /// # Errors
    /// Missing files, and files with other contents.
    pub(super) fn load(dir: Directory<'_>, verify_peer: bool) -> Result<Self> {
        Ok(Self {
            config: Arc::new(configure(dir, verify_peer)?),
            verify_peer,
        })
    }

    /// Starts a session. The certificate of the peer must be for `host`.
    ///
    /// # Errors
    /// A host name that no certificate can have, and no host name where one is needed.
    pub(super) fn session(&self, host: Option<&str>) -> Result<CertifiedSession> {
        if self.verify_peer && host.is_none() {
            return Err(Error::invalid("No hostname for certificate validation"));
        }
        // Without verification any name will do. An address is not sent to the server.
        let host = host.unwrap_or("127.0.0.1").to_owned();
        let name = ServerName::try_from(host.clone())
            .map_err(|_| Error::invalid(format!("Certificate does not match the hostname {host}")))?;
        let connection =
            ClientConnection::new(Arc::clone(&self.config), name).map_err(|error| failed(&error, &host))?;
        Ok(CertifiedSession { connection, host })
    }
}

fn configure(dir: Directory<'_>, verify_peer: bool) -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let ca = dir.file("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    let bad_list = || {
        Error::corrupt(format!(
            "Unable to import CA certificate list {}",
            name::of_path(&ca)
        ))
    };
    for certificate in certificates(&ca, &read_required(&ca)?)? {
        roots.add(certificate).map_err(|_| bad_list())?;
    }
    if roots.is_empty() {
        return Err(bad_list());
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::unsupported(format!("Cannot use TLS: {error}")))?;
    let builder = if verify_peer {
        let crl = dir.file("ca-crl.pem");
        let revoked = match read_if_exists(&crl)? {
            Some(pem) => CertificateRevocationListDer::pem_slice_iter(&pem)
                .collect::<std::result::Result<Vec<_>, _>>()
                .map_err(|error| bad_file(&crl, &error))?,
            None => Vec::new(),
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| Error::corrupt(format!("Unable to use {}: {error}", name::of_path(&ca))))?;
        builder.with_webpki_verifier(verifier)
    } else {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
    };
    let (cert, key) = (dir.file("client-cert.pem"), dir.file("client-key.pem"));
    match (read_if_exists(&cert)?, read_if_exists(&key)?) {
        // As in qemu-img: one without the other is ignored.
        (None, _) | (_, None) => Ok(builder.with_no_client_auth()),
        (Some(certificate), Some(private)) => {
            let chain = certificates(&cert, &certificate)?;
            let private = PrivateKeyDer::from_pem_slice(&private).map_err(|error| bad_file(&key, &error))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| {
                Error::corrupt(format!(
                    "Unable to load certificate {} & key {}: {error}",
                    name::of_path(&cert),
                    name::of_path(&key)
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
        name::of_path(path)
    ))
}

fn read_required(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    accessible(path)?;
    read(path)
}

/// Reads a credentials file; `None` if it does not exist.
fn read_if_exists(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>> {
    match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => read_required(path).map(Some),
    }
}

/// Accepts any certificate, for `verify-peer=off`. The signature of the handshake is still verified, which proves that
/// the peer has the key of its certificate.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
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

fn failed(error: &rustls::Error, host: &str) -> Error {
    let words = match error {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            // A signature of another key with the name of the issuer: the issuer is not known.
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
        rustls::Error::AlertReceived(_) => return handshake_failed(ALERT),
        rustls::Error::InappropriateMessage { .. }
        | rustls::Error::InappropriateHandshakeMessage { .. }
        | rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            return handshake_failed(UNEXPECTED);
        }
        rustls::Error::InvalidMessage(InvalidMessage::MessageTooLarge) => return handshake_failed(LENGTH),
        rustls::Error::InvalidMessage(_) => return handshake_failed(UNDECODABLE),
        other => return handshake_failed(&other.to_string()),
    };
    Error::new(ErrorKind::Permission, words)
}

/// A session of rustls.
pub(super) struct CertifiedSession {
    connection: ClientConnection,
    host: String,
}

impl CertifiedSession {
    /// Whether the handshake is not complete yet.
    pub(super) fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Takes encrypted bytes of the peer, as many as there is space for. Returns their number.
    ///
    /// # Errors
    /// An invalid message of the peer; there may be an alert to drain.
    pub(super) fn feed(&mut self, mut raw: &[u8]) -> Result<usize> {
        let taken = self.connection.read_tls(&mut raw)?;
        self.connection
            .process_new_packets()
            .map_err(|error| failed(&error, &self.host))?;
        Ok(taken)
    }

    /// Reads decrypted bytes of the peer.
    ///
    /// # Errors
    /// `WouldBlock` until more is fed.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.connection.reader().read(buf)
    }

    /// Takes bytes to encrypt for the peer. Returns their number.
    ///
    /// # Errors
    /// A session that has ended.
    pub(super) fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.connection.writer().write(buf)
    }

    /// Appends the encrypted bytes for the peer to `out`.
    ///
    /// # Errors
    /// None but those of memory.
    pub(super) fn drain(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_handshakes_have_the_messages_of_qemu_img() {
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
            .with_no_client_auth();
        let certificates = Certificates {
            config: Arc::new(config),
            verify_peer: false,
        };
        for (bytes, words) in diskimage_testing::INSTEAD_OF_A_HANDSHAKE {
            let error = certificates.session(None).unwrap().feed(bytes).unwrap_err();
            assert_eq!(error.chain(), format!("TLS handshake failed: {words}"));
        }
    }
}
