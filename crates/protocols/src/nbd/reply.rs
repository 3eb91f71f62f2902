//! Replies, assembled from their chunks without I/O.
//!
//! A reply begins with a [`Head`], which has type and length of what follows. [`Assembly`] holds the part of one reply
//! that has been received. The server is not trusted: every length is checked against the request.

use diskimage_core::{ByteRange, Error, Result};

use super::negotiate::ReplyMode;
use super::request::Command;
use super::wire::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, Wire, chunk};

/// The length of the shortest head, which is enough to find out the length of any head.
pub(super) const SHORTEST_HEAD: usize = 16;
/// The longest head.
pub(super) const LONGEST_HEAD: usize = 32;

/// The head of a reply, or of one of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// The cookie of the request.
    pub(super) cookie: u64,
    pub(super) kind: HeadKind,
}

/// What follows a [`Head`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadKind {
    /// The data of a read, if the error number is 0.
    Simple { error: u32 },
    /// `len` bytes of a chunk of this type.
    Chunk { done: bool, kind: u16, len: u64 },
}

impl Head {
    /// The length of the head that begins with these [`SHORTEST_HEAD`] bytes.
    pub(super) fn len_of(start: &[u8], reply_mode: ReplyMode) -> Result<usize> {
        let magic = Wire(start).u32()?;
        match (reply_mode, magic) {
            (ReplyMode::Simple | ReplyMode::Structured, SIMPLE_REPLY_MAGIC) => Ok(16),
            (ReplyMode::Structured, CHUNK_MAGIC) => Ok(20),
            (ReplyMode::Extended, EXTENDED_CHUNK_MAGIC) => Ok(LONGEST_HEAD),
            _ => Err(Error::corrupt(format!("invalid magic of a reply: {magic:#x}"))),
        }
    }

    /// Parses a whole head.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut wire = Wire(bytes);
        if wire.u32()? == SIMPLE_REPLY_MAGIC {
            let error = wire.u32()?;
            let cookie = wire.u64()?;
            return Ok(Self {
                cookie,
                kind: HeadKind::Simple { error },
            });
        }
        let (flags, kind, cookie) = (wire.u16()?, wire.u16()?, wire.u64()?);
        let len = if bytes.len() == LONGEST_HEAD {
            // The request's offset, which is known from the cookie.
            wire.u64()?;
            wire.u64()?
        } else {
            u64::from(wire.u32()?)
        };
        let done = flags & chunk::DONE != 0;
        Ok(Self {
            cookie,
            kind: HeadKind::Chunk { done, kind, len },
        })
    }
}

/// A run of bytes of the same status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StatusExtent {
    pub(super) len: u64,
    pub(super) flags: u64,
}

/// The longest accepted chunk other than data: 128 Ki extents of 16 bytes, and an error message.
const MAX_CHUNK: u64 = (2 << 20) + (64 << 10);
/// The limit of separate ranges of a read that have been received out of order.
const MAX_FRAGMENTS: usize = 4096;

/// The received part of the reply to a request.
#[derive(Debug)]
pub(super) struct Assembly {
    command: Command,
    range: ByteRange,
    reply_mode: ReplyMode,
    context: Option<u32>,
    /// The data of a read.
    pub(super) data: Vec<u8>,
    /// The ranges whose data has been received, in ascending order, not adjacent.
    received: Vec<ByteRange>,
    status: Option<Vec<StatusExtent>>,
    error: Option<u32>,
}

/// How to read what follows a head.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing follows. `done`: whether the reply is complete.
    Nothing { done: bool },
    /// The next bytes are data for [`Assembly::destination`], preceded by their offset if `offset_first`.
    Data {
        len: u64,
        offset_first: bool,
        done: bool,
    },
    /// The next bytes are for [`Assembly::chunk`].
    Chunk { kind: u16, len: usize, done: bool },
}

impl Assembly {
    /// An empty reply to `command`. `data` has the length of the read.
    pub(super) fn new(
        command: Command,
        range: ByteRange,
        reply_mode: ReplyMode,
        context: Option<u32>,
        data: Vec<u8>,
    ) -> Self {
        Self {
            command,
            range,
            reply_mode,
            context,
            data,
            received: Vec::new(),
            status: None,
            error: None,
        }
    }

    /// The range of the request.
    pub(super) fn range(&self) -> ByteRange {
        self.range
    }

    /// How to read what follows a head of `kind`.
    pub(super) fn step(&mut self, kind: HeadKind) -> Result<Step> {
        match kind {
            HeadKind::Simple { error: 0 } if self.command == Command::Read => {
                if self.reply_mode != ReplyMode::Simple {
                    return Err(Error::corrupt(
                        "Protocol error: simple reply when structured reply chunk was expected",
                    ));
                }
                Ok(Step::Data {
                    len: self.range.len(),
                    offset_first: false,
                    done: true,
                })
            }
            HeadKind::Simple { error } => {
                self.note_error(error);
                Ok(Step::Nothing { done: true })
            }
            HeadKind::Chunk {
                done,
                kind: chunk::NONE,
                len,
            } => {
                if !done || len != 0 {
                    return Err(Error::corrupt("Protocol error: an empty chunk that is not"));
                }
                Ok(Step::Nothing { done })
            }
            HeadKind::Chunk {
                done,
                kind: chunk::OFFSET_DATA,
                len,
            } => {
                let data = len.checked_sub(8).filter(|data| *data > 0);
                let data = data.filter(|data| self.command == Command::Read && *data <= self.range.len());
                let len =
                    data.ok_or_else(|| Error::corrupt("Protocol error: data that was not asked for"))?;
                Ok(Step::Data {
                    len,
                    offset_first: true,
                    done,
                })
            }
            HeadKind::Chunk { done, kind, len } => {
                let len = usize::try_from(len)
                    .ok()
                    .filter(|_| len <= MAX_CHUNK)
                    .ok_or_else(|| Error::corrupt("Protocol error: a chunk that is too long"))?;
                Ok(Step::Chunk { kind, len, done })
            }
        }
    }

    /// The buffer for `len` bytes of data from `offset` of the export on, which is marked as received.
    pub(super) fn destination(&mut self, offset: u64, len: u64) -> Result<&mut [u8]> {
        let range = ByteRange::at(offset, len);
        if range.is_empty() || range.len() != len || range.intersect(self.range) != range {
            return Err(Error::corrupt("Protocol error: data outside what was asked for"));
        }
        self.mark_received(range)?;
        let from = usize::try_from(offset - self.range.start()).ok();
        let len = usize::try_from(len).ok();
        from.zip(len)
            .and_then(|(from, len)| self.data.get_mut(from..)?.get_mut(..len))
            .ok_or_else(|| Error::corrupt("Protocol error: data outside what was asked for"))
    }

    fn mark_received(&mut self, range: ByteRange) -> Result<()> {
        let at = self
            .received
            .partition_point(|piece| piece.end() <= range.start());
        if self.received.get(at).is_some_and(|next| next.overlaps(range)) {
            return Err(Error::corrupt("Protocol error: data that came twice"));
        }
        let before = at
            .checked_sub(1)
            .filter(|before| self.received[*before].end() == range.start());
        let after = self
            .received
            .get(at)
            .is_some_and(|next| next.start() == range.end());
        match (before, after) {
            (Some(before), false) => {
                self.received[before] = ByteRange::new(self.received[before].start(), range.end())
            }
            (None, true) => self.received[at] = ByteRange::new(range.start(), self.received[at].end()),
            (Some(before), true) => {
                self.received[before] =
                    ByteRange::new(self.received[before].start(), self.received[at].end());
                self.received.remove(at);
            }
            (None, false) if self.received.len() < MAX_FRAGMENTS => self.received.insert(at, range),
            (None, false) => return Err(Error::corrupt("Protocol error: data in too many pieces")),
        }
        Ok(())
    }

    /// Takes the payload of a chunk that is not data.
    pub(super) fn chunk(&mut self, kind: u16, payload: &[u8]) -> Result<()> {
        let mut wire = Wire(payload);
        match kind {
            chunk::OFFSET_HOLE if self.command == Command::Read => {
                let (offset, len) = (wire.u64()?, wire.u32()?);
                self.destination(offset, len.into())?.fill(0);
                Ok(())
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if self.command == Command::BlockStatus => {
                if (kind == chunk::BLOCK_STATUS_EXT) != (self.reply_mode == ReplyMode::Extended) {
                    return Err(Error::corrupt("Protocol error: block status in the wrong form"));
                }
                self.block_status(wire)
            }
            _ if kind & chunk::ERROR != 0 => {
                let (error, text) = (wire.u32()?, wire.u16()?);
                wire.take(text.into())?;
                if error == 0 {
                    return Err(Error::corrupt(
                        "Protocol error: server sent structured error chunk with error = 0",
                    ));
                }
                self.note_error(error);
                Ok(())
            }
            _ => Err(Error::corrupt(format!(
                "Protocol error: unexpected chunk of type {kind}"
            ))),
        }
    }

    fn block_status(&mut self, mut wire: Wire<'_>) -> Result<()> {
        if Some(wire.u32()?) != self.context {
            return Err(Error::corrupt(
                "Protocol error: unexpected context id for a block status chunk",
            ));
        }
        let wide = self.reply_mode == ReplyMode::Extended;
        if wide {
            let (count, there) = (wire.u32()?, wire.0.len() / 16);
            if u64::from(count) != there as u64 {
                return Err(Error::corrupt("Protocol error: block status with a wrong count"));
            }
        }
        let mut runs = Vec::new();
        let mut left = self.range.len();
        while !wire.0.is_empty() && left > 0 {
            let (len, flags) = if wide {
                (wire.u64()?, wire.u64()?)
            } else {
                (wire.u32()?.into(), wire.u32()?.into())
            };
            if len == 0 {
                return Err(Error::corrupt("Protocol error: server sent chunk of zero length"));
            }
            // The last extent may end beyond the range of the request.
            let len = len.min(left);
            left -= len;
            runs.push(StatusExtent { len, flags });
        }
        if runs.is_empty() || self.status.replace(runs).is_some() {
            return Err(Error::corrupt(
                "Protocol error: block status of another form than asked for",
            ));
        }
        Ok(())
    }

    fn note_error(&mut self, error: u32) {
        if error != 0 {
            self.error.get_or_insert(error);
        }
    }

    /// The outcome of the request, after the reply is complete.
    pub(super) fn finish(self) -> Outcome {
        if let Some(error) = self.error {
            return Outcome::Refused(system_error(error));
        }
        match self.command {
            Command::Read if self.received != [self.range] => broken("Protocol error: data is missing"),
            Command::Read => Outcome::Data(self.data),
            Command::BlockStatus => match self.status {
                Some(status) => Outcome::Status(status),
                None => broken("Protocol error: server did not reply with any status extents"),
            },
            _ => Outcome::Done,
        }
    }
}

/// The outcome of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Success without data.
    Done,
    /// The data of a read.
    Data(Vec<u8>),
    /// The status of the bytes from the start of the range on.
    Status(Vec<StatusExtent>),
    /// An error reply; the error number of the system.
    Refused(i32),
    /// An invalid reply: the error number to return, and the reason.
    Broken(i32, String),
}

fn broken(words: &str) -> Outcome {
    Outcome::Broken(diskimage_core::errno::EIO, words.to_owned())
}

/// The error number of Linux for one of the protocol. Those that the protocol defines are the same.
fn system_error(error: u32) -> i32 {
    match error {
        1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => error.cast_signed(),
        _ => diskimage_core::errno::EINVAL,
    }
}
