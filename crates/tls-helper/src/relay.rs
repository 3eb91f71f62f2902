//! The bytes between the two sockets.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::session::Session;
use super::{CHUNK, read};

/// Bytes on their way in one direction. No more are read while these wait.
const FULL: usize = 256 << 10;
/// How long the last requests may take to leave after `qemu-img` has ended the connection.
const LINGER: Duration = Duration::from_secs(1);

/// Moves bytes until either side ends.
///
/// # Errors
/// Those of both sockets and of the session.
pub(super) fn run(session: &mut Session, server: &File, client: &File) -> io::Result<()> {
    for socket in [server, client] {
        rustix::io::ioctl_fionbio(socket, true)?;
    }
    let mut to_server = Outgoing::default();
    let mut to_client = Outgoing::default();
    let mut chunk = vec![0; CHUNK];
    let mut ends = None;
    // What came with the end of the handshake.
    session.read_all(&mut to_client.bytes)?;
    loop {
        to_server.bytes.append(&mut session.drain());
        let wanted = |incoming: bool, outgoing: &Outgoing| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, incoming);
            flags.set(PollFlags::OUT, !outgoing.is_empty());
            flags
        };
        let mut ready = [
            PollFd::new(server, wanted(to_client.len() < FULL, &to_server)),
            PollFd::new(
                client,
                wanted(ends.is_none() && to_server.len() < FULL, &to_client),
            ),
        ];
        let wait = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        match poll(&mut ready, ends.is_some().then_some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let readable = ready.map(|each| {
            each.revents()
                .intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
        });
        if readable[0] && to_client.len() < FULL {
            match try_read(server, &mut chunk)? {
                Some(0) => return to_client.finish(client),
                Some(len) => {
                    let fed = session.feed(&chunk[..len]).is_ok();
                    let is_open = fed && session.read_all(&mut to_client.bytes)?;
                    if !is_open {
                        return to_client.finish(client);
                    }
                }
                None => {}
            }
        }
        if readable[1] && ends.is_none() && to_server.len() < FULL {
            match try_read(client, &mut chunk)? {
                Some(0) => ends = Some(Instant::now() + LINGER),
                Some(len) => {
                    session.write_all(&chunk[..len])?;
                    to_server.bytes.append(&mut session.drain());
                }
                None => {}
            }
        }
        to_server.send(server)?;
        if ends.is_none() {
            to_client.send(client)?;
        }
        if ends.is_some_and(|end| to_server.is_empty() || Instant::now() >= end) {
            return Ok(());
        }
    }
}

/// `None` if there is nothing to read now.
fn try_read(from: &File, chunk: &mut [u8]) -> io::Result<Option<usize>> {
    match read(from, chunk) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Bytes for one side; those before `sent` have left.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends what the socket takes now.
    fn send(&mut self, mut to: &File) -> io::Result<()> {
        while !self.is_empty() {
            match to.write(&self.bytes[self.sent..]) {
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }

    /// Sends everything, since the other side has ended.
    fn finish(&mut self, to: &File) -> io::Result<()> {
        rustix::io::ioctl_fionbio(to, false)?;
        self.send(to)
    }
}
