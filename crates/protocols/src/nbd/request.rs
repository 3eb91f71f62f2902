//! The encoding of requests to an export.

use diskimage_core::{ByteRange, saturating_u32};

use super::negotiate::ReplyMode;
use super::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};

/// A command for a range of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Read the range.
    Read,
    /// Write the payload to the range.
    Write,
    /// End the connection; there is no reply.
    Disconnect,
    /// Make completed writes durable.
    Flush,
    /// Discard the range.
    Trim,
    /// Zero the range.
    WriteZeroes {
        /// Storage stays allocated.
        no_hole: bool,
        /// Fail if that is not faster than writing.
        fast: bool,
    },
    /// Report the status of the range.
    BlockStatus,
}

/// The longest range of a request without extended headers. The field has 32 bits, but some servers fail for lengths
/// close to 4 GiB.
pub(super) const MAX_SHORT_LEN: u64 = 1 << 31;

const NO_HOLE: u16 = 1 << 1;
const FAST_ZERO: u16 = 1 << 4;
/// The length of a request with extended headers is that of its payload.
const PAYLOAD_LEN: u16 = 1 << 5;

impl Command {
    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes { .. } => 6,
            Self::BlockStatus => 7,
        }
    }

    fn flags(self, reply_mode: ReplyMode) -> u16 {
        match self {
            Self::Write if reply_mode == ReplyMode::Extended => PAYLOAD_LEN,
            Self::WriteZeroes { no_hole, fast } => {
                (if no_hole { NO_HOLE } else { 0 }) | (if fast { FAST_ZERO } else { 0 })
            }
            _ => 0,
        }
    }
}

/// The head of a request. Without extended headers its range is no longer than [`MAX_SHORT_LEN`].
pub(super) fn encode(reply_mode: ReplyMode, command: Command, cookie: u64, range: ByteRange) -> Vec<u8> {
    let mut head = Vec::with_capacity(32);
    let magic = match reply_mode {
        ReplyMode::Extended => EXTENDED_REQUEST_MAGIC,
        ReplyMode::Simple | ReplyMode::Structured => REQUEST_MAGIC,
    };
    head.extend_from_slice(&magic.to_be_bytes());
    head.extend_from_slice(&command.flags(reply_mode).to_be_bytes());
    head.extend_from_slice(&command.number().to_be_bytes());
    head.extend_from_slice(&cookie.to_be_bytes());
    head.extend_from_slice(&range.start().to_be_bytes());
    match reply_mode {
        ReplyMode::Extended => head.extend_from_slice(&range.len().to_be_bytes()),
        ReplyMode::Simple | ReplyMode::Structured => {
            // Requests are split by the limits of the export, which has no longer ones in this mode.
            let len = saturating_u32(range.len());
            head.extend_from_slice(&len.to_be_bytes());
        }
    }
    head
}
