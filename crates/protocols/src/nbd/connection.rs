//! A connection to an export: requests from many threads, replies in any order.
//!
//! ```text
//!   callers --- one lock around the sending side ---> server
//!   callers <-- a channel each <-- one thread that reads all replies <--- server
//! ```
//!
//! A request is pending under its cookie until its reply is complete. An invalid reply, or the end of the connection,
//! fails all pending requests. No lock is held while a thread waits for a reply.

use std::collections::HashMap;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use diskimage_core::{ByteRange, Error, Result, errno, thread_builder, to_index};

use super::address::Socket;
use super::negotiate::{Export, ReplyMode};
use super::reply::{Assembly, Head, LONGEST_HEAD, Outcome, SHORTEST_HEAD, Step};
use super::request::{Command, encode};

/// Both directions of a connection.
pub(super) struct Channel {
    /// To shut the connection down.
    pub(super) socket: Socket,
    pub(super) reader: Box<dyn Read + Send>,
    pub(super) writer: Box<dyn Write + Send>,
}

/// The error of a request on a connection that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionLost;

/// A connection after the negotiation of an export.
pub(super) struct Connection {
    export: Export,
    socket: Socket,
    writer: Mutex<Box<dyn Write + Send>>,
    shared: Arc<Shared>,
    in_flight: AtomicUsize,
    thread: Option<JoinHandle<()>>,
}

/// The state shared by the callers and the reading thread.
#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next_cookie: u64,
    requests: HashMap<u64, PendingRequest>,
    lost: bool,
    /// Free buffers of earlier replies.
    buffers: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct PendingRequest {
    assembly: Assembly,
    answer: SyncSender<Outcome>,
}

/// How many free buffers are kept.
const MAX_BUFFERS: usize = 8;
/// The size of the read buffer; most reads are of heads.
const READ_AHEAD: usize = 64 << 10;

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails all pending requests and all later ones.
    fn fail_all(&self) {
        let mut waiting = self.waiting();
        waiting.lost = true;
        waiting.requests.clear();
    }
}

impl Connection {
    /// Takes over a channel after the handshake.
    pub(super) fn start(channel: Channel, export: Export) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let reader = Reader {
            from: BufReader::with_capacity(READ_AHEAD, channel.reader),
            socket: channel.socket.try_clone()?,
            shared: Arc::clone(&shared),
            reply_mode: export.reply_mode,
        };
        let thread = thread_builder()?
            .name("nbd".to_owned())
            .spawn(move || reader.run())?;
        Ok(Self {
            export,
            socket: channel.socket,
            writer: Mutex::new(channel.writer),
            shared,
            in_flight: AtomicUsize::new(0),
            thread: Some(thread),
        })
    }

    /// The negotiated export.
    pub(super) fn export(&self) -> &Export {
        &self.export
    }

    /// The number of requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether the connection is lost.
    pub(super) fn is_lost(&self) -> bool {
        self.shared.waiting().lost
    }

    /// Sends `command` for `range` and waits for the reply; `payload` is the data of a write.
    pub(super) fn call(
        &self,
        command: Command,
        range: ByteRange,
        payload: &[u8],
    ) -> std::result::Result<Outcome, ConnectionLost> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let outcome = self.exchange(command, range, payload);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        outcome
    }

    fn exchange(
        &self,
        command: Command,
        range: ByteRange,
        payload: &[u8],
    ) -> std::result::Result<Outcome, ConnectionLost> {
        let (answer, outcome) = sync_channel(1);
        let cookie = {
            let mut waiting = self.shared.waiting();
            if waiting.lost {
                return Err(ConnectionLost);
            }
            let mut data = Vec::new();
            if command == Command::Read {
                let Ok(len) = to_index(range.len()) else {
                    return Ok(Outcome::Refused(errno::ENOMEM));
                };
                data = waiting.buffers.pop().unwrap_or_default();
                data.resize(len, 0);
            }
            let assembly = Assembly::new(command, range, self.export.reply_mode, self.export.context, data);
            let cookie = waiting.next_cookie;
            waiting.next_cookie += 1;
            waiting
                .requests
                .insert(cookie, PendingRequest { assembly, answer });
            cookie
        };
        let head = encode(self.export.reply_mode, command, cookie, range);
        let sent = {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            write_both(&mut **writer, &head, payload)
        };
        if sent.is_err() {
            // The reading thread wakes up and fails the other requests.
            self.socket.shut_down();
            self.shared.fail_all();
            return Err(ConnectionLost);
        }
        outcome.recv().map_err(|_| ConnectionLost)
    }

    /// Keeps the buffer of a read for a later one.
    pub(super) fn release_buffer(&self, data: Vec<u8>) {
        let mut waiting = self.shared.waiting();
        if waiting.buffers.len() < MAX_BUFFERS {
            waiting.buffers.push(data);
        }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("export", &self.export)
            .finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let disconnect = encode(
            self.export.reply_mode,
            Command::Disconnect,
            0,
            ByteRange::new(0, 0),
        );
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Fails if the server has closed the connection already.
        let _ = writer.write_all(&disconnect);
        self.socket.shut_down();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends a head and its payload without copying them into one buffer.
fn write_both(writer: &mut dyn Write, head: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut parts = [IoSlice::new(head), IoSlice::new(payload)];
    let mut parts = &mut parts[..];
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match writer.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => IoSlice::advance_slices(&mut parts, len),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    writer.flush()
}

/// The state of the thread that reads all replies.
struct Reader {
    from: BufReader<Box<dyn Read + Send>>,
    socket: Socket,
    shared: Arc<Shared>,
    reply_mode: ReplyMode,
}

impl Reader {
    fn run(mut self) {
        while self.reply().is_ok() {}
        self.socket.shut_down();
        self.shared.fail_all();
    }

    /// Reads one reply or chunk. After an error the connection is lost.
    fn reply(&mut self) -> Result<()> {
        let mut head = [0; LONGEST_HEAD];
        self.from.read_exact(&mut head[..SHORTEST_HEAD])?;
        let len = Head::len_of(&head[..SHORTEST_HEAD], self.reply_mode)?;
        self.from.read_exact(&mut head[SHORTEST_HEAD..len])?;
        let head = Head::parse(&head[..len])?;
        let request = self.shared.waiting().requests.remove(&head.cookie);
        let mut request = request.ok_or_else(|| Error::corrupt("Protocol error: a reply to no request"))?;
        let done = match self.chunk(&mut request.assembly, head) {
            Ok(done) => done,
            Err(error) => {
                if error.errno().is_none() {
                    // A protocol violation by the server. The error of the connection itself would hide it.
                    let _ = request
                        .answer
                        .send(Outcome::Broken(errno::EINVAL, error.to_string()));
                }
                return Err(error);
            }
        };
        if done {
            // The caller holds the receiver until it gets an outcome, so this does not fail.
            let _ = request.answer.send(request.assembly.finish());
        } else {
            self.shared.waiting().requests.insert(head.cookie, request);
        }
        Ok(())
    }

    /// Reads what follows a head. Returns whether the reply is complete.
    fn chunk(&mut self, assembly: &mut Assembly, head: Head) -> Result<bool> {
        match assembly.step(head.kind)? {
            Step::Nothing { done } => Ok(done),
            Step::Data {
                len,
                offset_first,
                done,
            } => {
                let mut offset = assembly.range().start();
                if offset_first {
                    let mut bytes = [0; 8];
                    self.from.read_exact(&mut bytes)?;
                    offset = u64::from_be_bytes(bytes);
                }
                self.from.read_exact(assembly.destination(offset, len)?)?;
                Ok(done)
            }
            Step::Chunk { kind, len, done } => {
                let mut payload = vec![0; len];
                self.from.read_exact(&mut payload)?;
                assembly.chunk(kind, &payload)?;
                Ok(done)
            }
        }
    }
}
