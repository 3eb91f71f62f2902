//! A server and the client options: everything that is needed to connect and to reconnect.

use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use diskimage_core::{Error, ErrorKind, Objects, Result};

use super::address::{Address, Socket};
use super::connection::{Channel, Connection};
use super::negotiate::{ClientOptions, Handshake, Next};
use super::options::NbdOptions;
#[cfg(feature = "tls")]
use super::tls::{Credentials, UNCLEAN_END};

/// A server, and the options for connecting to it.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) address: Address,
    pub(super) client_options: ClientOptions,
    #[cfg(feature = "tls")]
    credentials: Option<Credentials>,
    #[cfg(feature = "tls")]
    hostname: Option<String>,
}

/// The default metadata context.
const ALLOCATION: &str = "base:allocation";
/// The time between two attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

impl Remote {
    pub(super) fn new(options: &NbdOptions, objects: &Objects) -> Result<Self> {
        #[cfg(feature = "tls")]
        let credentials = match &options.tls_creds {
            Some(id) => Some(Credentials::load(objects.tls_creds(id)?)?),
            None => None,
        };
        #[cfg(not(feature = "tls"))]
        if let Some(id) = &options.tls_creds {
            objects.tls_creds(id)?;
            return Err(Error::unsupported("TLS is not available in this build"));
        }
        Ok(Self {
            address: options.address.clone(),
            client_options: ClientOptions {
                export: options.export.clone(),
                tls: options.tls_creds.is_some(),
                context: options.context.clone().unwrap_or_else(|| ALLOCATION.to_owned()),
            },
            #[cfg(feature = "tls")]
            credentials,
            #[cfg(feature = "tls")]
            hostname: options
                .tls_hostname
                .clone()
                .or_else(|| options.address.host().map(str::to_owned)),
        })
    }

    /// Connects and negotiates the export. Meanwhile `handle` has a clone of the socket, by which another thread can
    /// shut it down.
    ///
    /// # Errors
    /// Errors of connecting, of TLS and of the negotiation.
    pub(super) fn connect(&self, handle: &Mutex<Option<Socket>>) -> Result<Connection> {
        let socket = self.address.connect()?;
        let hold = |socket| *handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = socket;
        hold(Some(socket.try_clone()?));
        let outcome = self.negotiate(socket);
        hold(None);
        outcome
    }

    /// [`Remote::connect`], repeated for the time of `timeout` after errors of the operating system. An unknown export
    /// and other errors of the negotiation are not retried.
    pub(super) fn connect_within(&self, timeout: Duration) -> Result<Connection> {
        let start = Instant::now();
        loop {
            match self.connect(&Mutex::new(None)) {
                Err(error) if error.errno().is_some() && start.elapsed() + RETRY_PAUSE < timeout => {
                    thread::sleep(RETRY_PAUSE)
                }
                other => return other,
            }
        }
    }

    fn negotiate(&self, socket: Socket) -> Result<Connection> {
        let mut channel = plain(socket)?;
        let mut handshake = Handshake::new(self.client_options.clone());
        loop {
            // `wanted` is bounded by the longest accepted reply.
            let mut bytes = vec![0; handshake.wanted()];
            channel
                .reader
                .read_exact(&mut bytes)
                .map_err(|error| read_error(handshake.awaited(), error, handshake.is_encrypted()))?;
            let next = handshake.take(&bytes).inspect_err(|_| {
                // A courtesy to the server: failures are ignored.
                let _ = send(&mut channel, &handshake.abort());
            })?;
            send(&mut channel, &handshake.output())?;
            match next {
                Next::Read => {}
                Next::StartTls => {
                    channel = self.secure(channel)?;
                    handshake.secured();
                    match send(&mut channel, &handshake.output()) {
                        // A server that rejects the credentials closes the connection about now. As in qemu-img, the
                        // following read reports that.
                        Err(error) if matches!(error.errno(), Some(libc::EPIPE | libc::ECONNRESET)) => {}
                        other => other?,
                    }
                }
                Next::Done => return Connection::start(channel, handshake.finish()),
            }
        }
    }

    #[cfg(feature = "tls")]
    fn secure(&self, channel: Channel) -> Result<Channel> {
        match &self.credentials {
            Some(credentials) => credentials.secure(channel.socket, self.hostname.as_deref()),
            None => Err(Error::unsupported("TLS without credentials")),
        }
    }

    #[cfg(not(feature = "tls"))]
    fn secure(&self, _: Channel) -> Result<Channel> {
        Err(Error::unsupported("TLS is not available in this build"))
    }
}

/// A channel without encryption and without read-ahead: the bytes after the last plain one may be encrypted.
fn plain(socket: Socket) -> Result<Channel> {
    Ok(Channel {
        reader: Box::new(PlainStream(socket.try_clone()?)),
        writer: Box::new(PlainStream(socket.try_clone()?)),
        socket,
    })
}

fn send(channel: &mut Channel, bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    match channel
        .writer
        .write_all(bytes)
        .and_then(|()| channel.writer.flush())
    {
        Ok(()) => Ok(()),
        Err(error) => Err(Error::from(error).context("Failed to send option request")),
    }
}

fn read_error(what: &str, error: io::Error, encrypted: bool) -> Error {
    let reason = match error.kind() {
        io::ErrorKind::UnexpectedEof if !encrypted => {
            "Unexpected end-of-file before all data were read".to_owned()
        }
        #[cfg(feature = "tls")]
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset if encrypted => {
            format!("Cannot read from TLS channel: {UNCLEAN_END}")
        }
        _ => format!("Unable to read from socket: {}", Error::from(error)),
    };
    Error::new(ErrorKind::Io, reason).context(what)
}

/// A socket as an owned reader and writer.
struct PlainStream(Socket);

impl Read for PlainStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buf)
    }
}

impl Write for PlainStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&self.0).write(buf)
    }

    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        (&self.0).write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
