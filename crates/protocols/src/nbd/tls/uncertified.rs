//! TLS without certificates: with a pre-shared key, or anonymous.
//!
//! rustls has neither. The program `qemu-img-tls` has both, by OpenSSL, so that no other program has to load that library:
//! it gets the socket as standard input, and our end of a pair of sockets as standard output.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use diskimage_core::{Error, Result, ResultExt, name};

use super::super::address::Socket;
use super::super::connection::Channel;
use super::helper::{Answer, NamedKey, Setup};

/// How sessions are started.
#[derive(Clone, Debug)]
pub(super) struct Uncertified {
    program: PathBuf,
    setup: Setup,
}

/// Limits of OpenSSL: `PSK_MAX_PSK_LEN`, and `PSK_MAX_IDENTITY_LEN` with the byte that ends it.
const MAX_KEY: usize = 512;
const MAX_NAME: usize = 255;

impl Uncertified {
    /// Sessions with a peer that has the same key. `program` is the path of `qemu-img-tls`.
    ///
    /// # Errors
    /// A name or a key that is longer than the limit of OpenSSL, and no program.
    pub(super) fn with_key(program: Option<&Path>, key: NamedKey) -> Result<Self> {
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
        Self::new(program, Setup::Key(key), "TLS with pre-shared keys")
    }

    /// Anonymous sessions. `program` is the path of `qemu-img-tls`.
    ///
    /// # Errors
    /// No program.
    pub(super) fn anonymous(program: Option<&Path>) -> Result<Self> {
        Self::new(program, Setup::Anonymous, "TLS with anonymous credentials")
    }

    fn new(program: Option<&Path>, setup: Setup, what: &str) -> Result<Self> {
        let program = program.filter(|path| path.is_file()).ok_or_else(|| {
            Error::unsupported(format!(
                "{what} needs the program 'qemu-img-tls', which is not installed"
            ))
        })?;
        Ok(Self {
            program: program.to_owned(),
            setup,
        })
    }

    /// Encrypts a connection.
    ///
    /// # Errors
    /// `TLS handshake failed`, and a program that cannot be started.
    pub(super) fn secure(&self, socket: Socket) -> Result<Channel> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(&self.program)
            .stdin(OwnedFd::from(socket))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::null())
            // A key press that interrupts this program must not end the connection that its last requests need.
            .process_group(0)
            .spawn()
            .context(|| format!("Could not start '{}'", name::of_path(&self.program)))?;
        let session = HelperSession {
            stream: ours.try_clone()?,
            child,
        };
        self.setup.write(&ours)?;
        let answer = Answer::read(&ours).context(|| "TLS handshake failed".to_owned())?;
        match answer.error() {
            Some(error) => Err(error),
            None => Ok(Channel {
                reader: Box::new(session),
                writer: Box::new(ours.try_clone()?),
                socket: Socket::Unix(ours),
            }),
        }
    }
}

/// The plain side of a running helper. A drop ends the connection and the helper.
struct HelperSession {
    stream: UnixStream,
    child: Child,
}

impl Read for HelperSession {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return outcome,
            }
        }
    }
}

impl Drop for HelperSession {
    fn drop(&mut self) {
        // Then it ends by itself, soon. Neither can fail while it runs, and after that there is nothing left to do.
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.child.wait();
    }
}
