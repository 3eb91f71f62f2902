//! Where a server listens, and getting through to it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;

use diskimage_core::{Error, ErrorKind, Result, ResultExt};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// A socket in the file system.
    Unix(String),
    /// A port of a host.
    Inet(Inet),
}

/// A port of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inet {
    pub(super) host: String,
    pub(super) port: String,
    /// Whether addresses of the old kind are taken, if said.
    pub(super) ipv4: Option<bool>,
    /// Whether addresses of the new kind are taken, if said.
    pub(super) ipv6: Option<bool>,
    /// The system looks whether the other side is still there.
    pub(super) keep_alive: bool,
}

/// The longest path that a socket's address has room for, and the byte that ends it.
const UNIX_PATH_MAX: usize = 108;

impl Address {
    /// Connects to the server.
    ///
    /// # Errors
    /// Names that nobody knows, and `Failed to connect to ...`.
    pub(super) fn connect(&self) -> Result<Socket> {
        match self {
            Self::Unix(path) => connect_unix(path),
            Self::Inet(inet) => inet.connect(),
        }
    }

    /// The name of the host, to look for in its certificate.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Self::Unix(_) => None,
            Self::Inet(inet) => Some(&inet.host),
        }
    }
}

fn connect_unix(path: &str) -> Result<Socket> {
    if path.len() > UNIX_PATH_MAX {
        return Err(Error::invalid(format!("UNIX socket path '{path}' is too long"))
            .hint(format!("Path must be less than {UNIX_PATH_MAX} bytes")));
    }
    let outcome = if path.is_empty() {
        // The address without a name, at which nobody listens.
        Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
    } else {
        retry(|| UnixStream::connect(path))
    };
    outcome
        .map(Socket::Unix)
        .context(|| format!("Failed to connect to '{path}'"))
}

impl Inet {
    fn connect(&self) -> Result<Socket> {
        let mut last = None;
        for address in self.resolve()? {
            match TcpStream::connect(address) {
                Ok(stream) => {
                    // Small requests are not to wait for each other.
                    stream.set_nodelay(true)?;
                    if self.keep_alive {
                        rustix::net::sockopt::set_socket_keepalive(&stream, true).map_err(io::Error::from)?;
                    }
                    return Ok(Socket::Tcp(stream));
                }
                Err(error) => last = Some(error),
            }
        }
        let error = last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
        Err(error).context(|| format!("Failed to connect to '{}:{}'", self.host, self.port))
    }

    fn resolve(&self) -> Result<Vec<SocketAddr>> {
        let failed = |reason: &str| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "address resolution failed for {}:{}: {reason}",
                    self.host, self.port
                ),
            )
        };
        if self.ipv4 == Some(false) && self.ipv6 == Some(false) {
            return Err(Error::invalid("Cannot disable IPv4 and IPv6 at same time"));
        }
        let port: u64 = self
            .port
            .parse()
            .map_err(|_| failed("Servname not supported for ai_socktype"))?;
        // As the system's own resolver takes numbers.
        let port = (port & 0xffff) as u16;
        if self.host.is_empty() {
            return Err(failed("Name or service not known"));
        }
        let all = (self.host.as_str(), port).to_socket_addrs().map_err(|error| {
            let text = error.to_string();
            // The standard library puts words of its own in front.
            failed(text.rsplit_once(": ").map_or(text.as_str(), |(_, reason)| reason))
        })?;
        let wanted: Vec<_> = all.filter(|address| self.takes(address)).collect();
        if wanted.is_empty() {
            return Err(failed("Address family for hostname not supported"));
        }
        Ok(wanted)
    }

    fn takes(&self, address: &SocketAddr) -> bool {
        let (mine, other) = if address.is_ipv4() {
            (self.ipv4, self.ipv6)
        } else {
            (self.ipv6, self.ipv4)
        };
        // Asking for one kind alone leaves the other out.
        mine.unwrap_or(other != Some(true))
    }
}

/// Does it again as long as signals interrupt it.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// A connection to a server, as the system has it.
#[derive(Debug)]
pub(super) enum Socket {
    /// Through the network.
    Tcp(TcpStream),
    /// On this machine.
    Unix(UnixStream),
}

impl Socket {
    /// A second handle for the same connection.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// Ends the connection: whoever waits for the other side wakes up.
    pub(super) fn shut_down(&self) {
        // One that has ended already is just as good.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl io::Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // A signal does not end the waiting.
        retry(|| match self {
            Socket::Tcp(stream) => (&mut &*stream).read(buf),
            Socket::Unix(stream) => (&mut &*stream).read(buf),
        })
    }
}

impl io::Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&mut &*stream).write(buf),
            Socket::Unix(stream) => (&mut &*stream).write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&mut &*stream).write_vectored(bufs),
            Socket::Unix(stream) => (&mut &*stream).write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
