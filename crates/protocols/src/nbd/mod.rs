//! Exports of NBD servers (network block devices).
//!
//! ```text
//!   Nbd            a Device: splits and aligns requests, caches the block status
//!    └ ConnectionPool    one connection, or several
//!       └ Connection     requests from many threads, one thread that reads the replies
//!          ├ request, reply    their encoding; no I/O
//!          └ Remote            connects: address, then negotiate (no I/O), then tls
//! ```
//!
//! Servers are not trusted: lengths are checked before use, control characters are removed from texts, and the
//! connection is closed after a protocol violation.

mod address;
mod connection;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod negotiate;
mod options;
mod pool;
mod remote;
mod reply;
mod request;
mod status;
#[cfg(test)]
mod tests;
#[cfg(feature = "tls")]
mod tls;
mod uri;
mod wire;

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, Limits, Node, NodeOptions, Objects, Preallocation, Result,
    ResultExt, StatusDetail, ZeroMode, align_down, errno, to_index,
};

use crate::protocol::{Protocol, ProtocolRequest};
use connection::Connection;
use negotiate::{Export, ReplyMode};
use options::NbdOptions;
use pool::ConnectionPool;
use remote::Remote;
use reply::Outcome;
use request::{Command, MAX_SHORT_LEN};
use status::{StatusCache, kind_of};
#[cfg(feature = "tls")]
pub use tls::{check_tls_creds, helper as tls_helper};
use wire::export;

/// The entry in the table of protocols.
#[derive(Debug)]
pub(crate) struct NbdProtocol;

/// Exports of NBD servers.
pub(crate) static NBD: NbdProtocol = NbdProtocol;

impl Protocol for NbdProtocol {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn prefixes(&self) -> &'static [&'static str] {
        &["nbd", "nbd+tcp", "nbd+unix"]
    }

    fn parse(&self, name: &str) -> Result<NodeOptions> {
        uri::parse(name)
    }

    fn open(&self, request: ProtocolRequest<'_>) -> Result<Arc<dyn Device>> {
        Ok(Arc::new(Nbd::open(
            request.options,
            request.write,
            &request.context.objects,
        )?))
    }
}

/// Checks credentials and their files before they are used for a connection.
///
/// # Errors
/// Always: this build has no TLS.
#[cfg(not(feature = "tls"))]
pub fn check_tls_creds(_: &diskimage_core::TlsCreds) -> Result<()> {
    Err(Error::unsupported("TLS is not available in this build"))
}

/// An export of an NBD server.
#[derive(Debug)]
struct Nbd {
    connections: ConnectionPool,
    export: Export,
    limits: Limits,
    write: bool,
    node: Node,
    statuses: StatusCache,
    /// Whether the status of a run is its depth in the backing chain of the server's image.
    reports_depth: bool,
    /// Held while a partly written block is read, modified and written.
    partial: Mutex<()>,
}

/// The useful number of requests in flight.
const PARALLELISM: u32 = 16;
/// The longest range of a request without data if lengths have 64 bits.
const MAX_LONG_LEN: u64 = 1 << 40;

impl Nbd {
    /// Connects to the export that `options` name, and takes the options of the driver.
    ///
    /// # Errors
    /// Invalid options, errors of connecting and negotiating, and a read-only export that is opened for writing.
    fn open(options: &mut NodeOptions, write: bool, objects: &Objects) -> Result<Self> {
        let options = NbdOptions::take(options)?;
        let remote = Remote::new(&options, objects)?;
        let node = options.node();
        let connection = remote.connect_within(options.open_timeout)?;
        let export = connection.export().clone();
        if options.context.is_some() && export.context.is_none() {
            return Err(Error::from_errno(errno::EINVAL)).context(|| OPEN);
        }
        if write && export.flags & export::READ_ONLY != 0 {
            return Err(Error::from_errno(libc::EACCES)).context(|| OPEN);
        }
        let limits = Limits {
            alignment: export.min_block,
            max_transfer: export.max_block,
            parallelism: PARALLELISM,
            fixed_len_message: "Cannot grow NBD nodes",
        };
        Ok(Self {
            connections: ConnectionPool::new(remote, connection, options.reconnect_delay),
            export,
            limits,
            write,
            node,
            statuses: StatusCache::default(),
            reports_depth: options.context.as_deref() == Some(ALLOCATION_DEPTH),
            partial: Mutex::new(()),
        })
    }

    fn unit(&self) -> u64 {
        self.export.min_block.into()
    }

    /// The whole blocks around `range`. The last block ends with the export: a server that does not accept a request
    /// for a partial block there returns an error.
    fn blocks(&self, range: ByteRange) -> ByteRange {
        let whole = range.align_out(self.unit());
        whole.intersect(ByteRange::new(0, self.export.len))
    }

    /// The end of the last whole block.
    fn whole_end(&self) -> u64 {
        align_down(self.export.len, self.unit())
    }

    /// Sends a command, again over another connection if one is lost and can be replaced. `take` converts the outcome;
    /// `None` means that it is not one of this command.
    fn call<T>(
        &self,
        command: Command,
        range: ByteRange,
        payload: &[u8],
        take: impl FnOnce(&Outcome) -> Option<T>,
    ) -> Result<T> {
        loop {
            let Some(connection) = self.connections.pick() else {
                self.reconnect(None)?;
                continue;
            };
            let Ok(outcome) = connection.call(command, range, payload) else {
                self.reconnect(Some(&connection))?;
                continue;
            };
            let error = match &outcome {
                Outcome::Refused(number) => Error::from_errno(*number),
                Outcome::Broken(number, reason) => Error::from_errno(*number).hint(reason.clone()),
                good => {
                    let taken = take(good);
                    if let Outcome::Data(data) = outcome {
                        connection.release_buffer(data);
                    }
                    return taken.ok_or_else(|| Error::from_errno(errno::EIO));
                }
            };
            return Err(error);
        }
    }

    fn reconnect(&self, lost: Option<&Arc<Connection>>) -> Result<()> {
        if self.connections.replace(lost) {
            Ok(())
        } else {
            Err(Error::from_errno(errno::EIO))
        }
    }

    /// [`Nbd::call`] for commands whose reply has no data.
    fn send_command(&self, command: Command, range: ByteRange, payload: &[u8]) -> Result<()> {
        self.call(command, range, payload, |outcome| {
            (*outcome == Outcome::Done).then_some(())
        })
    }

    /// Reads whole blocks with one request.
    fn read_chunk(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        self.call(Command::Read, range, &[], |outcome| match outcome {
            Outcome::Data(data) if data.len() == buf.len() => {
                buf.copy_from_slice(data);
                Some(())
            }
            _ => None,
        })
    }

    fn read_blocks(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut at = offset;
        for chunk in buf.chunks_mut(self.max_data_len()) {
            self.read_chunk(chunk, at)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    fn write_blocks(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut at = offset;
        for chunk in buf.chunks(self.max_data_len()) {
            self.send_command(Command::Write, ByteRange::at(at, chunk.len() as u64), chunk)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// The longest request that carries data; a multiple of the unit.
    fn max_data_len(&self) -> usize {
        self.export.max_block as usize
    }

    /// Writes parts of blocks: reads the whole blocks, modifies and writes them.
    fn write_partly(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        let _alone = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = self.blocks(range);
        let mut bytes = vec![0; to_index(whole.len())?];
        self.read_blocks(&mut bytes, whole.start())?;
        let from = to_index(range.start() - whole.start())?;
        bytes[from..from + buf.len()].copy_from_slice(buf);
        self.write_blocks(&bytes, whole.start())
    }

    /// Sends `command` for the blocks of `range`, in chunks that the server accepts.
    fn command_in_chunks(&self, command: Command, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let chunk = rest.first(self.max_range_len());
            self.send_command(command, chunk, &[])?;
            rest = rest.skip(chunk.len());
        }
        Ok(())
    }

    /// The longest request that carries no data.
    fn max_range_len(&self) -> u64 {
        match self.export.reply_mode {
            ReplyMode::Extended => MAX_LONG_LEN,
            ReplyMode::Simple | ReplyMode::Structured => align_down(MAX_SHORT_LEN, self.unit()),
        }
    }

    /// Sends zeroes as bytes.
    fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        (self as &dyn Device).write_zero_bytes(range)
    }

    fn require_writable(&self) -> Result<()> {
        if self.write {
            Ok(())
        } else {
            Err(Error::from_errno(libc::EBADF))
        }
    }

    /// `len` bytes from `offset` on, if they lie inside the export.
    fn check_range(&self, offset: u64, len: u64) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(ByteRange::new(offset, end)),
            _ => Err(Error::from_errno(errno::EIO)),
        }
    }

    fn supports(&self, flag: u16) -> bool {
        self.export.flags & flag != 0
    }
}

impl Device for Nbd {
    fn len(&self) -> u64 {
        self.export.len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = self.check_range(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let whole = self.blocks(range);
        if whole == range {
            return self.read_blocks(buf, offset);
        }
        let mut bytes = vec![0; to_index(whole.len())?];
        self.read_blocks(&mut bytes, whole.start())?;
        let from = to_index(range.start() - whole.start())?;
        buf.copy_from_slice(&bytes[from..from + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.require_writable()?;
        let range = self.check_range(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        self.statuses.invalidate();
        let outcome = if self.blocks(range) == range {
            self.write_blocks(buf, offset)
        } else {
            self.write_partly(buf, range)
        };
        self.statuses.invalidate();
        outcome
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_writable()?;
        let range = self.check_range(range.start(), range.len())?;
        let fast = mode == ZeroMode::FastOnly;
        let middle = range.align_in(self.unit());
        let can = self.supports(export::WRITE_ZEROES) && (!fast || self.supports(export::FAST_ZERO));
        if !can {
            if fast {
                return Err(not_fast());
            }
            return self.write_zero_bytes(range);
        }
        if fast && middle != range {
            return Err(not_fast());
        }
        self.statuses.invalidate();
        let command = Command::WriteZeroes {
            no_hole: mode == ZeroMode::KeepAllocated,
            fast,
        };
        let outcome = self.command_in_chunks(command, middle);
        self.statuses.invalidate();
        match outcome {
            Err(error) if fast && error.errno() == Some(libc::ENOTSUP) => return Err(not_fast()),
            other => other?,
        }
        if middle.is_empty() {
            return self.write_zero_bytes(range);
        }
        self.write_zero_bytes(ByteRange::new(range.start(), middle.start()))?;
        self.write_zero_bytes(ByteRange::new(middle.end(), range.end()))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.require_writable()?;
        let range = self
            .check_range(range.start(), range.len())?
            .align_in(self.unit());
        if !self.supports(export::TRIM) {
            return Ok(());
        }
        self.statuses.invalidate();
        let outcome = self.command_in_chunks(Command::Trim, range);
        self.statuses.invalidate();
        outcome
    }

    fn status(&self, range: ByteRange, _: StatusDetail) -> Result<Extent> {
        let asked = range
            .align_out(self.unit())
            .intersect(ByteRange::new(0, self.whole_end()));
        // Servers accept no status request for less than a block.
        if self.export.context.is_none() || asked.is_empty() {
            return Ok(extent(range.len(), 0));
        }
        let (len, flags) = self.statuses.find(asked, || {
            // Asks about the whole rest, since the next calls will be about what follows.
            let rest = ByteRange::new(asked.start(), self.whole_end()).first(self.max_range_len());
            self.call(Command::BlockStatus, rest, &[], |outcome| match outcome {
                Outcome::Status(runs) => Some(runs.clone()),
                _ => None,
            })
        })?;
        let end = asked.start().saturating_add(len).min(range.end());
        // A change of status inside the smallest block is ignored.
        let end = if end > range.start() {
            end
        } else {
            range.end().min(asked.end())
        };
        // As in qemu-img, which has two bits for the depth.
        let flags = if self.reports_depth { flags.min(2) } else { flags };
        Ok(extent(end - range.start(), flags))
    }

    fn flush(&self) -> Result<()> {
        if !self.write || !self.supports(export::FLUSH) {
            return Ok(());
        }
        self.send_command(Command::Flush, ByteRange::new(0, 0), &[])
    }

    fn resize(&self, len: u64, _: Preallocation) -> Result<()> {
        if len == self.len() {
            Ok(())
        } else {
            Err(Error::unsupported("Cannot resize NBD nodes"))
        }
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        self.node.shown_name()
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}

fn extent(len: u64, flags: u64) -> Extent {
    Extent {
        len,
        kind: kind_of(flags),
        depth: 0,
        host: None,
    }
}

/// The error of `FastOnly` if the server would write zero bytes.
fn not_fast() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        Error::from_errno(libc::ENOTSUP).to_string(),
    )
}

/// The context of `qemu-nbd` with the depth of allocated data.
const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

const OPEN: &str = "Could not open image";
