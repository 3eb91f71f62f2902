//! A connection over a session of rustls, which itself neither reads nor writes the socket.
//!
//! ```text
//!   bytes ── write ──► session ── drain ──► socket
//!   bytes ◄── read ─── session ◄── feed ─── socket
//! ```
//!
//! The lock of the session is not held while a thread waits for the socket.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{Error, Result};

use super::super::address::Socket;
use super::super::connection::Channel;
use super::messages::{UNCLEAN_END, UNCLEAN_PUSH, handshake_failed};
use super::x509::CertifiedSession;

/// Runs the handshake with the peer of `socket`.
///
/// # Errors
/// `TLS handshake failed`, and errors of `session`.
pub(super) fn secure(socket: Socket, mut session: CertifiedSession) -> Result<Channel> {
    shake_hands(&mut session, &socket)?;
    let session = Arc::new(Mutex::new(session));
    let (reading, writing) = (socket.try_clone()?, socket.try_clone()?);
    Ok(Channel {
        socket,
        reader: Box::new(TlsReader {
            session: Arc::clone(&session),
            socket: reading,
            raw: vec![0; RAW],
            pending: 0..0,
        }),
        writer: Box::new(TlsWriter {
            session,
            socket: writing,
            raw: Vec::new(),
        }),
    })
}

/// How many encrypted bytes are read at once.
const RAW: usize = 64 << 10;

fn shake_hands(session: &mut CertifiedSession, mut line: &Socket) -> Result<()> {
    let mut raw = vec![0; RAW];
    let mut out = Vec::new();
    let mut was_answered = false;
    loop {
        out.clear();
        session.drain(&mut out)?;
        line.write_all(&out)
            .map_err(|error| broken_off(&error, was_answered))?;
        if !session.is_handshaking() {
            return Ok(());
        }
        let len = line
            .read(&mut raw)
            .map_err(|error| broken_off(&error, was_answered))?;
        if len == 0 {
            return Err(broken_off(&io::ErrorKind::UnexpectedEof.into(), was_answered));
        }
        was_answered = true;
        let mut rest = &raw[..len];
        while !rest.is_empty() {
            match session.feed(rest) {
                Ok(taken) => rest = &rest[taken..],
                Err(error) => {
                    // Send the alert.
                    out.clear();
                    session.drain(&mut out)?;
                    let _ = line.write_all(&out);
                    return Err(error);
                }
            }
        }
    }
}

/// The error of a connection that ends during the handshake. `qemu-img` replies to the first message of the server at
/// once, so after that it is a write that fails.
fn broken_off(error: &io::Error, was_answered: bool) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            handshake_failed(if was_answered { UNCLEAN_PUSH } else { UNCLEAN_END })
        }
        _ => handshake_failed(&error.to_string()),
    }
}

fn lock(session: &Mutex<CertifiedSession>) -> MutexGuard<'_, CertifiedSession> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The receiving side.
struct TlsReader {
    session: Arc<Mutex<CertifiedSession>>,
    socket: Socket,
    raw: Vec<u8>,
    /// The part of `raw` that has not been decrypted yet.
    pending: std::ops::Range<usize>,
}

impl Read for TlsReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut session = lock(&self.session);
                match session.read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                if !self.pending.is_empty() {
                    let taken = session
                        .feed(&self.raw[self.pending.clone()])
                        .map_err(|error| io::Error::other(error.chain()))?;
                    self.pending.start += taken;
                    continue;
                }
            }
            // The session is not locked while this waits for the server.
            let len = (&self.socket).read(&mut self.raw)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.pending = 0..len;
        }
    }
}

/// The sending side. Messages of the session itself, such as key updates, are sent with the next request.
struct TlsWriter {
    session: Arc<Mutex<CertifiedSession>>,
    socket: Socket,
    raw: Vec<u8>,
}

impl Write for TlsWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.raw.clear();
        let taken = {
            let mut session = lock(&self.session);
            let taken = session.write(buf)?;
            session.drain(&mut self.raw)?;
            taken
        };
        (&self.socket).write_all(&self.raw)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
