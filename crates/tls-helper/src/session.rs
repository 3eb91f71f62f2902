//! A session of OpenSSL, which reads from one buffer and writes to another.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use diskimage_protocols::tls_helper::{Answer, NamedKey, Setup};
use openssl::error::ErrorStack;
use openssl::ssl::{
    self, ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslStream, SslVerifyMode,
    SslVersion,
};
use openssl::x509::X509VerifyResult;

use super::CHUNK;

/// Ciphers of TLS 1.2 that authenticate with the pre-shared key alone, with or without a Diffie-Hellman exchange.
const WITH_KEY: &str = "kDHEPSK:kECDHEPSK:kPSK:!eNULL:!3DES:!RC4";
/// Ciphers of TLS 1.2 without authentication. OpenSSL allows them only at security level 0.
const ANONYMOUS: &str = "ADH:AECDH:!eNULL:!3DES:!RC4:@SECLEVEL=0";
/// One side of an encrypted connection.
pub(super) struct Session {
    stream: SslStream<Pipe>,
    is_handshaking: bool,
}

impl Session {
    /// Starts a session.
    ///
    /// # Errors
    /// [`Answer::Unusable`]: an OpenSSL without such ciphers, and failed allocations.
    pub(super) fn new(setup: Setup) -> Result<Self, Answer> {
        let stream = context(setup)
            .and_then(|context| SslStream::new(Ssl::new(&context)?, Pipe::default()))
            .map_err(|error| Answer::Unusable(reason(&error).to_owned()))?;
        let mut session = Self {
            stream,
            is_handshaking: true,
        };
        session.shake_hands()?;
        Ok(session)
    }

    /// Whether the handshake is not complete yet.
    pub(super) fn is_handshaking(&self) -> bool {
        self.is_handshaking
    }

    /// Takes encrypted bytes of the peer.
    ///
    /// # Errors
    /// An invalid message of the handshake; there may be an alert to drain.
    pub(super) fn feed(&mut self, raw: &[u8]) -> Result<(), Answer> {
        self.stream.get_mut().incoming.extend(raw);
        if self.is_handshaking {
            self.shake_hands()?;
        }
        Ok(())
    }

    /// Appends all decrypted bytes of the peer to `plain`. Returns whether more may follow: `false` after a close alert.
    ///
    /// # Errors
    /// An invalid message of the peer.
    pub(super) fn read_all(&mut self, plain: &mut Vec<u8>) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(false),
                Ok(len) => plain.extend(&chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }

    /// Encrypts `plain` for the peer.
    ///
    /// # Errors
    /// A session that has ended.
    pub(super) fn write_all(&mut self, plain: &[u8]) -> io::Result<()> {
        self.stream.write_all(plain)
    }

    /// The encrypted bytes for the peer.
    pub(super) fn drain(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.stream.get_mut().outgoing)
    }

    fn shake_hands(&mut self) -> Result<(), Answer> {
        match self.stream.connect() {
            Ok(()) => self.is_handshaking = false,
            Err(error) if error.code() == ErrorCode::WANT_READ => {}
            Err(error) => return Err(self.failed(&error)),
        }
        Ok(())
    }

    fn failed(&self, error: &ssl::Error) -> Answer {
        if self.stream.ssl().verify_result() != X509VerifyResult::OK {
            return Answer::Insufficient;
        }
        let Some(errors) = error.ssl_error() else {
            return Answer::Farewell;
        };
        let is_alert = errors
            .errors()
            .first()
            .is_some_and(|error| error.reason_code() >= FIRST_ALERT);
        match reason(errors) {
            _ if is_alert => Answer::Alert,
            "wrong version number" | "unexpected message" | "unexpected record" => Answer::Unexpected,
            "length mismatch" | "length too short" => Answer::Undecodable,
            "packet length too long" => Answer::Length,
            other => Answer::Failed(other.to_owned()),
        }
    }
}

fn context(setup: Setup) -> Result<SslContext, ErrorStack> {
    let mut context = SslContextBuilder::new(SslMethod::tls_client())?;
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_cipher_list(match setup {
        Setup::Key(_) => WITH_KEY,
        Setup::Anonymous => ANONYMOUS,
    })?;
    // A server that sends a certificate instead of using the key is refused, whatever the system-wide configuration of
    // OpenSSL allows.
    context.set_verify_callback(SslVerifyMode::PEER, |_, chain| {
        chain.set_error(X509VerifyResult::APPLICATION_VERIFICATION);
        false
    });
    context.set_options(SslOptions::NO_RENEGOTIATION);
    match setup {
        Setup::Key(key) => context.set_psk_client_callback(move |_, _, name, bytes| {
            // Length 0 means no key: the handshake fails.
            Ok(copy_key(&key, name, bytes).unwrap_or(0))
        }),
        // TLS 1.3 has no such ciphers.
        Setup::Anonymous => context.set_max_proto_version(Some(SslVersion::TLS1_2))?,
    }
    Ok(context.build())
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

/// `SSL_AD_REASON_OFFSET`: reasons from this number on are alerts of the peer.
const FIRST_ALERT: i32 = 1000;

fn reason(errors: &ErrorStack) -> &str {
    let first = errors.errors().first();
    first.and_then(|error| error.reason()).unwrap_or("unknown reason")
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
    use diskimage_testing::INSTEAD_OF_A_HANDSHAKE;

    use super::*;

    #[test]
    fn invalid_handshakes_have_the_messages_of_qemu_img() {
        let farewell: (&[u8], _) = (b"\x15\x03\x03\0\x02\x01\0", "Peer has terminated the connection");
        for (bytes, words) in INSTEAD_OF_A_HANDSHAKE.iter().chain(&[farewell]) {
            let mut session = Session::new(Setup::Anonymous).unwrap();
            let answer = session.feed(bytes).unwrap_err();
            let error = answer.error().expect("a failure");
            assert_eq!(error.chain(), format!("TLS handshake failed: {words}"));
        }
    }
}
