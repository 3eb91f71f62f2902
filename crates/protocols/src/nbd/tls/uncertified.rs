//! TLS without certificates: with a pre-shared key, or anonymous.
//!
//! A session of OpenSSL reads from one buffer and writes to another; `channel` moves their bytes from and to the
//! socket.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use diskimage_core::{Error, Result};
use openssl::error::ErrorStack;
use openssl::ssl::{
    self, ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslStream, SslVerifyMode,
    SslVersion,
};
use openssl::x509::X509VerifyResult;

use super::channel::Session;
use super::messages::{ALERT, FAREWELL, INSUFFICIENT, LENGTH, UNDECODABLE, UNEXPECTED, handshake_failed};
use super::psk::NamedKey;

/// The context from which sessions are created.
#[derive(Clone, Debug)]
pub(super) struct Uncertified(SslContext);

/// Ciphers of TLS 1.2 that authenticate with the pre-shared key alone, with or without a Diffie-Hellman exchange.
const WITH_KEY: &str = "kDHEPSK:kECDHEPSK:kPSK:!eNULL:!3DES:!RC4";
/// Ciphers of TLS 1.2 without authentication. OpenSSL allows them only at security level 0.
const ANONYMOUS: &str = "ADH:AECDH:!eNULL:!3DES:!RC4:@SECLEVEL=0";
/// Limits of OpenSSL: `PSK_MAX_PSK_LEN`, and `PSK_MAX_IDENTITY_LEN` with the byte that ends it.
const MAX_KEY: usize = 512;
const MAX_NAME: usize = 255;

impl Uncertified {
    /// Sessions with a peer that has the same key.
    ///
    /// # Errors
    /// A name or a key that is longer than the limit of OpenSSL.
    pub(super) fn with_key(key: NamedKey) -> Result<Self> {
        if key.bytes.len() > MAX_KEY {
            return Err(Error::unsupported(format!(
                "Cannot set PSK client credentials: The key is longer than {MAX_KEY} bytes"
            )));
        }
        if key.name.len() > MAX_NAME || key.name.contains(&0) {
            return Err(Error::unsupported(format!(
                "Cannot set PSK client credentials: The name is longer than {MAX_NAME} bytes or has a NUL in it"
            )));
        }
        Self::new(WITH_KEY, |context| {
            context.set_psk_client_callback(move |_, _, name, bytes| {
                // Length 0 means no key: the handshake fails.
                Ok(copy_key(&key, name, bytes).unwrap_or(0))
            });
            Ok(())
        })
    }

    /// Anonymous sessions.
    ///
    /// # Errors
    /// An OpenSSL without such ciphers.
    pub(super) fn anonymous() -> Result<Self> {
        Self::new(ANONYMOUS, |context| {
            // TLS 1.3 has no such ciphers.
            context.set_max_proto_version(Some(SslVersion::TLS1_2))
        })
    }

    fn new(
        ciphers: &str,
        configure: impl FnOnce(&mut SslContextBuilder) -> std::result::Result<(), ErrorStack>,
    ) -> Result<Self> {
        let build = || {
            let mut context = SslContextBuilder::new(SslMethod::tls_client())?;
            context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
            context.set_cipher_list(ciphers)?;
            // A server that sends a certificate instead of using the key is refused, whatever the system-wide
            // configuration of OpenSSL allows.
            context.set_verify_callback(SslVerifyMode::PEER, |_, chain| {
                chain.set_error(X509VerifyResult::APPLICATION_VERIFICATION);
                false
            });
            context.set_options(SslOptions::NO_RENEGOTIATION);
            configure(&mut context)?;
            Ok(Self(context.build()))
        };
        build().map_err(|error| unusable(&error))
    }

    /// Starts a session.
    ///
    /// # Errors
    /// A failed allocation of OpenSSL.
    pub(super) fn session(&self) -> Result<UncertifiedSession> {
        let ssl = Ssl::new(&self.0).map_err(|error| unusable(&error))?;
        let stream = SslStream::new(ssl, Pipe::default()).map_err(|error| unusable(&error))?;
        let mut session = UncertifiedSession {
            stream,
            is_handshaking: true,
        };
        session.shake_hands()?;
        Ok(session)
    }
}

fn unusable(error: &ErrorStack) -> Error {
    Error::unsupported(format!("Cannot use TLS: {}", reason(error)))
}

/// Copies the key and its name, with a terminating NUL, into the buffers of OpenSSL. Returns the length of the key;
/// `None` if they do not fit.
fn copy_key(key: &NamedKey, name: &mut [u8], bytes: &mut [u8]) -> Option<usize> {
    let (end, name) = name.get_mut(..=key.name.len())?.split_last_mut()?;
    name.copy_from_slice(&key.name);
    *end = 0;
    bytes.get_mut(..key.bytes.len())?.copy_from_slice(&key.bytes);
    Some(key.bytes.len())
}

/// A session of OpenSSL.
pub(super) struct UncertifiedSession {
    stream: SslStream<Pipe>,
    is_handshaking: bool,
}

impl UncertifiedSession {
    fn shake_hands(&mut self) -> Result<()> {
        match self.stream.connect() {
            Ok(()) => self.is_handshaking = false,
            Err(error) if error.code() == ErrorCode::WANT_READ => {}
            Err(error) => return Err(self.failed(&error)),
        }
        Ok(())
    }

    fn failed(&self, error: &ssl::Error) -> Error {
        if self.stream.ssl().verify_result() != X509VerifyResult::OK {
            return handshake_failed(INSUFFICIENT);
        }
        let Some(errors) = error.ssl_error() else {
            return handshake_failed(FAREWELL);
        };
        let is_alert = errors
            .errors()
            .first()
            .is_some_and(|error| error.reason_code() >= FIRST_ALERT);
        handshake_failed(match reason(errors) {
            _ if is_alert => ALERT,
            "wrong version number" | "unexpected message" | "unexpected record" => UNEXPECTED,
            "length mismatch" | "length too short" => UNDECODABLE,
            "packet length too long" => LENGTH,
            other => other,
        })
    }
}

/// `SSL_AD_REASON_OFFSET`: reasons from this number on are alerts of the peer.
const FIRST_ALERT: i32 = 1000;

fn reason(errors: &ErrorStack) -> &str {
    let first = errors.errors().first();
    first.and_then(|error| error.reason()).unwrap_or("unknown reason")
}

impl Session for UncertifiedSession {
    fn is_handshaking(&self) -> bool {
        self.is_handshaking
    }

    fn feed(&mut self, raw: &[u8]) -> Result<usize> {
        self.stream.get_mut().incoming.extend(raw);
        if self.is_handshaking {
            self.shake_hands()?;
        }
        Ok(raw.len())
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buf)
    }

    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.write(buf)
    }

    fn drain(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        out.append(&mut self.stream.get_mut().outgoing);
        Ok(())
    }
}

/// The connection as OpenSSL sees it. Bytes are added only after OpenSSL has taken all earlier ones, so it holds at
/// most one read from the socket.
#[derive(Debug, Default)]
struct Pipe {
    incoming: VecDeque<u8>,
    outgoing: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.incoming.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.incoming.read(buf)
    }
}

impl Write for Pipe {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.outgoing.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_handshakes_have_the_messages_of_qemu_img() {
        let farewell: (&[u8], _) = (b"\x15\x03\x03\0\x02\x01\0", FAREWELL);
        for (bytes, words) in super::super::messages::tests::INSTEAD_OF_A_HANDSHAKE
            .iter()
            .chain(&[farewell])
        {
            let mut session = Uncertified::anonymous().and_then(|it| it.session()).unwrap();
            let error = session.feed(bytes).unwrap_err();
            assert_eq!(error.chain(), format!("TLS handshake failed: {words}"));
        }
    }
}
