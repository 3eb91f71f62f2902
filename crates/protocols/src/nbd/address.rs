//! Addresses of servers, and connecting to them.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use diskimage_core::{Error, ErrorKind, Result, ResultExt, name};

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// The path of a Unix domain socket.
    Unix(String),
    /// Host and port of a TCP server.
    Inet(Inet),
}

/// Host and port of a TCP server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inet {
    pub(super) host: String,
    pub(super) port: String,
    /// Whether IPv4 addresses are allowed, if given.
    pub(super) ipv4: Option<bool>,
    /// Whether IPv6 addresses are allowed, if given.
    pub(super) ipv6: Option<bool>,
    /// Sets `SO_KEEPALIVE`.
    pub(super) keep_alive: bool,
}

/// The size of the path in `sockaddr_un`, including the terminating NUL.
const UNIX_PATH_MAX: usize = 108;

impl Address {
    /// Connects to the server.
    ///
    /// # Errors
    /// `address resolution failed for ...` and `Failed to connect to ...`.
    pub(super) fn connect(&self) -> Result<Socket> {
        match self {
            Self::Unix(path) => connect_unix(path),
            Self::Inet(inet) => inet.connect(),
        }
    }

    /// The host name, which the certificate of the server must match.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Self::Unix(_) => None,
            Self::Inet(inet) => Some(&inet.host),
        }
    }
}

fn connect_unix(path: &str) -> Result<Socket> {
    if name::len(path) > UNIX_PATH_MAX {
        return Err(Error::invalid(format!("UNIX socket path '{path}' is too long"))
            .hint(format!("Path must be less than {UNIX_PATH_MAX} bytes")));
    }
    let outcome = if path.is_empty() {
        // An empty path would be an unnamed socket; no server can listen there.
        Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
    } else {
        let path = name::to_path(path);
        retry(|| name::connect(&path))
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
                    // Nagle's algorithm would delay small requests.
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
            // The standard library adds a prefix.
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
        // `on` for one version alone excludes the other.
        mine.unwrap_or(other != Some(true))
    }
}

/// Repeats `call` while signals interrupt it.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// The socket of a connection.
#[derive(Debug)]
pub(super) enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix domain socket.
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

    /// Shuts the connection down. Blocked reads and writes return.
    pub(super) fn shut_down(&self) {
        // Fails only if the connection has already ended.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        match socket {
            Socket::Tcp(stream) => stream.into(),
            Socket::Unix(stream) => stream.into(),
        }
    }
}

impl io::Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // A signal does not end the read.
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
