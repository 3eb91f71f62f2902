//! A small server in this process, for tests: an export in memory, and rules by which it misbehaves.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use diskimage_core::{NodeOptions, Objects, Result};

use super::super::Nbd;

/// How a server misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Closes the connection instead of replying to the n-th request.
    VanishAt(usize),
    /// Replies to the n-th request with this error.
    FailAt(usize, u32),
    /// Replies to the n-th request with these bytes, and continues.
    Rubbish(usize, &'static [u8]),
    /// Does not reply in the handshake of any connection but the first.
    OnlyOne,
}

/// The behaviour of a server.
#[derive(Clone, Debug)]
pub(super) struct Behaviour {
    pub(super) len: u64,
    pub(super) flags: u16,
    pub(super) extended: bool,
    pub(super) structured: bool,
    pub(super) min_block: u32,
    pub(super) max_block: u32,
    pub(super) rule: Option<Rule>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            len: 1 << 20,
            // All features that the client uses.
            flags: 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 11,
            extended: true,
            structured: true,
            min_block: 1,
            max_block: 1 << 16,
            rule: None,
        }
    }
}

/// A server, which listens until it is dropped.
pub(super) struct Server {
    dir: tempfile::TempDir,
    shared: Arc<Shared>,
}

struct Shared {
    behaviour: Behaviour,
    bytes: Mutex<Vec<u8>>,
    requests: AtomicUsize,
    connections: AtomicUsize,
    /// The number of requests of each kind.
    kinds: Mutex<HashMap<u16, usize>>,
}

impl Server {
    pub(super) fn start(behaviour: Behaviour) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let shared = Arc::new(Shared {
            bytes: Mutex::new(vec![0; usize::try_from(behaviour.len).unwrap()]),
            behaviour,
            requests: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            kinds: Mutex::default(),
        });
        let server = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let server = Arc::clone(&server);
                thread::spawn(move || server.serve(&stream));
            }
        });
        Self { dir, shared }
    }

    pub(super) fn options(&self) -> NodeOptions {
        let mut options = NodeOptions::new();
        options.set("path", self.dir.path().join("s").to_str().unwrap());
        options
    }

    pub(super) fn open(&self) -> Result<Nbd> {
        Nbd::open(&mut self.options(), true, &Objects::new())
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.shared.bytes.lock().unwrap().clone()
    }

    pub(super) fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }

    pub(super) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, kind: u16) -> usize {
        self.shared.kinds.lock().unwrap().get(&kind).copied().unwrap_or(0)
    }
}

impl Shared {
    fn serve(&self, stream: &UnixStream) {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        if self.behaviour.rule == Some(Rule::OnlyOne) && number > 0 {
            // Until the client disconnects.
            let _ = io::copy(&mut &*stream, &mut io::sink());
            return;
        }
        // Ends when the client disconnects.
        if let Ok(true) = self.negotiate(stream) {
            let _ = self.answer_all(stream);
        }
    }

    fn negotiate(&self, mut stream: &UnixStream) -> io::Result<bool> {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        read_exact(stream, 4)?;
        loop {
            let head = read_exact(stream, 16)?;
            let option = u32_at(&head, 8);
            let data = read_exact(stream, usize::try_from(u32_at(&head, 12)).unwrap())?;
            match option {
                11 if self.behaviour.extended => reply(stream, option, 1, &[])?,
                8 if self.behaviour.structured => reply(stream, option, 1, &[])?,
                10 => {
                    reply(stream, option, 4, b"\0\0\0\x07base:allocation")?;
                    reply(stream, option, 1, &[])?;
                }
                7 => {
                    assert_eq!(u32_at(&data, 0), 0, "the default export");
                    let mut sizes = vec![0, 3];
                    for size in [
                        self.behaviour.min_block,
                        self.behaviour.min_block,
                        self.behaviour.max_block,
                    ] {
                        sizes.extend(size.to_be_bytes());
                    }
                    reply(stream, option, 3, &sizes)?;
                    let mut export = vec![0, 0];
                    export.extend(self.behaviour.len.to_be_bytes());
                    export.extend(self.behaviour.flags.to_be_bytes());
                    reply(stream, option, 3, &export)?;
                    reply(stream, option, 1, &[])?;
                    return Ok(true);
                }
                2 => {
                    reply(stream, option, 1, &[])?;
                    return Ok(false);
                }
                _ => reply(stream, option, 1 << 31 | 1, &[])?,
            }
        }
    }

    fn answer_all(&self, mut stream: &UnixStream) -> io::Result<()> {
        loop {
            let extended = self.behaviour.extended;
            let head = read_exact(stream, if extended { 32 } else { 28 })?;
            let (kind, cookie, offset) = (u16_at(&head, 6), &head[8..16], u64_at(&head, 16));
            let len = if extended {
                u64_at(&head, 24)
            } else {
                u32_at(&head, 24).into()
            };
            let payload = match kind {
                1 => read_exact(stream, usize::try_from(len).unwrap())?,
                2 => return Ok(()),
                _ => Vec::new(),
            };
            let number = self.requests.fetch_add(1, Ordering::Relaxed);
            *self.kinds.lock().unwrap().entry(kind).or_default() += 1;
            assert_eq!(offset % u64::from(self.behaviour.min_block), 0, "aligned");
            let to_the_end = kind < 2 && offset + len == self.behaviour.len;
            assert!(
                to_the_end || len.is_multiple_of(self.behaviour.min_block.into()),
                "aligned"
            );
            if kind < 2 {
                assert!(len <= self.behaviour.max_block.into(), "no longer than allowed");
            }
            let mut error = 0;
            match self.behaviour.rule {
                Some(Rule::VanishAt(n)) if n == number => return stream.shutdown(std::net::Shutdown::Both),
                Some(Rule::FailAt(n, number_of_error)) if n == number => error = number_of_error,
                Some(Rule::Rubbish(n, bytes)) if n == number => {
                    stream.write_all(bytes)?;
                    continue;
                }
                _ => {}
            }
            if error != 0 {
                self.refuse(stream, cookie, error)?;
                continue;
            }
            self.carry_out(stream, cookie, (kind, offset, len), &payload)?;
        }
    }

    fn carry_out(
        &self,
        stream: &UnixStream,
        cookie: &[u8],
        (kind, offset, len): (u16, u64, u64),
        payload: &[u8],
    ) -> io::Result<()> {
        let range = || {
            let from = usize::try_from(offset).unwrap();
            from..from + usize::try_from(len).unwrap()
        };
        match kind {
            0 => {
                let data = self.bytes.lock().unwrap()[range()].to_vec();
                if !self.behaviour.structured {
                    return send(stream, &[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], cookie, &data]);
                }
                let (first, second) = data.split_at(data.len() / 2);
                // The second half before the first.
                let middle = offset + first.len() as u64;
                self.chunk(stream, cookie, 0, 1, &[&middle.to_be_bytes(), second])?;
                if first.is_empty() {
                    return self.chunk(stream, cookie, 1, 0, &[]);
                }
                self.chunk(stream, cookie, 1, 1, &[&offset.to_be_bytes(), first])
            }
            7 => {
                let bytes = self.bytes.lock().unwrap();
                let mut runs = Vec::new();
                let mut count = 0_u32;
                for block in bytes[range()].chunks(4096) {
                    let flags = if block.iter().all(|byte| *byte == 0) { 3 } else { 0 };
                    if self.behaviour.extended {
                        runs.extend((block.len() as u64).to_be_bytes());
                        runs.extend(u64::to_be_bytes(flags));
                    } else {
                        runs.extend(u32::try_from(block.len()).unwrap().to_be_bytes());
                        runs.extend(u32::try_from(flags).unwrap().to_be_bytes());
                    }
                    count += 1;
                }
                if self.behaviour.extended {
                    self.chunk(
                        stream,
                        cookie,
                        1,
                        6,
                        &[&7_u32.to_be_bytes(), &count.to_be_bytes(), &runs],
                    )
                } else {
                    self.chunk(stream, cookie, 1, 5, &[&7_u32.to_be_bytes(), &runs])
                }
            }
            _ => {
                match kind {
                    1 => self.bytes.lock().unwrap()[range()].copy_from_slice(payload),
                    4 | 6 => self.bytes.lock().unwrap()[range()].fill(0),
                    _ => {}
                }
                if self.behaviour.structured {
                    self.chunk(stream, cookie, 1, 0, &[])
                } else {
                    send(stream, &[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], cookie])
                }
            }
        }
    }

    fn refuse(&self, stream: &UnixStream, cookie: &[u8], error: u32) -> io::Result<()> {
        if self.behaviour.structured {
            self.chunk(stream, cookie, 1, 0x8001, &[&error.to_be_bytes(), &[0, 2], b"no"])
        } else {
            send(stream, &[&[0x67, 0x44, 0x66, 0x98], &error.to_be_bytes(), cookie])
        }
    }

    fn chunk(
        &self,
        stream: &UnixStream,
        cookie: &[u8],
        flags: u16,
        kind: u16,
        parts: &[&[u8]],
    ) -> io::Result<()> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let mut head = Vec::new();
        if self.behaviour.extended {
            head.extend([0x6e, 0x8a, 0x27, 0x8c]);
        } else {
            head.extend([0x66, 0x8e, 0x33, 0xef]);
        }
        head.extend(flags.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(cookie);
        if self.behaviour.extended {
            head.extend([0; 8]);
            head.extend((len as u64).to_be_bytes());
        } else {
            head.extend(u32::try_from(len).unwrap().to_be_bytes());
        }
        for part in parts {
            head.extend(*part);
        }
        send(stream, &[&head])
    }
}

fn send(mut stream: &UnixStream, parts: &[&[u8]]) -> io::Result<()> {
    stream.write_all(&parts.concat())
}

fn reply(stream: &UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let len = u32::try_from(data.len()).unwrap();
    send(
        stream,
        &[
            &0x0003_e889_0455_65a9_u64.to_be_bytes(),
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
            &len.to_be_bytes(),
            data,
        ],
    )
}

fn read_exact(mut stream: &UnixStream, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}
