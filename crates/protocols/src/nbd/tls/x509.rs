//! Encryption of connections with certificates.
//!
//! The files of credentials are those of QEMU's documentation: in one directory `ca-cert.pem`, whom we believe,
//! `ca-crl.pem`, whom not any more, and `client-cert.pem` with `client-key.pem`, who we are. The last three may be missing.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use diskimage_core::{Error, ErrorKind, Result};
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

use super::channel::Session;
use super::messages::{ALERT, LENGTH, UNDECODABLE, UNEXPECTED, handshake_failed};
use super::{Directory, accessible, read};

/// Who we are and whom we believe.
#[derive(Clone, Debug)]
pub(super) struct Certificates {
    config: Arc<ClientConfig>,
    verify_peer: bool,
}

impl Certificates {
    /// Reads the files in `dir`.
    ///
    /// # Errors
    /// Files that are missing or that hold something else.
    pub(super) fn load(dir: Directory<'_>, verify_peer: bool) -> Result<Self> {
        Ok(Self {
            config: Arc::new(configure(dir, verify_peer)?),
            verify_peer,
        })
    }

    /// Begins a session. `host` is who the other side should be.
    ///
    /// # Errors
    /// A name of a host that no certificate can have, and none where one is needed.
    pub(super) fn session(&self, host: Option<&str>) -> Result<CertifiedSession> {
        if self.verify_peer && host.is_none() {
            return Err(Error::invalid("No hostname for certificate validation"));
        }
        // Without a check any name will do; it is not sent, for it is an address.
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
        let crl = dir.file("ca-crl.pem");
        let revoked = match read_if_there(&crl)? {
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
            .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
    };
    let (cert, key) = (dir.file("client-cert.pem"), dir.file("client-key.pem"));
    match (read_if_there(&cert)?, read_if_there(&key)?) {
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

fn require(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    accessible(path)?;
    read(path)
}

/// The file's bytes; none if there is no file.
fn read_if_there(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => require(path).map(Some),
    }
}

/// Believes anybody to be the server, as `verify-peer=off` asks for; that the other side has the key to the certificate
/// that it shows is still checked.
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

/// A session of the library.
pub(super) struct CertifiedSession {
    connection: ClientConnection,
    host: String,
}

impl Session for CertifiedSession {
    fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    fn feed(&mut self, mut raw: &[u8]) -> Result<usize> {
        let taken = self.connection.read_tls(&mut raw)?;
        self.connection
            .process_new_packets()
            .map_err(|error| failed(&error, &self.host))?;
        Ok(taken)
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.connection.reader().read(buf)
    }

    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.connection.writer().write(buf)
    }

    fn drain(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
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
    fn what_a_server_says_instead_of_a_handshake_is_told_in_the_originals_words() {
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
        for (bytes, words) in super::super::messages::tests::INSTEAD_OF_A_HANDSHAKE {
            let error = certificates.session(None).unwrap().feed(bytes).unwrap_err();
            assert_eq!(error.chain(), format!("TLS handshake failed: {words}"));
        }
    }
}
